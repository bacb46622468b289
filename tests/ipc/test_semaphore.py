"""Semaphores, with names and in shared memory: the table of opening, waiting, time-outs, other processes, death.

`open-N`, `wait-N`... in comments are assertions of the Open POSIX Test Suite (conformance/interfaces/sem_open...).
"""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing

import pytest
from shared_helpers import NOBODY, c_program, fresh_name, line_of, program, run, sleeps

from anywire.ipc import Semaphore, semaphore_waits
from anywire.ipc import semaphore as native

__all__ = ["c_program"]

EXCLUSIVE = os.O_CREAT | os.O_EXCL


@pytest.fixture
def name() -> Iterator[str]:
    name = fresh_name("sem")
    yield name
    try:
        Semaphore.unlink(name)
    except FileNotFoundError:
        pass


@pytest.fixture(params=["named", "placed"])
def semaphore(request: pytest.FixtureRequest, name: str) -> Iterator[Semaphore]:
    """One with the value 0, of either kind."""
    if request.param == "named":
        with_one = Semaphore.create(name)
        yield with_one
        with_one.close()
    else:
        memory = mmap.mmap(-1, 4096)
        with_one = Semaphore.create_in(memory, 64)
        yield with_one
        with_one.close()
        memory.close()


# -- opening


@pytest.mark.parametrize(
    ("flags", "exists", "outcome"),
    [
        (0, False, FileNotFoundError),  # open-6
        (0, True, "old"),
        (os.O_CREAT, False, "new"),  # open-11
        (os.O_CREAT, True, "old"),  # open-10
        (EXCLUSIVE, False, "new"),
        (EXCLUSIVE, True, FileExistsError),  # open-2, open-4
    ],
)
def test_the_table_of_opening(name: str, flags: int, exists: bool, outcome: object) -> None:
    if exists:
        Semaphore.create(name, value=3).close()
    if isinstance(outcome, type):
        with pytest.raises(outcome) as caught:
            Semaphore(name, flags, 0o600, 7)
        assert caught.value.filename == name
        assert Semaphore.open(name).close() is None if exists else True
    else:
        opened = Semaphore(name, flags, 0o600, 7)
        assert opened.value == (3 if outcome == "old" else 7)
        opened.close()


def test_by_intent(name: str) -> None:
    first = Semaphore.create_or_open(name, 2)
    second = Semaphore.create_or_open(name, 9)
    third = Semaphore.open(name)  # open-15: the same semaphore
    second.acquire()
    assert first.value == third.value == 1
    with pytest.raises(FileExistsError):
        Semaphore.create(name)
    second.close()
    assert first.try_acquire() and not third.try_acquire()  # open-9: usable until it is closed
    first.close()
    third.close()


@pytest.mark.parametrize(
    ("bad", "number"),
    [
        ("/" + "n" * 300, errno.ENAMETOOLONG),  # open-7
        ("/a/b", errno.EINVAL),
        ("/", errno.EINVAL),
    ],
)
def test_names_that_cannot_be(bad: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        Semaphore.create(bad)
    assert caught.value.errno == number
    with pytest.raises(OSError) as caught:
        Semaphore.unlink(bad)
    assert caught.value.errno == number or number != errno.ENAMETOOLONG


def test_values_that_cannot_be(name: str) -> None:
    for value in (-1, Semaphore.VALUE_MAX + 1):  # open-5, open-12, init-6
        with pytest.raises(ValueError, match="0 \\.\\.\\. 2147483647"):
            Semaphore.create(name, value)
        with pytest.raises(ValueError, match="0 \\.\\.\\. 2147483647"):
            Semaphore.create_in(bytearray(32), 0, value)
    with pytest.raises(ValueError, match="flags"):
        Semaphore(name, os.O_TRUNC)
    full = Semaphore.create(name, Semaphore.VALUE_MAX)
    with pytest.raises(OSError, match="limit of 2147483647") as caught:
        full.release()
    assert caught.value.errno == errno.EOVERFLOW and full.value == Semaphore.VALUE_MAX
    full.close()


@pytest.mark.processes
def test_mode_and_umask(name: str) -> None:
    run(
        """
        import os, sys
        os.umask(0o026)
        from anywire.ipc import Semaphore
        Semaphore.create(sys.argv[1], mode=0o666).close()
        """,
        name,
    )
    status = os.stat("/dev/shm/sem." + name[1:])
    assert status.st_mode & 0o777 == 0o640  # open-11
    assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())  # open-13


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_permission(name: str) -> None:
    Semaphore.create(name, mode=0o644).close()  # readable is not enough: it must be writable
    said = run(
        "from anywire.ipc import Semaphore\nimport sys"
        + NOBODY
        + "for what in Semaphore.open, Semaphore.unlink:\n"
        "    try: what(sys.argv[1])\n"
        "    except PermissionError as error: print(error.filename == sys.argv[1])\n",
        name,
    )
    assert said == "True\nTrue\n"  # open-3, unlink-3


