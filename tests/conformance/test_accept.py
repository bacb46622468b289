"""accept(): silent strangers hold up nobody, who gives it up loses nobody, and a forked child gets nobody."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

import anywire

from . import frames
from .fronts import ABANDONED
from .marks import connected, framed, holds, listening, two_way, wire
from .test_listener import LISTENING, WHO
from .test_processes import FORK
from .test_strangers import GARBAGE
from .wires import client_address
from .world import World, outcome

LONG = 300.0
"""Seconds that a handshake may take: more than a scenario has, so who waits for a silent stranger fails."""


async def silent(world: World, listener: Any) -> Any:
    address = client_address(listener.addresses[0])
    return world.raw(await world.front.threads.run(frames.silent_dial, address))


def under_way(world: World, listener: Any) -> int:
    return len(world.front.inside(listener)._handshakes)


async def in_its_handshake(world: World, listener: Any) -> Any:
    """A stranger that the listener has begun to listen to, when nobody is in accept() any more."""
    dialing = asyncio.ensure_future(silent(world, listener))
    for _ in range(1000):
        if under_way(world, listener):
            break
        assert await world.front.abandon(listener.accept, turns=50) is ABANDONED
    assert under_way(world, listener)
    return await dialing


@holds(GARBAGE, framed, listening)
async def test_silent_strangers_do_not_delay_a_client(world: World) -> None:
    listener = await world.listen(handshake_timeout=LONG)
    accepting = asyncio.ensure_future(listener.accept())
    for _ in range(3):
        await silent(world, listener)
    client = await world.connect(listener.addresses[0])
    channel = world.keep(await accepting)
    await client.send(b"not held up")
    assert await channel.recv() == b"not held up"


@holds(LISTENING, listening)
async def test_an_abandoned_accept_loses_nobody(world: World) -> None:
    """At every turn between a client's coming and its handshake's end, and after."""
    listener = await world.listen()

    async def come(number: int) -> Any:
        client = await world.connect(listener.addresses[0])
        await client.send(b"%d" % number)
        return client

    for number, (way, turns) in enumerate((way, turns) for way in world.front.ways_to_abandon for turns in range(12)):
        coming = asyncio.ensure_future(come(number))
        for _ in range(number % 5 + 1):
            channel = await world.front.abandon(listener.accept, turns=turns, way=way)
            if channel is not ABANDONED:
                break
        else:
            channel = await listener.accept()
        client = await coming
        assert await channel.recv() == b"%d" % number
        channel.abort()
        client.abort()


@holds(LISTENING, listening, framed, two_way, fronts=("async",))
async def test_who_is_established_without_accept_is_what_the_next_one_returns(world: World) -> None:
    listener = await world.listen(handshake_timeout=LONG)
    accepting = await world.still_waiting(listener.accept())
    dialing = asyncio.ensure_future(world.raw_dial(listener.addresses[0]))
    await world.until(lambda: under_way(world, listener))
    accepting.cancel()
    raw = await dialing
    await raw.greet()
    await raw.send(frames.frame(b"before anybody accepts"))
    await world.until(lambda: not under_way(world, listener))
    channel = world.keep(await listener.accept(timeout=0))
    assert await channel.recv() == b"before anybody accepts"


@holds(LISTENING, framed, listening)
async def test_close_drops_who_was_not_accepted(world: World) -> None:
    listener = await world.listen(handshake_timeout=LONG)
    stranger = await in_its_handshake(world, listener)
    await world.front.stop_listening(listener)
    if world.setup.name.startswith("fifo"):
        with pytest.raises(BrokenPipeError):
            while True:
                await stranger.send(b"?")
                await asyncio.sleep(0)
    else:
        assert await stranger.recv_all() == b""


@holds(LISTENING, wire("tcp", "unix", "fifo"))
async def test_a_detached_listener_drops_who_is_in_its_handshake(world: World) -> None:
    listener = await world.listen(handshake_timeout=LONG)
    stranger = await in_its_handshake(world, listener)
    waiting = await world.still_waiting(listener.accept())
    moved = await world.front.attach(listener.detach())
    world._listeners.append(moved)
    with pytest.raises(anywire.ChannelClosed):
        await waiting
    accepting = asyncio.ensure_future(moved.accept())
    client = await world.connect(moved.addresses[0])
    channel = world.keep(await accepting)
    await client.send(b"after the move")
    assert await channel.recv() == b"after the move"
    await stranger.close()


@holds(LISTENING, wire("tcp", "unix"))
async def test_handshakes_under_way_are_bounded(world: World) -> None:
    listener = await world.listen(handshake_timeout=LONG)
    accepting = asyncio.ensure_future(listener.accept())
    strangers = [await silent(world, listener) for _ in range(130)]
    await world.until(lambda: under_way(world, listener) == 128)
    connecting = await world.still_waiting(world.connect(listener.addresses[0], timeout=30))
    assert under_way(world, listener) == 128
    for stranger in strangers[:3]:
        await stranger.close()
    world.keep(await accepting)
    await connecting


@holds(WHO, framed, listening, two_way)
async def test_authorize_that_fails_is_passed_over(world: World, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def authorize(peer: Any) -> bool:
        asked.append(peer)
        if len(asked) == 1:
            raise ZeroDivisionError("on purpose")
        return True

    listener = await world.listen(authorize=authorize)
    accepting = asyncio.ensure_future(listener.accept())
    first = await outcome(world.connect(listener.addresses[0]))
    assert isinstance(first, anywire.AnywireError), first
    client = await world.connect(listener.addresses[0])
    channel = world.keep(await accepting)
    await client.send(b"the second")
    assert await channel.recv() == b"the second"
    assert "on purpose" in caplog.text and "authorize() failed" in caplog.text


@holds(LISTENING, listening, connected)
async def test_several_may_accept_at_once(world: World) -> None:
    listener = await world.listen()
    accepting = [asyncio.ensure_future(listener.accept()) for _ in range(8)]
    clients = [await world.connect(listener.addresses[0]) for _ in range(8)]
    channels = [world.keep(await one) for one in accepting]
    for number, client in enumerate(clients):
        await client.send(b"%d" % number)
    assert sorted([await channel.recv() for channel in channels]) == [b"%d" % number for number in range(8)]
    accepting = [await world.still_waiting(listener.accept(), 0.01) for _ in range(3)]
    await world.front.stop_listening(listener)
    for one in accepting:
        with pytest.raises(anywire.ChannelClosed):
            await one


@pytest.mark.no_sanitize  # forks beside other threads: gcc's ASan may hold its allocator's lock at that moment
@holds(FORK, listening)
async def test_a_forked_child_accepts_nobody(world: World) -> None:
    """Also one that was forked while this process waits; and closing its copy there leaves this one alone."""
    listener = await world.listen()
    waiting = await world.still_waiting(listener.accept())
    inner = world.front.inside(listener)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                if world.front.name == "async":
                    asyncio.run(inner.accept(timeout=5))
                else:
                    inner.accept(timeout=5)
            except BaseException as error:
                os.write(write, type(error).__name__.encode())
            inner.close()
            os.write(write, b", closed")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read, "rb") as said:
        assert said.read() == b"Forked, closed"
    client = await world.connect(listener.addresses[0])
    await client.send(b"the parent goes on")
    channel = world.keep(await waiting)
    assert await channel.recv() == b"the parent goes on"
