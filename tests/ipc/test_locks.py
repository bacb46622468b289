"""Robust mutexes, conditions and read-write locks: opening, errors, death of the holder, C programs, hammering."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_helpers import FUTEX, NOBODY, c_program, fresh_name, line_of, program, run, sleeps

from anywire.ipc import Condition, Mutex, NotRecoverable, OwnerDied, RWLock, SharedMemory
from anywire.ipc import mutex as native

__all__ = ["c_program"]

Lock = Mutex | RWLock | Condition


@pytest.fixture
def name() -> Iterator[str]:
    name = fresh_name("lock")
    yield name
    for each in (name, name + "2", name + "3"):
        try:
            SharedMemory.unlink(each)
        except FileNotFoundError:
            pass


@pytest.fixture
def mutex(name: str) -> Iterator[Mutex]:
    mutex = Mutex.create(name)
    yield mutex
    mutex.close()


@pytest.fixture(params=["Mutex", "Condition", "RWLock"])
def kind(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The class, or what stands for it: Conditions need a mutex."""
    if request.param != "Condition":
        yield {"Mutex": Mutex, "RWLock": RWLock}[request.param]
        return
    guard = Mutex.create_in(bytearray(128))

    class WithMutex:
        __name__ = "Condition"

        def __call__(self, name: str, flags: int = 0, mode: int = 0o600) -> Condition:
            return Condition(name, guard, flags, mode)

        create = staticmethod(lambda name, *a, **k: Condition.create(name, guard, *a, **k))
        open = staticmethod(lambda name, *a, **k: Condition.open(name, guard, *a, **k))
        create_or_open = staticmethod(lambda name, *a, **k: Condition.create_or_open(name, guard, *a, **k))
        create_in = staticmethod(lambda buffer, offset=0: Condition.create_in(buffer, guard, offset))
        open_in = staticmethod(lambda buffer, offset=0: Condition.open_in(buffer, guard, offset))

    yield WithMutex()
    guard.close()


# -- opening


@pytest.mark.parametrize(
    ("flags", "exists", "outcome"),
    [
        (0, False, FileNotFoundError),
        (0, True, None),
        (os.O_CREAT, False, None),
        (os.O_CREAT, True, None),
        (os.O_CREAT | os.O_EXCL, False, None),
        (os.O_CREAT | os.O_EXCL, True, FileExistsError),
    ],
)
def test_the_table_of_opening(kind: Any, name: str, flags: int, exists: bool, outcome: type[OSError] | None) -> None:
    if exists:
        kind.create(name).close()
    if outcome is not None:
        with pytest.raises(outcome) as caught:
            kind(name, flags)
        assert caught.value.filename == name
    else:
        lock = kind(name, flags)
        with SharedMemory.open(name) as memory:
            assert memory.size == lock.SIZE == 128 and memory.mode == 0o600
        lock.close()


def test_what_is_something_else_is_refused(kind: Any, name: str) -> None:
    with SharedMemory.create(name, 128) as memory:
        for content in (bytes(128), b"AWMUTEX1" + bytes(120), b"AWCOND_1" + b"\1" * 120, os.urandom(128)):
            memory[:] = content
            with pytest.raises(ValueError, match=r"there is no|made by a program with another C library"):
                kind.open(name)
            with pytest.raises(ValueError, match=r"there is no|made by a program with another C library"):
                kind.open_in(memory)
        memory.resize(100)
        with pytest.raises(ValueError, match="no room"):
            kind.open(name)
        memory.resize(0)
        with pytest.raises(ValueError, match="no room"):
            kind.create_or_open(name)
        with pytest.raises(FileExistsError):
            kind.create(name)
    other = Mutex if kind is RWLock else RWLock
    other.create(name + "2").close()
    with pytest.raises(ValueError, match="there is no"):
        kind.open(name + "2")
    for bad in ("/", "/a/b", "/..", "/" + "n" * 300):
        with pytest.raises(OSError) as caught:
            kind.create(bad)
        assert caught.value.errno == (errno.ENAMETOOLONG if len(bad) > 300 else errno.EINVAL)
    with pytest.raises(ValueError, match="flags"):
        kind(name, os.O_TRUNC)
    with pytest.raises(ValueError, match="multiple of 8"):
        kind.create_in(bytearray(256), 4)
    with pytest.raises(BufferError):
        kind.create_in(bytes(128))


