"""How wires reach an event loop: the one small interface between them.

Owns: `Driver` (the interface), `AsyncioDriver` (any asyncio loop that can watch descriptors), `driver_for` (the driver
of a loop), and what runs the same establishment generators without any loop: `run_blocking`, and for several that wait
in one poll(2) `Stepping` with `wait_for_any`. Called on the loop's thread, `call_soon_threadsafe` excepted. A driver
holds nothing but the loop's bound methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from anywire.contract.errors import TimedOut
from anywire.contract.waits import READ, WRITE, Resolve, Steps, Wait

T = TypeVar("T")
Callback = Callable[[], object]


class Driver(Protocol):
    """What a wire may ask of an event loop. `fd` is a descriptor number; watches are level-triggered and persistent."""

    native: bool
    """Whether a connection may watch its descriptors by objects of its own (`loop._watch`), without a callback."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    def watch_read(self, fd: int, callback: Callback) -> object: ...
    def unwatch_read(self, fd: int) -> object: ...
    def watch_write(self, fd: int, callback: Callback) -> object: ...
    def unwatch_write(self, fd: int) -> object: ...
    async def run(self, steps: Steps[T]) -> T: ...
    def start(self, steps: Steps[T], done: Callable[[T | None, Exception | None], object]) -> Callback: ...


class AsyncioDriver:
    """A driver over the public methods of any asyncio event loop."""

    __slots__ = ("__weakref__", "_loop", "native")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # A weak reference: the driver lives in a table keyed by the loop and must not keep it alive.
        self._loop = weakref.ref(loop)
        # Our own loop, unless it measures its callbacks: then it must see them all.
        self.native = not getattr(loop, "_measures", True)

    def watch_read(self, fd: int, callback: Callback) -> object:
        """Call `callback` whenever `fd` is readable or hung up."""
        return self.loop.add_reader(fd, callback)

    def unwatch_read(self, fd: int) -> object:
        """Stop."""
        return self.loop.remove_reader(fd)

    def watch_write(self, fd: int, callback: Callback) -> object:
        """Call `callback` whenever `fd` is writable or hung up."""
        return self.loop.add_writer(fd, callback)

    def unwatch_write(self, fd: int) -> object:
        """Stop."""
        return self.loop.remove_writer(fd)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop of this connection no longer exists")
        return loop

    async def run(self, steps: Steps[T]) -> T:
        """Run an establishment generator; a cancellation is thrown into it."""
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self.answer(request)
                except BaseException as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def start(self, steps: Steps[T], done: Callable[[T | None, Exception | None], object]) -> Callback:
        """Run a generator that only waits by the loop's callbacks, from the loop's next turn on; gives what stops it.

        Parameters: `done`, called with (result, None) or (None, error). Stopping closes the generator at once, without
        a turn of the loop, and `done` is not called: nothing is watched any more when it returns.
        """
        return _Started(self.loop, steps, done).stop

    async def answer(self, request: Wait | Resolve) -> Any:
        """Wait as one request asks."""
        if isinstance(request, Resolve):
            with contextlib.suppress(socket.gaierror):     # a number needs no resolver, and so no thread to wait in
                return socket.getaddrinfo(
                    request.host, request.port, request.family, request.type, flags=socket.AI_NUMERICHOST
                )
            return await self.loop.getaddrinfo(
                request.host, request.port, family=request.family, type=socket.SocketKind(request.type)
            )
        if not request.watch:
            await asyncio.sleep(request.timeout or 0)
            return []
        loop = self.loop
        future: asyncio.Future[None] = loop.create_future()
        ready: list[tuple[int, int]] = []

        def fire(fd: int, mask: int) -> None:
            ready.append((fd, mask))
            if not future.done():
                future.set_result(None)

        def expire() -> None:
            if not future.done():
                future.set_result(None)

        timer = None
        if request.timeout is not None:
            timer = loop.call_later(max(0.0, request.timeout), expire)
        try:
            for fd, mask in request.watch:
                if mask & READ:
                    loop.add_reader(fd, fire, fd, READ)
                if mask & WRITE:
                    loop.add_writer(fd, fire, fd, WRITE)
            await future
        finally:
            if timer is not None:
                timer.cancel()
            for fd, mask in request.watch:
                if mask & READ:
                    loop.remove_reader(fd)
                if mask & WRITE:
                    loop.remove_writer(fd)
        return list(dict.fromkeys(ready))


