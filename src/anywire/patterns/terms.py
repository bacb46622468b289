"""What the patterns ask of a wire and of their arguments. Plain functions, both fronts, any thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from anywire.contract.address import Address
from anywire.contract.errors import TooLarge, Unsupported
from anywire.contract.wire import Front, wire_for
from anywire.wires.plan import MAX_MESSAGE

CONTROL_LIMIT = 1024
"""Bytes; the largest message that an end takes which gets control messages only."""
BURST = 64 << 10
"""After so many bytes without a wait, a sender lets the loop's other tasks run."""
EACH = 64
"""What a message counts for besides its bytes, in that."""


def need_channels(addresses: Sequence[str | Address], operation: str) -> bool:
    """Raise Unsupported for a wire without connections that keep all messages in order.

    Whether all are framed: then each side's limit binds the other side only, and who gets nothing but control messages
    can have a small one. A message wire such as unix?type=seqpacket has one limit for both ways."""
    framed = True
    for address in addresses:
        parsed = Address.parse(address) if isinstance(address, str) else address
        wire = wire_for(parsed)
        wire.check(parsed)
        traits = wire.traits(parsed)
        framed = framed and traits.is_framed
        if not (traits.connection and traits.promises("ordered") and traits.promises("reliable")):
            raise Unsupported(
                f"{parsed.scheme} has no connections that keep all messages in order",
                address=parsed,
                operation=operation,
                advice="inproc, unix, tcp and tls have",
            )
    return framed


def of_the_wire(role: Literal["publisher", "subscriber"], front: Front, given: Mapping[str, Any]) -> Any:
    """What the wire itself brings for this end, or None. `given`: the arguments of the call, by name."""
    settings = {**given, **given["wire_options"]}
    del settings["wire_options"]
    addresses = settings.pop("addresses", None) or [settings.pop("address", None)]
    if len(addresses) != 1 or addresses[0] is None:
        return None
    address = Address.parse(addresses[0]) if isinstance(addresses[0], str) else addresses[0]
    wire = wire_for(address)
    return (wire.publisher if role == "publisher" else wire.subscriber)(front, address, settings)


def unchanging(message: Any, limit: int, address: object, operation: str) -> bytes:
    """The message as bytes that nobody changes any more: bytes are taken as they are, other buffers are copied once."""
    if isinstance(message, str):
        raise TypeError("a message is bytes, not str: encode it first")
    data = message if type(message) is bytes else bytes(memoryview(message))
    if len(data) > limit:
        raise TooLarge(len(data), limit, address=address, operation=operation, advice="raise max_message= here")
    return data


def largest(max_message: int | None) -> int:
    """The `max_message` to use. Raises ValueError."""
    if max_message is None:
        return MAX_MESSAGE
    if max_message < 0:
        raise ValueError(f"max_message must be at least 0 bytes, not {max_message}")
    return max_message


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError for an argument that is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, not {value:g}")