def test_places_in_a_buffer(kind: Any) -> None:
    memory = bytearray(1024)
    made = kind.create_in(memory, 256)
    again = kind.open_in(memory, 256)
    with pytest.raises(ValueError, match="there is no"):
        kind.open_in(memory, 512)
    assert made.name is None
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(made)
    with pytest.raises(ValueError, match="no name"):
        made.unlink()
    with pytest.raises(ValueError, match="no name"):
        made.processes()
    with pytest.raises(BufferError):
        memory.clear()
    made.close()
    again.close()
    memory.clear()


def test_owner_pickle_and_collection(kind: Any, name: str) -> None:
    if kind in (Mutex, RWLock):
        owner = kind.create(name, owner=True)
        same = pickle.loads(pickle.dumps(owner))
        assert same.name == name and owner.processes() == [os.getpid()]
        same.close()
        kind.open(name).close()
        owner.close()
        owner.close()
        assert owner.closed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lock = kind.create(name, owner=True)
        del lock
        gc.collect()
    assert [str(warning.message) for warning in caught] == ["a lock was never closed"]
    with pytest.raises(FileNotFoundError):
        kind.open(name)


def test_a_condition_is_pickled_with_its_mutex(name: str, mutex: Mutex) -> None:
    condition = Condition.create(name + "2", mutex)
    same = pickle.loads(pickle.dumps(condition))
    assert (same.name, same.mutex.name) == (name + "2", name)
    same.mutex.close()
    same.close()
    condition.close()


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_permission(name: str) -> None:
    Mutex.create(name, 0o644).close()
    said = run(
        "from anywire.ipc import Mutex\nimport sys"
        + NOBODY
        + "for what in Mutex.open, Mutex.unlink:\n"
        "    try: what(sys.argv[1])\n"
        "    except PermissionError as error: print(error.filename == sys.argv[1])\n",
        name,
    )
    assert said == "True\nTrue\n"


def test_closed(kind: Any, name: str) -> None:
    lock = kind.create(name)
    lock.close()
    uses = {
        "Mutex": ("lock", "try_lock", "unlock", "mark_consistent"),
        "RWLock": ("read_lock", "write_lock", "try_read_lock", "try_write_lock", "unlock"),
        "Condition": ("wait", "notify", "notify_all"),
    }[kind.__name__]
    for use in uses:
        with pytest.raises(ValueError, match="is closed"):
            getattr(lock, use)()
    assert "closed" in repr(lock)


# -- the mutex


def test_locking(mutex: Mutex, name: str) -> None:
    mutex.lock()
    for again in (mutex.lock, lambda: mutex.lock(timeout=1)):
        with pytest.raises(OSError, match="this thread holds it already") as caught:
            again()
        assert caught.value.errno == errno.EDEADLK and caught.value.filename == name
    with pytest.raises(OSError, match="locked here") as caught:
        mutex.close()
    assert caught.value.errno == errno.EBUSY
    other = Mutex.open(name)
    seen: list[object] = []

    def elsewhere() -> None:
        seen.append(other.try_lock())
        for use in (other.unlock, lambda: other.lock(timeout=0), lambda: other.lock(timeout=0.02)):
            try:
                use()
            except OSError as error:
                seen.append((type(error), error.filename == name))

    in_thread(elsewhere)
    assert seen == [False, (PermissionError, True), (TimeoutError, True), (TimeoutError, True)]
    mutex.unlock()
    with pytest.raises(PermissionError, match="does not hold it"):
        mutex.unlock()
    with pytest.raises(OSError, match="no holder died"):
        mutex.mark_consistent()
    with other as same:
        assert same is other and not mutex_free(mutex)
    assert mutex_free(mutex)
    other.close()
    with pytest.raises(ValueError, match="not negative"), mutex:
        in_thread_raises(lambda: mutex.lock(timeout=-1))


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def in_thread_raises(function: Callable[[], object]) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            caught.append(error)

    in_thread(call)
    if caught:
        raise caught[0]


