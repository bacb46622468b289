"""System V semaphore sets: operations, waiting, undo, initialisation, removal, other processes."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import ipc_children as children
import pytest
from sysv_helpers import NAMESPACE, PATIENCE, blocked, c, compiled, some_key, until

from anywire.ipc.sysv import CREATE, EXCLUSIVE, NOWAIT, PRIVATE, UNDO, SemaphoreSet

NOBODY = 65534


@pytest.fixture
def sems() -> Iterator[SemaphoreSet]:
    with SemaphoreSet.create(some_key(), values=[1, 0, 5], owner=True) as sems:
        yield sems


def test_acquire_and_release(sems: SemaphoreSet) -> None:
    sems.acquire(2, 3)
    assert sems.values == [1, 0, 2] and len(sems) == 3
    sems.release(2, 1)
    assert sems.value(2) == 3
    with pytest.raises(BlockingIOError):
        sems.acquire(2, 4, block=False)
    with pytest.raises(BlockingIOError):
        sems.wait_zero(2, block=False)
    sems.wait_zero(1)
    for seconds in (0, 0.02):
        before = time.monotonic()
        with pytest.raises(TimeoutError, match="could not be made") as caught:
            sems.acquire(1, timeout=seconds)
        assert caught.value.errno == errno.ETIMEDOUT and time.monotonic() - before >= seconds
    assert sems.values == [1, 0, 3]


def test_operations_happen_whole_or_not_at_all(sems: SemaphoreSet) -> None:
    with pytest.raises(BlockingIOError):
        sems.op([(2, -5), (1, -1)], block=False)
    with pytest.raises(TimeoutError):
        sems.op([(2, -5), (1, -1)], timeout=0.01)
    with pytest.raises(BlockingIOError):
        sems.op([(2, -5), (1, -1, NOWAIT)])
    assert sems.values == [1, 0, 5]
    sems.op([(2, -5), (1, +2), (1, -1), (2, 0)])
    assert sems.values == [1, 1, 0]
    sems.op([])
    sems.op([(0, 1)] * 40)
    assert sems.value(0) == 41


def test_what_makes_no_sense_is_refused(sems: SemaphoreSet) -> None:
    for index in (-1, 3):
        for call in (lambda i: sems.acquire(i), lambda i: sems.value(i), lambda i: sems.set_value(i, 1),
                     lambda i: sems.op([(i, 1)])):
            with pytest.raises(IndexError, match="0 to 2"):
                call(index)
    for call in (lambda i: sems.acquire(0, 0), lambda i: sems.release(0, -1), lambda i: sems.op([(0, 40000)]),
                 lambda i: sems.op([(0,)]), lambda i: sems.set_value(0, 32768), lambda i: setattr(sems, "values", [1]),
                 lambda i: SemaphoreSet.create(PRIVATE, values=[-1])):
        with pytest.raises(ValueError):
            call(0)
    with pytest.raises(OSError, match="32767") as caught:
        sems.release(2, 32767)
    assert caught.value.errno == errno.ERANGE
    with pytest.raises(OSError, match="semopm is") as caught:
        sems.op([(0, 1)] * 100_000)
    assert caught.value.errno == errno.E2BIG


def test_values_are_set_and_status_told(sems: SemaphoreSet) -> None:
    sems.values = [3, 2, 1]
    sems.set_value(1, 9)
    assert sems.values == [3, 9, 1]
    assert sems.last_pid(1) == os.getpid()
    status = sems.stat()
    assert (status.key, status.uid, status.mode, status.semaphores) == (sems.key, os.geteuid(), 0o600, 3)
    assert status.operation_time >= time.time() - PATIENCE
    sems.set(mode=0o640)
    assert sems.stat().mode == 0o640


def test_who_waits_is_counted_and_woken(sems: SemaphoreSet) -> None:
    threads = [threading.Thread(target=sems.acquire, args=[1]), threading.Thread(target=sems.wait_zero, args=[0])]
    for thread in threads:
        thread.start()
    until(lambda: (sems.waiting(1), sems.waiting_zero(0)) == (1, 1))
    sems.op([(0, -1), (1, +1)])
    for thread in threads:
        thread.join(PATIENCE)
    assert sems.values == [0, 0, 5] and (sems.waiting(1), sems.waiting_zero(0)) == (0, 0)


def test_a_held_semaphore_is_given_back(sems: SemaphoreSet) -> None:
    with sems.held():
        assert sems.value() == 0
        with pytest.raises(TimeoutError), sems.held(timeout=0):
            pass
    with pytest.raises(ZeroDivisionError), sems.held(2, 4):
        raise ZeroDivisionError
    assert sems.values == [1, 0, 5]


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_removal_ends_waits(sems: SemaphoreSet, timeout: float | None) -> None:
    errors: list[OSError] = []

    def wait() -> None:
        try:
            sems.acquire(1, timeout=timeout)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: sems.waiting(1))
    sems.remove()
    thread.join(PATIENCE)
    assert errors[0].errno == errno.EIDRM and "removed while" in str(errors[0]) and errors[0].filename == sems.name
    for call in (sems.acquire, sems.value, sems.stat, sems.remove, lambda: sems.values):
        with pytest.raises(OSError, match="has been removed") as caught:
            call()
        assert caught.value.errno == errno.EIDRM


def test_signals_handlers_run_and_the_wait_goes_on(sems: SemaphoreSet) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    main = threading.get_native_id()

    def poke() -> None:
        for i in range(3):
            until(lambda: blocked(os.getpid(), main, "semtimedop"))
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: len(seen) > i)  # noqa: B023
        sems.release(1)

    thread = threading.Thread(target=poke)
    try:
        thread.start()
        sems.acquire(1, timeout=PATIENCE)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 3


# Opening, and who initialises.


def test_opening_by_intent() -> None:
    key = some_key()
    with pytest.raises(FileNotFoundError):
        SemaphoreSet.open(key)
    with SemaphoreSet.create_or_open(key, values=[0, 7], owner=True) as sems:
        assert sems.values == [0, 7] and sems.initialised
        again = SemaphoreSet.create_or_open(key, values=[1])
        assert (again.id, again.count, again.values) == (sems.id, 2, [0, 7])
        assert SemaphoreSet(key, CREATE).id == SemaphoreSet.open(key).id == SemaphoreSet.from_id(sems.id).id == sems.id
        for make in (lambda: SemaphoreSet.create(key), lambda: SemaphoreSet(key, CREATE | EXCLUSIVE)):
            with pytest.raises(FileExistsError):
                make()
    for find in (lambda: SemaphoreSet.open(key), lambda: SemaphoreSet.from_id(sems.id)):
        with pytest.raises(FileNotFoundError):
            find()
    with SemaphoreSet.create(None, values=[0] * 600 + [4], owner=True) as large:
        assert large.values[600] == 4 and large.initialised and SemaphoreSet.open(large.key).count == 601
    with SemaphoreSet.create(PRIVATE, 0o040, values=[3], owner=True) as sems:
        assert sems.stat().mode == 0o040


@pytest.mark.processes
def test_who_opens_waits_for_the_creators_initialisation() -> None:
    key = some_key()
    command = [compiled(), "semget", str(key), "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as creator:
        assert creator.stdin is not None and creator.stdout is not None
        for step in (b"made\n", b"set\n"):
            assert creator.stdout.readline() == step
            with pytest.raises(TimeoutError, match="or died"):
                SemaphoreSet.open(key, timeout=0.02)
            if step == b"made\n":
                creator.stdin.write(b"\n")
                creator.stdin.flush()
        found: list[list[int]] = []

        def find() -> None:
            found.append(SemaphoreSet.create_or_open(key, values=[8, 8, 8]).values)

        thread = threading.Thread(target=find)
        thread.start()
        assert not SemaphoreSet.open(key, initialised=False).initialised
        creator.stdin.write(b"\n")
        creator.stdin.flush()
        thread.join(PATIENCE)
        assert found == [[1, 2, 3]]
    SemaphoreSet.unlink(key)


@pytest.mark.processes
def test_of_many_who_create_or_open_one_initialises() -> None:
    program = """
        import sys
        from anywire.ipc.sysv import SemaphoreSet
        sys.stdin.readline()
        for key in range(int(sys.argv[1]), int(sys.argv[1]) + 30):
            sems = SemaphoreSet.create_or_open(key, values=[1, 2, 3])
            sems.op([(0, -1), (1, -2), (2, -3)], timeout=20)
            sems.op([(0, 1), (1, 2), (2, 3)])
    """
    key = some_key() & ~0xFF
    several = [children.started(program, str(key)) for _ in range(4)]
    processes = [one.__enter__() for one in several]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait(PATIENCE) for process in processes] == [0] * 4
    finally:
        for one in several:
            one.__exit__(None, None, None)
        for each in range(key, key + 30):
            SemaphoreSet.unlink(each)


# Undo.


@pytest.mark.processes
@pytest.mark.parametrize("undo", [True, False])
def test_a_killed_process_gives_back_with_undo_only(sems: SemaphoreSet, undo: bool) -> None:
    program = """
        import sys
        from anywire.ipc.sysv import SemaphoreSet
        sems = SemaphoreSet.open(int(sys.argv[1]))
        sems.acquire(2, 3, undo=sys.argv[2] == "True")
        sems.op([(0, -1)], undo=sys.argv[2] == "True")
        print("held", flush=True)
        sys.stdin.read()
    """
    with children.started(program, str(sems.key), str(undo)) as process:
        assert children.line(process) == "held"
        assert sems.values == [0, 0, 2]
        process.kill()
        process.wait()
    if undo:
        sems.acquire(2, 5, timeout=PATIENCE)
        assert sems.values == [1, 0, 0]
    else:
        assert sems.values == [0, 0, 2]


@pytest.mark.processes
def test_undo_belongs_to_the_process(sems: SemaphoreSet) -> None:
    """Not to the thread that acquired, which has ended; nor to a forked child."""
    children.run("""
        import asyncio, os, sys, threading
        from anywire.ipc.sysv import UNDO, SemaphoreSet
        sems = SemaphoreSet.open(int(sys.argv[1]))
        thread = threading.Thread(target=sems.op, args=[[(2, -2, UNDO)]])
        thread.start()
        thread.join()
        asyncio.run(sems.acquire_async(2, 2, undo=True))
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        assert sems.value(2) == 1
    """, str(sems.key))
    assert sems.value(2) == 5
    assert UNDO


# In an event loop.


def test_tasks_wait(sems: SemaphoreSet) -> None:
    async def main() -> None:
        await sems.acquire_async(0)
        tasks = [asyncio.create_task(sems.acquire_async(0)) for _ in range(5)]
        zero = asyncio.create_task(sems.wait_zero_async(2))
        with pytest.raises(TimeoutError, match=r"0\.02 s"):
            await sems.op_async([(0, -1), (2, -1)], timeout=0.02)
        sems.acquire(2, 5)
        await zero
        for task in tasks:
            sems.release(0)
            await task
        with pytest.raises(BlockingIOError):
            await sems.op_async([(0, -1, NOWAIT)])
        assert sems.values == [0, 0, 0]

    asyncio.run(main())


def test_a_cancelled_task_has_taken_nothing(sems: SemaphoreSet) -> None:
    async def main() -> None:
        for i in range(150):
            task = asyncio.create_task(sems.op_async([(1, -1), (2, -2)], undo=bool(i % 5)))
            for _ in range(i % 4):
                await asyncio.sleep(0)
            if i % 3:
                await asyncio.sleep(0.0005)
            sems.release(1)
            if i % 2:
                time.sleep(0.0003)              # the helper's thread has it by now, and the loop does not know
            task.cancel()
            try:
                await task
                sems.release(2, 2, undo=bool(i % 5))
            except asyncio.CancelledError:
                sems.acquire(1, block=False)
            assert sems.values == [1, 0, 5]

    asyncio.run(main())


# Processes.


@pytest.mark.processes
def test_a_c_program_shares_the_set(sems: SemaphoreSet) -> None:
    sems.set_value(1, 4)
    c("semop", sems.key, 1, -3)
    assert c("semval", sems.key, 1) == "1" and sems.value(1) == 1
    with pytest.raises(subprocess.CalledProcessError):
        c("semop", sems.key, 1, -2)


def test_a_pickled_set_is_the_same_one_and_closing_it_leaves_it(sems: SemaphoreSet) -> None:
    with pickle.loads(pickle.dumps(sems)) as copy:
        copy.release(1)
        assert copy.id == sems.id and copy.key == sems.key and not copy.owner
    with pytest.raises(ValueError, match="closed"):
        copy.acquire()
    assert sems.values == [1, 1, 5]


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_mode_decides() -> None:
    program = """
        import sys
        from anywire.ipc.sysv import SemaphoreSet
        def outcome(call):
            try:
                return call()
            except OSError as error:
                return type(error).__name__
        sems = outcome(lambda: SemaphoreSet.open(int(sys.argv[1])))
        if isinstance(sems, str):
            print(sems)
        else:
            print(sems.values, outcome(sems.acquire), outcome(sems.remove), outcome(lambda: sems.set_value(0, 1)))
    """
    for mode, expected in ((0o600, "PermissionError"), (0o604, "[1] PermissionError PermissionError PermissionError"),
                           (0o606, "[1] None PermissionError None")):
        with SemaphoreSet.create(some_key(), mode, owner=True) as sems:
            assert children.run(program, str(sems.key), user=NOBODY).strip() == expected


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="makes an IPC namespace")
def test_the_limits_are_named() -> None:
    said = children.run(NAMESPACE + """
        limit("sem", "10 100 5 2")
        def tell(values):
            try:
                SemaphoreSet.create(None, values=values)
            except OSError as error:
                print(error)
        tell([1] * 11)
        sems = SemaphoreSet.create(None, values=[1, 2, 3, 4, 5, 6])
        assert sems.values == [1, 2, 3, 4, 5, 6]
        try:
            sems.op([(0, 1)] * 6)
        except OSError as error:
            print(error)
        tell([1])
        tell([1])
    """).splitlines()
    assert len(said) == 3
    assert "semmsl is 10; raise it: sysctl -w kernel.sem=" in said[0]
    assert "semopm is 5" in said[1] and "semmni is 2, semmns is 100" in said[2]


WORKER = """
    import sys
    from anywire.ipc.sysv import SemaphoreSet, SharedMemory
    sems, memory = SemaphoreSet.open(int(sys.argv[1])), SharedMemory.from_id(int(sys.argv[2]))
    counter = memory.buf.cast("q")
    for _ in range(int(sys.argv[3])):
        with sems.held(0, undo=True):
            counter[0] += 1
    counter.release()
    memory.close()
"""


@pytest.mark.processes
def test_threads_and_processes_count_under_a_semaphore_and_nothing_is_lost(sems: SemaphoreSet) -> None:
    from anywire.ipc.sysv import SharedMemory

    each = 300
    with SharedMemory.create(PRIVATE, 8, owner=True) as memory:
        several = [children.started(WORKER, str(sems.key), str(memory.id), str(each)) for _ in range(8)]
        processes = [one.__enter__() for one in several]
        try:
            with memory.buf as view, view.cast("q") as counter:

                def count() -> None:
                    for _ in range(each):
                        with sems.held(0, undo=True, timeout=PATIENCE):
                            counter[0] += 1

                threads = [threading.Thread(target=count) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(PATIENCE)
                assert [process.wait(PATIENCE) for process in processes] == [0] * 8
                assert counter[0] == 16 * each
        finally:
            for one in several:
                one.__exit__(None, None, None)
    assert sems.values == [1, 0, 5]
