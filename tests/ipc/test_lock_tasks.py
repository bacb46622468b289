"""Locks and conditions in event loops: who owns what a task took, cancelling, death, threads."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator

import pytest
from shared_helpers import fresh_name, line_of, program, sleeps

from anywire.ipc import Condition, Mutex, OwnerDied, RWLock


@pytest.fixture
def mutex() -> Iterator[Mutex]:
    mutex = Mutex.create(fresh_name("lock"), owner=True)
    yield mutex
    mutex.close()


def taken(mutex: Mutex) -> bool:
    """Whether somebody has it; looked at through another object, by another thread."""
    seen: list[bool] = []

    def look() -> None:
        assert mutex.name is not None
        other = Mutex.open(mutex.name)
        seen.append(not other.try_lock())
        if not seen[0]:
            other.unlock()
        other.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen[0]


def test_a_task_owns_it(mutex: Mutex) -> None:
    async def other() -> None:
        with pytest.raises(PermissionError, match="this task does not hold it"):
            await mutex.unlock_async()
        with pytest.raises(TimeoutError, match=r"others held it for 0.02 s") as caught:
            await mutex.lock_async(timeout=0.02)
        assert caught.value.filename == mutex.name and caught.value.errno == errno.ETIMEDOUT

    async def main() -> None:
        async with mutex as same:
            assert same is mutex and taken(mutex)
            with pytest.raises(PermissionError, match="this thread does not hold it"):
                mutex.unlock()
            with pytest.raises(OSError, match="this task holds it already") as caught:
                await mutex.lock_async()
            assert caught.value.errno == errno.EDEADLK
            await asyncio.create_task(other())
        assert not taken(mutex)
        with pytest.raises(ValueError, match="not negative"):
            await mutex.lock_async(-1)

    asyncio.run(main())


def test_tasks_take_turns_with_few_threads(mutex: Mutex) -> None:
    inside = most = 0

    async def one() -> None:
        nonlocal inside, most
        async with mutex:
            inside += 1
            most = max(most, inside)
            assert threading.active_count() <= before + 3
            await asyncio.sleep(0)
            inside -= 1

    before = threading.active_count()

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(50)))

    asyncio.run(main())
    assert most == 1 and not taken(mutex)


def test_a_cancelled_wait_gives_it_back(mutex: Mutex) -> None:
    async def main() -> None:
        with mutex:
            task = asyncio.create_task(mutex.lock_async())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task  # at once, though its thread still waits
        await mutex.lock_async()  # the thread got it, and unlocked it
        assert taken(mutex)
        await mutex.unlock_async()

    async def again() -> None:
        for delay in range(40):
            try:
                async with asyncio.timeout(delay / 20000):
                    async with mutex:
                        await asyncio.sleep(0)
            except TimeoutError:
                pass
        async with asyncio.timeout(10):
            async with mutex:
                pass

    asyncio.run(main())
    asyncio.run(again())
    assert not taken(mutex)


@pytest.mark.parametrize("late", ["before", "after"])
def test_closing_behind_a_cancelled_wait(mutex: Mutex, late: str) -> None:
    """Its thread has yet to get the lock and to give it back: that is nobody's business any more."""
    assert mutex.name is not None
    other = Mutex.open(mutex.name)

    async def wait() -> None:
        other.lock()
        task = asyncio.create_task(mutex.lock_async())
        while not any(sleeps(each) for each in threading.enumerate() if each.name == "anywire-ipc"):
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(wait())
    if late == "after":
        other.unlock()
    mutex.close()                           # "after": whether its thread holds it just now, or does not yet, or no more
    if late == "before":
        other.unlock()
    other.lock(timeout=10)                  # not by OwnerDied
    other.unlock()
    other.close()


def test_closing_behind_a_cancelled_unlock(mutex: Mutex) -> None:
    assert mutex.name is not None
    other = Mutex.open(mutex.name)

    async def holder(locked: asyncio.Event) -> None:
        await mutex.lock_async()
        locked.set()
        await mutex.unlock_async()

    async def main() -> None:
        locked = asyncio.Event()
        task = asyncio.create_task(holder(locked))
        await locked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        mutex.close()

    asyncio.run(main())
    other.lock(timeout=10)
    other.unlock()
    other.close()


def test_closing_while_a_task_holds_it_is_refused(mutex: Mutex) -> None:
    async def main() -> None:
        async with mutex:
            with pytest.raises(OSError, match="locked here"):
                mutex.close()

    asyncio.run(main())


@pytest.mark.processes
def test_death_is_told_to_tasks(mutex: Mutex) -> None:
    text = """
        import sys
        from anywire.ipc import Mutex
        mutex = Mutex.open(sys.argv[1])
        mutex.lock()
        print("locked")
        sys.stdin.readline()
    """

    def kill() -> None:
        with program(text, mutex.name) as child:
            assert line_of(child) == "locked"
            child.kill()

    async def main() -> None:
        kill()
        with pytest.raises(OwnerDied) as caught:
            await mutex.lock_async()
        assert caught.value.mutex is mutex and taken(mutex)
        await mutex.mark_consistent_async()
        await mutex.unlock_async()
        kill()
        repaired = []
        mutex.repair = lambda: repaired.append(1)
        async with mutex:
            assert repaired == [1]

    asyncio.run(main())
    assert not taken(mutex)


def test_conditions(mutex: Mutex) -> None:
    condition = Condition.create(fresh_name("lock"), mutex, owner=True)
    items: list[int] = []

    async def consumer() -> int:
        async with mutex:
            await condition.wait_for_async(lambda: items, timeout=30)
            return items.pop()

    async def producer() -> None:
        for number in range(5):
            async with mutex:
                items.append(number)
                condition.notify()
            await asyncio.sleep(0)

    async def main() -> None:
        tasks = [asyncio.create_task(consumer()) for _ in range(5)]
        await asyncio.sleep(0.01)
        await producer()
        assert sorted(await asyncio.gather(*tasks)) == list(range(5))
        async with mutex:
            with pytest.raises(TimeoutError):
                await condition.wait_for_async(lambda: False, timeout=0.02)
            with pytest.raises(TimeoutError):
                await condition.wait_async(timeout=0.02)
        with pytest.raises(PermissionError):
            await condition.wait_async()
        # Cancelled, it comes back with the mutex, which `async with` then gives back.
        task = asyncio.create_task(consumer())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not taken(mutex)
    condition.close()


def test_read_write_locks() -> None:
    lock = RWLock.create(fresh_name("lock"), owner=True)

    async def reader(ready: asyncio.Event, end: asyncio.Event) -> None:
        async with lock.reading():
            ready.set()
            await end.wait()

    async def main() -> None:
        end = asyncio.Event()
        readies = [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(reader(ready, end)) for ready in readies]
        for ready in readies:
            await ready.wait()
        with pytest.raises(TimeoutError):
            await lock.write_lock_async(timeout=0.02)
        end.set()
        await asyncio.gather(*tasks)
        async with lock.writing(timeout=10):
            assert lock.writer
            assert not lock.try_read_lock()

    asyncio.run(main())
    lock.close()
