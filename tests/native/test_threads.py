"""Threads that share one connection, and the counters: two directions at once, many senders, ends from elsewhere.

These are ordinary tests of the blocking front, and what `make races` runs under ThreadSanitizer: what the native code
does without the GIL (system calls on buffers that Python owns) and what it shares between threads is exercised here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from native_threads import together

import anywire
from anywire import sync
from anywire.contract import counters

NUMBER = struct.Struct("<IQ")
"""Which sender, which message."""
WIRES = ["inproc://{name}", "unix:@{name}", "unix:@{name}?type=seqpacket", "tcp://127.0.0.1:0"]
_names = count()


@pytest.fixture(params=WIRES, ids=["inproc", "unix", "seqpacket", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[sync.Channel, sync.Channel]]:
    """Both ends of one connection, in this process."""
    address = request.param.format(name=f"anywire-threads-{os.getpid()}-{next(_names)}")
    with sync.listen(address) as listener:
        accepted: list[sync.Channel] = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(timeout=20)))
        thread.start()
        ours = sync.connect(listener.addresses[0])
        thread.join()
    yield ours, accepted[0]
    ours.abort()
    accepted[0].abort()


def body(sender: int, number: int) -> bytes:
    """A message whose size and content follow from its number: now and then larger than a socket takes at once."""
    size = (number * 7919) % 700 if number % 50 else 150_000
    return NUMBER.pack(sender, number) + bytes([number & 0xFF]) * size


def check(message: bytes | memoryview, next_of: dict[int, int]) -> None:
    """The next message of its sender, whole."""
    sender, number = NUMBER.unpack_from(message)
    assert number == next_of.get(sender, 0)
    assert message == body(sender, number)
    next_of[sender] = number + 1


def test_both_directions_at_once(pair: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = pair
    messages = 400

    def send(channel: sync.Channel) -> None:
        for number in range(messages):
            channel.send(body(1, number))

    def receive(channel: sync.Channel) -> None:
        seen: dict[int, int] = {}
        while seen.get(1, 0) < messages:
            check(channel.recv(timeout=30), seen)

    together(lambda: send(one), lambda: receive(one), lambda: send(two), lambda: receive(two))
    assert one.stats().messages_received == two.stats().messages_received == messages


def test_many_senders_stay_whole_and_each_in_order(pair: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = pair
    senders, messages = 4, 150

    def send(sender: int) -> None:
        for number in range(0, messages, 3):
            one.send(body(sender, number))
            one.send_many([body(sender, number + 1), body(sender, number + 2)])

    def receive() -> None:
        seen: dict[int, int] = {}
        while sum(seen.values()) < senders * messages:
            for message in two.recv_many(timeout=30):
                check(message, seen)

    together(receive, *(lambda sender=sender: send(sender) for sender in range(senders)))


def test_counters_are_read_while_they_are_written(pair: tuple[sync.Channel, sync.Channel]) -> None:
    one, two = pair
    messages = 1500
    over = threading.Event()

    def send() -> None:
        for number in range(messages):
            one.send(NUMBER.pack(0, number))

    def receive() -> None:
        for _ in range(messages):
            two.recv(timeout=30)
        over.set()

    def read() -> None:
        last = 0
        while not over.is_set():
            stats, page = one.stats(), counters.snapshot()
            assert last <= stats.messages_sent <= messages
            assert any(slot.messages_sent >= stats.messages_sent for slot in page.slots)
            last = stats.messages_sent

    together(send, receive, read)
    assert one.stats().messages_sent == two.stats().messages_received == messages


@pytest.mark.parametrize("end", ["close", "abort"])
def test_an_end_from_another_thread_wakes_a_receiver(pair: tuple[sync.Channel, sync.Channel], end: str) -> None:
    one, two = pair
    receiving = threading.Event()
    outcome: list[BaseException] = []

    def receive() -> None:
        receiving.set()
        try:
            one.recv()
        except anywire.AnywireError as error:
            outcome.append(error)

    def finish() -> None:
        # Whether it is in the system call yet, or just before it, is left open: it must end in either case.
        assert receiving.wait(20)
        for _ in range(100):
            os.sched_yield()
        if end == "close":
            one.close(timeout=1)
        else:
            one.abort()

    def answer() -> None:
        # The other side ends too, so that `close` needn't wait for its deadline.
        with contextlib.suppress(anywire.AnywireError):
            two.recv()
        with contextlib.suppress(anywire.AnywireError):
            two.close()

    together(receive, finish, answer)
    assert isinstance(outcome[0], anywire.ChannelClosed | anywire.EndOfChannel), outcome[0]


def test_an_abort_from_another_thread_wakes_a_blocked_sender(pair: tuple[sync.Channel, sync.Channel]) -> None:
    one, _ = pair
    outcome: list[BaseException] = []

    def send() -> None:
        data = bytearray(os.urandom(100_000))
        try:
            while True:
                one.send(data)
        except (anywire.AnywireError, OSError) as error:
            outcome.append(error)

    def abort() -> None:
        sent, since = -1, 0
        # The sender is blocked when it waits, or stays at one count while we look: this side never reads.
        while not one.stats().send_waits and since < 2000:
            now = one.stats().messages_sent
            sent, since = now, since + 1 if now == sent else 0
            os.sched_yield()
        one.abort()

    together(send, abort)
    assert isinstance(outcome[0], anywire.ChannelClosed | anywire.PeerLost), outcome[0]


def channels_counted() -> int:
    return sum(slot.kind == "channel" for slot in counters.snapshot().slots)


def test_connections_come_and_go_on_many_threads(tmp_path: Path) -> None:
    handled = []
    before = channels_counted()

    def handler(channel: sync.Channel) -> None:
        handled.append(1)
        for message in channel:
            channel.send(message)

    with sync.serve(handler, "inproc://threads-many", f"unix://{tmp_path}/many", "tcp://127.0.0.1:0") as server:

        def client(number: int) -> None:
            for turn in range(30):
                with sync.connect(server.addresses[(number + turn) % 3], wait=10) as channel:
                    channel.send(NUMBER.pack(number, turn))
                    assert channel.recv(timeout=30) == NUMBER.pack(number, turn)

        together(*(lambda number=number: client(number) for number in range(4)))
    assert len(handled) == 120
    # Without a garbage collection: nothing of a connection is in a circle, so its counters go at its end.
    assert channels_counted() <= before


def test_a_loop_and_a_thread_share_an_inproc_connection() -> None:
    messages = 500
    name = f"inproc://threads-loop-{os.getpid()}"
    ready = threading.Event()
    over: list[int] = []

    async def serve() -> None:
        done = asyncio.Event()

        async def handler(channel: anywire.Channel) -> None:
            async for message in channel:
                await channel.send(message)
            over.append(1)
            done.set()

        async with anywire.serve(handler, name):
            ready.set()
            await done.wait()

    def client() -> None:
        assert ready.wait(20)
        with sync.connect(name) as channel:
            sender = threading.Thread(target=lambda: [channel.send(body(0, number)) for number in range(messages)])
            sender.start()
            seen: dict[int, int] = {}
            while seen.get(0, 0) < messages:
                check(channel.recv(timeout=30), seen)
            sender.join()

    together(lambda: asyncio.run(serve()), client)
    assert over == [1]
