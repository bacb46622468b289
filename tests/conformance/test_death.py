"""The peer is killed with -9: seen at once, what it sent before is readable, `unconfirmed` is right."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

import anywire

from . import roles
from .marks import CLEAR, blind_to_death, clean_end, framed, half_close, holds, processes, reliable, sees_death, two_way
from .roles import message
from .world import World, outcome

DEATH = "sees the peer's death"
UNCONFIRMED = "unconfirmed is right"
LOST = (anywire.PeerLost, anywire.EndOfChannel)  # EndOfChannel only where the line can't tell the two apart


def is_the_right_loss(world: World, error: object) -> bool:
    return isinstance(error, anywire.PeerLost if world.promise.clean_end else LOST)


@holds(DEATH, sees_death, processes)
async def test_a_waiting_receiver_sees_it_within_100_ms(world: World) -> None:
    """The median of seven kills: on a shared machine the scheduler may hold up a few of them, but not most."""
    delays = []
    for _ in range(7):
        channel, peer = await world.open("receive")
        waiting = await world.still_waiting(channel.recv(), 0.01)
        killed = time.monotonic()
        peer.kill()
        error = await outcome(waiting)
        delays.append(time.monotonic() - killed)
        assert is_the_right_loss(world, error), error
    assert statistics.median(delays) <= 0.1, f"seen after {delays} seconds"


@holds(DEATH, sees_death, processes)
async def test_what_it_sent_before_is_readable(world: World) -> None:
    channel, peer = await world.open("receive")
    sent = await peer.call(roles.send_until_blocked, min(world.setup.largest, 20_000))
    peer.kill()
    for number in range(sent - 1):
        assert roles.number_of(await channel.recv()) == number
    last = await outcome(channel.recv())
    if not isinstance(last, Exception):  # else only a part of it had left the peer's process, and it is not shown
        assert roles.number_of(last) == sent - 1
        last = await outcome(channel.recv())
    assert is_the_right_loss(world, last), last
    assert is_the_right_loss(world, await outcome(channel.recv()))


@holds(DEATH, sees_death, processes, two_way)
async def test_what_it_sent_is_readable_after_our_send_failed(world: World) -> None:
    """The send that meets the death must not take the messages that wait with it."""
    channel, peer = await world.open("both")
    await peer.call(roles.send_numbers, 50)
    peer.kill()
    error = None
    while error is None:
        error = await outcome(channel.send(bytes(1000)))
    assert isinstance(error, (anywire.PeerLost, anywire.ChannelClosed)), error
    assert [roles.number_of(await channel.recv()) for _ in range(50)] == list(range(50))
    assert is_the_right_loss(world, await outcome(channel.recv()))


@holds(DEATH, sees_death, processes)
async def test_a_waiting_sender_sees_it(world: World) -> None:
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = 0
    while channel.try_send(message(count, size)):
        count += 1
    waiting = await world.still_waiting(channel.send(message(count, size)))
    peer.kill()
    error = await outcome(waiting)
    assert isinstance(error, anywire.PeerLost), error
    error = await outcome(channel.send(b"again"))
    assert isinstance(error, anywire.PeerLost), error


@holds(DEATH, sees_death, processes, two_way)
async def test_the_others_are_untouched(world: World) -> None:
    first, first_peer = await world.open("both")
    second, second_peer = await world.open("both")
    first_peer.start(roles.echo)
    second_peer.start(roles.echo)
    for channel in (first, second):
        await channel.send(b"hello")
        assert await channel.recv() == b"hello"
    first_peer.kill()
    assert is_the_right_loss(world, await outcome(first.recv()))
    await second.send(b"still here")
    assert await second.recv() == b"still here"


@holds(CLEAR, blind_to_death, processes)
async def test_a_wire_that_cannot_see_it_goes_on(world: World) -> None:
    """Its line says no: the receiver just waits, and the next peer's messages arrive."""
    channel, peer = await world.open("receive")
    await peer.call(roles.send_messages, [b"before"])
    assert await channel.recv() == b"before"
    peer.kill()
    waiting = await world.still_waiting(channel.recv())
    waiting.cancel()


