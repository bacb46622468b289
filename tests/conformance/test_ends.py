"""Ends: half-close, close with data in flight, close deadline, abort; an end is told from a loss."""

from __future__ import annotations

import asyncio
import time

import pytest

import anywire

from . import roles
from .marks import (
    CLEAR,
    clean_end,
    connected,
    half_close,
    holds,
    no_half_close,
    one_way,
    ordered,
    processes,
    reliable,
    sees_death,
    two_way,
    wire,
)
from .roles import message
from .world import World, outcome

CLEAN_END = "clean end told from loss"
HALF_CLOSE = "half-close"
CLOSE = "close delivers"


@holds(CLEAN_END, clean_end)
async def test_the_peers_close_is_a_clean_end(world: World) -> None:
    channel, peer = await world.open("receive")
    await peer.call(roles.send_messages, [b"one", b"two"])
    closing = peer.start(roles.close)
    assert await channel.recv() == b"one"
    assert await channel.recv() == b"two"
    for _ in range(3):  # as often as one asks
        with pytest.raises(anywire.EndOfChannel) as caught:
            await channel.recv()
        assert isinstance(caught.value, EOFError)
    with pytest.raises(anywire.EndOfChannel):
        await channel.recv_many()
    with pytest.raises(anywire.EndOfChannel):
        await channel.recv_into(bytearray(10))
    await channel.close()
    await closing


@holds(CLEAN_END, clean_end)
async def test_iteration_ends_at_the_clean_end(world: World) -> None:
    channel, peer = await world.open("receive")
    await peer.call(roles.send_numbers, 100)
    closing = peer.start(roles.close)
    assert [roles.number_of(data) async for data in channel] == list(range(100))
    assert [data async for data in channel] == []
    await channel.close()
    await closing


@holds(CLEAN_END, clean_end)
async def test_an_abort_is_a_loss(world: World) -> None:
    channel, peer = await world.open("receive")
    await peer.call(roles.send_numbers, 3)
    assert [roles.number_of(await channel.recv()) for _ in range(3)] == [0, 1, 2]
    waiting = await world.still_waiting(channel.recv())
    await peer.call(roles.abort)
    for call in (waiting, channel.recv()):
        with pytest.raises(anywire.PeerLost) as caught:
            await call
        assert isinstance(caught.value, ConnectionResetError) and caught.value.reason
    with pytest.raises(anywire.PeerLost):
        async for _ in channel:
            pass


@holds(CLEAN_END, clean_end)
async def test_our_abort_is_a_loss_for_the_peer(world: World) -> None:
    channel, peer = await world.open("send")
    await channel.send(message(0))
    receiving = peer.start(roles.receive_to_the_end, report=True)
    assert await peer.reports.get() == 1
    channel.abort()
    assert (await receiving)["kind"] == "PeerLost"


@holds(CLEAN_END, clean_end, two_way)
async def test_sending_to_a_peer_that_closed(world: World) -> None:
    channel, peer = await world.open("both")
    closing = peer.start(roles.close)
    with pytest.raises(anywire.EndOfChannel):
        await channel.recv()
    with pytest.raises(anywire.ChannelClosed) as caught:
        await channel.send(b"too late")
    assert isinstance(caught.value, BrokenPipeError)
    await channel.close()
    await closing


@holds(HALF_CLOSE, half_close, two_way)
async def test_the_peer_half_closes(world: World) -> None:
    channel, peer = await world.open("both")
    await peer.call(roles.send_numbers, 10)
    await peer.call(roles.send_eof)
    assert [roles.number_of(data) async for data in channel] == list(range(10))
    await channel.send_many([message(i) for i in range(100)])
    assert await peer.call(roles.receive_numbers, 100) == list(range(100))
    ending = peer.start(roles.receive_to_the_end)
    closing = peer.start(roles.close)
    await channel.close()
    assert (await ending)["kind"] == "EndOfChannel"
    await closing


