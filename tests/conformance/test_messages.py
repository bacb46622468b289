"""Messages arrive whole: empty, tiny, largest, too large; however they are sent and received."""

from __future__ import annotations

import array
import asyncio
from typing import Any

import pytest

import anywire

from . import roles
from .marks import connected, framed, holds, one_way, ordered, reliable, two_way
from .roles import digest, message
from .wires import MIB
from .world import World, outcome

WHOLE = "whole messages"


def sizes_for(world: World) -> list[int]:
    sizes = [1, 7, 8, 9, 1000, 2047, 2048, 2049, 4095, 4096, 4097, 65535, 65536, 65537, 1 * MIB, 15 * MIB]
    return ([0] if world.setup.empty else []) + [size for size in sizes if size <= world.setup.largest]


@holds(WHOLE, reliable)
async def test_every_size_sent(world: World) -> None:
    channel, peer = await world.open("send")
    sizes = sizes_for(world)
    messages = [message(i, size) if size >= 8 else bytes(size) for i, size in enumerate(sizes)]
    receiving = peer.start(roles.receive_digests, len(sizes))
    for data in messages:
        await channel.send(data)
    assert await receiving == [digest(data) for data in messages]


@holds(WHOLE, reliable)
async def test_every_size_received(world: World) -> None:
    channel, peer = await world.open("receive")
    sizes = sizes_for(world)
    sending = peer.start(roles.send_sizes, sizes)
    for i, size in enumerate(sizes):
        data = await channel.recv()
        assert type(data) is bytes
        assert data == (message(i, size) if size >= 8 else bytes(size)), f"size {size}"
    await sending


@holds(WHOLE, two_way)
async def test_echo(world: World) -> None:
    channel, peer = await world.open("both")
    echoing = peer.start(roles.echo)
    for data in [b"", b"x", message(3, 1000), message(4, min(world.setup.largest, 50_000))][not world.setup.empty :]:
        await channel.send(data)
        assert await channel.recv() == data
    assert not echoing.done()


@holds(WHOLE, reliable)
async def test_limit_exactly_and_one_byte_more(world: World) -> None:
    """A message over this side's own limit is refused before anything is written, and the channel goes on."""
    channel, peer = await world.open("send", max_message=1000, peer_options={"max_message": 1000})
    receiving = peer.start(roles.receive_digests, 2)
    await channel.send(bytes(1000))
    with pytest.raises(anywire.TooLarge) as caught:
        await channel.send(bytes(1001))
    assert (caught.value.size, caught.value.limit) == (1001, 1000)
    assert isinstance(caught.value, ValueError)
    assert "1,000" in str(caught.value) and "max_message" in str(caught.value)
    with pytest.raises(anywire.TooLarge):
        channel.try_send(bytes(1001))
    with pytest.raises(anywire.TooLarge):
        await channel.send_many([bytes(1001)])
    await channel.send(b"next")
    assert await receiving == [digest(bytes(1000)), digest(b"next")]


@holds(WHOLE, framed, two_way)
async def test_sender_refuses_what_the_peer_would(world: World) -> None:
    """The preamble tells each side the other's limit, so a message that the peer can't take is refused early."""
    channel, peer = await world.open("both", peer_options={"max_message": 500})
    receiving = peer.start(roles.receive_digests, 2)
    await channel.send(bytes(500))
    with pytest.raises(anywire.TooLarge) as caught:
        await channel.send(bytes(501))
    assert (caught.value.size, caught.value.limit) == (501, 500)
    await channel.send(b"next")
    assert await receiving == [digest(bytes(500)), digest(b"next")]


@holds(WHOLE, framed, one_way)
async def test_one_way_receiver_reports_what_is_over_its_limit(world: World) -> None:
    """A one-way sender can't know the limit: the receiver refuses, and the sender finds its peer gone."""
    channel, peer = await world.open("receive", max_message=500)
    sending = peer.start(roles.send_outcome, bytes(501))
    with pytest.raises(anywire.TooLarge) as caught:
        await channel.recv()
    assert (caught.value.size, caught.value.limit) == (501, 500)
    await sending
    await channel.close()
    later = await peer.call(roles.send_until_error, bytes(100))
    assert later["kind"] in ("PeerLost", "ChannelClosed"), later


