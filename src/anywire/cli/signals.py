"""Ctrl-C and its relatives, for commands that must leave nothing behind.

Owns: the handlers of SIGINT, SIGTERM and SIGHUP while a command runs. A signal raises `Stopped` in the main thread, so
that every `with` and `finally` runs; one that comes while those run is passed over. Within `run` it cancels the main
task instead, and `run` raises. At the end the process dies of the signal (`die_of`), as shells expect. Main thread
only.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

import anywire

T = TypeVar("T")

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CLEANING = 5.0              # seconds after a signal in which another one is passed over


class Stopped(KeyboardInterrupt):
    """A signal came; `number` is which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """During the block, signals that ask to stop raise Stopped. Ones that are ignored (nohup) stay so."""
    last = -CLEANING

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < CLEANING:
            return
        last = now
        if not any(work.cancel(number) for work in _running):
            raise Stopped(number)

    former = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in former.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class _Work:
    """A coroutine that `run` runs."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.number = 0

    def cancel(self, number: int) -> bool:
        """Called by the signal handler: between any two instructions of the main thread."""
        if self.task is None or self.task.done():
            return False
        self.number = number
        self.task.cancel()
        self.task.get_loop().call_soon_threadsafe(lambda: None)     # it may be asleep in its selector
        return True


_running: list[_Work] = []


def run(
    coroutine: Coroutine[Any, Any, T], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> T:
    """Run a coroutine on anywire's event loop, or on another; stopped by cancelling.

    An exception raised in the midst of the event loop's own code may lose a callback that was just taken from its
    queue, and cleaning up would wait for that callback for ever.
    """
    work = _Work()

    async def main() -> T:
        work.task = asyncio.current_task()
        return await coroutine

    _running.append(work)
    try:
        with asyncio.Runner(loop_factory=loop_factory or anywire.new_event_loop) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        if work.number:
            raise Stopped(work.number) from None
        raise
    finally:
        _running.remove(work)
        coroutine.close()                       # a no-op, unless a signal came before it began


@contextmanager
def held() -> Iterator[None]:
    """During the block they wait: for the moment between making something and noting that it must be removed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def die_of(number: signal.Signals) -> NoReturn:
    """End as the signal would have ended us: the shell sees it, and stops its loop."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)          # the signal is blocked
