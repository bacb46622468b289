"""A slow reader slows the writer, memory stays bounded, and then everything arrives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import anywire

from . import roles
from .marks import holds, reliable
from .roles import message
from .wires import MIB
from .world import World, outcome

BACK_PRESSURE = "back-pressure"
# The kernel's own buffers for one connection (tcp_wmem and tcp_rmem allow 4 + 6 MiB) and as much again for ours.
BOUND = 24 * MIB


def filled(channel: Any, size: int) -> int:
    """Send until nothing more is taken; how many messages that were."""
    count = 0
    while channel.try_send(message(count, size)):
        count += 1
        assert count * size < BOUND, "nobody reads, and the channel still takes more"
    return count


async def waiting_send(channel: Any, size: int, seconds: float) -> tuple[int, asyncio.Future[Any]]:
    """A send that waits, and the number of its message. A kernel may make room some time after it refused (TCP when
    it probes a closed window), so a send that still finds some doesn't count."""
    count = filled(channel, size)
    while True:
        waiting = asyncio.ensure_future(channel.send(message(count, size)))
        done, _ = await asyncio.wait([waiting], timeout=seconds)
        if not done:
            return count, waiting
        await waiting
        count += 1
        assert count * size < BOUND, "nobody reads, and the channel still takes more"


@holds(BACK_PRESSURE, reliable)
async def test_sender_waits_for_a_reader_that_stopped(world: World) -> None:
    channel, peer = await world.open("send")
    before = roles.resources()["resident"]
    size = min(world.setup.largest, 60_000)
    count, waiting = await waiting_send(channel, size, 0.05)
    assert roles.resources()["resident"] - before < BOUND
    receiving = peer.start(roles.receive_numbers, count + 11)
    await waiting
    for number in range(count + 1, count + 11):
        await channel.send(message(number, size))
    assert await receiving == list(range(count + 11))


@holds(BACK_PRESSURE, reliable)
async def test_reader_that_stopped_stays_small(world: World) -> None:
    """Our side is the slow reader: nothing is read ahead of the application beyond a bound."""
    channel, peer = await world.open("receive")
    size = min(world.setup.largest, 60_000)
    before = roles.resources()["resident"]
    # The first message is received, so that everything that receives by itself would be running by now.
    first = peer.start(roles.send_messages, [message(0)])
    assert roles.number_of(await channel.recv()) == 0
    await first
    taken = await peer.call(roles.send_until_blocked, size)
    assert taken * size < BOUND
    assert roles.resources()["resident"] - before < BOUND
    closing = peer.start(roles.close, 20)  # a blocking sender's last part goes with its next call
    for number in range(taken):
        assert roles.number_of(await channel.recv()) == number
    if world.setup.promise.clean_end:
        assert isinstance(await outcome(channel.recv()), anywire.EndOfChannel)
    if not world.setup.two_way:
        await closing  # a reader that leaves before the writer's end is a loss there
    await channel.close()
    await closing


@holds(BACK_PRESSURE, reliable)
async def test_send_many_waits_too(world: World) -> None:
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = BOUND // size + 10
    sending = await world.still_waiting(channel.send_many(message(number, size) for number in range(count)), 0.3)
    assert await peer.call(roles.receive_numbers, count) == list(range(count))
    await sending


@holds(BACK_PRESSURE, reliable, fronts=("async",))
async def test_waiting_senders_keep_their_order(world: World) -> None:
    """Tasks do. Threads that wait for one lock have no order, and no moment from which they wait."""
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = filled(channel, size)
    waiting = []
    for number in range(count, count + 5):
        waiting.append(await world.still_waiting(channel.send(message(number, size)), 0.01))
    assert await peer.call(roles.receive_numbers, count + 5) == list(range(count + 5))
    await asyncio.gather(*waiting)


@holds(BACK_PRESSURE, reliable)
async def test_a_send_that_times_out_says_so(world: World) -> None:
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = filled(channel, size)
    with pytest.raises(anywire.TimedOut) as caught:
        await channel.send(message(count, size), timeout=0.02)
    assert isinstance(caught.value, TimeoutError) and caught.value.seconds == 0.02
    receiving = peer.start(roles.receive_until_number, 10**9)
    await channel.send(message(10**9))
    numbers = await receiving
    # The message that timed out went whole or not at all; the others all arrived, in order.
    assert numbers in ([*range(count), 10**9], [*range(count + 1), 10**9])


@holds(BACK_PRESSURE, reliable)
async def test_waits_are_counted(world: World) -> None:
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    before = channel.stats().send_waits
    count, waiting = await waiting_send(channel, size, 0.01)
    await world.until(lambda: channel.stats().send_waits > before)
    assert await peer.call(roles.receive_numbers, count + 1) == list(range(count + 1))
    await waiting