class _Started(Generic[T]):
    """A generator that the loop's callbacks drive. On the loop's thread."""

    __slots__ = ("_done", "_loop", "_steps", "_timer", "_watch")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, steps: Steps[T], done: Callable[[T | None, Exception | None], object]
    ) -> None:
        self._loop = loop
        self._steps = steps
        self._done = done
        self._watch: Sequence[tuple[int, int]] = ()
        self._timer: asyncio.Handle | None = loop.call_soon(self._go, None)

    def _go(self, answer: list[tuple[int, int]] | None) -> None:
        self._forget()
        result = failure = None
        try:
            request = self._steps.send(answer)
        except StopIteration as stop:
            result = stop.value
        except Exception as error:
            failure = error
        else:
            assert isinstance(request, Wait)
            self._watch = request.watch
            for fd, mask in request.watch:
                if mask & READ:
                    self._loop.add_reader(fd, self._go, [(fd, READ)])
                if mask & WRITE:
                    self._loop.add_writer(fd, self._go, [(fd, WRITE)])
            if request.timeout is not None:
                self._timer = self._loop.call_later(max(0.0, request.timeout), self._go, [])
            return
        self._done(result, failure)

    def _forget(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        watch, self._watch = self._watch, ()
        for fd, mask in watch:
            if mask & READ:
                self._loop.remove_reader(fd)
            if mask & WRITE:
                self._loop.remove_writer(fd)

    def stop(self) -> None:
        """Watch nothing any more, and close the generator."""
        self._forget()
        self._steps.close()


_drivers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Driver] = weakref.WeakKeyDictionary()


def driver_for(loop: asyncio.AbstractEventLoop | None = None) -> Driver:
    """The driver of `loop` (default: the running one), made at the first use."""
    if loop is None:
        loop = asyncio.get_running_loop()
    driver = _drivers.get(loop)
    if driver is None:
        driver = _drivers[loop] = AsyncioDriver(loop)
    return driver


def run_blocking(steps: Steps[T], deadline: float | None = None, *, wake_fd: int = -1) -> T:
    """Run an establishment generator by waiting in poll(2).

    Parameters: `deadline`, on the monotonic clock in seconds: then `TimedOut` is thrown into the generator. A readable
    `wake_fd` ends every wait early (the generator sees a time-out).
    """
    try:
        request = next(steps)
        while True:
            try:
                answer = _answer_blocking(request, deadline, wake_fd)
            except BaseException as error:
                request = steps.throw(error)
            else:
                request = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _answer_blocking(request: Wait | Resolve, deadline: float | None, wake_fd: int) -> Any:
    if isinstance(request, Resolve):
        return socket.getaddrinfo(request.host, request.port, request.family, request.type)
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise TimedOut(0.0)
    timeout = request.timeout
    if left is not None and (timeout is None or left < timeout):
        timeout = left
    poller = select.poll()
    wanted: Mapping[int, int] = dict(request.watch)
    for fd, mask in wanted.items():
        poller.register(fd, (select.POLLIN if mask & READ else 0) | (select.POLLOUT if mask & WRITE else 0))
    if wake_fd >= 0:
        poller.register(wake_fd, select.POLLIN)
    events = poller.poll(None if timeout is None else max(0, timeout * 1000))
    ready = []
    for fd, event in events:
        if fd in wanted:
            mask = (READ if event & select.POLLIN else 0) | (WRITE if event & select.POLLOUT else 0)
            ready.append((fd, mask or wanted[fd]))
    if not ready and deadline is not None and time.monotonic() >= deadline:
        raise TimedOut(0.0)
    return ready


class Stepping(Generic[T]):
    """One of several generators that a thread drives together: `go` on with each that `wait_for_any` returns.

    The generator may only wait. Not thread-safe; another thread may go on with it later."""

    __slots__ = ("_steps", "expires", "result", "watch")

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.watch: Sequence[tuple[int, int]] = ()
        """What it waits for, as in `Wait`."""
        self.expires: float | None = 0.0
        """When that wait is over, on the monotonic clock in seconds; None: never."""
        self.result: T | None = None
        """What it returned."""

    def go(self, ready: list[tuple[int, int]] | None = None) -> bool:
        """Go on until the next wait, or to the end: whether `result` is there. `ready` is None the first time.

        Raises what the generator raises."""
        try:
            request = self._steps.send(ready)
        except StopIteration as stop:
            self.result = stop.value
            return True
        assert isinstance(request, Wait)
        self.watch = request.watch
        self.expires = None if request.timeout is None else time.monotonic() + request.timeout
        return False

    def close(self) -> None:
        """Give up: the generator closes what it opened."""
        self._steps.close()


def wait_for_any(
    several: Sequence[Stepping[Any]], deadline: float | None, wake_fd: int
) -> list[tuple[Stepping[Any], list[tuple[int, int]]]]:
    """Wait in one poll(2) until some can go on: those, in the given order, each with what `go` needs.

    None of them when `deadline` (monotonic, seconds) passed first, or `wake_fd` became readable."""
    poller = select.poll()
    poller.register(wake_fd, select.POLLIN)
    ends = [deadline] if deadline is not None else []
    for one in several:
        for fd, mask in one.watch:
            poller.register(fd, (select.POLLIN if mask & READ else 0) | (select.POLLOUT if mask & WRITE else 0))
        if one.expires is not None:
            ends.append(one.expires)
    timeout = max(0.0, (min(ends) - time.monotonic()) * 1000) if ends else None
    events = dict(poller.poll(timeout))
    now = time.monotonic()
    found = []
    for one in several:
        ready = []
        for fd, wanted in one.watch:
            event = events.get(fd, 0)
            if event:
                mask = (READ if event & select.POLLIN else 0) | (WRITE if event & select.POLLOUT else 0)
                ready.append((fd, mask or wanted))
        if ready or (one.expires is not None and one.expires <= now):
            found.append((one, ready))
    return found
