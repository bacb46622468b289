"""Descriptors: sent to other processes, and ones that count or are timers (unix(7), eventfd(2), timerfd(2)).

    >>> from anywire.ipc import EventFd, TimerFd
    >>> with EventFd() as event, TimerFd() as timer:
    ...     event.add(3)
    ...     event.take()
    ...     timer.set(0.001, every=0.001)
    ...     timer.wait(timeout=5) >= 1
    3
    True

Any thread. An `EventFd` and a `TimerFd` are shared by all who have a copy, such as forked children and processes they
were sent to: each count is told once, to one of them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import math
import os
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from anywire.ipc import _calls, waiting
from anywire.ipc.owned import Owned, deadline_of, late, left, wait

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

MOST_FDS = 253
"""Descriptors in one message (SCM_MAX_FD of unix(7))."""
MOST = 2**64 - 2
"""The highest count of an EventFd."""


class HasFileno(Protocol):
    """An object with a descriptor."""

    def fileno(self) -> int: ...


def _number(thing: int | HasFileno) -> int:
    return thing if isinstance(thing, int) else thing.fileno()


def _name(sock: socket.socket) -> str:
    return f"socket {sock.fileno()}"


def _ancillary(fds: Sequence[int | HasFileno], data: memoryview) -> list[tuple[int, int, array.array[int]]]:
    if not 1 <= len(fds) <= MOST_FDS:
        raise ValueError(f"a message carries 1 to {MOST_FDS} descriptors (SCM_MAX_FD), not {len(fds)}")
    if not len(data):
        raise ValueError("descriptors travel with at least one byte of data")
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", map(_number, fds)))]


def _put(sock: socket.socket, ancillary: list[tuple[int, int, array.array[int]]], rest: memoryview) -> int:
    flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    try:
        return sock.sendmsg([rest], ancillary, flags)
    except OSError as error:
        text = error.strerror
        if error.errno == errno.ETOOMANYREFS:
            text = "more descriptors of this user are in flight than a process may have open (RLIMIT_NOFILE)"
        raise OSError(error.errno, text, _name(sock)) from None


def send_fds(
    sock: socket.socket, fds: Sequence[int | HasFileno], data: Buffer = b"\0", *, timeout: float | None = None
) -> None:
    """Send copies of descriptors over a connected Unix socket, with the first byte of `data`, all of which is sent.

    Parameters: `fds`, numbers or objects with fileno(), at most 253; `timeout` in seconds, also of a blocking socket.
    Raises TimeoutError; OSError (EBADF) when one isn't open; BrokenPipeError.
    """
    deadline = deadline_of(timeout)
    with memoryview(data).cast("B") as view:
        ancillary, done = _ancillary(fds, view), 0
        while done < len(view):
            try:
                done += _put(sock, ancillary, view[done:])
                ancillary = []
            except BlockingIOError:
                if not wait(sock.fileno(), deadline, writing=True):
                    raise late(_name(sock), "no room for the message", timeout) from None


async def send_fds_async(
    sock: socket.socket, fds: Sequence[int | HasFileno], data: Buffer = b"\0", *, timeout: float | None = None
) -> None:
    """`send_fds` for an event loop. Cancelled, it has sent nothing, or of a stream the fds and a part."""
    deadline = deadline_of(timeout)
    with memoryview(data).cast("B") as view:
        ancillary, done = _ancillary(fds, view), 0
        while done < len(view):
            try:
                done += _put(sock, ancillary, view[done:])
                ancillary = []
            except BlockingIOError:
                if not await _ready(sock, deadline, writing=True):
                    raise late(_name(sock), "no room for the message", timeout) from None


async def _ready(sock: socket.socket, deadline: float | None, *, writing: bool) -> bool:
    import asyncio

    try:
        async with asyncio.timeout(left(deadline)):
            await (waiting.writable if writing else waiting.readable)(sock.fileno())
    except TimeoutError:
        return False
    return True


def _get(sock: socket.socket, limit: int, most: int) -> tuple[bytes, list[int]]:
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, told, _ = sock.recvmsg(limit, socket.CMSG_SPACE(most * 4), flags)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            fds += numbers
    # The kernel rounds the room up, and may have put one more into it.
    if told & socket.MSG_CTRUNC or len(fds) > most:
        for fd in fds:
            os.close(fd)
        raise OSError(
            errno.EMSGSIZE, f"more than {most} descriptors came, or more than this process may open (RLIMIT_NOFILE); "
            f"the {len(fds)} that did were closed", _name(sock),
        )
    return data, fds


def recv_fds(
    sock: socket.socket, limit: int = 65536, *, most: int = MOST_FDS, timeout: float | None = None
) -> tuple[bytes, list[int]]:
    """Receive data and descriptors, which are close-on-exec, from now on yours, and yours to close.

    Parameters: `limit`, bytes of data; `most`, descriptors; `timeout` in seconds, also of a blocking socket.
    Raises TimeoutError, and OSError (EMSGSIZE) when more descriptors came: they are closed then. b"" without
    descriptors is the end of a stream.
    """
    deadline = deadline_of(timeout)
    while True:
        with contextlib.suppress(BlockingIOError):
            return _get(sock, limit, most)
        if not wait(sock.fileno(), deadline):
            raise late(_name(sock), "nothing came", timeout)


async def recv_fds_async(
    sock: socket.socket, limit: int = 65536, *, most: int = MOST_FDS, timeout: float | None = None
) -> tuple[bytes, list[int]]:
    """`recv_fds` for an event loop. Cancelled, it has taken nothing."""
    deadline = deadline_of(timeout)
    while True:
        with contextlib.suppress(BlockingIOError):
            return _get(sock, limit, most)
        if not await _ready(sock, deadline, writing=False):
            raise late(_name(sock), "nothing came", timeout)


class EventFd(Owned):
    """A counter of the kernel's that is waited for (eventfd(2)).

    Parameters: `initial`, its count. `semaphore`: `take` takes 1; otherwise it takes all, and the count is 0.
    """

    def __init__(self, initial: int = 0, *, semaphore: bool = False) -> None:
        if not 0 <= initial <= MOST:
            raise ValueError(f"an EventFd counts from 0 to 2**64 - 2, not {initial}")
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if semaphore else 0)
        low = min(initial, 2**32 - 1)
        super().__init__(os.eventfd(low, flags), "eventfd")
        self.semaphore = semaphore
        """Whether `take` takes 1."""
        if initial > low:
            self.add(initial - low)

    @classmethod
    def _of(cls, fd: int, semaphore: bool) -> EventFd:
        made = cls.__new__(cls)
        Owned.__init__(made, fd, "eventfd")
        made.semaphore = semaphore
        return made

    def _state(self) -> tuple[bool]:
        return (self.semaphore,)

    def _add(self, fd: int, count: int) -> None:
        os.eventfd_write(fd, count)

    def add(self, count: int = 1, *, timeout: float | None = None) -> None:
        """Add to it; waits while the count would pass 2**64 - 2. TimeoutError: it would for `timeout` seconds."""
        self._until(lambda fd: self._add(fd, _counted(count)), timeout, f"no room for {count}", writing=True)

    async def add_async(self, count: int = 1, *, timeout: float | None = None) -> None:
        """`add` for an event loop. Cancelled, it has added nothing."""
        await self._until_async(
            lambda fd: self._add(fd, _counted(count)), timeout, f"no room for {count}", writing=True
        )

    def take(self, *, timeout: float | None = None) -> int:
        """Wait until it is not 0; take 1 of a semaphore, else all: how many that were. TimeoutError."""
        return self._until(os.eventfd_read, timeout, "it stayed 0")

    def try_take(self) -> int:
        """`take` without waiting. BlockingIOError: it is 0."""
        return os.eventfd_read(self.fileno())

    async def take_async(self, *, timeout: float | None = None) -> int:
        """`take` for an event loop. Cancelled, it has taken nothing."""
        return await self._until_async(os.eventfd_read, timeout, "it stayed 0")


def _counted(count: int) -> int:
    if not 0 <= count <= MOST:
        raise ValueError(f"an EventFd counts from 0 to 2**64 - 2; {count} can't be added")
    return count


CLOCKS = {
    "monotonic": time.CLOCK_MONOTONIC,
    "real": time.CLOCK_REALTIME,
    "boot": time.CLOCK_BOOTTIME,
}
ABSOLUTE, CANCEL_ON_SET = 1, 2      # TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET


class ClockSet(OSError):
    """Somebody set the clock (ECANCELED) that a TimerFd with `cancel_on_set` goes by; it goes on by the new time."""


class TimerFd(Owned):
    """A timer that is waited for (timerfd(2)). Never early.

    Parameters: `clock`, "monotonic", "real" (the wall clock, which may be set) or "boot" (as monotonic, and goes on
    while the machine sleeps).
    """

    def __init__(self, clock: str = "monotonic") -> None:
        if clock not in CLOCKS:
            raise ValueError(f"the clock is one of {', '.join(CLOCKS)}; not {clock!r}")
        super().__init__(_calls.timerfd_create(CLOCKS[clock]), f"timerfd of the {clock} clock")
        self.clock = clock
        """Which clock it goes by."""

    @classmethod
    def _of(cls, fd: int, clock: str) -> TimerFd:
        made = cls.__new__(cls)
        Owned.__init__(made, fd, f"timerfd of the {clock} clock")
        made.clock = clock
        return made

    def _state(self) -> tuple[str]:
        return (self.clock,)

    def set(self, after: float, *, every: float = 0) -> None:
        """Let it expire in `after` seconds, and then each `every` seconds unless that is 0. Expirations that nobody
        took are forgotten."""
        # 0 nanoseconds would stop it.
        _calls.timerfd_settime(self.fileno(), 0, max(1, _nanoseconds(after, "after")), _nanoseconds(every, "every"))

    def set_at(self, when: float, *, every: float = 0, cancel_on_set: bool = False) -> None:
        """Let it expire at a time of its clock in seconds (time.time() of the real one), at once if that is past.

        Parameters: `cancel_on_set`, of the real clock: waiting raises ClockSet when somebody sets it.
        """
        if cancel_on_set and self.clock != "real":
            raise ValueError(f"only the real clock can be set; this timer goes by the {self.clock} clock")
        flags = ABSOLUTE | (CANCEL_ON_SET if cancel_on_set else 0)
        _calls.timerfd_settime(self.fileno(), flags, max(1, _nanoseconds(when, "when")), _nanoseconds(every, "every"))

    def stop(self) -> None:
        """It expires no more, and expirations that nobody took are forgotten."""
        _calls.timerfd_settime(self.fileno(), 0, 0, 0)

    @property
    def left(self) -> float | None:
        """Seconds until it expires next; None when it doesn't."""
        value, _ = _calls.timerfd_gettime(self.fileno())
        return value / 1e9 if value else None

    @property
    def interval(self) -> float:
        """Seconds between its further expirations; 0: there is one only."""
        return _calls.timerfd_gettime(self.fileno())[1] / 1e9

    def _take(self, fd: int) -> int:
        try:
            return int.from_bytes(os.read(fd, 8), "little")
        except OSError as error:
            if error.errno == errno.ECANCELED:
                raise ClockSet(errno.ECANCELED, "the clock was set", self.name) from None
            raise

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait until it has expired; how often it has since the last time somebody waited, or since it was set.

        Raises TimeoutError, and ClockSet where `set_at` asked for that. A timer that is not set never expires.
        """
        return self._until(self._take, timeout, "it did not expire")

    def try_wait(self) -> int:
        """`wait` without waiting. BlockingIOError: it has not expired."""
        return self._take(self.fileno())

    async def wait_async(self, *, timeout: float | None = None) -> int:
        """`wait` for an event loop. Cancelled, it has taken nothing."""
        return await self._until_async(self._take, timeout, "it did not expire")


def _nanoseconds(seconds: float, what: str) -> int:
    if not 0 <= seconds < 9e9:
        raise ValueError(f"{what} is a number of seconds from 0 to 9e9, not {seconds!r}")
    return math.ceil(seconds * 1e9)
