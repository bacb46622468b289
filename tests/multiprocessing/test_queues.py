"""anywire.multiprocessing beyond the interpreter's own tests: overflow, buffers, threads, signals, start methods."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing.connection
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from anywire import multiprocessing as ours
from anywire.multiprocessing import queues

METHODS = ("fork", "spawn", "forkserver")


class Array:
    """Pickled as NumPy's arrays are: its memory is a buffer of protocol 5."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: int) -> Any:
        return Array, (pickle.PickleBuffer(self.data),)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rings of 64 KiB, so that little overflows them."""
    monkeypatch.setattr(queues, "SIZE", 1 << 16)
    return 1 << 16


@pytest.fixture
def forked() -> Iterator[Any]:
    """Run functions in children, which end with their result as status."""
    children: list[int] = []

    def start(work: Any) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(work() or 0)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(99)
        children.append(pid)
        return pid

    yield start
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_put_never_waits_for_a_reader(small: int) -> None:
    # As in the standard library: fill first, read later, in one thread.
    q = ours.Queue()
    for number in range(200):
        q.put((number, bytes(10_000)))
    q.put(bytes(5 * small))
    assert q.qsize() == 201
    assert [q.get()[0] for _ in range(200)] == list(range(200))
    assert q.get() == bytes(5 * small)
    assert q.qsize() == 0 and q.empty()
    q.close()
    q.join_thread()


def test_a_child_that_put_much_ends_when_it_is_read(small: int) -> None:
    q = ours.get_context("fork").Queue()

    def fill() -> None:
        for number in range(100):
            q.put((number, bytes(20_000)))

    child = ours.get_context("fork").Process(target=fill)
    child.start()
    child.join(0.2)
    assert child.is_alive(), "its feeder has what nobody took"
    assert [q.get()[0] for _ in range(100)] == list(range(100))
    child.join()
    assert child.exitcode == 0


def test_a_child_that_does_not_care_ends_at_once(small: int) -> None:
    q = ours.get_context("fork").Queue()

    def fill() -> None:
        q.cancel_join_thread()
        for _ in range(100):
            q.put(bytes(20_000))

    child = ours.get_context("fork").Process(target=fill)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_maxsize_counts_what_overflowed(small: int) -> None:
    q = ours.Queue(5)
    for _ in range(5):
        q.put(bytes(30_000))
    assert q.full() and q.qsize() == 5
    with pytest.raises(queue.Full):
        q.put(b"", block=False)
    with pytest.raises(queue.Full):
        q.put(b"", timeout=0.05)
    threading.Timer(0.05, q.get).start()
    q.put(b"last", timeout=20)
    for _ in range(4):
        q.get()
    assert q.get() == b"last"
    q.close()
    q.join_thread()


def test_what_waited_in_a_killed_process_does_not_count(small: int, forked: Any) -> None:
    q = ours.JoinableQueue(8)
    reading, writing = os.pipe()

    def fill() -> None:
        for _ in range(8):
            q.put(bytes(30_000))
        os.write(writing, b"x")
        signal.pause()

    pid = forked(fill)
    os.read(reading, 1)
    assert q.full()
    os.kill(pid, signal.SIGKILL)        # not reaped: a zombie counts as dead, too
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    here = q.qsize()
    assert 0 < here < 8
    for _ in range(here):
        q.get(timeout=20)
        q.task_done()
    q.join()                            # of what the ring held, everything is done
    with pytest.raises(queue.Empty):
        q.get(timeout=0.05)             # what it was writing is dropped
    with pytest.raises(ValueError, match="too many"):
        q.task_done()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("lock", ["take", "put", "turn"])
def test_a_lock_of_a_killed_process_is_inherited(lock: str, forked: Any) -> None:
    # A process stopped and then killed in a get (turn), or in the middle of taking or putting a long message.
    q = ours.SimpleQueue()
    words = q._ring.words

    def work() -> None:
        if lock == "put":
            q.put(bytes(8 << 20))
        else:
            q.get()

    pid = forked(work)
    if lock == "take":                  # a message whose rest never comes
        writer = forked(lambda: q.put(bytes(64 << 20)))
        while not words()["take"] or words()["tail"] == 0:
            pass
        os.kill(writer, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        os.kill(writer, signal.SIGKILL)
    else:
        while not words()[lock]:
            pass
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    q.put("hello") if lock != "put" else forked(lambda: q.put("hello"))
    assert q.get() == "hello"
    assert q.empty()


@pytest.mark.parametrize("size", [0, 1023, 1024, 100_000, 3 << 20])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_buffers_go_beside_the_pickle(size: int, kind: Any) -> None:
    q = ours.Queue()
    sent = kind(os.urandom(size))
    q.put({"a": Array(sent), "b": [Array(memoryview(sent)[size // 2:])], "c": sent})
    if isinstance(sent, bytearray):     # a put copies: what is changed later was not sent
        kept, sent[:] = bytes(sent), bytes(size)
    else:
        kept = sent
    got = q.get()
    assert bytes(got["a"].data) == kept and bytes(got["b"][0].data) == kept[size // 2:] and got["c"] == kept
    q.close()
    q.join_thread()


def test_many_and_strange_buffers() -> None:
    a, b = ours.Pipe()
    many = [Array(bytearray(2000)) for _ in range(700)]
    thread = threading.Thread(target=a.send, args=(many,))
    thread.start()
    got = b.recv()
    thread.join()
    assert len(got) == 700 and all(bytes(one.data) == bytes(2000) for one in got)
    a.send(Array((ctypes.c_int * 1000)(*range(1000))))
    assert memoryview(b.recv().data).cast("B").cast("i").tolist() == list(range(1000))
    a.send(Array(bytearray(b"x" * 5000)))
    assert pickle.loads(b.recv_bytes()).data == b"x" * 5000    # recv_bytes gives what the standard library would send
    a.close()
    b.close()


def test_a_pickling_error_is_raised_and_costs_nothing() -> None:
    q = ours.Queue(1)
    for _ in range(3):
        with pytest.raises((pickle.PicklingError, AttributeError)):
            q.put(lambda: None)
    q.put("fine", block=False)
    assert q.get() == "fine"
    q.close()


def test_threads_share_a_queue() -> None:
    q, results = ours.Queue(), ours.SimpleQueue()

    def work() -> None:
        for item in iter(q.get, None):
            results.put(item)

    threads = [threading.Thread(target=work) for _ in range(4)]
    feeders = [
        threading.Thread(target=lambda n=n: [q.put(number) for number in range(n, 4000, 4)]) for n in range(4)
    ]
    for thread in [*threads, *feeders]:
        thread.start()
    got = sorted(results.get() for _ in range(4000))
    for _ in threads:
        q.put(None)
    for thread in [*threads, *feeders]:
        thread.join()
    assert got == list(range(4000))
    q.close()


@contextlib.contextmanager
def interrupted(handler: Any, times: int) -> Iterator[None]:
    """Send the main thread signals (not SIGALRM, which is pytest-timeout's), 50 ms apart."""
    before = signal.signal(signal.SIGUSR1, handler)
    over = threading.Event()

    def send() -> None:
        for _ in range(times):
            if not over.wait(0.05):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_runs_and_may_end_a_get() -> None:
    q = ours.Queue()
    seen = []

    class EnoughError(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 2:
            raise EnoughError

    with interrupted(handler, 2), pytest.raises(EnoughError):
        q.get()
    q.put("still usable")
    assert q.get() == "still usable"
    q.close()


def test_a_signal_handler_may_end_a_long_put(small: int) -> None:
    q = queues.SimpleQueue()

    def handler(number: int, frame: object) -> None:
        raise TimeoutError

    with interrupted(handler, 1), pytest.raises(TimeoutError):     # once: it must not get lost, wherever it comes
        q.put(bytes(10 * small))
    thread = threading.Thread(target=q.put, args=("next",))
    thread.start()
    assert q.get() == "next", "the half of the first was dropped"
    thread.join()
    q.close()


def test_a_signal_handler_may_use_the_queue_whose_get_it_interrupted() -> None:
    q = ours.Queue()
    got = []

    def handler(number: int, frame: object) -> None:
        got.append(q.get(timeout=20))
        q.put("from the handler")

    with interrupted(handler, 1):
        threading.Timer(0.3, q.put, ("from a thread",)).start()
        assert q.get() == "from the handler"
    assert got == ["from a thread"]
    q.close()


@pytest.mark.no_sanitize  # forks beside other threads: gcc's ASan may hold its allocator's lock at that moment
def test_readiness_is_exact_for_selectors(forked: Any) -> None:
    q = ours.SimpleQueue()
    reader = q._reader

    def is_ready() -> bool:
        return bool(multiprocessing.connection.wait([reader], 0))

    for _ in range(3):
        q.put(1)
    assert is_ready()                   # asked for the first time with messages waiting
    for left in (2, 1, 0):
        q.get()
        assert is_ready() == (left > 0)
    for _ in range(30):
        forked(lambda: q.put(2))
        assert multiprocessing.connection.wait([reader], 20) == [reader]
        assert q.get() == 2 and not is_ready()
    q.close()


def test_no_cpu_while_waiting(forked: Any) -> None:
    q = ours.Queue()

    def work() -> int:
        with pytest.raises(queue.Empty):
            q.get(timeout=1)
        return int(time.process_time() > 0.8)

    pids = [forked(work) for _ in range(3)]
    assert [status_of(pid) for pid in pids] == [0, 0, 0]


def test_damaged_memory_is_an_error(forked: Any) -> None:
    import mmap

    q = queues.Queue()
    q.put("x" * 100)
    with mmap.mmap(q._memory.fd, 4096 + queues.SIZE) as memory:
        memory[4096:4100] = b"\xff\xff\xff\x7f"         # the first record's length
    with pytest.raises(OSError, match="damaged"):
        q.get()
    q.close()


def double(number: int) -> int:
    return 2 * number


def echo(requests: Any, answers: Any, pipe: Any) -> None:
    for item in iter(requests.get, None):
        answers.put((os.getpid(), item))
        requests.task_done()
    pipe.send_bytes(pipe.recv())


@pytest.mark.parametrize("method", METHODS)
def test_start_methods(method: str) -> None:
    context = ours.get_context(method)
    requests, answers = context.JoinableQueue(), context.SimpleQueue()
    near, far = context.Pipe()
    children = [context.Process(target=echo, args=(requests, answers, end)) for end in (far, context.Pipe()[0])]
    children[0].start()
    far.close()
    for number in range(10):
        requests.put((number, Array(bytearray(b"y" * 3000))))
    got = [answers.get() for _ in range(10)]
    assert [item[0] for _, item in got] == list(range(10))
    assert all(bytes(item[1].data) == b"y" * 3000 for _, item in got)
    requests.join()
    requests.put(None)
    near.send(b"bytes")
    assert near.recv_bytes() == b"bytes"
    children[0].join()
    assert children[0].exitcode == 0
    with pytest.raises(EOFError):
        near.recv()
    with pytest.raises(BrokenPipeError):
        near.send("nobody")


@pytest.mark.parametrize("method", METHODS)
def test_pools_and_executors(method: str) -> None:
    context = ours.get_context(method)
    with context.Pool(2) as pool:
        assert isinstance(pool._inqueue, queues.SimpleQueue)
        assert pool.map(double, range(100)) == list(range(0, 200, 2))
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(double, range(20))) == list(range(0, 40, 2))


def test_a_pool_goes_on_when_a_worker_is_killed() -> None:
    with ours.get_context("fork").Pool(3) as pool:
        for _ in range(10):
            victim = next((worker for worker in list(pool._pool) if worker.is_alive()), None)
            if victim is not None:          # none: the pool hasn't replaced the last ones yet
                victim.kill()               # it sleeps in a get, perhaps as the one who is woken next
                victim.join()
            assert pool.apply_async(double, (4,)).get(timeout=20) == 8


def test_workers_end_with_their_killed_parent() -> None:
    program = (
        "from anywire import multiprocessing as mp; import os, time\n"
        "pool = mp.get_context('fork').Pool(2); pool.map(len, ['a']); print(*[p.pid for p in pool._pool], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=40, check=False)
    assert done.returncode == -signal.SIGKILL and len(done.stdout.split()) == 2


def test_it_is_the_standard_module_otherwise() -> None:
    assert ours.Process is multiprocessing.Process
    assert ours.current_process() is multiprocessing.current_process()
    assert isinstance(ours.Queue(), multiprocessing.queues.Queue)
    assert isinstance(ours.Pipe()[0], multiprocessing.connection.Connection)
    assert ours.get_start_method() == multiprocessing.get_start_method()
    assert ours.TimeoutError is multiprocessing.TimeoutError and ours.util is multiprocessing.util
    with pytest.raises(AttributeError):
        _ = ours.nothing
    with pytest.raises(ValueError, match="cannot find context"):
        ours.get_context("none")


def test_a_feeder_that_nobody_reads_lets_others_write(small: int, forked: Any) -> None:
    # One feeder is in the middle of a long message; another process still puts without waiting for a reader.
    q = ours.Queue()

    def fill() -> None:
        q.put(bytes(10 * small))
        q.put("second")
        q.close()
        q.join_thread()

    first = forked(fill)
    while q._ring.words()["head"] < small // 2:
        pass
    q.put("mine")
    assert status_of(forked(lambda: q.put("another's"))) == 0     # it returns; os._exit may lose what it put
    missing = {bytes(10 * small), "second", "mine"}
    while missing:
        missing.discard(q.get(timeout=20))
    assert status_of(first) == 0
    q.close()
    q.join_thread()