def mutex_free(mutex: Mutex) -> bool:
    free: list[bool] = []

    def look() -> None:
        free.append(mutex.try_lock())
        if free[0]:
            mutex.unlock()

    in_thread(look)
    return free[0]


@pytest.mark.parametrize("portable", [False, True])
def test_time_outs_in_either_thread(mutex: Mutex, portable: bool) -> None:
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with mutex:
            held.set()
            end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    native._without_clocklock(portable)
    try:
        for where in (lambda f: f(), in_thread_raises):
            for timeout in (0.03, 0.15):                    # the main thread looks for signals each 0.1 s
                start = time.monotonic()
                with pytest.raises(TimeoutError, match=f"others held it for {timeout} s"):
                    where(lambda: mutex.lock(timeout))  # noqa: B023
                assert time.monotonic() - start >= timeout
        threading.Timer(0.12, end.set).start()
        mutex.lock(30)
        mutex.unlock()
    finally:
        native._without_clocklock(False)
        end.set()
        holder.join()


@pytest.mark.processes
def test_a_signal_ends_a_wait_of_the_main_thread(mutex: Mutex) -> None:
    text = """
        import sys
        from anywire.ipc import Mutex
        mutex = Mutex.open(sys.argv[1])
        try:
            print("waiting")
            mutex.lock()
        except KeyboardInterrupt:
            print("interrupted")
        mutex.close()
    """
    with mutex, program(text, mutex.name) as child:
        assert line_of(child) == "waiting"
        while not Path(f"/proc/{child.pid}/syscall").read_text().startswith(FUTEX):
            time.sleep(0.001)
        child.send_signal(signal.SIGINT)
        assert line_of(child) == "interrupted"


DIE = """
    import os, signal, sys
    from anywire.ipc import Mutex
    mutex = Mutex.open(sys.argv[1])
    mutex.lock()
    print("locked")
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_a_holder(name: str) -> None:
    with program(DIE, name) as child:
        assert line_of(child) == "locked"
        child.kill()


@pytest.mark.processes
@pytest.mark.parametrize("how", ["lock", "try_lock", "waiting"])
def test_the_next_one_is_told_of_a_death(mutex: Mutex, name: str, how: str) -> None:
    if how == "waiting":
        with program(DIE, name) as child:
            assert line_of(child) == "locked"
            threading.Timer(0.15, child.kill).start()
            with pytest.raises(OwnerDied) as caught:
                mutex.lock(timeout=30)
    else:
        kill_a_holder(name)
        with pytest.raises(OwnerDied, match="you hold it now") as caught:
            getattr(mutex, how)()
    assert caught.value.mutex is mutex and caught.value.errno == errno.EOWNERDEAD and caught.value.filename == name
    assert not mutex_free(mutex)  # it is told while it is held
    mutex.mark_consistent()
    mutex.unlock()
    with mutex:
        pass


@pytest.mark.processes
def test_unlocked_without_repair_it_is_not_recoverable(mutex: Mutex, name: str) -> None:
    kill_a_holder(name)
    with pytest.raises(OwnerDied):
        mutex.__enter__()
    mutex.unlock()
    for use in (mutex.lock, mutex.try_lock, lambda: mutex.lock(timeout=1), mutex.__enter__):
        with pytest.raises(NotRecoverable, match="make a new one") as caught:
            use()
        assert caught.value.errno == errno.ENOTRECOVERABLE
    mutex.unlink()
    Mutex.create(name).close()


@pytest.mark.processes
def test_with_repairs(name: str) -> None:
    repaired = []
    mutex = Mutex.create(name, repair=lambda: repaired.append(not mutex_free(mutex)))
    kill_a_holder(name)
    with mutex:
        assert repaired == [True]
    with mutex:
        assert repaired == [True]
    kill_a_holder(name)

    def give_up() -> None:
        raise RuntimeError("can't")

    mutex.repair = give_up
    with pytest.raises(RuntimeError, match="can't"):
        mutex.__enter__()
    with pytest.raises(NotRecoverable):
        mutex.lock()
    mutex.close()


def test_a_thread_that_ends_is_a_death_too(mutex: Mutex) -> None:
    in_thread(mutex.lock)
    with pytest.raises(OwnerDied):
        mutex.lock()
    mutex.mark_consistent()
    mutex.unlock()


def in_child(function: Callable[[], object]) -> None:
    """Call it in a forked child, where it must not raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.processes