def test_unlinking(name: str) -> None:
    old = Semaphore.create(name, 1)
    old.unlink()  # unlink-1
    with pytest.raises(FileNotFoundError) as caught:  # unlink-4
        Semaphore.unlink(name)
    assert caught.value.filename == name
    new = Semaphore.create(name, 5)
    old.acquire()  # unlink-2, unlink-9
    assert (old.value, new.value) == (0, 5)  # unlink-6
    old.close()
    new.close()


def test_an_owner_removes_the_name(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        Semaphore.open(name)
    owner = Semaphore.create(name, owner=True)
    other = Semaphore.open(name)
    other.close()  # close-3: nothing happens to it
    Semaphore.open(name).close()
    owner.close()
    owner.close()
    with pytest.raises(FileNotFoundError):
        Semaphore.open(name)
    Semaphore.create(name, owner=True).close()
    again = Semaphore.create(name, owner=True)
    again.unlink()
    again.close()


def test_places_in_buffers() -> None:
    memory = bytearray(4 * Semaphore.SIZE)
    with pytest.raises(ValueError, match="no room at offset"):
        Semaphore.create_in(memory, len(memory) - Semaphore.SIZE + 8)
    with pytest.raises(ValueError, match="no room at offset"):
        Semaphore.open_in(memory, -8)
    with pytest.raises(ValueError, match="multiple of 8"):
        Semaphore.create_in(memory, 12)
    with pytest.raises((BufferError, TypeError)):
        Semaphore.create_in(bytes(64))
    made = Semaphore.create_in(memory, 32, 2)  # init-1
    with pytest.raises(BufferError):
        memory.clear()  # it is exported as long as the semaphore is open
    again = Semaphore.open_in(memory, 32)
    again.acquire()
    assert made.value == 1 and made.name is None
    with pytest.raises(ValueError, match="no name"):
        made.unlink()
    with pytest.raises(ValueError, match="no name"):
        made.processes()
    made.close()
    again.close()
    memory.clear()


# -- taking and giving


def test_units(semaphore: Semaphore) -> None:
    assert not semaphore.try_acquire()  # wait-5, wait-12
    semaphore.release()  # post-1
    semaphore.release()
    assert semaphore.value == 2
    assert semaphore.value == 2  # getvalue-5
    semaphore.acquire()  # wait-1
    assert semaphore.try_acquire()  # wait-11
    with pytest.raises(TimeoutError) as caught:
        semaphore.acquire(timeout=0)
    assert caught.value.errno == errno.ETIMEDOUT and caught.value.filename == semaphore.name
    assert semaphore.value == 0  # timedwait-4, getvalue-2
    semaphore.release()
    with semaphore as same:
        assert same is semaphore and semaphore.value == 0
    assert semaphore.value == 1
    semaphore.acquire(timeout=0)  # timedwait-11


@pytest.mark.parametrize("portable", [False, True])
def test_time_outs(semaphore: Semaphore, portable: bool) -> None:
    native._without_clockwait(portable)
    try:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="0.05 s"):
            semaphore.acquire(timeout=0.05)  # timedwait-2, timedwait-7
        assert time.monotonic() - start >= 0.05
        threading.Timer(0.01, semaphore.release).start()
        semaphore.acquire(timeout=30)  # timedwait-1
        for bad in (-1, float("nan")):
            with pytest.raises(ValueError, match="not negative"):
                semaphore.acquire(timeout=bad)
        with pytest.raises(TypeError):
            semaphore.acquire(timeout="1")  # type: ignore[arg-type]
    finally:
        native._without_clockwait(False)