@holds(WHOLE, reliable)
async def test_anything_with_a_buffer_is_a_message(world: World) -> None:
    channel, peer = await world.open("send")
    numbers = array.array("d", [1.5, 2.5])
    messages: list[Any] = [bytearray(b"abc"), memoryview(b"defgh")[1:4], numbers, memoryview(numbers)]
    receiving = peer.start(roles.receive_digests, len(messages) + 2)
    for data in messages:
        await channel.send(data)
    await channel.send_many(messages[:2])
    expected = [digest(bytes(memoryview(data).cast("B"))) for data in [*messages, *messages[:2]]]
    assert await receiving == expected


@holds(WHOLE, reliable)
async def test_what_is_no_buffer_is_refused(world: World) -> None:
    channel, peer = await world.open("send")
    for wrong in ("text", 5, None):
        with pytest.raises(TypeError):
            await channel.send(wrong)
    with pytest.raises(BufferError):
        await channel.send(memoryview(bytes(10))[::2])
    receiving = peer.start(roles.recv_one)
    await channel.send(b"still whole")
    assert await receiving == b"still whole"


@holds(WHOLE, reliable)
async def test_caller_may_change_its_buffer_after_send(world: World) -> None:
    channel, peer = await world.open("send")
    buffer = bytearray(message(1, min(world.setup.largest, 300_000)))
    wanted = digest(buffer)
    receiving = peer.start(roles.receive_digests, 1)
    await channel.send(buffer)
    buffer[:] = bytes(len(buffer))
    buffer.clear()  # would raise BufferError if the library still held on to it
    assert await receiving == [wanted]


@holds(WHOLE, ordered)
async def test_send_many_and_recv_many(world: World) -> None:
    sender, peer = await world.open("send")
    receiving = peer.start(roles.receive_numbers, 3000)
    await sender.send_many([])
    await sender.send_many(message(i) for i in range(1000))
    await sender.send_many([message(i, 8 + i % 3000) for i in range(1000, 3000)])
    assert await receiving == list(range(3000))

    receiver, peer = await world.open("receive")
    sending = peer.start(roles.send_numbers, 3000, 100)
    numbers: list[int] = []
    while len(numbers) < 3000:
        batch = await receiver.recv_many(limit=50)
        assert 1 <= len(batch) <= 50
        numbers += [roles.number_of(data) for data in batch]
    assert numbers == list(range(3000))
    await sending


@holds(WHOLE, reliable)
async def test_recv_into(world: World) -> None:
    channel, peer = await world.open("receive")
    large = min(world.setup.largest, 300_000)
    sending = peer.start(roles.send_sizes, [8, 5000, large])
    buffer = bytearray(b"\xee" * (large + 10))
    for number, size in enumerate([8, 5000, large]):
        buffer[:] = b"\xee" * len(buffer)
        assert await channel.recv_into(buffer) == size
        assert roles.number_of(buffer[:size]) == number
        assert buffer[size:] == b"\xee" * (len(buffer) - size), "bytes after the message were touched"
    await sending


@holds(WHOLE, reliable)
async def test_recv_into_a_buffer_that_is_too_small(world: World) -> None:
    """The error names both sizes, the buffer's neighbours are untouched and the channel goes on in step."""
    channel, peer = await world.open("receive")
    sending = peer.start(roles.send_sizes, [100, 50])
    buffer = bytearray(b"\xee" * 60)
    with pytest.raises((ValueError, BufferError), match="100"):
        await channel.recv_into(memoryview(buffer)[:40])
    assert buffer[40:] == b"\xee" * 20
    assert [roles.number_of(await channel.recv()) for _ in range(2)] == [0, 1], "the message stays"
    await sending


@holds(WHOLE, reliable)
async def test_recv_without_a_copy(world: World) -> None:
    channel, peer = await world.open("receive")
    size = min(world.setup.largest, 200_000)
    sending = peer.start(roles.send_sizes, [8, size])
    first = await channel.recv(copy=False)
    second = await channel.recv(copy=False)
    for number, view in enumerate([first, second]):
        assert isinstance(view, memoryview) and view.readonly
        assert roles.number_of(view) == number
    await sending


@holds(WHOLE, reliable)
async def test_loan(world: World) -> None:
    channel, peer = await world.open("send")
    receiving = peer.start(roles.receive_digests, 2)
    data = message(1, 5000)
    loan = channel.loan(5000)
    assert len(loan) == 5000
    with memoryview(loan) as view:
        view[:] = data
    await channel.send(loan)
    with pytest.raises(BufferError):
        memoryview(loan)
    with pytest.raises(BufferError):
        await channel.send(loan)
    await channel.send_many([_filled(channel, b"second")])
    assert await receiving == [digest(data), digest(b"second")]