def test_fork(mutex: Mutex) -> None:
    def child() -> None:
        with pytest.raises(PermissionError):
            mutex.unlock()  # its parent holds it, it doesn't
        with pytest.raises(TimeoutError):
            mutex.lock(timeout=0.02)
        mutex.close()

    mutex.lock()
    in_child(child)
    mutex.unlock()


# -- the condition


def test_waiting_at_a_condition(mutex: Mutex, name: str) -> None:
    condition = Condition.create(name + "2", mutex)
    with pytest.raises(OSError, match="hold the mutex"):
        condition.wait(1)
    state: list[int] = []
    with mutex:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            while True:
                condition.wait(0.15)
        assert time.monotonic() - start >= 0.15
        with pytest.raises(TimeoutError, match="did not come within 0.02 s"):
            condition.wait_for(lambda: state, 0.02)
        assert not mutex_free(mutex)

    def change() -> None:
        with mutex:
            state.append(1)
            condition.notify()

    threads = [threading.Thread(target=change) for _ in range(2)]
    with mutex:
        for thread in threads:
            thread.start()
        assert condition.wait_for(lambda: len(state) == 2 and "both", 30) == "both"
    for thread in threads:
        thread.join()
    woken: list[int] = []

    def sleeper() -> None:
        with mutex:
            condition.wait_for(lambda: len(state) == 3)
            woken.append(1)

    threads = [threading.Thread(target=sleeper) for _ in range(3)]
    for thread in threads:
        thread.start()
    with mutex:
        state.append(3)
        condition.notify_all()
    for thread in threads:
        thread.join()
    assert len(woken) == 3
    condition.close()


def test_a_wait_ends_when_nobody_can_have_the_mutex_any_more(mutex: Mutex, name: str) -> None:
    condition = Condition.create(name + "2", mutex)
    errors: list[BaseException] = []

    def wait() -> None:
        mutex.lock()
        try:
            condition.wait()
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not sleeps(thread):
        time.sleep(0.001)
    in_thread(mutex.lock)
    with pytest.raises(OwnerDied):
        mutex.lock()
    mutex.unlock()                          # without a repair
    condition.notify()
    thread.join()
    assert [type(error) for error in errors] == [NotRecoverable]
    condition.close()                       # and the mutex's fixture closes it: nobody holds it


