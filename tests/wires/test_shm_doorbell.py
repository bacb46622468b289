"""Threads of one process that sleep on the one doorbell of a connection through shared memory.

Which of them takes a token is chance, so these try often. A token that is lost shows as a thread that sleeps on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from anywire import AnywireError, EndOfChannel, TimedOut, sync

_names = count()


@contextlib.contextmanager
def connected(query: str = "") -> Iterator[tuple[sync.Channel, sync.Channel]]:
    """Both ends of one connection in this process."""
    accepted: list[sync.Channel] = []
    with sync.listen(f"shm://anywire-doorbell-{os.getpid()}-{next(_names)}{query}") as listener:
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
        thread.start()
        ours = sync.connect(listener.addresses[0])
        thread.join()
    yield ours, accepted[0]
    ours.abort()
    accepted[0].abort()


def fill(channel: sync.Channel) -> None:
    """Send until no byte is left in its ring."""
    for size in (1000, 100, 8, 0):
        while channel.try_send(bytes(size)):
            pass


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


@pytest.mark.parametrize("go", range(8))
def test_the_end_goes_out_though_another_thread_receives(go: int) -> None:
    with connected() as (ours, theirs):
        fill(ours)
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
        fill(ours)
        closer, _ = beside(lambda: ours.close(timeout=50))
        until_asleep(closer)
        ours.abort()
        closer.join(20)
        assert not closer.is_alive()


def test_an_abort_ends_a_close_that_waits_for_the_peer() -> None:
    with connected() as (ours, theirs):
        fill(ours)
        closer, _ = beside(lambda: ours.close(timeout=50))
        with pytest.raises(EndOfChannel):
            while True:
                theirs.recv(timeout=20)
        until_asleep(closer)
        ours.abort()
        closer.join(20)
        assert not closer.is_alive()


def test_a_sender_hears_of_a_place_in_the_pool_beside_a_receiver() -> None:
    """The loan that makes the place is dropped on this side: the peer rings for nobody."""
    with connected("?waiting=sleep") as (ours, theirs):
        receiver, _ = beside(lambda: ours.recv(timeout=50))
        size = 4 << 20
        for _ in range(100):
            loans = [ours.loan(size) for _ in range(20)]  # 16 fill the pool; the others lie elsewhere
            sender, _ = beside(lambda: ours.send(bytes(1 << 20)))
            until_asleep(sender)
            until_asleep(receiver)
            del loans[3]
            sender.join(20)
            assert not sender.is_alive()
            assert len(theirs.recv(timeout=20)) == 1 << 20
            del loans


@contextlib.contextmanager
def streams() -> Iterator[tuple[sync.Stream, sync.Stream]]:
    accepted: list[sync.Stream] = []
    with sync.listen_stream(f"shm://anywire-doorbell-{os.getpid()}-{next(_names)}?waiting=sleep") as listener:
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
        thread.start()
        ours = sync.connect_stream(listener.addresses[0])
        thread.join()
    yield ours, accepted[0]
    ours.abort()
    accepted[0].abort()


LARGE = 8 << 20


def test_what_a_write_left_over_keeps_no_data_from_a_reader_and_goes_on() -> None:
    with streams() as (ours, theirs):
        with pytest.raises(TimedOut):
            ours.write(bytes(LARGE), timeout=0)
        reader, read = beside(lambda: ours.read_exactly(5))
        until_asleep(reader)
        theirs.write(b"hello")
        reader.join(20)
        assert read == [b"hello"]
        reader, read = beside(lambda: ours.read_exactly(3))
        until_asleep(reader)
        assert theirs.read_exactly(LARGE, timeout=20) == bytes(LARGE)
        theirs.write(b"bye")
        reader.join(20)
        assert read == [b"bye"]


def test_a_reader_that_sleeps_already_finishes_what_a_write_leaves_over() -> None:
    with streams() as (ours, theirs):
        reader, read = beside(lambda: ours.read_exactly(3))
        until_asleep(reader)
        with pytest.raises(TimedOut):
            ours.write(bytes(LARGE), timeout=0)
        assert theirs.read_exactly(LARGE, timeout=20) == bytes(LARGE)
        theirs.write(b"bye")
        reader.join(20)
        assert read == [b"bye"]
