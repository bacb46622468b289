"""Listening and serving: addresses, limits, draining, who may connect, exhausted descriptors, retries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

import pytest

import anywire
from anywire.contract.counters import snapshot

from . import roles
from .marks import (
    connected,
    connectionless,
    credentials,
    framed,
    holds,
    listening,
    processes,
    several,
    two_way,
    wire,
)
from .test_strangers import echo_server, echoes
from .wires import client_address
from .world import World, outcome

LISTENING = "listener"
WHO = "who may connect"


@holds(LISTENING, listening, two_way, connected)
async def test_several_addresses_at_once(world: World) -> None:
    """One server on this wire twice and on two others; each reports the address that it really has."""
    addresses = [world.listen_address(), world.listen_address(), "tcp://127.0.0.1:0", f"inproc://also-{os.getpid()}"]

    async def handler(channel: Any) -> None:
        async for data in channel:
            await channel.send(data)

    async with world.front.serve(handler, *addresses) as server:
        assert len(server.addresses) == 4
        for address in server.addresses:
            assert address.port != 0, f"{address} is not real"
        assert len(set(map(str, server.addresses))) == 4
        for i, address in enumerate(server.addresses):
            channel = await world.connect(address) if i < 2 else world.keep(await world.front.connect(address))
            await echoes(channel, b"hello %d" % i)
            await channel.close()


@holds(LISTENING, listening, connected)
async def test_nobody_listens(world: World) -> None:
    listener = await world.listen()
    address = client_address(listener.addresses[0])
    await world.front.stop_listening(listener)
    started = time.monotonic()
    with pytest.raises(anywire.Refused) as caught:
        await world.connect(address)
    assert isinstance(caught.value, ConnectionRefusedError)
    assert not caught.value.answered
    assert address.split("?")[0] in str(caught.value)
    assert time.monotonic() - started < 2


@holds(LISTENING, listening, connected)
async def test_connect_waits_for_the_listener(world: World) -> None:
    address = await world.free_address()
    before = snapshot().connect_retries
    connecting = await world.still_waiting(world.connect(address, wait=20))
    await world.until(lambda: snapshot().connect_retries > before)
    listener = await world.listen(address)
    accepting = asyncio.ensure_future(listener.accept())
    await connecting
    world.keep(await accepting)


@holds(LISTENING, listening, connected)
async def test_connect_does_not_wait_for_ever(world: World) -> None:
    address = await world.free_address()
    with pytest.raises(anywire.Refused):
        await world.connect(address, wait=0.1)


@holds(LISTENING, listening, connected, two_way)
async def test_connect_forever(world: World) -> None:
    """A new channel each time the last one ended; the listener may be away meanwhile."""
    address = await world.free_address()

    async def handler(channel: Any) -> None:
        await channel.send(b"welcome")
        await channel.recv()

    greeted = 0
    options = world.dial_options({"backoff": (0.01, 0.1)})
    server = world.front.serve(handler, address)
    await server.__aenter__()
    async for channel in world.front.connect_forever(client_address(address), **options):
        assert await channel.recv() == b"welcome"
        greeted += 1
        if greeted == 3:
            await channel.send(b"bye")
            await outcome(channel.close())
            break
        if greeted == 1:
            await channel.send(b"next")
            await outcome(channel.close())
        else:
            channel.abort()
            await server.close(timeout=0.5)
            server = world.front.serve(handler, address)
            await server.__aenter__()
    await server.close(timeout=1)


@holds(LISTENING, listening, connected)
async def test_close_leaves_no_name(world: World) -> None:
    for _ in range(3):
        listener = await world.listen()
        address = str(listener.addresses[0])
        await world.front.stop_listening(listener)
        assert not world.setup.name_left(address)


@holds(LISTENING, listening, connected)
async def test_close_ends_a_waiting_accept(world: World) -> None:
    listener = await world.listen()
    accepting = await world.still_waiting(listener.accept())
    await world.front.stop_listening(listener)
    with pytest.raises(anywire.ChannelClosed):
        await accepting


@holds(LISTENING, listening, connected)
async def test_an_address_in_use(world: World) -> None:
    listener = await world.listen()
    with pytest.raises(OSError) as caught:
        await world.listen(world.setup.again(str(listener.addresses[0])))
    assert str(listener.addresses[0]).split("?")[0] in str(caught.value)
    accepting = asyncio.ensure_future(listener.accept())
    await world.connect(listener.addresses[0])
    world.keep(await accepting)  # the first listener is untouched


@holds(LISTENING, wire("unix", "seqpacket"))
async def test_a_stale_socket_file_is_replaced(world: World) -> None:
    address = world.listen_address()
    dead = await world.peer()
    await dead.call(roles.listen, address)
    dead.kill()
    await dead.until_gone()
    assert world.setup.name_left(address), "a killed process leaves its socket file"
    listener = await world.listen(address)
    accepting = asyncio.ensure_future(listener.accept())
    await world.connect(address)
    world.keep(await accepting)


@holds(LISTENING, wire("unix", "seqpacket"))
async def test_a_file_that_is_no_socket_is_not_replaced(world: World) -> None:
    address = world.listen_address()
    path = address.split("://")[1].split("?")[0]
    with open(path, "w") as file:
        file.write("precious")
    with pytest.raises(OSError):
        await world.listen(address)
    with open(path) as file:
        assert file.read() == "precious"


@holds(LISTENING, listening, two_way, connected)
async def test_a_limit_on_connections(world: World) -> None:
    """At most `limit` handlers at once; the next client gets its turn when one leaves."""
    running, most = 0, 0

    async def handler(channel: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        async for data in channel:
            await channel.send(data)
        running -= 1

    async with world.front.serve(handler, world.listen_address(), limit=2) as server:
        address = server.addresses[0]
        first, second = await world.connect(address), await world.connect(address)
        await echoes(first, b"1")
        await echoes(second, b"2")

        async def third_client() -> bool:
            """Whether the third client was served at its first try (it waited), or after it was refused."""
            while True:
                channel = await outcome(world.connect(address, timeout=20))
                if not isinstance(channel, Exception):
                    await echoes(channel, b"3")
                    return True
                assert isinstance(channel, anywire.Refused), channel
                await asyncio.sleep(0.02)

        third = await world.still_waiting(third_client(), 0.1)
        await first.close()
        assert await third
        assert most == 2
        world.abort_channels()


@holds(LISTENING, listening, two_way, connected)
async def test_draining(world: World) -> None:
    """Close stops accepting, waits for the handlers that run, and then is done."""
    release = asyncio.Event()
    finished: list[bytes] = []

    async def handler(channel: Any) -> None:
        data = await channel.recv()
        await release.wait()
        await channel.send(data)
        finished.append(data)

    server = world.front.serve(handler, world.listen_address())
    async with server:
        address = server.addresses[0]
        channel = await world.connect(address)
        await channel.send(b"work")
        await world.until(lambda: len(server.connections) == 1)
        closing = await world.still_waiting(server.close(timeout=20))
        while not isinstance(late := await outcome(world.connect(address)), anywire.AnywireError):
            late.abort()  # a thread that is to close may come to it late
        release.set()
        assert await channel.recv() == b"work"
        await channel.close()
        await closing
        assert finished == [b"work"]
        assert not server.connections


@holds(LISTENING, listening, two_way, connected)
async def test_the_drain_has_a_deadline(world: World) -> None:
    entered = asyncio.Event()
    ended: list[str] = []

    async def handler(channel: Any) -> None:
        entered.set()
        try:
            await channel.recv()
        finally:
            ended.append("ended")

    async with world.front.serve(handler, world.listen_address()) as server:
        channel = await world.connect(server.addresses[0])
        await entered.wait()
        started = time.monotonic()
        await server.close(timeout=0.2)
        assert 0.1 < time.monotonic() - started < 5
        assert ended == ["ended"]
        error = await outcome(channel.recv())
        assert isinstance(error, (anywire.EndOfChannel, anywire.PeerLost)), error


@holds(LISTENING, listening, two_way, connected)
async def test_a_failing_handler_stops_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(channel: Any) -> None:
        data = await channel.recv()
        if data == b"fail":
            raise ZeroDivisionError("on purpose")
        await channel.send(data)

    async with world.front.serve(handler, world.listen_address()) as server:
        bad = await world.connect(server.addresses[0])
        await bad.send(b"fail")
        error = await outcome(bad.recv())
        assert isinstance(error, (anywire.PeerLost, anywire.EndOfChannel)), error
        good = await world.connect(server.addresses[0])
        await echoes(good, b"fine")
        world.abort_channels()
    assert "on purpose" in caplog.text
    assert any(record.name.startswith("anywire") for record in caplog.records)


@holds(LISTENING, listening, two_way, connected)
async def test_a_peer_that_left_before_its_answer_is_no_failure(world: World, caplog: pytest.LogCaptureFixture) -> None:
    entered = asyncio.Event()

    async def handler(channel: Any) -> None:
        entered.set()
        with contextlib.suppress(anywire.EndOfChannel):
            while True:
                await channel.recv()
        while True:
            await channel.send(b"answer")

    caplog.set_level(logging.INFO, logger="anywire")
    async with world.front.serve(handler, world.listen_address()) as server:
        channel = await world.connect(server.addresses[0])
        await channel.send(b"ask")
        # Without a close frame the handler learns of it only when the client stops reading its answers.
        await channel.close(timeout=5.0 if world.promise.clean_end else 0.2)
        await entered.wait()
    records = [record for record in caplog.records if record.name.startswith("anywire")]
    assert [record.levelname for record in records] == ["INFO"], caplog.text
    said = records[0].getMessage()
    assert said.startswith("handler of ") and records[0].exc_info is None
    assert said.count(f"{server.addresses[0].scheme}:") == 1, "where it was is said once"


@holds(WHO, framed, listening, two_way)
async def test_authorize_refuses_with_the_reason(world: World) -> None:
    seen: list[Any] = []

    def authorize(peer: Any) -> str | None:
        seen.append(peer)
        return "only on weekdays" if len(seen) == 1 else None

    async with echo_server(world, authorize=authorize) as (address, handled):
        error = await outcome(world.connect(address))
        assert isinstance(error, anywire.Refused) and "only on weekdays" in str(error), error
        assert not handled
        await echoes(await world.connect(address), b"now")
    assert len(seen) == 2


@holds(WHO, framed, listening, two_way)
async def test_waiting_does_not_ask_again_who_refused(world: World) -> None:
    """Neither `wait` nor `connect_forever` repeats what somebody who answered refused."""
    asked: list[Any] = []

    def authorize(peer: Any) -> str:
        asked.append(peer)
        return "never"

    async with echo_server(world, authorize=authorize) as (address, _handled):
        with pytest.raises(anywire.Refused, match="never") as caught:
            await world.connect(address, wait=3600)
        assert caught.value.answered
        options = world.dial_options({"backoff": (0.001, 0.001)})
        with pytest.raises(anywire.Refused, match="never"):
            async for channel in world.front.connect_forever(client_address(address), **options):
                world.keep(channel)
    assert len(asked) == 2


@holds(WHO, listening, two_way, connected)
async def test_this_sides_refusal_is_not_repeated_either(world: World) -> None:
    async with echo_server(world) as (address, _handled):
        options = world.dial_options({"backoff": (0.001, 0.001), "authorize": lambda peer: "not that one"})
        with pytest.raises(anywire.Refused, match="this side refused the peer: not that one") as caught:
            async for channel in world.front.connect_forever(client_address(address), **options):
                world.keep(channel)
        assert caught.value.answered


@holds(WHO, listening, two_way, connected)
async def test_an_authorize_that_fails_leaves_no_connection(world: World) -> None:
    def authorize(peer: Any) -> bool:
        raise ZeroDivisionError("on purpose")

    listener = await world.listen()
    accepting = asyncio.ensure_future(listener.accept())
    with pytest.raises(ZeroDivisionError) as caught:
        await world.connect(listener.addresses[0], authorize=authorize)
    await _is_over(world.keep(await accepting))
    assert caught.tb is not None  # the traceback, and all that its frames hold, was alive until here


@holds(WHO, listening, two_way, connected, fronts=("async",))
@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_an_authorize_that_takes_too_long_leaves_no_connection(world: World, how: str) -> None:
    """`timeout` covers it, with `wait` too, and so does cancellation."""
    asked, never = asyncio.Event(), asyncio.Event()

    async def authorize(peer: Any) -> bool:
        asked.set()
        return await never.wait()

    listener = await world.listen()
    accepting = asyncio.ensure_future(listener.accept())
    limits = {"timeout": 0.2, "wait": 0.1} if how == "timeout" else {}
    connecting = asyncio.ensure_future(world.connect(listener.addresses[0], authorize=authorize, **limits))
    await asked.wait()
    if how == "cancel":
        connecting.cancel()
    await asyncio.wait([connecting])
    accepted = world.keep(await accepting)
    await _is_over(accepted)
    if how == "cancel":
        assert connecting.cancelled()
    else:
        error = connecting.exception()
        assert isinstance(error, anywire.TimedOut) and error.operation == "connect", error
        assert error.seconds == pytest.approx(0.3)


async def _is_over(channel: Any) -> None:
    error = await outcome(channel.recv())
    assert isinstance(error, (anywire.EndOfChannel, anywire.PeerLost)), error


@holds(WHO, listening, two_way, connected)
async def test_authorize_by_yes_and_no(world: World) -> None:
    answers = [False, True]

    def authorize(peer: Any) -> bool:
        return answers.pop(0)

    async with echo_server(world, authorize=authorize) as (address, handled):
        channel = await outcome(world.connect(address))
        if not isinstance(channel, Exception):  # no preamble on this wire: the refusal shows at the first use
            channel = await outcome(channel.recv())
        assert isinstance(channel, anywire.AnywireError), channel
        await echoes(await world.connect(address), b"now")
        assert len(handled) == 1


@holds(WHO, listening, two_way, connectionless, several)
async def test_authorize_decides_at_the_first_message(world: World) -> None:
    """Whoever is refused gets no answer, and neither handler nor others notice; who is admitted is asked about once."""
    seen: list[Any] = []

    def authorize(peer: Any) -> bool:
        seen.append(peer)
        return peer.address != seen[0].address

    async with echo_server(world, authorize=authorize) as (address, handled):
        refused, admitted = await world.connect(address), await world.connect(address)
        await refused.send(b"let me in")
        await world.until(lambda: seen)
        await echoes(admitted, b"now")
        await refused.send(b"and again")
        await world.until(lambda: len(seen) == 3)
        await echoes(admitted, b"still here")
        with pytest.raises(anywire.TimedOut):
            await refused.recv(timeout=0.01)
        assert len(handled) == 1
        assert [peer.address == seen[0].address for peer in seen] == [True, False, True]


@holds(WHO, listening, two_way, fronts=("async",))
async def test_authorize_may_be_a_coroutine(world: World) -> None:
    async def authorize(peer: Any) -> bool:
        await asyncio.sleep(0)
        return True

    async with echo_server(world, authorize=authorize) as (address, _handled):
        await echoes(await world.connect(address), b"hello")


@holds(WHO, credentials, listening)
async def test_the_kernel_says_who_the_peer_is(world: World) -> None:
    channel, peer = await world.open("receive")
    assert (channel.peer.pid, channel.peer.uid, channel.peer.gid) == (peer.pid, os.getuid(), os.getgid())
    channel, peer = await world.open("send")
    assert channel.peer.uid == os.getuid()


@holds(WHO, credentials, listening)
async def test_another_user_is_refused(world: World) -> None:
    """Same uid by default, also where the file's mode or the abstract name would let everybody in."""
    world.open_directories()
    address = world.listen_address()
    if not address.startswith(("unix:@", "shm:")):
        address += "&mode=0666" if "?" in address else "?mode=0666"
    handled = []

    async def handler(channel: Any) -> None:
        handled.append(channel)
        async for data in channel:
            await channel.send(data)

    async with world.front.serve(handler, address) as server:
        stranger = await world.peer()
        await stranger.call(roles.become, 65534)
        refused = await stranger.call(roles.dial_outcome, str(server.addresses[0]))
        if refused is None:
            refused = await stranger.call(roles.recv_outcome)
        assert refused["kind"] in ("Refused", "PeerLost", "EndOfChannel"), refused
        if world.setup.framed:
            assert refused["kind"] == "Refused" and "user 65534" in refused["text"], refused
        assert not handled
        await echoes(await world.connect(server.addresses[0]), b"the same user")
        world.abort_channels()