@pytest.mark.processes
def test_a_holder_that_dies_wakes_who_waits_at_the_condition(mutex: Mutex, name: str) -> None:
    """OwnerDied comes out of the wait too. The condition itself is not robust, which the docs say."""
    condition = Condition.create(name + "2", mutex)
    text = """
        import os, signal, sys
        from anywire.ipc import Condition, Mutex
        mutex = Mutex.open(sys.argv[1])
        condition = Condition.open(sys.argv[1] + "2", mutex)
        mutex.lock()
        condition.notify_all()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with mutex, program(text, name) as child:
        with pytest.raises(OwnerDied):
            while True:
                condition.wait(30)
        mutex.mark_consistent()
        child.wait()
    condition.close()


# -- the read-write lock


def test_reading_and_writing(name: str) -> None:
    lock = RWLock.create(name)
    other = RWLock.open(name)
    with lock.reading() as same:
        assert same is lock and other.try_read_lock() and not other.try_write_lock()
        with pytest.raises(TimeoutError, match="others held it for 0.02 s"):
            other.write_lock(0.02)
        with pytest.raises(OSError, match="locked here"):
            lock.close()
        other.unlock()
    with lock.writing():
        assert lock.writer == other.writer == os.getpid() and not other.abandoned
        assert not other.try_write_lock() and not other.try_read_lock()
        with pytest.raises(OSError, match="holds it already") as caught:
            other.read_lock()
        assert caught.value.errno == errno.EDEADLK

        def elsewhere() -> None:
            with pytest.raises(TimeoutError):
                other.read_lock(0.02)
            with pytest.raises(TimeoutError):
                other.write_lock(timeout=0)

        in_thread_raises(elsewhere)
    assert lock.writer is None
    with pytest.raises(PermissionError, match="not locked"):
        lock.unlock()
    lock.close()
    other.close()


@pytest.mark.parametrize("what", ["mutex", "condition", "reading", "writing"])
def test_who_waits_when_it_is_closed_goes_on_and_gives_it_back(name: str, what: str) -> None:
    """The memory stays as long as he holds it: the kernel's list of the robust mutexes of a thread runs through it."""
    lock: Any = (Mutex if what in ("mutex", "condition") else RWLock).create(name)
    other: Any = type(lock).open(name)
    condition = Condition.create(name + "2", lock) if what == "condition" else None
    after: list[Any] = []

    def wait() -> None:
        try:
            with lock if isinstance(lock, Mutex) else lock.reading() if what == "reading" else lock.writing():
                if condition is not None:
                    condition.wait()
                after.append(lock.closed)
        except BaseException as error:
            after.append(error)

    def take() -> None:
        other.lock() if isinstance(lock, Mutex) else other.write_lock()

    if condition is None:
        take()
    thread = threading.Thread(target=wait)
    thread.start()
    while not sleeps(thread):
        time.sleep(0.001)
    if condition is not None:
        with lock:
            pass
        take()
        condition.notify()
    lock.close()
    other.unlock()
    thread.join()
    assert after == [True]
    take()                                  # he gave it back
    other.unlock()
    other.close()
    for use in (lock.unlock, lock.lock if isinstance(lock, Mutex) else lock.read_lock):
        with pytest.raises(ValueError, match="is closed"):
            use()
    if condition is not None:
        condition.close()


@pytest.mark.processes
def test_a_forked_child_holds_nothing_of_an_rwlock(name: str) -> None:
    def child() -> None:
        with pytest.raises(PermissionError):
            lock.unlock()
        lock.close()

    lock = RWLock.create(name)
    lock.write_lock()
    in_child(child)
    assert lock.writer == os.getpid() and not lock.try_read_lock()
    lock.unlock()
    lock.close()


def test_writers_first(name: str) -> None:
    """With prefer_writers a reader waits behind a writer that waits."""
    for prefer in (False, True):
        lock = RWLock.create(name, prefer_writers=prefer)
        lock.read_lock()
        waiting = threading.Thread(target=lambda: (lock.write_lock(), lock.unlock()))  # noqa: B023
        waiting.start()
        while not sleeps(waiting):
            time.sleep(0.001)
        got: list[bool] = []
        in_thread(lambda: got.append(lock.try_read_lock()))  # noqa: B023
        if got[0]:
            lock.unlock()
        lock.unlock()
        waiting.join()
        assert got == [not prefer]
        lock.unlink()
        lock.close()


@pytest.mark.processes
def test_a_dead_writer_is_named(name: str) -> None:
    lock = RWLock.create(name)
    text = """
        import sys
        from anywire.ipc import RWLock
        lock = RWLock.open(sys.argv[1])
        lock.write_lock()
        print("locked")
        sys.stdin.readline()
    """
    with program(text, name) as child:
        assert line_of(child) == "locked"
        assert lock.writer == child.pid and not lock.abandoned
        child.kill()
    assert lock.abandoned
    with pytest.raises(TimeoutError, match=f"process {child.pid}, which holds it for writing, is dead"):
        lock.read_lock(timeout=0)
    lock.close()


# -- C programs, and many at a time


@pytest.fixture
def counter(name: str) -> Iterator[SharedMemory]:
    with SharedMemory.create(name + "3", 8, owner=True) as memory:
        yield memory


def value(counter: SharedMemory) -> int:
    return int.from_bytes(counter[:8], "little")


def add(counter: SharedMemory) -> None:
    counter[:8] = (value(counter) + 1).to_bytes(8, "little")


