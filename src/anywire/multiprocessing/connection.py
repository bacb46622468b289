"""Pipe(): two connections over shared memory, with the standard library's face.

A pipe is one sealed memfd with a ring for each direction and a socket pair. The memory moves the messages; the sockets
carry a byte when somebody sleeps, give `fileno()` something that select, poll and `multiprocessing.connection.wait`
understand, and tell death: when all copies of an end are closed, by whatever means, the kernel tells the other end. So
a killed process is EOFError or BrokenPipeError here, as with a kernel's pipe, and nothing is left of a pipe that
nobody holds.

Connections may be shared between threads and processes, which the standard ones may not: each message goes whole to one
receiver. They travel to children in Process arguments, and through other connections and queues.

What can go wrong: EOFError, BrokenPipeError (looked for at the latest every 0.2 ms of sending), OSError when closed.
"""

from __future__ import annotations

import multiprocessing.connection
import socket
from multiprocessing import reduction
from typing import Any

from anywire.multiprocessing._ring import End, Memory, Ring

SIZE = 1 << 18
"""Bytes of a pipe's ring, one each way."""


class Connection(End, multiprocessing.connection.Connection):
    """One end of a Pipe. Also an instance of the standard library's Connection, whose methods it has."""

    lent: Memory | None = None
    """The memory of a queue, whose ends these are; a pipe's ends have a descriptor of their own each."""

    def __reduce__(self) -> Any:
        if self.closed:
            raise OSError("handle is closed")
        incoming, outgoing = self.rings
        return rebuild, (
            reduction.DupFd((self.lent or self.memory).fd),
            reduction.DupFd(self.bell_fd),
            None if incoming is None else incoming.index,
            None if outgoing is None else outgoing.index,
        )

    def __repr__(self) -> str:
        return f"<{'closed ' if self.closed else ''}anywire.multiprocessing.Connection at {id(self):#x}>"


def rebuild(memory_fd: Any, bell_fd: Any, incoming: int | None, outgoing: int | None) -> Connection:
    """A connection that came from another process."""
    memory = Memory(memory_fd.detach())
    bell = bell_fd.detach()
    return Connection(
        memory,
        None if incoming is None else Ring(memory, incoming),
        None if outgoing is None else Ring(memory, outgoing),
        bell,
    )


def bells() -> tuple[int, int]:
    """A socket pair's two descriptors, not inheritable by exec."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return one.detach(), other.detach()


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802 - the standard library's name
    """Two connected ends. With `duplex` both send and receive; else the first receives and the second sends.

    Raises OSError: no memory, no descriptors, or a system without robust futexes."""
    memory = Memory.create(SIZE, 2 if duplex else 1)
    there = Ring(memory)
    back = Ring(memory, 1) if duplex else None
    copy = memory.copy()
    first, second = bells()
    return Connection(memory, there, back, first), Connection(copy, back, there, second)