@holds(UNCONFIRMED, framed, two_way, processes)
async def test_unconfirmed_is_exact_after_a_reply(world: World) -> None:
    """A reply's header confirms what was handed over before it; a stopped peer is handed nothing more."""
    channel, peer = await world.open("both")
    receiving = peer.start(roles.receive_and_acknowledge, 20)
    for number in range(20):
        await channel.send(message(number))
    assert channel.unconfirmed <= 20
    assert await channel.recv() == b"all here"
    await receiving
    assert channel.unconfirmed == 0
    await peer.freeze()
    for number in range(3):
        await channel.send(message(number))
    assert channel.unconfirmed == 3
    peer.kill()
    error = await outcome(channel.recv())
    assert isinstance(error, anywire.PeerLost), error
    assert error.unconfirmed == 3 and "3 sent messages" in str(error)
    assert channel.unconfirmed == 3


@holds(UNCONFIRMED, reliable, sees_death, processes)
async def test_accepted_is_at_most_delivered_and_unconfirmed(world: World) -> None:
    """Killed in mid-flow. Nothing that was accepted is missing from the sum."""
    channel, peer = await world.open("send")
    receiving = peer.start(roles.receive_to_the_end, report=True)
    accepted = 0
    error = None

    async def flow() -> None:
        nonlocal accepted, error
        while error is None:
            error = await outcome(channel.send(message(accepted, 2000)))
            accepted += error is None

    flowing = asyncio.ensure_future(flow())
    await world.until(lambda: (peer.last_report or 0) >= 500)
    peer.kill()
    await flowing
    with pytest.raises(Exception, match="the peer ended"):
        await receiving  # and with it, every report has come
    assert isinstance(error, anywire.PeerLost), error
    delivered = peer.last_report + 1  # it may have been killed between the hand-over and the report
    assert accepted <= delivered + error.unconfirmed


@holds(UNCONFIRMED, half_close, sees_death, framed, two_way, processes)
async def test_a_death_after_its_half_close_is_a_loss(world: World) -> None:
    """Its end frame said that nothing more comes from there, not that it took what comes from here."""
    channel, peer = await world.open("both")
    await peer.call(roles.send_eof)
    assert isinstance(await outcome(channel.recv()), anywire.EndOfChannel)
    await peer.freeze()
    for number in range(3):
        await channel.send(message(number))
    peer.kill()
    error = await outcome(channel.close())
    assert isinstance(error, anywire.PeerLost), error
    assert error.unconfirmed == 3 and channel.unconfirmed == 3


@holds(UNCONFIRMED, clean_end, framed, two_way)
async def test_unconfirmed_after_a_clean_end(world: World) -> None:
    """The peer closes without having taken everything: the end says how many may be missing."""
    channel, peer = await world.open("both")
    await channel.send_many([message(number) for number in range(10)])
    assert await peer.call(roles.receive_numbers_one_by_one, 4) == [0, 1, 2, 3]
    closing = peer.start(roles.close)
    error = await outcome(channel.recv())
    assert isinstance(error, anywire.EndOfChannel), error
    assert error.unconfirmed == 6
    await outcome(channel.close())
    await closing


@holds(UNCONFIRMED, framed, two_way)
async def test_confirmations_come_without_replies(world: World) -> None:
    """A peer that only receives still confirms, in a bounded number of messages."""
    channel, peer = await world.open("both")
    for start in range(0, 3000, 100):
        await channel.send_many([message(number) for number in range(start, start + 100)])
        await peer.call(roles.receive_numbers, 100)
    with pytest.raises(anywire.TimedOut):
        await channel.recv(timeout=0.01)
    assert channel.unconfirmed < 500
    await peer.call(roles.send_messages, [b"done"])
    assert await channel.recv() == b"done"
    assert channel.unconfirmed == 0
