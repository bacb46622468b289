"""The loop that people see: the standard library's, with what is hot replaced by `anywire.loop._core`.

What happens once per connection or per loop is the standard library's own code (name resolution, subprocesses, TLS,
signals, executors, sendfile), and so has its behaviour and its errors; what happens for each callback, timer and report
is native. All on the thread that runs the loop, but for `call_soon_threadsafe`.

What can go wrong: see each method. A loop that was inherited by a forked child refuses to be used there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import selectors
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, TypeVar

from anywire.engine.demultiplexers import by_name
from anywire.loop._core import Core
from anywire.loop.children import ChildHooks
from anywire.loop.sockets import SocketHooks

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LoopStats:
    """What a loop has done so far, and what it has to do."""

    seconds: float
    """How long it has run, in seconds."""
    slept: float
    """How much of that it spent waiting for something to do; polling by `busy_poll` is part of it."""
    turns: int
    """Turns: a round of what was ready, of reports and of timers."""
    callbacks: int
    """Callbacks called: of call_soon, of timers, of add_reader and add_writer."""
    polls: int
    """Looks at the descriptors while something was ready."""
    sleeps: int
    """Waits for something to do."""
    wakeups: int
    """Waits that another thread or a signal handler ended."""
    ready: int
    """Callbacks that are ready now."""
    ready_most: int
    """The most that were ready at the start of a turn."""
    timers: int
    """Timers that are set."""
    watched: int
    """Descriptors watched, the loop's own two among them."""
    slow: tuple[tuple[str, float], ...]
    """The last callbacks that took `slow_callbacks` seconds or more: a name (of a task and its coroutine, or of a
    function and its place) and seconds."""

    @property
    def utilisation(self) -> float:
        """The share of its time in which it had something to do, 0 to 1."""
        return 1 - self.slept / self.seconds if self.seconds else 0.0


class _Selector:
    """Stands where the standard loop has its selector, so that it makes none. Answers what its transports ask one."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def get_key(self, fd: int) -> selectors.SelectorKey:
        """What a descriptor is watched for. KeyError: it isn't."""
        found = self._loop._watched(fd)
        if found is None:
            raise KeyError(f"{fd!r} is not registered")
        return selectors.SelectorKey(fd, fd, *found)

    def close(self) -> None:
        pass


class Loop(Core, SocketHooks, ChildHooks, asyncio.SelectorEventLoop):
    """An asyncio event loop. Everything of asyncio.AbstractEventLoop, on Unix.

    Args:
        busy_poll: microseconds for which it goes on polling before it sleeps. A message that comes meanwhile is here
            some microseconds sooner, for a CPU that is always busy.
        slow_callbacks: seconds from which a callback is noted in `stats().slow`. None measures none, and costs nothing.
        demultiplexer: how it waits for descriptors: "epoll", "poll" or "select".
        count_transports: show each of its TCP and Unix connections on the process's page of counters. The loop is there
            in any case.

    Raises:
        ValueError: a number below 0, or an unknown demultiplexer.
        OSError: no descriptor is left (EMFILE, ENFILE).
    """

    def __init__(
        self, *, busy_poll: float = 0, slow_callbacks: float | None = None, demultiplexer: str = "epoll",
        count_transports: bool = False,
    ) -> None:
        if not busy_poll >= 0:
            raise ValueError(f"busy_poll is a number of microseconds, not {busy_poll!r}")
        if slow_callbacks is not None and not slow_callbacks >= 0:
            raise ValueError(f"slow_callbacks is a number of seconds, or None to measure none; not {slow_callbacks!r}")
        slow = -1 if slow_callbacks is None else slow_callbacks
        self._open(by_name(demultiplexer), busy_poll / 1e6, slow, count_transports)
        selector: Any = _Selector(self)
        super().__init__(selector)

    def close(self) -> None:
        """Close it: callbacks that wait are forgotten, the default executor is shut down without waiting.

        RuntimeError: it runs."""
        if self.is_closed():
            super().close()
            return
        super().close()
        self._release()

    # The standard loop reads in the callback that says it is readable: what came for a receive that is cancelled then
    # is lost. Here the receive itself tries again, so a cancelled one has taken nothing.

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """Receive at most `nbytes` bytes; b"" at the end. A cancelled one has taken nothing."""
        self._check_socket(sock)
        while True:
            got = self._receive(sock, nbytes)
            if isinstance(got, bytes):
                return got
            await got

    async def sock_recv_into(self, sock: socket.socket, buf: Any) -> int:
        """Receive into a buffer. Returns how many bytes came, 0 at the end. A cancelled one has taken nothing."""
        self._check_socket(sock)
        while True:
            try:
                return sock.recv_into(buf)
            except (BlockingIOError, InterruptedError):
                await self._until_readable(sock)

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """Receive a datagram of at most `bufsize` bytes, and its sender. A cancelled one has taken nothing."""
        self._check_socket(sock)
        while True:
            try:
                return sock.recvfrom(bufsize)
            except (BlockingIOError, InterruptedError):
                await self._until_readable(sock)

    async def sock_recvfrom_into(self, sock: socket.socket, buf: Any, nbytes: int = 0) -> tuple[int, Any]:
        """Receive a datagram into a buffer. Returns its size and its sender. A cancelled one has taken nothing."""
        self._check_socket(sock)
        if not nbytes:
            nbytes = len(buf)
        while True:
            try:
                return sock.recvfrom_into(buf, nbytes)
            except (BlockingIOError, InterruptedError):
                await self._until_readable(sock)

    def _check_socket(self, sock: socket.socket) -> None:
        if isinstance(sock, ssl.SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")

    def _until_readable(self, sock: socket.socket) -> asyncio.Future[None]:
        number = sock.fileno()
        self._ensure_fd_no_transport(number)
        return self._readable(number)

    def stats(self) -> LoopStats:
        """What it has done so far. From any thread."""
        return LoopStats(**self._figures(), slow=tuple(self.slow_calls))


def new_event_loop(
    *, busy_poll: float = 0, slow_callbacks: float | None = None, demultiplexer: str = "epoll",
    count_transports: bool = False,
) -> Loop:
    """A new `Loop`; for `asyncio.Runner(loop_factory=anywire.new_event_loop)` and others that want a factory."""
    return Loop(busy_poll=busy_poll, slow_callbacks=slow_callbacks, demultiplexer=demultiplexer,
                count_transports=count_transports)


def run(
    main: Coroutine[Any, Any, T], *, debug: bool | None = None, busy_poll: float = 0,
    slow_callbacks: float | None = None, count_transports: bool = False,
) -> T:
    """Run a coroutine on a new `Loop` and return its result; otherwise asyncio.run().

    Args:
        main: the coroutine.
        debug: asyncio's debug mode; None leaves it to PYTHONASYNCIODEBUG and -X dev.
        busy_poll, slow_callbacks, count_transports: see `Loop`.

    Raises:
        RuntimeError: a loop runs in this thread already.
    """
    # Before a loop is made: the Runner would find out too late to clean up after itself.
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("anywire.run() can't be called where an event loop runs already: await the coroutine there")

    def make() -> Loop:
        return new_event_loop(busy_poll=busy_poll, slow_callbacks=slow_callbacks, count_transports=count_transports)

    with asyncio.Runner(debug=debug, loop_factory=make) as runner:
        return runner.run(main)
