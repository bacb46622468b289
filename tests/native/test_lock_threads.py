"""Threads that share memory under our semaphores and locks, some of them for the tasks of an event loop.

Ordinary tests, and what `make races` runs under ThreadSanitizer: the waits are made without the GIL, in memory that all
of them touch, and one that is closed is still used by who waits in it.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

import pytest
from native_threads import together

from anywire.ipc import Condition, Mutex, RWLock, Semaphore, SharedMemory

THREADS, TURNS = 4, 100
COUNTER, PLACES = 0, (256, 512)
"""Where what is guarded lies, and what guards it; on cache lines of their own."""


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory.anonymous(mmap.PAGESIZE) as memory:
        yield memory


def add(memory: SharedMemory) -> None:
    was = int.from_bytes(memory[COUNTER:COUNTER + 8], "little")
    memory[COUNTER:COUNTER + 8] = (was + 1).to_bytes(8, "little")


def guarded(lock: Any) -> AbstractContextManager[Any]:
    return lock.writing() if isinstance(lock, RWLock) else lock  # type: ignore[no-any-return]


def guarded_async(lock: Any) -> AbstractAsyncContextManager[Any]:
    return lock.writing() if isinstance(lock, RWLock) else lock  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Semaphore, Mutex, RWLock])
def test_threads_and_tasks_exclude_each_other(memory: SharedMemory, kind: Any) -> None:
    """Through several objects of one place, as processes have them."""
    made = kind.create_in(memory, PLACES[0], *([1] if kind is Semaphore else []))
    locks = [made, *(kind.open_in(memory, PLACES[0]) for _ in range(2))]

    def count(number: int) -> None:
        for _ in range(TURNS):
            with guarded(locks[number % 3]):
                add(memory)

    async def one(number: int) -> None:
        for _ in range(TURNS // 4):
            async with guarded_async(locks[number % 3]):
                add(memory)

    async def several() -> None:
        await asyncio.gather(*(one(number) for number in range(4)))

    together(*(lambda n=n: count(n) for n in range(THREADS)), lambda: asyncio.run(several()))  # type: ignore[misc]
    assert int.from_bytes(memory[:8], "little") == (THREADS + 1) * TURNS
    for lock in locks:
        lock.close()


def test_threads_wake_each_other_at_a_condition(memory: SharedMemory) -> None:
    mutex = Mutex.create_in(memory, PLACES[0])
    condition = Condition.create_in(memory, mutex, PLACES[1])

    def give() -> None:
        for _ in range(TURNS):
            with mutex:
                memory[COUNTER] += 1
                condition.notify()

    def take(timeout: float | None) -> None:
        for _ in range(TURNS):
            with mutex:
                while not memory[COUNTER]:
                    try:
                        condition.wait(timeout)
                    except TimeoutError:
                        pass
                memory[COUNTER] -= 1

    together(give, lambda: take(None), give, lambda: take(0.0005))
    assert memory[COUNTER] == 0
    condition.close()
    mutex.close()


def test_semaphores_are_closed_while_others_wait(memory: SharedMemory) -> None:
    """Threads go on waiting in the memory, tasks are told."""
    for _ in range(20):
        waited, other = Semaphore.create_in(memory, PLACES[0]), Semaphore.open_in(memory, PLACES[0])

        async def main(waited: Semaphore = waited, other: Semaphore = other) -> None:
            tasks = [asyncio.create_task(waited.acquire_async()) for _ in range(2)]
            thread = threading.Thread(target=other.acquire)
            thread.start()
            await asyncio.sleep(0)
            while not sleeps(thread):
                await asyncio.sleep(0.001)
            waited.close()
            assert [type(found) for found in await asyncio.gather(*tasks, return_exceptions=True)] == [OSError] * 2
            other.close()
            giver = Semaphore.open_in(memory, PLACES[0])
            giver.release()
            thread.join()
            giver.close()

        asyncio.run(main())


def sleeps(thread: threading.Thread) -> bool:
    """Whether it is in futex(2), of x86 and others."""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        return file.read().startswith(("202 ", "98 "))


def test_cancelled_tasks_and_threads_share_units(memory: SharedMemory) -> None:
    semaphore = Semaphore.create_in(memory, PLACES[0], 2)

    def churn() -> None:
        for _ in range(TURNS):
            with semaphore:
                pass

    async def one(number: int) -> None:
        for turn in range(TURNS // 4):
            try:
                async with asyncio.timeout((number + turn) % 3 / 2000), semaphore:
                    await asyncio.sleep(0)
            except TimeoutError:
                pass

    async def several() -> None:
        await asyncio.gather(*(one(number) for number in range(6)))

    together(churn, churn, lambda: asyncio.run(several()))
    assert semaphore.value == 2
    semaphore.close()
