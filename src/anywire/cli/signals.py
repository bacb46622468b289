"""Ctrl-C and its relatives, for commands that must leave nothing behind.

Owns: the handlers of SIGINT, SIGTERM and SIGHUP while a command runs. A signal raises `Stopped` in the main thread, so
that every `with` and `finally` runs; one that comes while those run is passed over. At the end the process dies of the
signal (`die_of`), as shells expect. Main thread only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
        if now - last >= CLEANING:
            last = now
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


@contextmanager
def held() -> Iterator[None]:
    """During the block they wait: for the moment between making something and noting that it must be removed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def die_of(number: signal.Signals) -> None:
    """End as the signal would have ended us: the shell sees it, and stops its loop."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)          # the signal is blocked
