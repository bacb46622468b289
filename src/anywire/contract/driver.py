"""How wires reach an event loop: the one small interface between them.

Owns: `Driver` (the interface), `AsyncioDriver` (any asyncio loop that can watch descriptors), `driver_for` (the driver
of a loop), and `run_blocking`, which runs the same establishment generators without any loop. Called on the loop's
thread, `call_soon_threadsafe` excepted. A driver holds nothing but the loop's bound methods.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from anywire.contract.errors import TimedOut
from anywire.contract.waits import READ, WRITE, Resolve, Steps, Wait

T = TypeVar("T")
Callback = Callable[[], object]


class Driver(Protocol):
    """What a wire may ask of an event loop. `fd` is a descriptor number; watches are level-triggered and persistent."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    def watch_read(self, fd: int, callback: Callback) -> object: ...
    def unwatch_read(self, fd: int) -> object: ...
    def watch_write(self, fd: int, callback: Callback) -> object: ...
    def unwatch_write(self, fd: int) -> object: ...
    async def run(self, steps: Steps[T]) -> T: ...


class AsyncioDriver:
    """A driver over the public methods of any asyncio event loop."""

    __slots__ = ("__weakref__", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # A weak reference: the driver lives in a table keyed by the loop and must not keep it alive.
        self._loop = weakref.ref(loop)

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
