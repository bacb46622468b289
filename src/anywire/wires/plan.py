"""From an address and keywords to a plan: which wire, which options, who may connect. Shared by both facades.

Plain functions, any thread, no I/O except `bind_all`, which opens listening descriptors and closes all when one fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anywire.contract.address import Address
from anywire.contract.errors import AddressError, Refused
from anywire.contract.options import Side, resolve_options, shaped
from anywire.contract.peer import Peer
from anywire.contract.wire import Acceptor, Wire, wire_for
from anywire.wires.establish import no_stream

CONNECT_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 5.0
ATTACH_TIMEOUT = 60.0
"""Seconds for a pipe's other end to be attached: a child may have much to import first."""
MAX_MESSAGE = 16 << 20


@dataclass(frozen=True)
class Plan:
    """One address, understood."""

    wire: Wire
    address: Address
    face: str
    options: Mapping[str, Any]


def plan_for(
    address: str | Address,
    face: str,
    side: Side,
    max_message: int | None,
    handshake_timeout: float,
    wire_options: Mapping[str, Any],
    backlog: int = 1024,
) -> Plan:
    """Understand an address. Raises AddressError, UnknownWire, Unsupported, TypeError for an unknown option."""
    parsed = Address.parse(address) if isinstance(address, str) else address
    wire = wire_for(parsed)
    wire.check(parsed)
    options = resolve_options(wire, parsed, wire_options, side=side)
    parsed = shaped(wire, parsed, options)
    if face == "stream" and "stream" not in wire.traits(parsed).kind:
        raise no_stream(parsed)
    if max_message is not None and max_message < 0:
        raise ValueError(f"max_message must be at least 0 bytes, not {max_message}")
    default = sys.maxsize if wire.traits(parsed).message_limit == "none" else MAX_MESSAGE
    options["max_message"] = default if max_message is None else max_message
    options["handshake_timeout"] = handshake_timeout
    options["backlog"] = backlog
    options["face"] = face
    return Plan(wire, parsed, face, options)


def bind_all(
    addresses: Sequence[str | Address],
    face: str,
    max_message: int | None,
    handshake_timeout: float,
    backlog: int,
    wire_options: Mapping[str, Any],
) -> tuple[dict[Acceptor, Plan], list[Acceptor]]:
    """Listen on all addresses, or on none. An option must be known to at least one of the wires."""
    if not addresses:
        raise AddressError("", 0, 0, "serve and listen need at least one address")
    parsed = [Address.parse(address) if isinstance(address, str) else address for address in addresses]
    known = [set(wire_for(address).options) for address in parsed]
    everywhere = {name for name in wire_options if not any(name in names for names in known)}
    plans: dict[Acceptor, Plan] = {}
    acceptors: list[Acceptor] = []
    try:
        for address, names in zip(parsed, known, strict=True):
            mine = {name: value for name, value in wire_options.items() if name in names or name in everywhere}
            plan = plan_for(address, face, "listen", max_message, handshake_timeout, mine, backlog)
            acceptor = plan.wire.bind(plan.address, plan.options)
            plans[acceptor] = plan
            acceptors.append(acceptor)
    except BaseException:
        for acceptor in acceptors:
            acceptor.close()
        raise
    return plans, acceptors


def may_connect(peer: Peer | None) -> str | None:
    """The default rule: on one host the same user, or root; across hosts anybody (TLS checks certificates before).

    Returns why not, or None."""
    if peer is None or peer.uid is None or peer.uid in (0, os.geteuid()):
        return None
    return f"user {peer.uid} is not user {os.geteuid()}; pass authorize= to admit others"


def verdict_of(answer: bool | str | None) -> str | None:
    """What authorize() said: None admits, a text says why not."""
    if answer is None or answer is True:
        return None
    if answer is False:
        return "not authorized"
    if isinstance(answer, str):
        return answer or "not authorized"
    raise TypeError(f"authorize() must return True, None, False or a reason, not {answer!r}")


def refused_here(plan: Plan, why: str) -> Refused:
    """The error of a connect whose `authorize`, or the default rule, refused the peer."""
    what = f"this side refused the peer: {why}"
    return Refused(what, address=str(plan.address), operation="connect", answered=True)
