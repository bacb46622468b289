"""Giving up an operation is safe: a message stays, or goes whole, or doesn't go; buffers come back for good.

Also on udp: it promises less, but what it loses it does not lose by a cancellation. There the scenarios send no more
than a socket's buffer holds, so on one host everything arrives.

"Abandon" is what each front has: cancellation, `asyncio.timeout` and the timeout argument on the async front, the
timeout argument on the blocking one. Interrupts by signal are in test_processes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import pytest

import anywire

from . import frames, roles
from .fronts import ABANDONED
from .marks import connected, framed, holds, listening, ordered, reliable, two_way
from .roles import message
from .test_strangers import echo_server, echoes
from .world import World

CANCELLATION = "safe cancellation"


@holds(CANCELLATION)
async def test_an_abandoned_recv_leaves_the_message(world: World) -> None:
    """Abandon at every turn of the loop between 0 and the message's arrival and after; and when it is here already."""
    channel, peer = await world.open("receive")
    count = 0
    for way in world.front.ways_to_abandon:
        for turns in range(6):
            await peer.call(roles.send_messages, [message(count)])
            data = await world.front.abandon(channel.recv, turns=turns, way=way)
            if data is ABANDONED:
                data = await channel.recv()
            assert roles.number_of(data) == count
            count += 1
        for turns in range(12):
            assert await world.front.abandon(channel.recv, turns=turns, way=way) is ABANDONED
            assert await world.front.abandon(channel.recv_many, turns=turns, way=way) is ABANDONED
            sending = peer.start(roles.send_messages, [message(count)])
            data = await world.front.abandon(channel.recv, turns=turns, way=way)
            if data is ABANDONED:
                data = await channel.recv()
            assert roles.number_of(data) == count
            await sending
            count += 1


@holds(CANCELLATION)
async def test_recv_with_a_timeout_says_so(world: World) -> None:
    channel, peer = await world.open("receive")
    for call in (channel.recv, channel.recv_many, lambda timeout: channel.recv_into(bytearray(9), timeout=timeout)):
        with pytest.raises(anywire.TimedOut) as caught:
            await call(timeout=0.01)
        assert caught.value.seconds == 0.01
    await peer.call(roles.send_messages, [b"here"])
    assert await channel.recv(timeout=5) == b"here"


@holds(CANCELLATION, ordered)
async def test_a_thousand_random_abandonments_under_load(world: World) -> None:
    channel, peer = await world.open("receive")
    chance = random.Random(world.setup.name + world.front.name)
    numbers: list[int] = []
    abandoned = expected = 0
    pause = 1 / 2000
    sending = asyncio.ensure_future(asyncio.sleep(0))
    buffer = bytearray(300)
    while expected < 1500 or abandoned < 20 or len(numbers) < expected:
        if len(numbers) == expected:  # a receiver that is slow (a busy machine, a sanitizer) gets longer pauses
            await sending
            sending = peer.start(roles.send_numbers_slowly, expected, expected + 500, 300, pause)
            expected += 500
            pause *= 1.5
        way = chance.choice(world.front.ways_to_abandon)
        turns = chance.randrange(5)
        kind = chance.randrange(3)
        if kind == 0:
            got = await world.front.abandon(channel.recv, turns=turns, way=way)
            batch = [] if got is ABANDONED else [got]
        elif kind == 1:
            got = await world.front.abandon(channel.recv_many, turns=turns, way=way)
            batch = [] if got is ABANDONED else got
        else:
            got = await world.front.abandon(channel.recv_into, buffer, turns=turns, way=way)
            batch = [] if got is ABANDONED else [bytes(buffer[:got])]
        abandoned += got is ABANDONED
        numbers += map(roles.number_of, batch)
        if got is ABANDONED and abandoned > 1000:
            numbers.append(roles.number_of(await channel.recv()))
    assert numbers == list(range(expected))
    await sending


@holds(CANCELLATION, framed, listening)
async def test_an_abandoned_recv_keeps_the_part_that_came(world: World) -> None:
    """At every frame boundary and inside: a frame comes in pieces, and each wait in between is abandoned."""
    listener = await world.listen()
    raw, channel = await world.raw_and_accepted(listener)
    whole = message(5, 40)
    data = frames.frame(whole)
    for way in world.front.ways_to_abandon:
        for call, extract in ((channel.recv, bytes), (channel.recv_many, lambda got: bytes(got[0]))):
            for cut in range(len(data)):
                await raw.send(data[:cut])
                assert await world.front.abandon(call, turns=2, way=way) is ABANDONED
                await raw.send(data[cut:])
                assert extract(await call()) == whole, f"cut after {cut} bytes"


