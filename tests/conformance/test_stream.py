"""The byte face of stream wires: `Stream` on both fronts. Message wires refuse it early."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

import anywire

from . import roles
from .fronts import ABANDONED
from .marks import CLEAR, half_close, holds, listening, processes, sees_death, stream, two_way
from .roles import message
from .wires import MIB
from .world import World, outcome

STREAM = "stream of bytes"


def message_wire(setup: Any) -> bool:
    return setup.promise.kind == "message"


def blake(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@holds(CLEAR, message_wire, listening)
async def test_a_message_wire_has_no_stream(world: World) -> None:
    listener = await world.listen()
    for call in (
        world.connect(listener.addresses[0], stream=True, timeout=2),
        world.listen(stream=True),
    ):
        with pytest.raises(anywire.Unsupported):
            await call


@holds(STREAM, stream)
async def test_bytes_go_unchanged(world: World) -> None:
    channel, peer = await world.open("send", stream=True)
    data = message(1, 5 * MIB)
    reading = peer.start(roles.read_to_the_end)
    for start, size in ((0, 0), (0, 1), (1, 99), (100, 65_536), (65_636, 5 * MIB)):
        await channel.write(data[start : start + size])
    await channel.close()
    assert await reading == (len(data), blake(data))


@holds(STREAM, stream)
async def test_reading_in_every_way(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    lines = b"first line\nsecond\n\nno end"
    await peer.call(roles.write, lines + bytes(range(256)))
    assert await channel.read_until(b"\n") == b"first line\n"
    assert await channel.read(3) == b"sec"
    assert await channel.read_until(b"\n") == b"ond\n"
    assert await channel.read_until(b"\n") == b"\n"
    assert await channel.read_exactly(6) == b"no end"
    buffer = bytearray(b"\xee" * 30)
    got = await channel.read_into(memoryview(buffer)[:20])
    assert 1 <= got <= 20
    assert buffer[:got] == bytes(range(got)) and buffer[got:] == b"\xee" * (30 - got)
    assert await channel.read_exactly(256 - got) == bytes(range(got, 256))
    assert await channel.read_exactly(0) == b""


@holds(STREAM, stream)
async def test_the_end(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    await peer.call(roles.write, b"all there is")
    closing = peer.start(roles.close)
    assert await channel.read_exactly(7) == b"all the"
    with pytest.raises((anywire.EndOfChannel, anywire.PeerLost)):
        await channel.read_exactly(100)
    assert await channel.read() in (b"", b"re is")  # what was too short may stay readable
    assert await channel.read() == b""
    assert [chunk async for chunk in channel] == []
    await channel.close()
    await closing


@holds(STREAM, stream, two_way, half_close)
async def test_half_close_of_a_stream(world: World) -> None:
    """For TLS one way: the end of our bytes, as its line says; the other direction still flows."""
    channel, peer = await world.open("both", stream=True)
    await channel.write(b"question")
    if world.setup.name == "tls":
        await outcome(channel.write_eof())
        return
    await channel.write_eof()
    assert await peer.call(roles.read_to_the_end, hold=True) == (8, blake(b"question"))
    writing = peer.start(roles.write, message(2, 2 * MIB))
    assert blake(await channel.read_exactly(2 * MIB)) == blake(message(2, 2 * MIB))
    await writing
    with pytest.raises(anywire.ChannelClosed):
        await channel.write(b"more")


@holds(STREAM, stream)
async def test_iteration_over_chunks(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    writing = peer.start(roles.write_and_close, message(3, 3 * MIB))
    total = hashlib.blake2b(digest_size=16)
    async for chunk in channel:
        assert chunk
        total.update(chunk)
    assert total.hexdigest() == blake(message(3, 3 * MIB))
    await channel.close()
    await writing


@holds(STREAM, stream)
async def test_read_until_has_a_limit(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    await peer.call(roles.write, b"x" * 200 + b"\n")
    with pytest.raises((anywire.TooLarge, ValueError)):
        await channel.read_until(b"\n", limit=100)


@holds(STREAM, stream)
async def test_a_slow_reader_slows_the_writer(world: World) -> None:
    channel, peer = await world.open("send", stream=True)
    data = message(4, 30 * MIB)
    writing = await world.still_waiting(channel.write(data), 0.3)
    reading = peer.start(roles.read_to_the_end)
    await writing
    await channel.close()
    assert await reading == (len(data), blake(data))


@holds(STREAM, stream)
async def test_an_abandoned_read_loses_nothing(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    for way in world.front.ways_to_abandon:
        for turns in range(4):
            for call in (
                lambda **options: channel.read_exactly(6, **options),
                lambda **options: channel.read_until(b"\n", **options),
            ):
                assert await world.front.abandon(call, turns=turns, way=way) is ABANDONED
                await peer.call(roles.write, b"abc")
                assert (
                    await world.front.abandon(lambda **o: channel.read_exactly(6, **o), turns=4, way=way) is ABANDONED
                )
                await peer.call(roles.write, b"de\n")
                assert await call() == b"abcde\n"
            assert await world.front.abandon(channel.read, turns=turns, way=way) is ABANDONED
            await peer.call(roles.write, b"abc")
            assert await channel.read() == b"abc"


@holds(STREAM, stream)
async def test_an_abandoned_read_into_leaves_the_buffer(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    for way in world.front.ways_to_abandon:
        buffer = bytearray(b"\xee" * 20)
        assert await world.front.abandon(channel.read_into, buffer, turns=4, way=way) is ABANDONED
        await peer.call(roles.write, b"abc")
        assert await channel.read_exactly(3) == b"abc"
        assert buffer == b"\xee" * 20
        buffer.clear()


@holds(STREAM, stream)
async def test_an_abandoned_write_goes_whole(world: World) -> None:
    """Once a part is out the rest follows: bytes that come later are not mixed into it."""
    channel, peer = await world.open("send", stream=True)
    first = message(5, 20 * MIB)
    buffer = bytearray(first)
    assert await world.front.abandon(channel.write, buffer, turns=50) is ABANDONED
    buffer[:] = bytes(len(buffer))
    buffer.clear()
    reading = peer.start(roles.read_to_the_end)
    await channel.write(b"after")
    await channel.close(timeout=20)
    assert await reading == (len(first) + 5, blake(first + b"after"))


@holds(STREAM, stream)
async def test_a_second_reader_gets_busy(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    reading = await world.still_waiting(channel.read())
    with pytest.raises(anywire.Busy):
        await channel.read()
    await peer.call(roles.write, b"for the first")
    assert await reading == b"for the first"


@holds(STREAM, stream)
async def test_writers_side_by_side_stay_whole(world: World) -> None:
    channel, peer = await world.open("send", stream=True)
    size = 3_000_000
    reading = peer.start(roles.read_runs)
    await asyncio.gather(*(channel.write(bytes([letter]) * size) for letter in b"abcd"))
    await channel.close(timeout=20)
    assert sorted(await reading) == [(letter, size) for letter in b"abcd"]


@holds(STREAM, stream, processes, sees_death)
async def test_a_killed_writer(world: World) -> None:
    """A bare stream can't tell a death from an end; what came before is readable."""
    channel, peer = await world.open("receive", stream=True)
    await peer.call(roles.write, b"last words")
    peer.kill()
    assert await channel.read_exactly(10) == b"last words"
    ended = await outcome(channel.read())
    assert ended == b"" or isinstance(ended, anywire.PeerLost), ended


