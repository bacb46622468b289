"""What a message may cost: no Task, no Future, no trip through the loop when it is here, one system call each way."""

from __future__ import annotations

import asyncio
import collections
import re
import shutil
import subprocess
from typing import Any

import pytest

from . import roles
from .marks import connected, holds, ordered, roomy, two_way, wire
from .roles import message
from .world import World

COSTS = "costs per message"


@holds(COSTS, two_way, connected, fronts=("async",))
async def test_no_task_and_no_future_per_message(world: World) -> None:
    channel, peer = await world.open("both")
    echoing = peer.start(roles.echo)
    await channel.send(b"warm")
    await channel.recv()
    loop = asyncio.get_running_loop()
    made: collections.Counter[str] = collections.Counter()

    def count_task(loop: Any, coroutine: Any, **options: Any) -> Any:
        made["tasks"] += 1
        return asyncio.Task(coroutine, loop=loop, **options)

    create_future = loop.create_future

    def count_future() -> Any:
        made["futures"] += 1
        return create_future()

    loop.set_task_factory(count_task)
    loop.create_future = count_future  # type: ignore[method-assign]
    try:
        for _ in range(1000):
            await channel.send(b"ping")
            await channel.recv()
    finally:
        loop.set_task_factory(None)
        del loop.create_future
    assert not made, made
    assert not echoing.done()


@holds(COSTS, ordered, roomy, fronts=("async",))
async def test_a_message_that_is_here_needs_no_loop(world: World) -> None:
    """Some hundred messages wait; receiving them neither suspends nor asks the loop for anything."""
    channel, peer = await world.open("receive")
    await peer.call(roles.send_numbers, 50)
    assert roles.number_of(await channel.recv()) == 0
    await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    calls: collections.Counter[str] = collections.Counter()
    originals = {
        name: getattr(loop, name) for name in ("call_soon", "call_later", "call_at", "add_reader", "create_future")
    }
    for name, original in originals.items():
        setattr(
            loop, name, lambda *a, _name=name, _original=original, **k: (calls.update([_name]), _original(*a, **k))[1]
        )
    try:
        for number in range(1, 50):
            with pytest.raises(StopIteration) as returned:
                channel.recv().send(None)
            assert roles.number_of(returned.value.value) == number
    finally:
        for name in originals:
            delattr(loop, name)
    assert not calls, calls


@holds(COSTS, ordered, roomy, fronts=("async",))
async def test_a_send_with_room_needs_no_loop(world: World) -> None:
    channel, peer = await world.open("send")
    receiving = peer.start(roles.receive_numbers, 50)
    await asyncio.sleep(0)
    for number in range(50):
        with pytest.raises(StopIteration):
            channel.send(message(number)).send(None)
    assert await receiving == list(range(50))


@holds(COSTS, wire("tcp", "unix", "abstract"), fronts=("blocking",))
async def test_one_system_call_each_way(world: World) -> None:
    """strace of a blocking echo: per small message one send and one receive, and nothing else."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed on this platform")
    channel, peer = await world.open("both")
    await peer.call(roles.run, int)
    command = [strace, "-f", "-c", "-p", str(peer.pid), "-o", f"{world.directory}/calls"]
    tracing = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert tracing.stderr is not None
    said = (await tracing.stderr.readline()).decode()
    if "attached" not in said:
        pytest.skip(f"this platform doesn't allow ptrace: {said.strip()}")
    echoing = peer.start(roles.echo)
    for _ in range(1000):
        await channel.send(b"ping")
        assert await channel.recv() == b"ping"
    tracing.terminate()
    await tracing.wait()
    table = (world.directory / "calls").read_text()
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d", line)]
    calls = {row[-1]: int(row[3]) for row in rows if row[-1] != "total"}
    assert not echoing.done()
    sending = sum(calls.get(name, 0) for name in ("sendto", "sendmsg", "write", "writev"))
    receiving = sum(calls.get(name, 0) for name in ("recvfrom", "recvmsg", "read", "readv"))
    # The last one may still be under way when strace stops counting.
    assert 999 <= sending <= 1030, table
    assert 999 <= receiving <= 1030, table
    assert sum(calls.values()) <= 2100, table
