"""Other processes: fork, interrupts by signal, moving a connection, nothing left after a thousand connections."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire.contract.handle import Handle

from . import frames, roles
from .marks import connected, framed, half_close, holds, listening, processes, reliable, stream, two_way
from .peers import Peer
from .roles import message
from .wires import client_address
from .world import World, outcome

FORK = "refuses a forked child"
LEAKS = "leaves nothing behind"
INTERRUPT = "safe cancellation"
MOVE = "moves to another process"


@pytest.mark.no_sanitize  # forks beside other threads: gcc's ASan may hold its allocator's lock at that moment
@holds(FORK)
async def test_a_forked_child_is_refused_everything(world: World) -> None:
    """Also on the wire between threads: the process under test opens both ends itself, then forks."""
    peer = await world.peer(process=True)
    how = world.dial_options({}), world.setup.two_way, world.setup.announced
    refused, after = await peer.call(roles.fork_with_a_channel, world.listen_address(), world.front.name, *how)
    assert refused == dict.fromkeys(("send", "try_send", "send_many", "recv", "recv_into", "recv_many"), "Forked")
    assert after == b"the parent goes on"


@pytest.mark.no_sanitize  # as above
@holds(FORK, processes)
async def test_the_peer_sees_no_end_when_the_child_exits(world: World) -> None:
    channel, peer, forking = await world.opened_by(roles.dial_fork_and_send, world.front.name)
    assert await channel.recv() == b"the child is gone"
    assert await forking == 0
    waiting = await world.still_waiting(channel.recv())
    peer.kill()
    if world.promise.death == "no":
        waiting.cancel()
    else:
        assert isinstance(await outcome(waiting), (anywire.PeerLost, anywire.EndOfChannel))


@holds(INTERRUPT, reliable, two_way, listening, connected, processes)
async def test_ctrl_c_while_receiving(world: World) -> None:
    """SIGINT reaches a process that waits in recv. It may go on afterwards: nothing is lost."""
    peer, channel = await _interruptible(world, roles.receive_despite_interrupts, 30)
    for number in range(30):
        for _ in range(number % 3):
            await _interrupt(peer)
        await peer.until_state("S")
        await channel.send(message(number, 100 + number * 50))
    assert await peer.kept_future == list(range(30))


@holds(INTERRUPT, framed, two_way, listening)
async def test_ctrl_c_inside_a_frame(world: World) -> None:
    listener = frames.RawListener(world.listen_address())
    peer = await world.peer()
    sizes = [40, 40, 40, 40, 700_000, 700_000, 700_000]
    cuts = [0, 3, 8, 30, 100, 262_152, 600_000]
    address = client_address(listener.address)
    numbers = peer.start(
        roles.receive_despite_interrupts, address, world.front.name, world.dial_options({}), len(sizes)
    )
    raw = world.raw(await world.front.threads.run(listener.accept))
    await raw.recv_preamble()
    await raw.send(frames.preamble())
    assert await peer.reports.get() == "connected", "an interrupt in mid-handshake would end that"
    for number, (size, cut) in enumerate(zip(sizes, cuts, strict=True)):
        data = frames.frame(message(number, size))
        await raw.send(data[:cut])
        for _ in range(2):
            await _interrupt(peer)
        await raw.send(data[cut:])
    assert await numbers == list(range(len(sizes)))
    listener.close()


@holds(INTERRUPT, reliable, two_way, listening, connected, processes)
async def test_ctrl_c_while_sending(world: World) -> None:
    """The sender is stopped inside a message, again and again; what arrives is whole and in step."""
    size = min(world.setup.largest, 3_000_000)
    peer, channel = await _interruptible(world, roles.send_despite_interrupts, 5, size)
    for _ in range(5):
        assert await peer.reports.get() == "sending"
        await _interrupt(peer)
    numbers = []
    while not numbers or numbers[-1] != 10**9:
        numbers.append(roles.number_of(await channel.recv(timeout=10)))
    await channel.close()
    large = [number for number in numbers if number != roles.FILLER]
    assert large == sorted(set(large))
    assert set(large) <= {*range(5), 10**9}
    assert await peer.kept_future == 5, "every send was interrupted"


async def _interruptible(world: World, role: Any, *args: Any) -> tuple[Any, Any]:
    """A peer in whose process the front under test runs `role`, and the channel to it."""
    listener = await world.listen()
    peer = await world.peer()
    address = client_address(listener.addresses[0])
    peer.kept_future = peer.start(role, address, world.front.name, world.dial_options({}), *args)
    return peer, world.keep(await listener.accept())


async def _interrupt(peer: Peer) -> None:
    """Ctrl-C, once the process sleeps in its call; it says so when it caught it."""
    await peer.until_state("S")
    peer.signal(signal.SIGINT)
    while await peer.reports.get() != "interrupted":
        pass


async def _heir(world: World, handle: Any) -> Peer:
    """A new process that has the handle's descriptors."""
    return await world.peer(fds=[fd for fd in handle.fds if fd >= 0])


