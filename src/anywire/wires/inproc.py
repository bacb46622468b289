"""`inproc://name`: between tasks and threads of one process. A message wire, native, nothing copied.

Owns: the table of names of this process. A listener announces a connection through an eventfd, so servers wait for it
like for any other. All under one lock, from any thread. A forked child starts with an empty table.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

from anywire.contract.address import Address, require_name
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.errors import Refused
from anywire.contract.options import Option
from anywire.contract.peer import Peer
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor, Wire
from anywire.wires._inproc import pair

TRAITS = Traits(
    kind=frozenset({"message"}),
    connection=True,
    ordered="yes",
    reliable="yes",
    clean_end="yes",
    sees_death="–",
    half_close="yes",
    crosses_hosts=False,
    credentials="–",
    copies="0",
    message_limit="none",
)

_names: dict[str, InprocAcceptor] = {}
_lock = threading.Lock()


def _start_anew() -> None:
    global _lock
    _lock = threading.Lock()
    _names.clear()


os.register_at_fork(after_in_child=_start_anew)


class InprocAcceptor(Acceptor):
    """A name that listens."""

    def __init__(self, wire: Wire, address: Address, options: Mapping[str, Any]) -> None:
        self.wire = wire
        self.address = address
        self.max_message: int = options["max_message"]
        self.backlog: int = options["backlog"]
        self.waiting: deque[MessageEndpoint] = deque()
        self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        with _lock:
            if address.host in _names:
                os.close(self.event)
                raise OSError(98, f"listen {address}: the name is in use in this process")
            _names[address.host] = self

    def fileno(self) -> int:
        """An eventfd: readable while a connection waits; -1 when closed."""
        return self.event

    def accept(self) -> MessageEndpoint | None:
        """The next connection, None when nobody waits."""
        with _lock:
            if self.waiting:
                return self.waiting.popleft()
            try:
                os.eventfd_read(self.event)
            except BlockingIOError:
                pass
            return None

    def close(self) -> None:
        """Give the name back; connections that were not accepted yet are dropped."""
        with _lock:
            if self.event < 0:
                return
            if _names.get(self.address.host) is self:       # not so in a forked child
                del _names[self.address.host]
            os.close(self.event)
            self.event = -1
            dropped, self.waiting = self.waiting, deque()
        for endpoint in dropped:
            endpoint.release()


class InprocWire(Wire):
    """The in-process wire."""

    schemes: ClassVar[tuple[str, ...]] = ("inproc",)
    options: ClassVar[Mapping[str, Option]] = {}

    def traits(self, address: Address) -> Traits:
        """What it promises."""
        return TRAITS

    def check(self, address: Address) -> None:
        """An address is a name."""
        require_name(address)

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[MessageEndpoint]:
        """Connect to a name of this process."""
        with _lock:
            acceptor = _names.get(address.host)
            if acceptor is None or len(acceptor.waiting) >= acceptor.backlog:
                raise Refused(
                    "nobody listens on this name in this process" if acceptor is None else "the backlog is full",
                    address=str(address),
                    operation="connect",
                    advice="serve it first, or pass wait=SECONDS",
                )
            peer = Peer(address=str(address), pid=os.getpid(), uid=os.getuid(), gid=os.getgid(), wire="inproc")
            ours, theirs = pair(address, self, options["max_message"], acceptor.max_message, peer)
            acceptor.waiting.append(theirs)
            os.eventfd_write(acceptor.event, 1)
        return ours
        yield  # type: ignore[unreachable] # a generator like every dial, though nothing here waits

    def bind(self, address: Address, options: Mapping[str, Any]) -> InprocAcceptor:
        """Listen on a name."""
        return InprocAcceptor(self, address, options)