@holds(CANCELLATION, framed, listening)
async def test_an_abandoned_recv_keeps_the_part_of_a_large_message(world: World) -> None:
    """Large messages are received straight into their final buffer; that buffer must survive too."""
    listener = await world.listen()
    raw, channel = await world.raw_and_accepted(listener)
    whole = message(6, 700_000)
    data = frames.frame(whole)
    for way in world.front.ways_to_abandon:
        for cut in (9, 20_000, 262_144, 262_152, 500_000, len(data) - 1):
            sending = asyncio.ensure_future(raw.send(data[:cut]))
            while not sending.done():  # the kernel's buffer may be smaller than this part
                assert await world.front.abandon(channel.recv, turns=5, way=way) is ABANDONED
            await sending
            for _ in range(3):
                assert await world.front.abandon(channel.recv, turns=5, way=way) is ABANDONED
            sending = asyncio.ensure_future(raw.send(data[cut:]))
            assert await channel.recv() == whole
            await sending


@holds(CANCELLATION, framed, listening)
async def test_an_abandoned_recv_into_never_touches_the_buffer_again(world: World) -> None:
    """A part of the message was already in the caller's buffer; the rest must go elsewhere."""
    listener = await world.listen()
    raw, channel = await world.raw_and_accepted(listener)
    for way in world.front.ways_to_abandon:
        for size in (40, 700_000):
            whole = message(7, size)
            data = frames.frame(whole)
            for cut in (0, 5, 8, 20, len(data) // 2, len(data) - 1):
                sending = asyncio.ensure_future(raw.send(data[:cut]))  # the kernel's buffer may be smaller than this
                buffer = bytearray(size)
                assert await world.front.abandon(channel.recv_into, buffer, turns=4, way=way) is ABANDONED
                buffer[:] = b"\xee" * size
                again = bytearray(size)
                receiving = asyncio.ensure_future(channel.recv_into(again))
                await sending
                await raw.send(data[cut:])
                assert await receiving == size
                assert again == whole
                assert buffer == b"\xee" * size, f"{way}: the buffer was written after {cut} of {len(data)} bytes"
                buffer.clear()  # nothing holds on to it


@holds(CANCELLATION)
async def test_an_abandoned_recv_into_frees_the_buffer(world: World) -> None:
    channel, peer = await world.open("receive")
    for way in world.front.ways_to_abandon:
        buffer = bytearray(b"\xee" * 100)
        assert await world.front.abandon(channel.recv_into, buffer, turns=4, way=way) is ABANDONED
        await peer.call(roles.send_messages, [message(1, 100)])
        assert roles.number_of(await channel.recv()) == 1
        assert buffer == b"\xee" * 100
        buffer.clear()


@holds(CANCELLATION, reliable)
async def test_an_abandoned_send_goes_whole_or_not_at_all(world: World) -> None:
    """The peer is blocked, so sends stop inside a frame; after each abandonment the next messages are in step."""
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 1_000_000)
    number = 0
    while channel.try_send(message(number, min(size, 50_000))):
        number += 1
    certain, perhaps = list(range(number)), []
    for way in world.front.ways_to_abandon:
        for turns in (0, 1, 2, 5, 20):
            for call in (channel.send, lambda data, **options: channel.send_many([data], **options)):
                buffer = bytearray(message(number, size))
                if await world.front.abandon(call, buffer, turns=turns, way=way) is ABANDONED:
                    perhaps.append(number)
                else:
                    certain.append(number)
                buffer[:] = bytes(size)  # the buffer is the caller's again, whatever went
                buffer.clear()
                number += 1
    assert perhaps, "the peer reads nothing, so some send must have waited"
    receiving = peer.start(roles.receive_until_number, 10**9)
    await channel.send(message(10**9))
    numbers = await receiving
    assert numbers == sorted(numbers)
    assert set(certain) <= set(numbers), "an accepted message is missing"
    assert set(numbers) <= {*certain, *perhaps, 10**9}
    assert len(numbers) == len(set(numbers))