def _filled(channel: Any, data: bytes) -> Any:
    loan = channel.loan(len(data))
    memoryview(loan)[:] = data
    return loan


@holds(WHOLE, ordered)
async def test_ten_thousand_in_order_sent(world: World) -> None:
    channel, peer = await world.open("send")
    receiving = peer.start(roles.receive_numbers, 10_000)
    for number in range(5000):
        if not channel.try_send(message(number)):
            await channel.send(message(number))
    await channel.send_many([message(number) for number in range(5000, 10_000)])
    assert await receiving == list(range(10_000))


@holds(WHOLE, ordered)
async def test_ten_thousand_in_order_received(world: World) -> None:
    channel, peer = await world.open("receive")
    sending = peer.start(roles.send_numbers, 10_000)
    numbers = []
    while len(numbers) < 10_000:
        numbers.append(roles.number_of(await channel.recv()))
        if len(numbers) < 10_000:  # else the last one has just come, and recv_many would wait for another
            numbers += map(roles.number_of, await channel.recv_many(limit=37))
    assert numbers == list(range(10_000))
    await sending


@holds(WHOLE, ordered, two_way, connected)
async def test_both_directions_at_once(world: World) -> None:
    """Neither side's sending waits for its own receiving."""
    channel, peer = await world.open("both")
    echoing = peer.start(roles.echo)
    count, size = 400, min(world.setup.largest, 20_000)

    async def send() -> None:
        for number in range(count):
            await channel.send(message(number, size))

    sending = asyncio.ensure_future(send())
    assert [roles.number_of(await channel.recv()) for _ in range(count)] == list(range(count))
    await sending
    assert not echoing.done()


@holds(WHOLE, reliable)
async def test_senders_side_by_side_stay_whole(world: World) -> None:
    """Many tasks or threads send on one channel; each sender's own order is kept."""
    channel, peer = await world.open("send")
    senders, count = 8, 100
    largest = min(world.setup.largest, 60_000)
    receiving = peer.start(roles.receive_numbers, senders * count)

    async def send(sender: int) -> None:
        for i in range(count):
            await channel.send(message(sender * 1000 + i, 8 + (i * 7919 * (sender + 1)) % largest))

    await asyncio.gather(*map(send, range(senders)))
    numbers = await receiving
    assert sorted(numbers) == sorted(sender * 1000 + i for sender in range(senders) for i in range(count))
    for sender in range(senders):
        own = [number % 1000 for number in numbers if number // 1000 == sender]
        assert own == list(range(count))


@holds(WHOLE, reliable)
async def test_a_second_receiver_gets_busy(world: World) -> None:
    channel, peer = await world.open("receive")
    first = await world.still_waiting(channel.recv())
    for second in (channel.recv, channel.recv_many, lambda: channel.recv_into(bytearray(10))):
        error = await outcome(second())
        assert isinstance(error, anywire.Busy) and isinstance(error, RuntimeError), error
    await peer.call(roles.send_messages, [b"one", b"two"])
    assert await first == b"one"
    assert await channel.recv() == b"two"


@holds(WHOLE, reliable)
async def test_counters_equal_what_happened(world: World) -> None:
    sender, peer = await world.open("send")
    before = sender.stats()  # without connections a message was sent to be seen
    receiving = peer.start(roles.receive_digests, 7)
    for size in (8, 100, 1000, 4000):
        await sender.send(bytes(size))
    await sender.send_many([bytes(10)] * 3)
    await receiving
    stats = sender.stats()
    assert stats.messages_sent - before.messages_sent == 7 and stats.messages_received == 0
    assert stats.bytes_sent - before.bytes_sent == 8 + 100 + 1000 + 4000 + 30

    receiver, peer = await world.open("receive")
    before = receiver.stats()
    await peer.call(roles.send_sizes, [8, 100, 1000, 10])
    await receiver.recv()
    await receiver.recv_into(bytearray(200))
    await receiver.recv(copy=False)
    await receiver.recv_many()
    stats = receiver.stats()
    assert stats.messages_received - before.messages_received == 4 and stats.messages_sent == 0
    assert stats.bytes_received - before.bytes_received == 1118
