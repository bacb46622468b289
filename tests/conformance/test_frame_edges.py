"""A peer made of raw bytes ends at every byte offset: the error is right, and never a clean end that was not sent."""

from __future__ import annotations

import asyncio

import pytest

import anywire

from . import frames
from .marks import framed, holds, listening, two_way, wire
from .world import World, outcome

EDGES = "clean end told from loss"


@holds(EDGES, framed)
async def test_an_end_at_every_offset(world: World) -> None:
    messages = [b"", b"first", b"second message"]
    data = b"".join(map(frames.frame, messages)) + frames.header(frames.END)
    whole_at = []  # how many bytes it takes until message i is whole
    for i in range(len(messages)):
        whole_at.append(sum(frames.HEADER + len(m) for m in messages[: i + 1]))
    async with world.raw_senders() as connect:
        for cut in range(len(data) + 1):
            raw, channel = await connect()
            await raw.send(data[:cut])
            await raw.close()
            for expected in [m for m, at in zip(messages, whole_at, strict=True) if at <= cut]:
                assert await channel.recv() == expected, f"after {cut} bytes"
            for _ in range(2):
                error = await outcome(channel.recv())
                wanted = anywire.EndOfChannel if cut == len(data) else anywire.PeerLost
                assert type(error) is wanted, f"after {cut} of {len(data)} bytes: {error!r}"
            channel.abort()


@holds(EDGES, framed)
async def test_an_end_inside_a_large_message(world: World) -> None:
    data = frames.frame(bytes(900_000))
    async with world.raw_senders() as connect:
        for cut in (8, 9, 262_143, 262_152, 500_000, len(data) - 1):
            raw, channel = await connect()
            sending = asyncio.ensure_future(raw.send(data[:cut]))
            receiving = asyncio.ensure_future(outcome(channel.recv()))
            await sending
            await raw.close()
            error = await receiving
            assert type(error) is anywire.PeerLost, f"after {cut} bytes: {error!r}"
            channel.abort()


@holds(EDGES, framed)
async def test_byte_by_byte(world: World) -> None:
    """Slow drip: whole messages all the same, and nothing before its time."""
    data = frames.frame(b"") + frames.frame(b"drip") + frames.header(frames.CONFIRM) + frames.frame(b"drop")
    data += frames.header(frames.END)
    async with world.raw_senders() as connect:
        raw, channel = await connect()

        async def drip() -> None:
            for i in range(len(data)):
                await raw.send(data[i : i + 1])
                await asyncio.sleep(0.0005)

        dripping = asyncio.ensure_future(drip())
        assert [bytes(data) async for data in channel] == [b"", b"drip", b"drop"]
        await dripping


@holds(EDGES, framed)
async def test_everything_in_one_piece(world: World) -> None:
    messages = [bytes([i % 251]) * (i * 7 % 500) for i in range(2000)]
    data = b"".join(map(frames.frame, messages)) + frames.header(frames.END)
    async with world.raw_senders() as connect:
        raw, channel = await connect()
        sending = asyncio.ensure_future(raw.send(data))
        assert [bytes(message) async for message in channel] == messages
        await sending


@holds(EDGES, wire("tcp"))
async def test_a_reset_is_never_a_clean_end(world: World) -> None:
    listener = await world.listen()
    for data in (b"", frames.frame(b"whole"), frames.frame(b"whole") + b"\x05\0"):
        raw, channel = await world.raw_and_accepted(listener)
        await raw.send(data)
        await raw.reset()
        error = None
        while not isinstance(error, Exception):
            error = await outcome(channel.recv())
        assert type(error) is anywire.PeerLost, error
        channel.abort()


@holds(EDGES, framed, two_way)
async def test_the_close_frame_is_a_clean_end(world: World) -> None:
    async with world.raw_senders() as connect:
        raw, channel = await connect()
        await raw.send(frames.frame(b"last") + frames.header(frames.CLOSE))
        await raw.close()
        assert await channel.recv() == b"last"
        with pytest.raises(anywire.EndOfChannel):
            await channel.recv()
        with pytest.raises(anywire.ChannelClosed):
            await channel.send(b"too late")


@holds(EDGES, framed, two_way)
async def test_our_end_is_on_the_wire(world: World) -> None:
    """What the library writes, seen as bytes: message, end frame; the close frame and the end of the connection."""
    async with world.raw_senders() as connect:
        raw, channel = await connect()
        await channel.send(b"hello")
        await channel.send_eof()
        assert await raw.recv_exactly(2 * frames.HEADER + 5) == frames.frame(b"hello") + frames.header(frames.END)
        closing = asyncio.ensure_future(channel.close())
        await raw.send(frames.header(frames.CLOSE))
        rest = await raw.recv_all()
        assert rest in (b"", frames.header(frames.CLOSE)), rest
        await raw.close()
        await closing


@holds(EDGES, framed, listening, two_way)
async def test_an_end_at_every_offset_of_the_clients_preamble(world: World) -> None:
    """None of them becomes a channel, and the listener goes on."""
    listener = await world.listen()
    accepting = asyncio.ensure_future(listener.accept())
    hello = frames.preamble(extensions=b"\x63\0\x02\0xy")
    for cut in range(len(hello)):
        raw = await world.raw_dial(listener.addresses[0])
        await raw.send_what_fits(hello[:cut])
        await raw.close()
    assert not accepting.done(), "half a preamble is no connection"
    raw = await world.raw_dial(listener.addresses[0])
    await raw.send(hello)
    await raw.recv_preamble()
    channel = world.keep(await accepting)
    await raw.send(frames.frame(b"whole"))
    assert await channel.recv() == b"whole"


@holds(EDGES, framed, listening, two_way)
async def test_an_end_at_every_offset_of_the_servers_preamble(world: World) -> None:
    listener = frames.RawListener(world.listen_address())
    answer = frames.preamble(extensions=b"\x63\0\x02\0xy")
    for cut in range(len(answer)):
        connecting = asyncio.ensure_future(outcome(world.connect(listener.address)))
        raw = world.raw(await world.front.threads.run(listener.accept))
        assert (await raw.recv_exactly(24))[:8] == frames.MAGIC
        await raw.send(answer[:cut])
        await raw.close()
        error = await connecting
        assert isinstance(error, (anywire.PeerLost, anywire.BadFrame, anywire.Refused)), f"after {cut}: {error!r}"
    listener.close()


@holds(EDGES, framed, listening, two_way)
async def test_preamble_byte_by_byte(world: World) -> None:
    listener = await world.listen()
    accepting = asyncio.ensure_future(listener.accept())
    raw = await world.raw_dial(listener.addresses[0])
    hello = frames.preamble(minor=7, extensions=b"\x63\0\x02\0xy")  # a newer minor version and an unknown extension
    for i in range(len(hello)):
        await raw.send(hello[i : i + 1])
    await raw.recv_preamble()
    channel = world.keep(await accepting)
    await raw.send(frames.frame(b"welcome"))
    assert await channel.recv() == b"welcome"