@holds(STREAM, stream, processes, sees_death)
async def test_a_killed_reader(world: World) -> None:
    channel, peer = await world.open("send", stream=True)
    waiting = await world.still_waiting(channel.write(bytes(30 * MIB)), 0.2)
    peer.kill()
    with pytest.raises((anywire.PeerLost, anywire.ChannelClosed)):
        await waiting


@holds(STREAM, stream)
async def test_stream_time_outs(world: World) -> None:
    channel, peer = await world.open("receive", stream=True)
    for call in (channel.read, lambda **o: channel.read_exactly(5, **o), lambda **o: channel.read_until(b"x", **o)):
        with pytest.raises(anywire.TimedOut):
            await call(timeout=0.01)
    await peer.call(roles.write, b"later")
    assert await channel.read_exactly(5, timeout=5) == b"later"


@holds(STREAM, stream, listening, two_way)
async def test_serving_a_stream(world: World) -> None:
    async def handler(channel: Any) -> None:
        async for chunk in channel:
            await channel.write(bytes(byte + 1 for byte in chunk))

    async with world.front.serve(handler, world.listen_address(), stream=True) as server:
        channels = [await world.connect(server.addresses[0], stream=True) for _ in range(3)]
        for channel in channels:
            await channel.write(b"HAL")
        for channel in channels:
            assert await channel.read_exactly(3) == b"IBM"
            await channel.close()