@pytest.mark.processes
def test_c_programs_share_mutexes(mutex: Mutex, name: str, counter: SharedMemory, c_program: str) -> None:
    with subprocess.Popen([c_program, "count-locked", name, name + "3", "20000"]) as peer:
        for _ in range(2000):
            with mutex:
                add(counter)
    assert peer.returncode == 0 and value(counter) == 22000
    assert subprocess.run([c_program, "die-locked", name], check=False).returncode == -signal.SIGKILL
    with pytest.raises(OwnerDied):
        mutex.lock()
    mutex.mark_consistent()
    mutex.unlock()
    kill_a_holder(name)
    said = subprocess.run([c_program, "lock-after-death", name], check=True, capture_output=True, text=True).stdout
    assert said == "1 0\n"
    mutex.lock()
    mutex.unlock()


@pytest.mark.processes
def test_c_programs_share_conditions(mutex: Mutex, name: str, counter: SharedMemory, c_program: str) -> None:
    condition = Condition.create(name + "2", mutex)
    with subprocess.Popen([c_program, "answer-condition", name, name + "2", name + "3", "100"]) as peer:
        for number in range(100):
            with mutex:
                add(counter)
                condition.notify()
                condition.wait_for(lambda: value(counter) == 2 * number + 2, 30)  # noqa: B023
    assert peer.returncode == 0
    condition.close()


@pytest.mark.processes
def test_c_programs_share_rwlocks(name: str, counter: SharedMemory, c_program: str) -> None:
    lock = RWLock.create(name)
    with subprocess.Popen([c_program, "count-written", name, name + "3", "20000"]) as peer:
        for _ in range(2000):
            with lock.writing():
                add(counter)
    assert peer.returncode == 0 and value(counter) == 22000
    lock.close()


@pytest.mark.processes
@pytest.mark.parametrize("what", ["Mutex", "RWLock"])
def test_8_processes_and_8_threads(what: str, name: str, counter: SharedMemory) -> None:
    lock: Any = {"Mutex": Mutex, "RWLock": RWLock}[what].create(name)
    text = """
        import os, sys, threading
        from anywire import ipc
        what, name, threads, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        lock = getattr(ipc, what).open(name)
        counter = ipc.SharedMemory.open(name + "3")
        sys.stdin.readline()

        def count():
            for turn in range(times):
                with lock.writing() if what == "RWLock" else lock:
                    was = int.from_bytes(counter[:8], "little")
                    if turn % 16 == 0:
                        os.sched_yield()
                    counter[:8] = (was + 1).to_bytes(8, "little")
                if what == "RWLock" and turn % 8 == 0:
                    with lock.reading():
                        pass

        all_of_them = [threading.Thread(target=count) for _ in range(threads)]
        for thread in all_of_them: thread.start()
        for thread in all_of_them: thread.join()
        lock.close()
        counter.close()
    """
    children = [program(text, what, name, 1, 400) for _ in range(7)] + [program(text, what, name, 8, 50)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        with child:
            child.communicate()
        assert child.returncode == 0
    assert value(counter) == 7 * 400 + 8 * 50
    lock.close()


@pytest.mark.processes
def test_killed_again_and_again(mutex: Mutex, name: str, counter: SharedMemory) -> None:
    """Holders killed at any moment: somebody always gets it, told or not, and no count goes back."""
    text = """
        import sys
        from anywire import ipc
        mutex = ipc.Mutex.open(sys.argv[1])
        mutex.repair = lambda: None
        counter = ipc.SharedMemory.open(sys.argv[1] + "3")
        print("ready")
        while True:
            with mutex:
                counter[:8] = (int.from_bytes(counter[:8], "little") + 1).to_bytes(8, "little")
    """
    mutex.repair = lambda: None
    last = 0
    children = [program(text, name) for _ in range(3)]
    for child in children:
        assert line_of(child) == "ready"
    for child in children:
        for _ in range(50):
            with mutex:
                now = value(counter)
            assert now >= last
            last = now
        child.kill()
        with child:
            pass
    assert last > 0
    with mutex:
        pass


def test_memory_that_is_not_a_file_too() -> None:
    memory = mmap.mmap(-1, 4096)
    mutex, lock = Mutex.create_in(memory), RWLock.create_in(memory, 256)
    with mutex, lock.reading():
        pass
    mutex.close()
    lock.close()
    memory.close()