@holds(CANCELLATION)
async def test_an_abandoned_send_without_a_wait_goes_whole_or_not_at_all(world: World) -> None:
    """There is room, so it is only a question of which turn of the loop the cancellation meets."""
    channel, peer = await world.open("send")
    receiving = peer.start(roles.receive_until_number, 10**9)
    certain, perhaps = [], []
    for number in range(60):
        call = channel.send if number % 2 else lambda data, **options: channel.send_many([data], **options)
        way = world.front.ways_to_abandon[number % len(world.front.ways_to_abandon)]
        buffer = bytearray(message(number, 8 + number * 10))
        sent = await world.front.abandon(call, buffer, turns=number // 2 % 3, way=way)
        (perhaps if sent is ABANDONED else certain).append(number)
        buffer[:] = bytes(len(buffer))  # the buffer is the caller's again, whatever went
        buffer.clear()
    await channel.send(message(10**9))
    numbers = await receiving
    assert numbers == sorted(set(numbers))
    assert set(certain) <= set(numbers) <= {*certain, *perhaps, 10**9}


@holds(CANCELLATION, ordered)
async def test_random_abandoned_sends_under_load(world: World) -> None:
    channel, peer = await world.open("send")
    chance = random.Random(world.setup.name + world.front.name)
    receiving = peer.start(roles.receive_until_number, 10**9)
    certain, perhaps = [], []
    for number in range(600):
        data = message(number, 8 + chance.randrange(min(world.setup.largest, 200_000)))
        way = chance.choice(world.front.ways_to_abandon)
        sent = await world.front.abandon(channel.send, data, turns=chance.randrange(3), way=way)
        (perhaps if sent is ABANDONED else certain).append(number)
    await channel.send(message(10**9))
    numbers = await receiving
    assert numbers == sorted(set(numbers))
    assert set(certain) <= set(numbers)
    assert set(numbers) <= {*certain, *perhaps, 10**9}


@holds(CANCELLATION, reliable)
async def test_an_abandoned_sender_in_the_queue_leaves_the_others(world: World) -> None:
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = 0
    while channel.try_send(message(count, size)):
        count += 1
    first = await world.still_waiting(channel.send(message(count, size)), 0.01)
    assert await world.front.abandon(channel.send, message(count + 1, size), turns=20) is ABANDONED
    third = await world.still_waiting(channel.send(message(count + 2, size)), 0.01)
    receiving = peer.start(roles.receive_until_number, count + 2)
    await first
    await third
    numbers = await receiving
    assert numbers in ([*range(count + 1), count + 2], [*range(count + 3)])


@holds(CANCELLATION, reliable, fronts=("async",))
async def test_room_that_appears_as_the_first_sender_is_cancelled(world: World) -> None:
    """The wake-up for free room reaches a sender that is just being cancelled: the next in line must get it."""
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = 0
    while channel.try_send(message(count, size)):
        count += 1
    first = await world.still_waiting(channel.send(message(10**6, size)), 0.01)
    second = await world.still_waiting(channel.send(message(10**7)), 0.01)
    receiving = peer.start(roles.receive_numbers, count)
    await asyncio.sleep(0)  # the request leaves
    time.sleep(0.2)  # the loop stands still while room appears, so the wake-up and the cancellation meet in one turn
    first.cancel()
    assert [number for number in await receiving if number < 10**6] != []
    rest = peer.start(roles.receive_until_number, 10**7)
    await second
    await rest


@holds(CANCELLATION, listening, two_way, connected, fronts=("async",))
async def test_connect_and_close_abandoned_at_every_turn(world: World) -> None:
    """A cancelled connect leaves nothing and hurts nobody; a cancelled close has dropped the connection."""

    async def given_up(operation: Any, turns: int) -> Any:
        task = asyncio.ensure_future(operation)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await task

    async with echo_server(world) as (address, handled):
        connections = 0
        for turns in range(20):
            await given_up(world.connect(address), turns)
            channel = await world.connect(address)
            await echoes(channel, b"whole")
            await given_up(channel.close(), turns)
            connections += 1
            if turns:                           # before its first step a close has not begun
                assert channel.closed
            channel.abort()
        await echoes(await world.connect(address), b"still there")
        assert len(handled) > connections
