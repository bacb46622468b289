"""Several tasks wait for one descriptor."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from anywire.ipc import waiting


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_all_who_wait_are_woken(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(waiting.readable(pipe[0])) for _ in range(3)]
        await asyncio.sleep(0)
        os.write(pipe[1], b"x")
        await asyncio.wait_for(asyncio.gather(*tasks), 5)

    asyncio.run(main())


def test_a_cancelled_wait_leaves_the_others(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        first, second = (asyncio.create_task(waiting.readable(pipe[0])) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        assert first.cancelled() and not second.done()
        os.write(pipe[1], b"x")
        await asyncio.wait_for(second, 5)

    asyncio.run(main())


def test_the_last_cancelled_wait_stops_watching(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        for _ in range(2):
            task = asyncio.create_task(waiting.readable(pipe[0]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            assert not asyncio.get_running_loop().remove_reader(pipe[0])

    asyncio.run(main())


def test_reading_and_writing_are_waited_for_apart() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            reading = asyncio.create_task(waiting.readable(ours.fileno()))
            await asyncio.wait_for(waiting.writable(ours.fileno()), 5)
            assert not reading.done()
            theirs.send(b"x")
            await asyncio.wait_for(reading, 5)

    asyncio.run(main())


@pytest.mark.parametrize("thread", [False, True])
def test_forgetting_ends_the_waits(pipe: tuple[int, int], thread: bool) -> None:
    async def main() -> None:
        task = asyncio.create_task(waiting.readable(pipe[0]))
        await asyncio.sleep(0)
        if thread:
            await asyncio.to_thread(waiting.forget, pipe[0])
        else:
            waiting.forget(pipe[0])
        with pytest.raises(OSError, match="closed while a task waited"):
            await asyncio.wait_for(task, 5)

    asyncio.run(main())
