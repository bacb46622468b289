"""Garbage, strangers and silence: a clear error on that connection, at once, and the others untouched."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

import anywire

from . import frames
from .marks import framed, holds, listening, two_way
from .world import World, outcome

GARBAGE = "survives garbage"

STRANGERS = {
    "a browser": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS client": bytes.fromhex("16030100c5010000c10303") + bytes(200),
    "a shell": b"SSH-2.0-OpenSSH_9.6\r\n",
    "one zero": b"\0" * 64,
    "random bytes": random.Random(5).randbytes(4000),
    "an old version": frames.preamble(major=0),
    "a newer version": frames.preamble(major=2),
    "a demand we don't know": frames.preamble(flags=1 << 20),
    "line ends translated": frames.preamble().replace(b"\r\n", b"\n") + bytes(10),
}


@contextlib.asynccontextmanager
async def echo_server(world: World, **options: Any) -> AsyncIterator[tuple[str, list[Any]]]:
    """A server of the front under test: its address, and the channels that its handler got."""
    handled: list[Any] = []

    async def handler(channel: Any) -> None:
        handled.append(channel)
        async for data in channel:
            await channel.send(data)

    if not world.promise.connection:
        options.setdefault("close_timeout", 0.1)        # nothing tells its handlers that a client went
    async with world.front.serve(handler, world.listen_address(), **options) as server:
        yield str(server.addresses[0]), handled
        world.abort_channels()  # so that the server needn't wait for its clients


async def echoes(channel: Any, data: bytes) -> None:
    await channel.send(data)
    assert await channel.recv() == data


@holds(GARBAGE, framed, listening, two_way)
async def test_strangers_at_the_server(world: World) -> None:
    async with echo_server(world) as (address, handled):
        channel = await world.connect(address)
        await echoes(channel, b"before")
        for name, data in STRANGERS.items():
            raw = await world.raw_dial(address)
            started = time.monotonic()
            await raw.send_what_fits(data)
            await raw.recv_all()  # whatever it answers, it ends the connection
            assert time.monotonic() - started < 3, f"{name}: not at once"
            await echoes(channel, name.encode())
            await raw.close()
        assert len(handled) == 1, "a stranger reached the handler"
        await echoes(await world.connect(address), b"a new client")
        await channel.close()


@holds(GARBAGE, framed, listening, two_way)
async def test_the_log_says_once_where_a_stranger_was(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def stranger(address: str) -> None:
        raw = await world.raw_dial(address)
        await raw.send_what_fits(STRANGERS["a shell"])
        await raw.recv_all()
        await raw.close()

    caplog.set_level(logging.INFO, logger="anywire")
    async with echo_server(world) as (address, _):
        await stranger(address)
    listener = await world.listen()
    accepting = asyncio.ensure_future(listener.accept())
    await stranger(str(listener.addresses[0]))
    connecting = asyncio.ensure_future(world.connect(listener.addresses[0]))
    world.keep(await accepting)
    await connecting
    for record, where in zip(caplog.records, (address, listener.addresses[0]), strict=True):
        said = record.getMessage()
        assert said.startswith(f"accept {where}: this is not a framed anywire connection"), said
        assert said.count(str(where)) == 1


@holds(GARBAGE, framed, listening, two_way)
async def test_strangers_at_the_client(world: World) -> None:
    """The client's error shows what came."""
    listener = frames.RawListener(world.listen_address())
    answers = {**STRANGERS, "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n"}
    for name, data in answers.items():
        connecting = asyncio.ensure_future(outcome(world.connect(listener.address)))
        raw = world.raw(await world.front.threads.run(listener.accept))
        await raw.send_what_fits(data)
        error = await connecting
        assert isinstance(error, anywire.BadFrame), f"{name}: {error!r}"
        assert isinstance(error, ConnectionError)
        assert error.received and data.startswith(error.received[:8]), f"{name}: {error.received!r}"
        await raw.close()
    assert "HTTP" in str(error)
    listener.close()


@holds(GARBAGE, framed, listening, two_way)
async def test_an_old_version_is_told_why(world: World) -> None:
    async with echo_server(world) as (address, handled):
        raw = await world.raw_dial(address)
        await raw.send(frames.preamble(major=9))
        answer = await raw.recv_all()
        assert answer.startswith(frames.MAGIC), answer
        assert answer[12] & 1, "the refused flag"
        assert b"version" in answer[24:], answer
        assert not handled