@holds(MOVE, two_way, connected, listening, processes)
async def test_a_connection_moves_to_another_process(world: World) -> None:
    """Detached here, attached there: what was in flight is received there, and the counting goes on."""
    if not world.setup.moves:
        channel, peer = await world.open("both")
        with pytest.raises(anywire.Unsupported):  # TLS: the keys live in this process's library; shm: sealed memory
            channel.detach()
        return
    channel, peer = await world.open("both")
    await peer.call(roles.send_numbers, 3)
    assert roles.number_of(await channel.recv()) == 0
    handle = channel.detach()
    with pytest.raises(anywire.ChannelClosed):
        await channel.send(b"x")
    heir = await _heir(world, handle)
    moved = await heir.call(roles.attach_and_receive, handle.pack(), 2)
    handle.close()
    assert moved == [1, 2]
    receiving = peer.start(roles.recv_one)
    await heir.call(roles.send_messages, [b"from the heir"])
    assert await receiving == b"from the heir"


@holds(MOVE, two_way, connected, listening, processes)
async def test_a_connection_that_moves_keeps_its_peer_and_its_end(world: World) -> None:
    """After send_eof() nothing more is sent there either: the peer would never see it."""
    if not world.setup.moves:
        return  # it does not move: see above
    channel, peer = await world.open("both", max_message=5000)
    who, address = channel.peer, channel.address
    ended = world.promise.half_close
    if ended:
        await channel.send_eof()
    detached = channel.detach()
    moved = world.keep(await world.front.attach(Handle.unpack(detached.pack(), detached.take())))
    assert (moved.peer, moved.address, moved.max_message) == (who, address, 5000)
    if ended:
        with pytest.raises(anywire.ChannelClosed):
            await moved.send(b"too late")
        assert (await peer.call(roles.recv_outcome))["kind"] == "EndOfChannel"
    await peer.call(roles.send_messages, [b"it may still speak"])
    assert await moved.recv() == b"it may still speak"


@holds(MOVE, stream, half_close, two_way, connected, listening, processes)
async def test_a_stream_that_moves_keeps_its_end(world: World) -> None:
    """After write_eof() a write there says so, and reading goes on."""
    if not world.setup.moves:
        return  # it does not move: see above
    stream_here, peer = await world.open("both", stream=True)
    await stream_here.write_eof()
    detached = stream_here.detach()
    moved = world.keep(await world.front.attach(Handle.unpack(detached.pack(), detached.take())))
    with pytest.raises(anywire.ChannelClosed, match="write_eof"):
        await moved.write(b"too late")
    await peer.call(roles.write, b"it may still speak")
    assert await moved.read_exactly(18) == b"it may still speak"


@holds(MOVE, two_way, connected, listening, processes)
async def test_a_listener_moves_to_another_process(world: World) -> None:
    listener = await world.listen()
    if world.setup.name == "tls":
        with pytest.raises(anywire.Unsupported):
            listener.detach()
        return
    address = client_address(listener.addresses[0])
    handle = listener.detach()
    heir = await _heir(world, handle)
    serving = await heir.call(roles.attach_listener, handle.pack())
    handle.close()
    accepting = heir.start(roles.accept)
    channel = await world.connect(address)
    await accepting
    heir.start(roles.echo)
    await channel.send(b"hello")
    assert await channel.recv() == b"hello"
    assert serving


