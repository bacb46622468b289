"""Closing a connection through shared memory while the ring is full, beside other threads that use it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from anywire import AnywireError, EndOfChannel, sync

_names = count()
# Several tries: which of two threads takes a token is chance.
TRIES = 8


@contextlib.contextmanager
def connected() -> Iterator[tuple[sync.Channel, sync.Channel]]:
    """Both ends of one connection in this process, with no byte left in the ring from the first to the second."""
    accepted: list[sync.Channel] = []
    with sync.listen(f"shm://anywire-closing-{os.getpid()}-{next(_names)}") as listener:
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
        thread.start()
        ours = sync.connect(listener.addresses[0])
        thread.join()
    for size in (1000, 100, 8, 0):
        while ours.try_send(bytes(size)):
            pass
    yield ours, accepted[0]
    ours.abort()
    accepted[0].abort()


def beside(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start it in a thread; what it returns or raises is in the list when the thread has ended."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except AnywireError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def until_asleep(thread: threading.Thread) -> None:
    """Wait until the kernel says that this thread sleeps in poll(2)."""
    while thread.native_id is None:
        time.sleep(0.001)
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        while True:
            file.seek(0)
            words = file.read().split()
            if words[0] in {"7", "73", "271"}:  # poll; ppoll on ARM and on x86
                return
            time.sleep(0.001)


@pytest.mark.parametrize("go", range(TRIES))
def test_the_end_goes_out_though_another_thread_receives(go: int) -> None:
    with connected() as (ours, theirs):
        receiver, received = beside(lambda: ours.recv(timeout=20))
        until_asleep(receiver)
        closer, _ = beside(lambda: ours.close(timeout=20))
        until_asleep(closer)
        with pytest.raises(EndOfChannel):  # and not PeerLost, when close() gave up waiting
            while True:
                theirs.recv(timeout=20)
        theirs.close()
        closer.join(20)
        receiver.join(20)
        assert not closer.is_alive()
        assert not receiver.is_alive()
        assert isinstance(received[0], AnywireError)


def test_an_abort_ends_a_close_that_waits_for_room() -> None:
    with connected() as (ours, _):
        closer, _ = beside(lambda: ours.close(timeout=50))
        until_asleep(closer)
        ours.abort()
        closer.join(20)
        assert not closer.is_alive()


def test_an_abort_ends_a_close_that_waits_for_the_peer() -> None:
    with connected() as (ours, theirs):
        closer, _ = beside(lambda: ours.close(timeout=50))
        with pytest.raises(EndOfChannel):
            while True:
                theirs.recv(timeout=20)
        until_asleep(closer)
        ours.abort()
        closer.join(20)
        assert not closer.is_alive()