@holds(WHO, credentials, listening)
async def test_a_listener_of_another_user_is_refused(world: World) -> None:
    """Both sides check: a client does not talk to whoever took the name."""
    world.open_directories()
    impostor = await world.peer()
    await impostor.call(roles.become, 65534)
    (address,) = await impostor.call(roles.listen, world.listen_address())
    impostor.start(roles.accept)
    error = await outcome(world.connect(address))
    assert isinstance(error, anywire.Refused), error
    impostor.start(roles.accept)  # the first is over: from there the connection had come about
    channel = await world.connect(address, authorize=lambda peer: peer.uid == 65534)
    assert channel.peer.uid == 65534


@holds(LISTENING, listening, two_way, connected, processes)
async def test_exhausted_descriptors(world: World) -> None:
    """A server with no descriptors left neither spins nor stops: when some are free again it goes on accepting."""
    server = await world.peer()
    address = await server.call(roles.start_limited_server, world.listen_address(), world.front.name, 24)
    dial = client_address(address)
    first = await world.connect(dial)
    await echoes(first, b"first")
    clients = await world.peer()
    taken = await clients.call(roles.take_connections, dial, 40, world.dial_options({}))
    tries, seconds = await server.call(roles.accept_errors), await server.call(roles.cpu_seconds)
    await asyncio.sleep(0.5)  # a measured interval, not a wait
    tries, seconds = await server.call(roles.accept_errors) - tries, await server.call(roles.cpu_seconds) - seconds
    assert tries <= 25 and seconds < 0.2, f"{tries} tries, {seconds:.2f} s of CPU in 0.5 s: it spins"
    await echoes(first, b"still served")
    await clients.call(roles.drop_connections)
    assert taken
    # A handshake that needs descriptors itself is broken off while there are too few.
    until = time.monotonic() + 20
    while True:
        try:
            channel = await world.connect(dial, timeout=20)
            break
        except anywire.PeerLost:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
    await echoes(channel, b"accepted again")