@holds(GARBAGE, framed, listening, two_way)
async def test_a_refusal_reaches_the_client(world: World) -> None:
    listener = frames.RawListener(world.listen_address())
    connecting = asyncio.ensure_future(outcome(world.connect(listener.address)))
    raw = world.raw(await world.front.threads.run(listener.accept))
    await raw.recv_preamble()
    await raw.send(frames.refusal("come back on Monday"))
    error = await connecting
    assert isinstance(error, anywire.Refused) and "come back on Monday" in str(error), error
    listener.close()


@holds(GARBAGE, framed)
async def test_garbage_after_the_preamble(world: World) -> None:
    """Whole messages before it still arrive; then the error, as often as one asks, and the connection is closed."""
    cases = {
        "unknown kind": (frames.header(0xFFFFFFF5), anywire.BadFrame),
        "descriptors that didn't come": (
            frames.header(frames.DESCRIPTORS) + b"\x01\0\0\0\x01\0\0\0x",
            anywire.BadFrame,
        ),
        "too large": (frames.header(5000), anywire.TooLarge),
        "far too large": (frames.header(frames.LARGE) + (1 << 62).to_bytes(8, "little"), anywire.TooLarge),
        "larger than signed": (frames.header(frames.LARGE) + b"\xff" * 8, (anywire.TooLarge, anywire.BadFrame)),
        "message after the end": (frames.header(frames.END) + frames.frame(b"x"), anywire.BadFrame),
    }
    async with world.raw_senders(max_message=1000) as connect:
        for name, (data, kind) in cases.items():
            raw, channel = await connect()
            await raw.send(frames.frame(b"good") + data)
            assert await channel.recv() == b"good", name
            first = await outcome(channel.recv())
            if name == "message after the end" and isinstance(first, anywire.EndOfChannel):
                channel.abort()  # the end was clean; what follows it is never shown
                continue
            assert isinstance(first, kind), f"{name}: {first!r}"
            assert isinstance(await outcome(channel.recv()), kind), name
            channel.abort()
            await raw.close()


@holds(GARBAGE, framed, two_way)
async def test_confirming_what_was_never_sent(world: World) -> None:
    async with world.raw_senders() as connect:
        raw, channel = await connect()
        await channel.send(b"one")
        await raw.send(frames.header(frames.CONFIRM, 5))
        error = await outcome(channel.recv())
        assert isinstance(error, (anywire.PeerLost, anywire.BadFrame)), error
        assert 0 <= channel.unconfirmed <= 1


@holds(GARBAGE, framed, two_way)
async def test_a_length_alone_allocates_nothing(world: World) -> None:
    """A header that announces a gigabyte costs no memory before the bytes come."""
    from . import roles

    async with world.raw_senders(max_message=1 << 31) as connect:
        before = roles.resources()["resident"]
        pairs = []
        for _ in range(20):
            raw, channel = await connect()
            await raw.send(frames.header(1 << 30) + b"only this")
            pairs.append((raw, channel, await world.still_waiting(channel.recv(), 0.01)))
        assert roles.resources()["resident"] - before < 64 << 20
        for _raw, channel, receiving in pairs:
            channel.abort()
            with pytest.raises(anywire.ChannelClosed):
                await receiving


@holds(GARBAGE, framed, listening, two_way)
async def test_silence_fails_and_holds_nobody_up(world: World) -> None:
    async with echo_server(world, handshake_timeout=0.3) as (address, handled):
        silent = [await world.raw_dial(address) for _ in range(5)]
        started = time.monotonic()
        await echoes(await world.connect(address), b"not held up")
        for raw in silent:
            await raw.recv_all()
        assert 0.2 < time.monotonic() - started < 5
        assert len(handled) == 1


@holds(GARBAGE, framed, listening, two_way)
async def test_a_silent_server(world: World) -> None:
    listener = frames.RawListener(world.listen_address())
    connecting = asyncio.ensure_future(outcome(world.connect(listener.address, timeout=0.3)))
    world.raw(await world.front.threads.run(listener.accept))
    error = await connecting
    assert isinstance(error, anywire.TimedOut), error
    listener.close()


@holds(GARBAGE, framed, listening, two_way)
async def test_clients_that_leave_at_once(world: World) -> None:
    async with echo_server(world) as (address, handled):
        for _ in range(50):
            raw = await world.raw_dial(address)
            await raw.close()
        await echoes(await world.connect(address), b"after the crowd")
        assert len(handled) == 1
