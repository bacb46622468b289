"""Conditions used by many at a time: every notification ends a wait, whoever times out or is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from shared_helpers import fresh_name, program, sleeps

from anywire.ipc import Condition, Mutex, SharedMemory

PATIENCE = 50.0


class Shop:
    """A mutex and two conditions around a store with room for 4, as others open it by their names."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mutex = Mutex.create(name, owner=True)
        self.filled = Condition.create(name + "-filled", self.mutex, owner=True)
        self.room = Condition.create(name + "-room", self.mutex, owner=True)
        self.memory = SharedMemory.create(name + "-words", 16, owner=True)

    @property
    def words(self) -> list[int]:
        """How much is in the store, and how often something was taken."""
        with memoryview(self.memory) as view, view.cast("Q") as words:
            return words.tolist()

    def notified(self) -> tuple[int, int]:
        """How often either condition was notified: the word at offset 12, as how-to/ipc-locks.md says."""
        found = []
        for each in ("-filled", "-room"):
            with SharedMemory.open(self.name + each) as memory:
                found.append(int.from_bytes(memory[12:16], "little"))
        return found[0], found[1]

    def close(self) -> None:
        for each in (self.filled, self.room, self.mutex, self.memory):
            each.close()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop(fresh_name("shop"))
    yield shop
    shop.close()


# In threads, none of which is the main one: that comes back from a wait now and then to look for signals.
WORKER = """
    import random, sys, threading
    from anywire.ipc import Condition, Mutex, SharedMemory
    name, times, timed, kinds = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4:]
    mutex = Mutex.open(name)
    filled, room = (Condition.open(name + what, mutex) for what in ("-filled", "-room"))
    memory = SharedMemory.open(name + "-words")
    words = memoryview(memory).cast("Q")

    def until(condition, true, impatient):
        while not true():
            try:
                condition.wait(random.random() / 1000 if impatient else None)
            except TimeoutError:
                pass

    def give(impatient):
        for _ in range(times):
            with mutex:
                until(room, lambda: words[0] < 4, impatient)
                words[0] += 1
                filled.notify()

    def take(impatient):
        for _ in range(times):
            with mutex:
                until(filled, lambda: words[0], impatient)
                words[0] -= 1
                words[1] += 1
                room.notify()

    works = {"give": give, "take": take}
    threads = [
        threading.Thread(target=works[kind], args=(timed and number % 2 == 0,), daemon=True)
        for number, kind in enumerate(kinds)
    ]
    print("ready")
    sys.stdin.readline()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    words.release()
    for each in (filled, room, mutex, memory): each.close()
"""


@pytest.mark.processes
@pytest.mark.parametrize("timed", [False, True])
def test_8_processes_and_8_threads_lose_no_notification(shop: Shop, timed: bool) -> None:
    """One notification for each thing that is put and taken, and no more: one that got lost would leave somebody asleep
    beside what he waits for. With time-outs, half of the threads give up at all moments and come again."""
    few, many = 40, 200
    several = ("give", "give", "take", "take")
    children = [
        program(WORKER, shop.name, many, timed and number < 3, "give" if number % 2 else "take") for number in range(6)
    ]
    children += [program(WORKER, shop.name, many, False, "give", "take")]
    children += [program(WORKER, shop.name, few, timed, *several, *several)]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        end = time.monotonic() + PATIENCE
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
            assert child.returncode == 0
    except subprocess.TimeoutExpired:
        pytest.fail(f"somebody sleeps beside {shop.words[0]} things")
    finally:
        for child in children:
            child.kill()
            child.communicate()
    each = 4 * many + 4 * few
    assert shop.words == [0, each]
    assert shop.notified() == (each, each)


def test_tasks_that_are_cancelled_lose_no_notification(shop: Shop) -> None:
    """Tasks that give up at all moments, beside others that wait as long as it takes, for what threads bring."""
    store = 0
    each, givers = 60, 2

    def give() -> None:
        nonlocal store
        for _ in range(each * 6 // givers):
            with shop.mutex:
                store += 1
                shop.filled.notify()
            if random.random() < 0.2:
                time.sleep(0.0005)

    async def take(patient: bool) -> None:
        nonlocal store
        taken = 0
        while taken < each:
            try:
                async with asyncio.timeout(None if patient else random.random() / 200), shop.mutex:
                    while not store:
                        await shop.filled.wait_async()
                    store -= 1
                    taken += 1
            except TimeoutError:
                pass

    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(take(number % 2 == 0) for number in range(6)))

    threads = [threading.Thread(target=give) for _ in range(givers)]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join()
    assert store == 0


@pytest.mark.parametrize("attempt", range(3))
def test_a_task_that_is_cancelled_when_it_was_notified_passes_it_on(shop: Shop, attempt: int) -> None:
    """Just between its wait's end and its own next step; if the system chose to wake the other one first, nothing is
    to be seen."""
    store = 0
    got: list[int] = []

    def other() -> None:
        nonlocal store
        with shop.mutex:
            # It is free, so the first one waits, or is about to. glibc wakes those who sleep in their order, mostly.
            while not all(sleeps(helper) for helper in threading.enumerate() if helper.name == "anywire-ipc"):
                time.sleep(0.001)
            waits.set()
            while not store:
                shop.filled.wait()
            store -= 1
            got.append(1)

    def give() -> None:
        nonlocal store
        with shop.mutex:                                    # so both wait by now
            store = 1
            shop.filled.notify()

    async def first() -> None:
        async with shop.mutex:
            await shop.filled.wait_async()

    async def main() -> None:
        task = asyncio.create_task(first())
        here = asyncio.current_task()
        while not (inner := asyncio.all_tasks() - {task, here}):
            await asyncio.sleep(0)
        inner.pop().add_done_callback(lambda _: task.cancel())
        thread.start()
        await asyncio.to_thread(waits.wait)
        await asyncio.to_thread(give)
        while thread.is_alive() and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(thread.join, 10)

    waits = threading.Event()
    thread = threading.Thread(target=other, daemon=True)
    asyncio.run(main())
    asleep = thread.is_alive()
    with shop.mutex:
        shop.filled.notify_all()
    thread.join()
    assert got == [1] and not asleep
