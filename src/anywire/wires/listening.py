"""What a listener owns, whichever front accepts on it: bound addresses, their plans, who may connect, its counters.

The base of `anywire.Listener` and `anywire.sync.Listener`, which add the waiting. Binding is its only I/O, on the
calling thread. What can go wrong is what `bind_all` and `detach_listener` raise, and `Forked` in a forked child: two
processes would take each other's clients, and a loop's epoll(7) set is shared with the parent.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from anywire.contract import counters
from anywire.contract.address import Address
from anywire.contract.counters_page import LISTENER
from anywire.contract.errors import AnywireError, ChannelClosed, Forked, PeerLost
from anywire.contract.handle import Handle
from anywire.contract.wire import Acceptor
from anywire.wires.establish import told
from anywire.wires.moving import detach_listener
from anywire.wires.plan import Plan, bind_all

log = logging.getLogger("anywire")

K = TypeVar("K")

MOST_HANDSHAKES = 128
"""Handshakes that may be under way at once in a listener's `accept()`; further clients wait in the kernel's backlog."""


class Bound(Generic[K]):
    """Bound addresses that give connections of class `K`, the front's channel or stream."""

    _channel: ClassVar[type]

    def __init__(
        self,
        kind: type[K],
        addresses: Sequence[str | Address],
        max_message: int | None,
        handshake_timeout: float,
        authorize: Any,
        backlog: int,
        wire_options: dict[str, Any],
    ) -> None:
        bound = bind_all(addresses, self._face_of(kind), max_message, handshake_timeout, backlog, wire_options)
        self._set_up(kind, *bound, authorize)

    @classmethod
    def _face_of(cls, kind: type[K]) -> str:
        return "channel" if issubclass(kind, cls._channel) else "stream"

    def _set_up(
        self, kind: type[K], plans: dict[Acceptor, Plan], acceptors: list[Acceptor], authorize: Any
    ) -> None:
        self._kind: type[K] = kind
        self._face = self._face_of(kind)
        self._plans, self._acceptors = plans, acceptors
        self._authorize = authorize
        self._slot = counters.OwnSlot(LISTENER, ",".join(str(address) for address in self.addresses))
        for acceptor in acceptors:
            acceptor.on_drop = functools.partial(self._slot.add, "drops")
        self._name = ", ".join(str(address) for address in self.addresses)      # also once it is closed
        self._owner = os.getpid()
        self._ready()

    def _ready(self) -> None:
        """What the front adds to a listener that is bound or attached."""

    @property
    def addresses(self) -> list[Address]:
        """The real addresses, in the order given; a port 0 is the port that the kernel chose."""
        return [acceptor.address for acceptor in self._acceptors]

    @staticmethod
    def _is_peers_doing(error: BaseException) -> bool:
        """Whether a handler that raised `error` found its peer gone, and did nothing wrong."""
        return isinstance(error, PeerLost) or (isinstance(error, ChannelClosed) and error.by_peer)

    def _count_error(self, error: OSError) -> None:
        self._slot.add("accept_errors")

    def _passed_over(self, acceptor: Acceptor, error: Exception) -> None:
        """Log and count why a connection that came was not established."""
        if isinstance(error, (AnywireError, OSError)):
            log.info("%s", told("accept", acceptor.address, error))
            self._slot.add("accept_errors")
        else:
            log.error(
                "accept %s: authorize() failed; the connection was dropped", acceptor.address, exc_info=error
            )
            self._slot.add("handler_errors")

    def _check_open(self) -> None:
        """Raise Forked or ChannelClosed where `accept()` makes no sense."""
        if self._owner != os.getpid():
            raise Forked(
                "this listener was opened by the parent process",
                address=self._name,
                operation="accept",
                advice="listen in the child (tcp and tls with reuse_port=True in each process), or hand the listener "
                "over with detach() and attach()",
            )
        if not self._acceptors:
            raise self._closed("the listener is closed")

    def _closed(self, what: str = "the listener was closed while this waited") -> ChannelClosed:
        return ChannelClosed(what, address=self._name, operation="accept")

    def _drop(self) -> None:
        """What the front does when no connection may come through this listener any more."""

    def detach(self) -> Handle:
        """Give the listening socket away, for another process: a listener of one address. This one is then closed.

        Its options go with the handle, but not its `authorize`: give `attach` one.
        Clients that wait in the kernel's backlog go with it. Those in their handshake are dropped, and so is who was
        established and not accepted yet: they see the connection lost, and connect again.
        Raises Unsupported where a wire's listener can't move, and nothing changes then."""
        handle = detach_listener(self)
        self._drop()
        return handle
