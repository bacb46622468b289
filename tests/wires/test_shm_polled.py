"""Shared memory on a loop that polls before it sleeps: it looks into the ring, and is rung for only when it sleeps."""

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time

import pytest

import anywire
from anywire import sync

FOR_EVER, SHORT = 60_000_000, 20         # microseconds of polling
_names = itertools.count()


def unique():
    return f"shm://anywire-polled-{os.getpid()}-{next(_names)}"


def run(main, busy_poll):
    with asyncio.Runner(loop_factory=lambda: anywire.new_event_loop(busy_poll=busy_poll)) as runner:
        return runner.run(main)


@contextlib.asynccontextmanager
async def pair(listen=anywire.listen, connect=anywire.connect, **options):
    address = unique()
    async with listen(address, **options) as listener:
        accepting = asyncio.create_task(listener.accept())
        ours = await connect(address, **options)
        theirs = await accepting
    try:
        yield ours, theirs
    finally:
        ours.abort()
        theirs.abort()


async def echo(channel):
    with contextlib.suppress(anywire.EndOfChannel):
        while True:
            await channel.send(await channel.recv())


def test_nobody_rings_for_a_loop_that_polls():
    async def main():
        async with pair() as (ours, theirs):
            echoing = asyncio.create_task(echo(theirs))
            for number in range(500):
                message = b"%d" % number * (1 + number % 7 * 20_000)
                await ours.send(message)
                assert await ours.recv() == message
            # The first wait of each was before the loop knew of it; long messages may wait for room.
            rung = ours.endpoint.doorbells, theirs.endpoint.doorbells
            await ours.close(timeout=1)
            await echoing
            return rung

    assert max(run(main(), FOR_EVER)) < 50


def test_a_bare_stream_is_looked_at_too():
    async def main():
        async with pair(anywire.listen_stream, anywire.connect_stream) as (ours, theirs):
            async def back():
                async for chunk in theirs:
                    await theirs.write(chunk)

            echoing = asyncio.create_task(back())
            for number in range(200):
                await ours.write(b"%06d" % number)
                assert await ours.read_exactly(6) == b"%06d" % number
            await ours.write_eof()
            await echoing

    run(main(), FOR_EVER)


def asleep(native_id):
    """Wait until that thread sleeps in the kernel."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with open(f"/proc/self/task/{native_id}/wchan") as wchan, open(f"/proc/self/task/{native_id}/stat") as stat:
            if wchan.read() not in ("0", "") or stat.read().rpartition(")")[2].split()[0] == "S":
                return
        time.sleep(0.0005)
    raise AssertionError("it never slept")


def test_a_loop_that_sleeps_is_woken():
    rounds, address, begun = 60, unique(), threading.Event()
    native = []

    async def main():
        native.append(threading.get_native_id())
        async with anywire.listen(address) as listener:
            begun.set()
            channel = await listener.accept()
        loop = asyncio.get_running_loop()
        async with channel:
            for number in range(rounds):
                await channel.send(b"next")
                assert await channel.recv() == b"%d" % number
            return loop.stats().sleeps

    def other():
        begun.wait(30)
        with sync.connect(address) as channel:
            for number in range(rounds):
                channel.recv(timeout=30)
                if number % 3:
                    asleep(native[0])
                channel.send(b"%d" % number)

    thread = threading.Thread(target=other)
    thread.start()
    sleeps = run(asyncio.wait_for(main(), 60), SHORT)
    thread.join()
    assert sleeps > rounds // 3


@pytest.mark.parametrize("what", ["descriptor", "timer", "callback"])
def test_others_have_their_turn_beside_a_connection_that_is_always_ready(what):
    async def main():
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        with here, there:
            async with pair() as (ours, theirs):
                happened = asyncio.Event()
                echoing = asyncio.create_task(echo(theirs))
                for number in range(1_000_000):
                    await ours.send(b"x")
                    await ours.recv()
                    if happened.is_set():
                        break
                    if number == 100:
                        if what == "descriptor":
                            loop.add_reader(here, happened.set)
                            there.send(b"x")
                        elif what == "timer":
                            loop.call_later(0.0001, happened.set)
                        else:
                            threading.Thread(target=lambda: loop.call_soon_threadsafe(happened.set)).start()
                loop.remove_reader(here)
                await ours.close(timeout=1)
                await echoing
                return number

    assert run(main(), FOR_EVER) < 999_999


def test_a_peer_that_goes_is_noticed():
    async def main():
        async with pair() as (ours, theirs):
            receiving = asyncio.create_task(ours.recv())
            await asyncio.sleep(0.001)
            theirs.abort()
            with pytest.raises(anywire.PeerLost):
                await receiving

    run(main(), FOR_EVER)