@holds(MOVE, two_way, connected, listening, processes)
async def test_who_may_connect_is_asked_again_where_a_listener_moved(world: World) -> None:
    """A function can't travel: `attach` demands one of a listener that had one, and then refuses as that one says."""
    if world.setup.name == "tls":
        return  # its listener does not move: see above
    asked: list[Any] = []

    def not_the_first(peer: Any) -> bool:
        asked.append(peer)
        return len(asked) > 1

    listener = await world.listen(authorize=lambda peer: False)
    address = client_address(listener.addresses[0])
    detached = listener.detach()
    handle = Handle.unpack(detached.pack(), detached.take())
    for nothing in ({}, {"authorize": None}):
        with pytest.raises(ValueError, match="authorize="):
            await world.front.attach(handle, **nothing)
    moved = await world.front.attach(handle, authorize=not_the_first)
    accepting = asyncio.ensure_future(moved.accept())
    refused = await outcome(world.connect(address))
    if world.setup.framed:
        assert isinstance(refused, anywire.Refused), refused
    admitted = await world.connect(address)
    await admitted.send(b"hello")
    assert await world.keep(await accepting).recv() == b"hello"
    assert len(asked) == 2
    await world.front.stop_listening(moved)


@holds(MOVE, two_way, connected, listening, processes)
async def test_a_connection_that_moves_asks_nobody(world: World) -> None:
    if not world.setup.moves:
        return  # it does not move: see above
    channel, _peer = await world.open("both")
    with channel.detach() as handle:
        with pytest.raises(ValueError, match="listeners"):
            await world.front.attach(handle, authorize=lambda peer: True)
        assert handle.fds, "the handle can still be attached"


@pytest.mark.no_sanitize  # measures memory
@holds(LEAKS, two_way, connected, listening)
async def test_a_thousand_connections(world: World) -> None:
    """No descriptor, thread or name is left in either process, and memory doesn't grow."""

    async def handler(channel: Any) -> None:
        async for data in channel:
            await channel.send(data)

    peer = await world.peer()
    async with world.front.serve(handler, world.listen_address()) as server:
        address = client_address(server.addresses[0])
        options = world.dial_options({})
        await peer.call(roles.connect_and_close, address, world.front.name, 100, options)  # whatever is made once
        await world.until(lambda: not server.connections)
        gc.collect()
        before, theirs_before = roles.resources(), await peer.call(roles.resources)
        await peer.call(roles.connect_and_close, address, world.front.name, 1000, options)
        await world.until(lambda: not server.connections)
        await world.until(lambda: roles.resources()["threads"] <= before["threads"] + 8)
        gc.collect()
        for earlier, now in ((before, roles.resources()), (theirs_before, await peer.call(roles.resources))):
            assert now["descriptors"] <= earlier["descriptors"], (earlier, now)
            assert now["threads"] <= earlier["threads"] + 8, (earlier, now)  # the suite's own idle threads
            assert now["resident"] - earlier["resident"] < 6 << 20, (earlier, now)
    assert not world.setup.name_left(str(server.addresses[0]))
    assert not list(Path(world.directory).rglob("*socket*"))


@holds(LEAKS, listening, connected)
async def test_refused_connections_leave_nothing(world: World) -> None:
    address = await world.free_address()
    for _ in range(20):
        await outcome(world.connect(address))
    before = roles.resources()["descriptors"]
    for _ in range(200):
        assert isinstance(await outcome(world.connect(address)), anywire.Refused)
    assert roles.resources()["descriptors"] <= before


@holds(LEAKS, reliable)
async def test_aborted_channels_leave_nothing(world: World) -> None:
    counts = []
    for _ in range(4):
        sender, sender_peer = await world.open("send")
        await sender.send(b"x")
        receiver, receiver_peer = await world.open("receive")
        sender.abort()
        receiver.abort()
        for peer in (sender_peer, receiver_peer):
            await peer.close()
        del sender, receiver, sender_peer, receiver_peer, peer
        world.abort_channels()
        await world.close_listeners()
        gc.collect()
        await asyncio.sleep(0.01)
        counts.append(roles.resources()["descriptors"])
    assert counts[-1] <= counts[1], counts


def test_the_suite_itself_leaves_no_process() -> None:
    """Peers that are killed are reaped: no zombie is a child of the process that forks them."""
    from .peers import host

    children = Path(f"/proc/{host().process.pid}/task/{host().process.pid}/children").read_text().split()
    for pid in children:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state != "Z"
    assert os.getpid()