@holds(HALF_CLOSE, half_close, two_way)
async def test_we_half_close(world: World) -> None:
    channel, peer = await world.open("both")
    await channel.send_many([message(i) for i in range(10)])
    await channel.send_eof()
    for call in (channel.send(b"more"), channel.send_many([b"more"])):
        with pytest.raises(anywire.ChannelClosed):
            await call
    with pytest.raises(anywire.ChannelClosed):
        channel.try_send(b"more")
    ended = await peer.call(roles.receive_to_the_end)
    assert (ended["kind"], ended["numbers"]) == ("EndOfChannel", list(range(10)))
    sending = peer.start(roles.send_numbers, 3000, 1000)
    assert [roles.number_of(await channel.recv()) for _ in range(3000)] == list(range(3000))
    await sending
    await channel.send_eof()  # again is nothing


@holds(HALF_CLOSE, half_close, two_way)
async def test_half_close_wakes_a_waiting_receiver_only(world: World) -> None:
    channel, peer = await world.open("both")
    waiting = await world.still_waiting(channel.recv())
    await channel.send_eof()
    waiting = await world.still_waiting(waiting)
    await peer.call(roles.send_messages, [b"still here"])
    assert await waiting == b"still here"


@holds(CLEAR, no_half_close)
async def test_without_half_close_it_is_refused(world: World) -> None:
    channel, peer = await world.open("send")
    with pytest.raises(anywire.Unsupported) as caught:
        await channel.send_eof()
    assert isinstance(caught.value, NotImplementedError)
    receiving = peer.start(roles.recv_one)
    await channel.send(b"goes on")
    assert await receiving == b"goes on"


@holds(CLEAR, reliable, one_way)
async def test_a_one_way_channel_refuses_the_other_way(world: World) -> None:
    sender, _peer = await world.open("send")
    with pytest.raises(anywire.Unsupported):
        await sender.recv()
    receiver, _peer = await world.open("receive")
    with pytest.raises(anywire.Unsupported):
        await receiver.send(b"wrong way")


@holds(CLOSE, clean_end, ordered)
async def test_close_with_data_in_flight(world: World) -> None:
    """Everything that was accepted arrives, then the end, however late the peer reads."""
    channel, peer = await world.open("send")
    size = min(world.setup.largest, 50_000)
    count = 0
    while count < 500 and channel.try_send(message(count, size)):
        count += 1
    closing = asyncio.ensure_future(channel.close(timeout=20))
    ended = await peer.call(roles.receive_to_the_end)
    assert (ended["kind"], ended["numbers"]) == ("EndOfChannel", list(range(count)))
    if world.setup.two_way:
        await peer.call(roles.close)
    await closing
    assert channel.closed


@holds(CLOSE, clean_end, two_way)
async def test_close_with_unread_input_destroys_nothing(world: World) -> None:
    """Unread input at close turns into a reset, which would destroy what was sent last; close must read it."""
    channel, peer = await world.open("both")
    await peer.call(roles.send_numbers, 200, 100)
    await channel.recv()
    await channel.send_many([message(i, 1000) for i in range(50)])  # a pipe holds 64 KiB
    closing = asyncio.ensure_future(channel.close(timeout=20))
    ended = await peer.call(roles.receive_to_the_end)
    assert (ended["kind"], ended["numbers"]) == ("EndOfChannel", list(range(50)))
    await peer.call(roles.close)
    await closing


@holds(CLOSE, connected)
async def test_close_keeps_its_deadline(world: World) -> None:
    """The peer neither reads nor closes. Close gives up at its deadline and leaves nothing open."""
    channel, _peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    count = 0
    while channel.try_send(message(count, size)):
        count += 1
    started = time.monotonic()
    error = await outcome(channel.close(timeout=0.2))
    assert error is None or isinstance(error, (anywire.PeerLost, anywire.TimedOut)), error
    assert time.monotonic() - started < 3
    assert channel.closed


@holds(CLOSE, connected)
async def test_a_closed_channel_says_so(world: World) -> None:
    channel, peer = await world.open("send")
    await peer.call(roles.run, int)
    await outcome(channel.close(timeout=0.1))
    assert channel.closed
    await channel.close()
    for call in (channel.send(b"x"), channel.send_many([b"x"])):
        with pytest.raises(anywire.ChannelClosed):
            await call
    with pytest.raises(anywire.ChannelClosed):
        channel.try_send(b"x")
    if world.setup.two_way:
        for call in (channel.recv(), channel.recv_many(), channel.recv_into(bytearray(5))):
            with pytest.raises(anywire.ChannelClosed):
                await call
    assert str(channel.address)


