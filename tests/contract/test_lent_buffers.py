"""A buffer that was lent to a receive is free again as soon as the receive is over, however it ended."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

import anywire


@pytest.fixture(params=["channel", "stream"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def silent(connection: Any) -> None:
    """Says nothing, and stays."""
    await asyncio.Event().wait()


def served(face: str) -> Any:
    return (anywire.serve if face == "channel" else anywire.serve_stream)(silent, "tcp://127.0.0.1:0", close_timeout=0)


async def connected(face: str, server: Any) -> tuple[Any, Any]:
    connect = anywire.connect if face == "channel" else anywire.connect_stream
    connection: Any = await connect(server.addresses[0])
    return connection, connection.recv_into if face == "channel" else connection.read_into


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_after_a_cancellation(face: str, turns: int) -> None:
    async def main() -> None:
        async with served(face) as server:
            connection, receive_into = await connected(face, server)
            buffer = bytearray(10)
            task = asyncio.ensure_future(receive_into(buffer))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            buffer.extend(b"resized")           # BufferError while anybody holds it
            assert caught.value.__traceback__ is not None
            connection.abort()

    asyncio.run(main())


def test_after_busy(face: str) -> None:
    async def main() -> None:
        async with served(face) as server:
            connection, receive_into = await connected(face, server)
            first = asyncio.ensure_future(receive_into(bytearray(10)))
            await asyncio.sleep(0)
            buffer = bytearray(10)
            with pytest.raises(anywire.Busy) as caught:
                await receive_into(buffer)
            buffer.extend(b"resized")
            assert caught.value.__traceback__ is not None
            connection.abort()
            with pytest.raises(anywire.ChannelClosed):
                await first

    asyncio.run(main())


CYCLE = """
import asyncio, gc, anywire

async def silent(connection):
    await asyncio.Event().wait()

async def main():
    async with anywire.serve(silent, "tcp://127.0.0.1:0", close_timeout=0) as server:
        channel = await anywire.connect(server.addresses[0])

        async def forgotten():
            await channel.recv_into(bytearray(10))

        for operation in (channel.recv_into(bytearray(10)), forgotten()):
            cycle = [operation]
            cycle.append(cycle)
            del operation, cycle
        gc.collect()
        channel.abort()

asyncio.run(main())
"""


def test_the_garbage_collector_gives_it_back_too() -> None:
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", CYCLE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