@pytest.mark.parametrize("timeout", [None, 30])
def test_signals_while_waiting(semaphore: Semaphore, timeout: float | None) -> None:
    """wait-7, timedwait-9: the handler runs, and the wait goes on; an exception of the handler ends it."""

    class Stopped(Exception):
        pass

    ran = []

    def handler(number: int, frame: object) -> None:
        ran.append(number)
        if len(ran) == 2:
            raise Stopped
        semaphore.release()  # post-6
        again.start()

    def raise_soon() -> None:
        while not in_wait():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    def in_wait() -> bool:
        with open(f"/proc/self/task/{os.getpid()}/syscall") as file:
            call = file.read().split()
        # futex(2), of x86 and others; waiting for the interpreter's lock has FUTEX_PRIVATE_FLAG
        return call[0] in ("202", "98") and not int(call[2], 16) & 128

    again = threading.Thread(target=raise_soon)
    before = signal.signal(signal.SIGUSR1, handler)
    first = threading.Thread(target=raise_soon)
    try:
        first.start()
        semaphore.acquire(timeout)
        with pytest.raises(Stopped):
            semaphore.acquire(timeout)
        assert len(ran) == 2 and semaphore.value == 0
    finally:
        first.join()
        again.join()
        signal.signal(signal.SIGUSR1, before)