@holds(CLOSE, reliable)
async def test_abort_ends_a_waiting_receiver(world: World) -> None:
    channel, _peer = await world.open("receive")
    waiting = await world.still_waiting(channel.recv())
    channel.abort()
    with pytest.raises(anywire.ChannelClosed):
        await waiting
    channel.abort()
    assert channel.closed


@holds(CLOSE, reliable)
async def test_close_ends_a_waiting_receiver(world: World) -> None:
    channel, _peer = await world.open("receive")
    waiting = await world.still_waiting(channel.recv())
    closing = asyncio.ensure_future(channel.close(timeout=0.2))
    with pytest.raises((anywire.ChannelClosed, anywire.EndOfChannel)):
        await waiting
    await outcome(closing)


@holds(CLOSE, connected)
async def test_abort_ends_a_waiting_sender(world: World) -> None:
    channel, _peer = await world.open("send")
    size = min(world.setup.largest, 60_000)
    while channel.try_send(message(0, size)):
        pass
    waiting = await world.still_waiting(channel.send(message(0, size)))
    channel.abort()
    with pytest.raises(anywire.ChannelClosed):
        await waiting


@holds(CLOSE, connected, two_way)
async def test_both_close_at_once(world: World) -> None:
    channel, peer = await world.open("both")
    await channel.send(b"last of ours")
    started = time.monotonic()
    closing = peer.start(roles.close, 20)
    await channel.close(timeout=20)
    await closing
    assert time.monotonic() - started < 10, "two sides that both close must not wait for their deadlines"


@holds(CLEAR, wire("seqpacket"))
async def test_seqpacket_has_an_end_but_cannot_tell_why(world: World) -> None:
    """Its line promises no difference: a close and a death both read as the end, after everything sent before."""
    for how in (roles.close, roles.exit_now):
        channel, peer = await world.open("receive")
        await peer.call(roles.send_numbers, 5)
        peer.start(how)
        assert [roles.number_of(await channel.recv()) for _ in range(5)] == list(range(5))
        with pytest.raises((anywire.EndOfChannel, anywire.PeerLost)):
            await channel.recv()
        channel.abort()


@holds(CLEAR, wire("fifo-many"))
async def test_a_fifo_with_many_writers_has_no_end(world: World) -> None:
    channel, peer = await world.open("receive")
    await peer.call(roles.send_messages, [b"only one"])
    await peer.call(roles.close)
    assert await channel.recv() == b"only one"
    waiting = await world.still_waiting(channel.recv())
    waiting.cancel()


@holds(CLEAN_END, clean_end, sees_death)
async def test_an_exit_without_close_is_a_loss(world: World) -> None:
    channel, peer = await world.open("receive")
    await peer.call(roles.send_numbers, 5)
    peer.start(roles.exit_now, 0)
    assert [roles.number_of(await channel.recv()) for _ in range(5)] == list(range(5))
    with pytest.raises(anywire.PeerLost):
        await channel.recv()


@holds(CLOSE, two_way, connected)
async def test_after_the_end_errors_name_the_call(world: World) -> None:
    channel, _ = await world.open("both")
    channel.abort()
    for operation, call in {"send": lambda: channel.send(b"x"), "recv": lambda: channel.recv()}.items():
        error = await outcome(call())
        assert isinstance(error, anywire.ChannelClosed) and error.operation == operation, error
        assert str(error).startswith(f"{operation} "), error


@holds(CLEAN_END, clean_end, sees_death, processes, two_way)
async def test_after_a_loss_errors_name_the_call(world: World) -> None:
    channel, peer = await world.open("both")
    peer.kill()
    for _ in range(2):
        error = await outcome(channel.recv())
        assert isinstance(error, anywire.PeerLost) and error.operation == "recv", error
    error = await outcome(channel.send(b"x"))
    assert isinstance(error, anywire.PeerLost) and error.operation == "send", error
