"""Anonymous pipes: `pipe:?read=3&write=4`, descriptors that this process was started with; either may be missing.

Owns: turning inherited numbers into a connection. The descriptors belong to the connection from then on and are closed
with it; they are also marked close-on-exec, because a grandchild that kept one would hide this process's end from the
other side. Used by the establishment generators, on the front's thread. `anywire.pipe()` makes the pipes, in `moving`.

A pipe is one connection, so listening means waiting for the one peer at its other end, which connects or attaches.

What can go wrong: a number that is not open, or no pipe, or open in the other direction (OSError, EBADF); the other end
was closed before it said anything (PeerLost); it belongs to a program that does not speak (TimedOut).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Mapping
from typing import Any, ClassVar

from anywire.contract.address import Address, forbid
from anywire.contract.endpoint import ByteEndpoint
from anywire.contract.options import Option, integer
from anywire.contract.peer import Peer
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor, Wire
from anywire.wires._descriptor import PipeBytes

MOST = (1 << 31) - 1
READ = Option("read", integer(0, MOST), None, "the descriptor to read from")
WRITE = Option("write", integer(0, MOST), None, "the descriptor to write to")

TWO_WAY = Traits(
    kind=frozenset({"stream"}),
    connection=True,
    ordered="yes",
    reliable="yes",
    clean_end="yes (framed)",
    sees_death="at once",
    half_close="yes",
    crosses_hosts=False,
    credentials="inherited",
    copies="2",
    message_limit="configured",
)


class PipeWire(Wire):
    """The wire of anonymous pipes."""

    schemes: ClassVar[tuple[str, ...]] = ("pipe",)
    options: ClassVar[Mapping[str, Option]] = {option.name: option for option in (READ, WRITE)}

    def traits(self, address: Address) -> Traits:
        """What it promises. With one direction only, receiving and sending end together."""
        return TWO_WAY

    def check(self, address: Address) -> None:
        """An address is one or two descriptor numbers."""
        forbid(address, "host", "port", "path", "abstract")
        numbers = [address.params[name] for name in ("read", "write") if name in address.params]
        if not address.params:
            raise address.error("scheme", "name the inherited descriptors: pipe:?read=3&write=4, or only one of them")
        if len(numbers) == 2 and numbers[0] == numbers[1]:
            raise address.error("?write", "a pipe has one direction: two ways need two descriptors")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint]:
        """Take the descriptors over."""
        return inherited(self, address, options)
        yield  # type: ignore[unreachable] # a generator like every dial, though nothing here waits

    def bind(self, address: Address, options: Mapping[str, Any]) -> PipeAcceptor:
        """Take the descriptors over; the peer at their other end is the one connection that comes."""
        return PipeAcceptor(address, inherited(self, address, options))


class PipeAcceptor(Acceptor):
    """The one connection of a pipe, until it is taken. Not thread-safe."""

    def __init__(self, address: Address, endpoint: PipeBytes) -> None:
        self.address = address
        self.endpoint: PipeBytes | None = endpoint
        try:
            self.event = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            endpoint.release()
            raise

    def fileno(self) -> int:
        """An eventfd, readable until the connection was taken; -1 when closed."""
        return self.event

    @property
    def over(self) -> bool:
        """Whether the one connection was taken."""
        return self.endpoint is None

    def accept(self) -> ByteEndpoint | None:
        """The connection, once."""
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            os.eventfd_read(self.event)
        return endpoint

    def close(self) -> None:
        """Close the descriptors if nobody took the connection."""
        event, self.event = self.event, -1
        if event >= 0:
            os.close(event)
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            endpoint.release()


def inherited(wire: Wire, address: Address, options: Mapping[str, Any]) -> PipeBytes:
    """The endpoint of the descriptors that an address names. Closes neither when one is wrong."""
    read, write = options["read"], options["write"]
    for fd, name, wanted in ((read, "read", os.O_RDONLY), (write, "write", os.O_WRONLY)):
        if fd is not None:
            check_descriptor(address, fd, name, wanted)
    for fd in (read, write):
        if fd is not None:
            os.set_inheritable(fd, False)
    return endpoint_of(wire, address, -1 if read is None else read, -1 if write is None else write)


def endpoint_of(wire: Wire, address: Address, read: int, write: int) -> PipeBytes:
    """The endpoint of pipe ends; -1 for a direction that is not there."""
    return PipeBytes(read, write, address=address, peer=Peer(wire="pipe"), wire=wire)


def check_descriptor(address: Address, fd: int, name: str, wanted: int) -> None:
    """Raise EBADF unless `fd` is an open pipe end of the direction `wanted` (O_RDONLY or O_WRONLY)."""
    try:
        kind = os.fstat(fd).st_mode
    except OSError:
        why = "is not open in this process; pass it on: Popen(..., pass_fds=handle.fds)"
        raise OSError(errno.EBADF, f"connect {address}: {name}={fd} {why}") from None
    if not stat.S_ISFIFO(kind):
        raise OSError(errno.EBADF, f"connect {address}: {name}={fd} is no pipe")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (wanted, os.O_RDWR):
        other = "write" if name == "read" else "read"
        raise OSError(errno.EBADF, f"connect {address}: {name}={fd} is the {other} end of a pipe")