def test_threads_are_woken_and_the_gil_is_free(semaphore: Semaphore) -> None:
    threads = [threading.Thread(target=semaphore.acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        semaphore.release()
    for thread in threads:
        thread.join()
    assert semaphore.value == 0


# -- closing


def test_closed(semaphore: Semaphore) -> None:
    semaphore.close()
    semaphore.close()
    assert semaphore.closed and "closed" in repr(semaphore)
    for use in (semaphore.acquire, semaphore.try_acquire, semaphore.release, lambda: semaphore.value):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_while_a_thread_waits(name: str) -> None:
    waited, other = Semaphore.create(name), Semaphore.open(name)
    done: list[int] = []

    def wait() -> None:
        waited.acquire()
        done.append(1)

    thread = threading.Thread(target=wait)
    thread.start()
    while not sleeps(thread):
        time.sleep(0.001)
    waited.close()
    other.release()
    thread.join()
    assert done == [1]
    other.close()


def test_collected_while_open(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        semaphore = Semaphore.create(name, owner=True)
        del semaphore
        gc.collect()
    assert [str(warning.message) for warning in caught] == ["a semaphore was never closed"]
    assert caught[0].category is ResourceWarning
    with pytest.raises(FileNotFoundError):
        Semaphore.open(name)


# -- other processes


@pytest.mark.processes
def test_pickle_and_fork(name: str) -> None:
    semaphore = Semaphore.create(name, owner=True)
    copy = pickle.loads(pickle.dumps(semaphore))
    copy.release()
    assert semaphore.value == 1
    copy.close()
    placed = Semaphore.create_in(bytearray(32))
    with pytest.raises(TypeError, match="open_in"):
        pickle.dumps(placed)
    placed.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        try:
            semaphore.acquire(5)
            semaphore.release()
            semaphore.release()
            semaphore.close()  # it is not the owner
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert semaphore.value == 2
    Semaphore.open(name).close()
    semaphore.close()


@pytest.mark.processes
def test_c_programs_share_named_ones(name: str, c_program: str) -> None:
    """open-14, and the other way round."""
    there = name + "2"
    subprocess.run([c_program, "make-named", there, "0"], check=True)
    here, back = Semaphore.create(name), Semaphore.open(there)
    with subprocess.Popen([c_program, "answer-named", name, there, "200"]) as peer:
        for _ in range(200):
            here.release()
            back.acquire(30)
    assert peer.returncode == 0 and (here.value, back.value) == (0, 0)
    here.close()
    back.unlink()
    back.close()


@pytest.mark.processes
def test_c_programs_share_placed_ones(name: str, c_program: str) -> None:
    """init-3, and that a sem_t has the size that C says."""
    size = subprocess.run([c_program, "size-of-sem_t"], check=True, capture_output=True, text=True).stdout
    assert int(size) == Semaphore.SIZE
    path = "/dev/shm" + name
    with open(path, "wb+") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    subprocess.run([c_program, "make-placed", name, "64", "0"], check=True)
    here, back = Semaphore.create_in(memory, 0), Semaphore.open_in(memory, 64)
    with subprocess.Popen([c_program, "answer-placed", name, "0", "64", "200"]) as peer:
        for _ in range(200):
            here.release()
            back.acquire(30)
    assert peer.returncode == 0
    here.close()
    back.close()
    memory.close()
    os.unlink(path)


@pytest.mark.processes
def test_killed_with_a_unit(name: str) -> None:
    """wait-4 too. Its units are gone; that nobody has it open any more shows that they are."""
    semaphore = Semaphore.create(name, 1)
    text = """
        import sys
        from anywire.ipc import Semaphore
        semaphore = Semaphore.open(sys.argv[1])
        semaphore.acquire()
        print("taken")
        semaphore.acquire()
    """
    with program(text, name) as holder:
        assert line_of(holder) == "taken"
        assert semaphore.processes() == sorted([os.getpid(), holder.pid])
        holder.kill()
    assert semaphore.processes() == [os.getpid()] and semaphore.value == 0
    semaphore.release()
    assert semaphore.try_acquire()
    semaphore.close()


@pytest.mark.processes
def test_8_processes_and_8_threads(name: str) -> None:
    """A counter that is read and written in two steps, under a semaphore of value 1: nothing may be lost."""
    path = "/dev/shm" + name
    with open(path, "wb+") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    semaphore = Semaphore.create_in(memory, 64, 1)
    text = """
        import mmap, os, sys, threading
        from anywire.ipc import Semaphore
        with open(sys.argv[1], "rb+") as file:
            memory = mmap.mmap(file.fileno(), 4096)
        semaphore = Semaphore.open_in(memory, 64)
        sys.stdin.readline()

        def count(times):
            for turn in range(times):
                with semaphore:
                    was = int.from_bytes(memory[:8], "little")
                    if turn % 16 == 0:
                        os.sched_yield()
                    memory[:8] = (was + 1).to_bytes(8, "little")

        threads = [threading.Thread(target=count, args=(int(sys.argv[3]),)) for _ in range(int(sys.argv[2]))]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        semaphore.close()
    """
    children = [program(text, path, 1, 500) for _ in range(7)] + [program(text, path, 8, 60)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        with child:
            child.communicate()
        assert child.returncode == 0
    assert int.from_bytes(memory[:8], "little") == 7 * 500 + 8 * 60
    assert semaphore.value == 1
    semaphore.close()
    memory.close()
    os.unlink(path)


# -- in an event loop


@pytest.fixture(params=["one thread", "a thread each"])
def helpers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With futex_waitv, and as where it is missing."""
    if request.param == "a thread each":
        monkeypatch.setattr(semaphore_waits._waits, "at_once", 0)
    elif not semaphore_waits._waits.at_once:
        pytest.skip("futex_waitv (Linux 5.16) and glibc are not here")
    return str(request.param)


def test_awaiting(semaphore: Semaphore, helpers: str) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(semaphore.acquire_async()) for _ in range(5)]
        await asyncio.sleep(0)
        for number in range(5):
            assert sum(task.done() for task in tasks) <= number
            semaphore.release()
            while sum(task.done() for task in tasks) <= number:
                await asyncio.sleep(0.001)
            assert all(task.done() for task in tasks[: number + 1])  # in their order
        semaphore.release()
        async with semaphore:
            assert semaphore.value == 0
        assert semaphore.value == 1
        await semaphore.acquire_async()
        with pytest.raises(TimeoutError, match="0.02 s"):
            await semaphore.acquire_async(timeout=0.02)
        with pytest.raises(ValueError, match="not negative"):
            await semaphore.acquire_async(timeout=-1)

    asyncio.run(main())
    assert not semaphore_waits._waits.queues


def test_a_cancelled_wait_that_had_won_gives_back(semaphore: Semaphore, helpers: str) -> None:
    async def main() -> None:
        task = asyncio.create_task(semaphore.acquire_async())
        await asyncio.sleep(0)
        semaphore.release()
        while semaphore.value:  # the helper takes it; this loop doesn't turn meanwhile
            time.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert semaphore.value == 1

    asyncio.run(main())


def test_cancelled_waits_lose_no_wake_up(name: str, helpers: str) -> None:
    """Tasks that are cancelled at all moments, while others and threads take and give: no unit is missing then."""
    semaphore = Semaphore.create(name, 3)
    stop = threading.Event()
    taken = 0

    def churn() -> None:
        nonlocal taken
        while not stop.is_set():
            semaphore.acquire(30)
            taken += 1
            semaphore.release()
            time.sleep(0.0002)

    async def one(number: int) -> None:
        for turn in range(30):
            try:
                async with asyncio.timeout((number * 7 + turn) % 5 / 4000):
                    async with semaphore:
                        await asyncio.sleep(0)
            except TimeoutError:
                pass

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(10)))

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    stop.set()
    for thread in threads:
        thread.join()
    semaphore.close()               # then no helper's thread has one in its hands to give back
    with closing(Semaphore.open(name)) as again:
        assert again.value == 3 and taken


def test_many_semaphores_one_thread(name: str) -> None:
    """More than the kernel waits for at a time: the rest get threads of their own."""
    memory = mmap.mmap(-1, 160 * 32)
    all_of_them = [Semaphore.create_in(memory, 32 * number) for number in range(160)]

    async def main() -> None:
        before = threading.active_count()
        tasks = [asyncio.create_task(semaphore.acquire_async()) for semaphore in all_of_them[:100]]
        await asyncio.sleep(0)
        if semaphore_waits._waits.at_once:
            assert threading.active_count() <= before + 1
        tasks += [asyncio.create_task(semaphore.acquire_async()) for semaphore in all_of_them[100:]]
        await asyncio.sleep(0)
        for semaphore in all_of_them:
            semaphore.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    for semaphore in all_of_them:
        semaphore.close()
    memory.close()


def test_closing_while_a_task_waits(semaphore: Semaphore, helpers: str) -> None:
    async def main() -> None:
        task = asyncio.create_task(semaphore.acquire_async())
        await asyncio.sleep(0)
        semaphore.close()
        with pytest.raises(OSError, match="was closed while a task waited") as caught:
            await task
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="closed"):
            await semaphore.acquire_async()

    asyncio.run(main())


@pytest.mark.processes
def test_the_helper_sleeps_while_nothing_happens(name: str) -> None:
    """CPU time of a process whose task waits for a second, and which then is told by another process."""
    if not semaphore_waits._waits.at_once:
        pytest.skip("futex_waitv (Linux 5.16) and glibc are not here")
    text = """
        import asyncio, resource, sys
        from anywire.ipc import Semaphore

        async def main():
            semaphore = Semaphore.open(sys.argv[1])
            task = asyncio.create_task(semaphore.acquire_async())
            await asyncio.sleep(0.1)
            before = resource.getrusage(resource.RUSAGE_SELF)
            print("waiting")
            await task
            after = resource.getrusage(resource.RUSAGE_SELF)
            print(after.ru_nvcsw - before.ru_nvcsw)
            semaphore.close()

        asyncio.run(main())
    """
    semaphore = Semaphore.create(name)
    with program(text, name) as child:
        assert line_of(child) == "waiting"
        time.sleep(0.5)
        semaphore.release()
        assert int(line_of(child)) < 20  # sleeps: a thread that looked each 10 ms would have had 50
    semaphore.close()


@pytest.mark.processes
def test_import_is_lazy() -> None:
    text = "import sys, anywire, anywire.ipc; print([m for m in sys.modules if m.startswith('anywire.ipc.')])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "[]\n"
