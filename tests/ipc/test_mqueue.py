"""POSIX message queues: opening, order, waiting, limits, other processes. In the words of `mqueue_assertions.py`."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import random
import resource
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import ipc_children as children
import mqueue_assertions
import pytest

from anywire.ipc import MessageQueue, mqueue_limits

NOBODY = 65534


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no queue has, and none has afterwards."""
    found = f"/anywire-test-{secrets.token_hex(6)}"
    yield found
    try:
        MessageQueue.unlink(found)
    except FileNotFoundError:
        pass


@pytest.fixture
def queue(name: str) -> Iterator[MessageQueue]:
    """Room for four messages of up to 64 bytes."""
    with MessageQueue.create(name, 4, 64) as found:
        yield found


def fill(queue: MessageQueue) -> None:
    for number in range(queue.max_messages):
        queue.send(b"%d" % number)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that runs `work`, and the list to which its result, or its exception, is added."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def blocked(thread: threading.Thread) -> None:
    """Until the thread sleeps in the kernel."""
    while True:
        state = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(") ")[2][0]
        if state == "S":
            return
        time.sleep(0.001)


# -- opening ----------------------------------------------------------------------------------------------------------


def test_making_opening_and_what_is_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no queue of this name") as missing:
        MessageQueue.open(name)
    assert missing.value.filename == name
    with MessageQueue.create_or_open(name, 3, 100) as first, MessageQueue.create_or_open(name, 9, 9) as second:
        assert (second.max_messages, second.message_size) == (3, 100)       # what is there keeps its sizes
        with pytest.raises(FileExistsError, match="there already") as there:
            MessageQueue.create(name)
        assert there.value.filename == name
        first.send(b"x")
        with MessageQueue.open(name) as third:                              # opening takes and adds nothing
            assert third.depth == second.depth == 1 and third.recv() == b"x"


def test_flags_are_those_of_mq_open(name: str) -> None:
    with MessageQueue(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NONBLOCK, 0o640, 2, 10) as queue:
        assert not queue.blocking and queue.access == "rw"
        assert os.fstat(queue.fileno()).st_mode & 0o777 == 0o640 & ~os.umask(os.umask(0))
        status = os.fstat(queue.fileno())
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        with pytest.raises(FileExistsError):
            MessageQueue(name, os.O_CREAT | os.O_EXCL)
        with MessageQueue(name, os.O_RDONLY) as other:
            assert other.blocking and other.access == "r"                   # O_NONBLOCK is each opening's own
        assert not os.get_inheritable(queue.fileno())


def test_one_of_many_who_insist_on_making_it_does(name: str) -> None:
    def make() -> bool:
        try:
            MessageQueue.create(name, 2, 10).close()
        except FileExistsError:
            return False
        return True

    started = [in_thread(make) for _ in range(8)]
    for thread, _ in started:
        thread.join()
    assert Counter(result[0] for _, result in started) == {True: 1, False: 7}


@pytest.mark.parametrize(("access", "sends", "receives"), [("r", False, True), ("w", True, False), ("rw", True, True)])
def test_access_is_what_was_asked_for(queue: MessageQueue, access: Any, sends: bool, receives: bool) -> None:
    queue.send(b"one")
    with MessageQueue.open(queue.name or "", access=access) as other:
        assert other.access == access
        for may, work in ((sends, lambda: other.send(b"two")), (receives, other.recv)):
            if may:
                work()
            else:
                with pytest.raises(OSError, match="only") as error:
                    work()
                assert error.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("bad", "number", "says"),
    [
        ("no-slash", errno.EINVAL, "begins with a slash"),
        ("/", errno.ENOENT, "at least one character"),
        ("/two/slashes", errno.EACCES, "none of them a slash"),
        ("/" + "x" * 256, errno.ENAMETOOLONG, "at most 255"),
    ],
)
def test_a_bad_name_is_named(bad: str, number: int, says: str) -> None:
    for work in (lambda: MessageQueue(bad, os.O_RDWR | os.O_CREAT), lambda: MessageQueue.unlink(bad)):
        with pytest.raises(OSError, match=says) as error:
            work()
        assert (error.value.errno, error.value.filename) == (number, bad)
    with pytest.raises(ValueError, match="null"):
        MessageQueue("/a\0b")
    with pytest.raises(TypeError, match="is a str"):
        MessageQueue(b"/a")  # type: ignore[arg-type]


def test_the_longest_name(name: str) -> None:
    longest = name + "x" * (256 - len(name))
    MessageQueue.create(longest, 2, 10, owner=True).close()
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(longest)


def test_random_names() -> None:
    with MessageQueue.create(None, 2, 10, owner=True) as one, MessageQueue.create(None, 2, 10, owner=True) as two:
        assert one.name != two.name
        with MessageQueue.open(one.name or "") as again:
            assert os.path.samestat(os.fstat(again.fileno()), os.fstat(one.fileno()))
    with pytest.raises(ValueError, match="made"):
        MessageQueue(None, os.O_RDWR)


def test_sizes_not_given_are_the_systems(name: str) -> None:
    limits = mqueue_limits.limits()
    with MessageQueue.create(name, message_size=10) as queue:
        assert (queue.max_messages, queue.message_size) == (limits.msg_default, 10)
    assert limits._asdict()["msg_max"] == int(Path("/proc/sys/fs/mqueue/msg_max").read_text())
    for bad in (0, -1):
        with pytest.raises(ValueError, match="above 0"):
            MessageQueue.create(None, bad)


def test_as_many_as_descriptors(name: str) -> None:
    with MessageQueue.create(name, 2, 10, owner=True):
        many = [MessageQueue.open(name) for _ in range(300)]
        assert len({queue.fileno() for queue in many}) == 300
        for queue in many:
            queue.close()


# -- unlinking and closing --------------------------------------------------------------------------------------------


def test_unlinking_takes_the_name_now_and_the_queue_last(queue: MessageQueue) -> None:
    queue.send(b"kept")
    queue.unlink()
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(queue.name or "")
    with pytest.raises(FileNotFoundError) as error:
        MessageQueue.unlink(queue.name or "")
    assert error.value.filename == queue.name
    with MessageQueue.create(queue.name, 2, 10) as other:
        assert other.depth == 0                                             # another queue of this name
    assert queue.recv() == b"kept"


def test_closing(queue: MessageQueue) -> None:
    fd = queue.fileno()
    queue.close()
    queue.close()
    assert queue.closed and "closed" in repr(queue)
    with pytest.raises(OSError):
        os.fstat(fd)
    uses: list[Callable[[], object]] = [
        lambda: queue.send(b""), queue.recv, queue.fileno, lambda: queue.depth, lambda: queue.blocking,
        queue.stop_notify, lambda: queue.notify(print),
        lambda: queue.recv_into(bytearray(64)), lambda: queue.notify_signal(10),
        lambda: setattr(queue, "blocking", True),
    ]
    for use in uses:
        with pytest.raises(OSError, match="closed on this side") as error:
            use()
        assert error.value.errno == errno.EBADF and error.value.filename == queue.name


def test_an_owner_unlinks_what_is_its_own(name: str) -> None:
    MessageQueue.create(name, 2, 10, owner=True).close()
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(name)
    with MessageQueue.create(name, 2, 10, owner=True) as queue:
        queue.unlink()
        other = MessageQueue.create(name, 2, 10)
    with other:
        MessageQueue.open(name).close()                                     # another's queue, so its name stayed


def test_the_collector_closes_with_a_warning(name: str) -> None:
    queue = MessageQueue.create(name, 2, 10)
    fd = queue.fileno()
    with pytest.warns(ResourceWarning, match=name):
        del queue
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("what", ["recv", "send"])
def test_closing_ends_the_waits_of_other_threads(
    queue: MessageQueue, what: str, timeout: float | None, masked: bool
) -> None:
    """Also those of threads that have all signals blocked."""
    works: dict[str, Callable[[], object]] = {
        "recv": lambda: queue.recv(timeout), "send": lambda: queue.send(b"too many", 0, timeout),
    }

    def work() -> object:
        if masked:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return works[what]()

    if what == "send":
        fill(queue)
    before = queue.depth
    with MessageQueue.open(str(queue.name)) as other:
        threads = [in_thread(work) for _ in range(3)]
        for thread, _ in threads:
            blocked(thread)
        fd = queue.fileno()
        queue.close()
        for thread, result in threads:
            thread.join(10)
            (error,) = result
            assert (error.errno, error.filename) == (errno.EBADF, queue.name), error
            assert "closed on this side" in str(error)
        assert other.depth == before                                        # none was taken, none sent
    with pytest.raises(OSError):
        os.fstat(fd)


def test_closing_just_when_others_begin_to_wait(name: str) -> None:
    """Whatever the moment, the wait ends, with its message or with the error; a message is received or still there."""
    ends: Counter[str] = Counter()
    with MessageQueue.create(name, 4, 64, owner=True) as source:
        for number in range(300):
            queue = MessageQueue.open(name)
            barrier = threading.Barrier(2)

            def work(queue: MessageQueue = queue, barrier: threading.Barrier = barrier) -> bytes:
                barrier.wait()
                return queue.recv()

            thread, result = in_thread(work)
            barrier.wait()
            if number % 3:
                source.send(b"x")
            queue.close()
            thread.join(10)
            (found,) = result
            ends[type(found).__name__] += 1
            if found == b"x":
                assert source.depth == 0
            else:
                assert found.errno == errno.EBADF
                assert source.depth == (1 if number % 3 else 0)
                if source.depth:
                    source.recv()
    assert ends["OSError"] >= 100 and ends.total() == 300


def test_closing_disturbs_nobody_who_has_a_handler_for_the_signal(queue: MessageQueue) -> None:
    came = []
    old = signal.signal(signal.SIGURG, lambda *_: came.append(1))
    try:
        thread, result = in_thread(queue.recv)
        blocked(thread)
        queue.close()
        thread.join(10)
        assert result[0].errno == errno.EBADF and came == []
        os.kill(os.getpid(), signal.SIGURG)
        assert came == [1]
    finally:
        signal.signal(signal.SIGURG, old)


@pytest.mark.processes
def test_closing_takes_another_signal_when_somebody_takes_ours(name: str) -> None:
    """Also while a thread waits already."""
    assert children.run("""
        import errno, signal, sys, threading, time
        from pathlib import Path
        from anywire.ipc import MessageQueue

        def wait():
            try:
                queue.recv()
            except OSError as error:
                print(errno.errorcode[error.errno])

        with MessageQueue.create(sys.argv[1], 4, 64, owner=True):
            for number in range(signal.SIGRTMAX - 5, signal.SIGRTMAX - 8, -1):
                queue = MessageQueue.open(sys.argv[1])
                thread = threading.Thread(target=wait, daemon=True)
                thread.start()
                while Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(") ")[2][0] != "S":
                    time.sleep(0.001)
                signal.signal(number, lambda *_: print("a signal that is not ours"))
                queue.close()
                thread.join(10)
    """, name) == "EBADF\n" * 3


def test_closing_ends_waits_that_began_at_the_same_moment(name: str) -> None:
    """Whatever they need to be woken by is made once."""
    with MessageQueue.create(name, 4, 64, owner=True):
        for _ in range(30):
            queue = MessageQueue.open(name)
            barrier = threading.Barrier(4)

            def work(queue: MessageQueue = queue, barrier: threading.Barrier = barrier) -> bytes:
                barrier.wait()
                return queue.recv(60)

            threads = [in_thread(work) for _ in range(4)]
            before = len(os.listdir("/proc/self/fd"))
            for thread, _ in threads:
                blocked(thread)
            queue.close()
            for thread, result in threads:
                thread.join(10)
                assert result[0].errno == errno.EBADF
            assert len(os.listdir("/proc/self/fd")) <= before


def test_iteration_in_another_thread_ends_when_the_queue_is_closed(queue: MessageQueue) -> None:
    queue.send(b"one")
    thread, result = in_thread(lambda: list(queue))
    blocked(thread)
    while queue.depth:
        time.sleep(0.001)
    blocked(thread)
    queue.close()
    thread.join(10)
    assert result == [[b"one"]]


# -- sending and receiving --------------------------------------------------------------------------------------------


def test_higher_priority_first_and_oldest_first_within_one(queue: MessageQueue) -> None:
    for data, priority in ((b"a", 1), (b"b", 32767), (b"c", 1), (b"d", 0)):
        queue.send(data, priority)
    assert queue.depth == 4
    assert [queue.recv_with_priority() for _ in range(4)] == [(b"b", 32767), (b"a", 1), (b"c", 1), (b"d", 0)]
    assert queue.depth == 0


def test_any_order_of_priorities(name: str) -> None:
    rng = random.Random(7)
    with MessageQueue.create(name, 10, 8) as queue:
        for _ in range(20):
            sent = [(rng.choice((0, 1, 5, 100, 32767)), number) for number in range(10)]
            for priority, number in sent:
                queue.send(b"%d" % number, priority)
            expected = sorted(sent, key=lambda pair: (-pair[0], pair[1]))
            found = [queue.recv_with_priority() for _ in range(10)]
            assert found == [(b"%d" % number, priority) for priority, number in expected]


def test_bytes_come_out_unchanged_with_their_length(queue: MessageQueue) -> None:
    messages: list[Any] = [b"", b"\0", bytes(range(64)), bytearray(b"array"), memoryview(b"abcdef")[2:4]]
    for data in messages:
        queue.send(data)
        assert queue.recv() == bytes(data)
    with pytest.raises(TypeError):
        queue.send("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        queue.send(memoryview(b"abcdef")[::2])
    assert queue.depth == 0


def test_a_message_over_the_size_is_refused_and_says_what_to_do(queue: MessageQueue) -> None:
    with pytest.raises(OSError, match="65 bytes, and this queue takes up to 64.*message_size=65:") as error:
        queue.send(bytes(65))
    assert error.value.errno == errno.EMSGSIZE and error.value.filename == queue.name and queue.depth == 0
    with pytest.raises(OSError, match="sysctl fs.mqueue.msgsize_max=10000000"):
        queue.send(bytes(10_000_000))
    with pytest.raises(OSError, match="send it in parts"):
        queue.send(bytes((16 << 20) + 1))


@pytest.mark.parametrize("bad", [-1, 32768, 1 << 40])
def test_priorities_out_of_range(queue: MessageQueue, bad: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 32767"):
        queue.send(b"", bad)
    assert queue.depth == 0


def test_a_priority_is_a_whole_number(queue: MessageQueue) -> None:
    with pytest.raises(TypeError, match="whole number"):
        queue.send(b"", 1.0)  # type: ignore[arg-type]
    queue.send(b"", True)
    assert queue.recv_with_priority() == (b"", 1)


def test_receiving_into_a_buffer(queue: MessageQueue) -> None:
    buffer = bytearray(b"-" * 70)
    queue.send(b"hello", 3)
    with pytest.raises(OSError, match="messages up to 64") as error:
        queue.recv_into(memoryview(buffer)[:63])
    assert error.value.errno == errno.EMSGSIZE and queue.depth == 1         # none was taken
    assert queue.recv_into_with_priority(buffer) == (5, 3) and bytes(buffer[:6]) == b"hello-"
    queue.send(b"again")
    assert queue.recv_into(buffer) == 5
    with pytest.raises(BufferError):
        queue.recv_into(bytes(64))  # type: ignore[arg-type]


@pytest.mark.no_sanitize
def test_receiving_allocates_what_the_message_needs(name: str) -> None:
    """One buffer a queue, used again: 200 messages in a queue of 8 KiB ones leave no trace in the peak."""
    import tracemalloc

    with MessageQueue.create(name, 2, 8192) as queue:
        queue.send(b"x" * 8)
        queue.recv()
        tracemalloc.start()
        try:
            for _ in range(200):
                queue.send(b"x" * 8)
                queue.recv()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4096


def test_iteration_ends_when_the_queue_is_closed(queue: MessageQueue) -> None:
    fill(queue)
    found = []
    for message in queue:
        found.append(message)
        if not queue.depth:
            queue.close()
    assert found == [b"0", b"1", b"2", b"3"]


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_not_waiting(queue: MessageQueue) -> None:
    with pytest.raises(BlockingIOError, match="empty") as empty:
        queue.recv(block=False)
    fill(queue)
    with pytest.raises(BlockingIOError, match="full") as full:
        queue.send(b"more", block=False)
    assert empty.value.errno == full.value.errno == errno.EAGAIN and empty.value.filename == queue.name
    assert queue.depth == 4


def test_nonblocking_queues_never_wait(queue: MessageQueue) -> None:
    queue.blocking = False
    assert not queue.blocking and queue.depth == 0                          # and the rest is as it was
    assert (queue.max_messages, queue.message_size) == (4, 64)
    for timeout in (None, 60):
        with pytest.raises(BlockingIOError):
            queue.recv(timeout)
    fill(queue)
    for timeout in (None, 60):
        with pytest.raises(BlockingIOError):
            queue.send(b"", timeout=timeout)
    queue.blocking = True
    assert queue.blocking and queue.recv(60) == b"0"


@pytest.mark.parametrize("timeout", [0, 0.03])
def test_time_outs(queue: MessageQueue, timeout: float) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=f"stayed empty for {timeout} s") as error:
        queue.recv(timeout)
    assert error.value.errno == errno.ETIMEDOUT and error.value.filename == queue.name
    fill(queue)
    with pytest.raises(TimeoutError, match="stayed full"):
        queue.send(b"", timeout=timeout)
    assert time.monotonic() - start >= 2 * timeout and queue.depth == 4


def test_a_time_out_is_not_looked_at_when_nothing_has_to_wait(queue: MessageQueue) -> None:
    queue.send(b"now", timeout=0)
    assert queue.recv(0) == b"now"
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="not negative"):
            queue.recv(bad)
    with pytest.raises(TypeError):
        queue.recv("soon")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [None, 60])
def test_waiting_for_a_message_and_for_room(queue: MessageQueue, timeout: float | None) -> None:
    thread, result = in_thread(lambda: queue.recv(timeout))
    blocked(thread)
    queue.send(b"came")
    thread.join(10)
    assert result == [b"came"]
    fill(queue)
    thread, result = in_thread(lambda: queue.send(b"last", timeout=timeout))
    blocked(thread)
    assert queue.recv() == b"0"
    thread.join(10)
    assert result == [None] and [queue.recv() for _ in range(4)] == [b"1", b"2", b"3", b"last"]


STEPPED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
/* The wall clock as it was before somebody stepped it by STEP seconds. */
int clock_gettime(clockid_t clock, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(clock, t);
    if (clock == CLOCK_REALTIME) t->tv_sec += atol(getenv("STEP"));
    return r;
}
"""


@pytest.mark.processes
@pytest.mark.no_sanitize  # which have to be the first to be preloaded
@pytest.mark.parametrize("step", [-3600, 3600])
def test_a_step_of_the_clock_does_not_matter(tmp_path: Path, step: int) -> None:
    (tmp_path / "step.c").write_text(STEPPED)
    command = ["cc", "-shared", "-fPIC", "-o", "step.so", "step.c", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=50)
    program = f"""
        import threading, time
        from anywire.ipc import MessageQueue
        assert abs(time.time() - {time.time()} - {step}) < 600              # it is stepped indeed
        with MessageQueue.create(None, 2, 10, owner=True) as queue:
            start = time.monotonic()
            for timeout in (0, 0.05):
                try:
                    queue.recv(timeout)
                except TimeoutError:
                    pass
            assert 0.05 <= time.monotonic() - start < 20
            for timeout in (None, 60):
                threading.Timer(0.1, queue.send, (b"came",)).start()
                assert queue.recv(timeout) == b"came"
    """
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "step.so"), "STEP": str(step)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, env=environment, check=True, timeout=30)


def test_signals_run_their_handlers_and_the_wait_goes_on(queue: MessageQueue) -> None:
    """PEP 475. The second signal's handler raises, which ends the wait."""
    came = []

    def handler(*_: object) -> None:
        came.append(time.monotonic())
        if len(came) == 2:
            raise KeyboardInterrupt
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        for timeout in (None, 60):
            came.clear()
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(KeyboardInterrupt):
                queue.recv(timeout)
            assert len(came) == 2
        fill(queue)
        came.clear()
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            queue.send(b"")
        assert queue.depth == 4
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_time_out_counts_through_signals(queue: MessageQueue) -> None:
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    try:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            queue.recv(0.05)
        assert 0.05 <= time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# -- in an event loop -------------------------------------------------------------------------------------------------


def test_awaiting(queue: MessageQueue) -> None:
    async def main() -> None:
        receiver = asyncio.create_task(queue.recv_with_priority_async())
        await asyncio.sleep(0)
        await queue.send_async(b"x", 5)
        assert await asyncio.wait_for(receiver, 10) == (b"x", 5)
        fill(queue)
        sender = asyncio.create_task(queue.send_async(b"last"))
        await asyncio.sleep(0)
        assert not sender.done()
        assert [await queue.recv_async() for _ in range(4)] == [b"0", b"1", b"2", b"3"]
        await asyncio.wait_for(sender, 10)
        buffer = bytearray(64)
        assert await queue.recv_into_async(buffer) == 4 and buffer[:4] == b"last"

    asyncio.run(main())


def test_awaiting_no_longer_than_asked(queue: MessageQueue) -> None:
    async def main() -> None:
        for timeout in (0, 0.02):
            with pytest.raises(TimeoutError, match="stayed empty") as error:
                await queue.recv_async(timeout)
            assert error.value.errno == errno.ETIMEDOUT and error.value.filename == queue.name
        fill(queue)
        with pytest.raises(TimeoutError, match="stayed full"):
            await queue.send_async(b"", timeout=0.02)
        with pytest.raises(ValueError, match="not negative"):
            await queue.send_async(b"", timeout=-1)

    asyncio.run(main())


def test_a_cancelled_wait_takes_nothing(queue: MessageQueue) -> None:
    async def main() -> None:
        for turns in range(4):
            task = asyncio.create_task(queue.recv_async())
            await asyncio.sleep(0)
            queue.send(b"x")
            for _ in range(turns):
                await asyncio.sleep(0)
            taken = task.done()
            if not taken:
                task.cancel()
            await asyncio.wait([task])
            assert queue.depth == (0 if taken else 1)
            if not taken:
                queue.recv()

    asyncio.run(main())


def test_many_tasks_and_closing(queue: MessageQueue) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(queue.recv_async()) for _ in range(4)]
        await asyncio.sleep(0)
        queue.send(b"one")
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [b"one"]
        queue.close()
        rest = await asyncio.gather(*(task for task in tasks if task not in done), return_exceptions=True)
        for error in rest:
            assert isinstance(error, OSError)
            assert (error.errno, error.filename) == (errno.EBADF, queue.name)

    asyncio.run(main())


def test_async_iteration(queue: MessageQueue) -> None:
    async def main() -> list[bytes]:
        fill(queue)
        asyncio.get_running_loop().call_later(0.02, queue.close)
        return [message async for message in queue]

    assert asyncio.run(main()) == [b"0", b"1", b"2", b"3"]


# -- limits and permissions -------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_limits_are_named_for_who_has_no_privileges() -> None:
    """In a child without root's rights, and with room for two queues."""
    limits = mqueue_limits.limits()
    program = f"""
        import errno, os, resource
        from anywire.ipc import MessageQueue, mqueue_limits
        resource.setrlimit(mqueue_limits.RLIMIT_MSGQUEUE, (20_000, 20_000))
        if os.geteuid() == 0:
            os.setgid({NOBODY})
            os.setuid({NOBODY})

        def refused(**sizes):
            try:
                MessageQueue.create(**sizes)
            except OSError as error:
                print(errno.errorcode[error.errno], error.strerror)

        refused(max_messages={limits.msg_max + 1})
        refused(message_size={limits.msgsize_max + 1})
        with MessageQueue.create(None, 2, 4000, owner=True), MessageQueue.create(None, 2, 4000, owner=True):
            refused(max_messages=2, message_size=4000)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            refused(max_messages=1, message_size=1)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    """
    lines = children.run(program).splitlines()
    assert [line.split()[0] for line in lines] == ["EINVAL", "EINVAL", "EMFILE", "EMFILE"]
    assert f"sysctl fs.mqueue.msg_max={limits.msg_max + 1}" in lines[0]
    assert f"sysctl fs.mqueue.msgsize_max={limits.msgsize_max + 1}" in lines[1]
    assert "takes about 8192 bytes of RLIMIT_MSGQUEUE" in lines[2] and "20000 together" in lines[2]
    assert "ulimit -q" in lines[2] and "LimitMSGQUEUE" in lines[2]
    assert "ulimit -n" in lines[3]


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a namespace with limits of its own, which root may")
def test_the_number_of_queues_is_named() -> None:
    program = """
        import ctypes, os, sys
        from anywire.ipc import MessageQueue, mqueue_limits
        if ctypes.CDLL(None).unshare(0x08000000):           # CLONE_NEWIPC
            print("no namespaces here"); sys.exit()
        try:
            with open("/proc/sys/fs/mqueue/queues_max", "w") as file:
                file.write("1")
        except OSError:
            print("no namespaces here"); sys.exit()
        os.setgid(65534); os.setuid(65534)
        with MessageQueue.create("/one", 1, 1):
            try:
                MessageQueue.create("/two", 1, 1).close()
            except OSError as error:
                print(error.errno, error.strerror)
    """
    text = children.run(program)
    if "no namespaces" in text:
        pytest.skip("no namespaces here")
    assert text.startswith(f"{errno.ENOSPC} ")
    assert "sysctl fs.mqueue.queues_max=2" in text and "1 queues already" in text


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_permissions_are_those_of_files(name: str) -> None:
    with MessageQueue.create(name, 2, 10):
        children.run(
            """
            import sys
            from anywire.ipc import MessageQueue
            name = sys.argv[1]
            for access in ("r", "w", "rw"):
                try:
                    MessageQueue.open(name, access=access)
                except PermissionError as error:
                    assert error.filename == name
                else:
                    raise SystemExit("was let in")
            try:
                MessageQueue.unlink(name)
            except PermissionError:
                pass
            """,
            name, user=NOBODY,
        )
    MessageQueue.unlink(name)
    old = os.umask(0)
    try:
        queue = MessageQueue.create(name, 2, 10, mode=0o622)
    finally:
        os.umask(old)
    with queue:
        children.run(
            """
            import sys
            from anywire.ipc import MessageQueue
            with MessageQueue.open(sys.argv[1], access="w") as queue:
                queue.send(b"let in")
            try:
                MessageQueue.open(sys.argv[1], access="r")
            except PermissionError:
                pass
            else:
                raise SystemExit("may read")
            """,
            name, user=NOBODY,
        )
        assert queue.recv() == b"let in"


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_messages_need_no_reader_and_survive_their_writer(name: str) -> None:
    children.run(
        """
        import sys
        from anywire.ipc import MessageQueue
        with MessageQueue.create(sys.argv[1], 4, 64) as queue:
            queue.send(b"from one who is gone", 2)
            queue.send(b"first", 3)
        """,
        name,
    )
    with MessageQueue.open(name) as queue:
        assert [queue.recv_with_priority() for _ in range(2)] == [(b"first", 3), (b"from one who is gone", 2)]


C_PROGRAM = r"""
#include <fcntl.h>
#include <mqueue.h>
#include <stdio.h>
#include <string.h>
/* Takes each message from the first queue and puts it, with its priority + 1, into the second; an empty one ends it. */
int main(int argc, char **argv) {
    mqd_t in = mq_open(argv[1], O_RDONLY);
    struct mq_attr want = { .mq_maxmsg = 3, .mq_msgsize = 100 }, a, b;
    mqd_t out = mq_open(argv[2], O_WRONLY | O_CREAT | O_EXCL, 0600, &want);
    char data[64];
    unsigned priority;
    if (argc != 3 || in < 0 || out < 0 || mq_getattr(in, &a) || mq_getattr(out, &b)) { perror("mq_open"); return 1; }
    printf("%ld %ld %ld %ld\n", a.mq_maxmsg, a.mq_msgsize, b.mq_maxmsg, b.mq_msgsize);
    fflush(stdout);
    for (;;) {
        ssize_t n = mq_receive(in, data, sizeof data, &priority);
        if (n < 0) { perror("mq_receive"); return 1; }
        if (n == 0) return 0;
        if (mq_send(out, data, n, priority + 1)) { perror("mq_send"); return 1; }
    }
}
"""


@pytest.mark.processes
def test_c_programs_share_the_queue(queue: MessageQueue, tmp_path: Path) -> None:
    source = tmp_path / "copy.c"
    source.write_text(C_PROGRAM)
    subprocess.run(["cc", "-o", tmp_path / "copy", source, "-lrt"], check=True, timeout=50)
    back = f"{queue.name}-back"
    with subprocess.Popen([tmp_path / "copy", str(queue.name), back], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "4 64 3 100\n"
            with MessageQueue.open(back, access="r", owner=True) as answers:
                assert (answers.max_messages, answers.message_size) == (3, 100)
                for data in (b"x", bytes(range(64)), b"\0\0"):
                    queue.send(data, 7)
                    assert answers.recv_with_priority(20) == (data, 8)
                queue.send(b"")
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.processes
def test_a_killed_sender_leaves_whole_messages(name: str) -> None:
    with MessageQueue.create(name, 8, 4096, owner=True) as queue:
        program = """
            import sys
            from anywire.ipc import MessageQueue
            number = 0
            with MessageQueue.open(sys.argv[1]) as queue:
                while True:
                    number += 1
                    queue.send(b"%08d" % number * 512)
        """
        for _ in range(3):
            with children.started(program, name) as process:
                found = [queue.recv(20) for _ in range(40)]
                process.send_signal(signal.SIGKILL)
                process.wait()
            while queue.depth:
                found.append(queue.recv())
            assert [message[:8] * 512 for message in found] == found
            assert [int(message[:8]) for message in found] == list(range(1, len(found) + 1))


@pytest.mark.processes
def test_fork(queue: MessageQueue) -> None:
    """The child has the same queue open, with the same O_NONBLOCK; what it closes is its own; it unlinks nothing."""
    program = """
        import os, sys, threading
        from anywire.ipc import MessageQueue
        queue = MessageQueue.create(None, 2, 10, owner=True)
        threading.Thread(target=queue.recv, daemon=True).start()        # not the child's to wait for
        if (pid := os.fork()) == 0:
            queue.blocking = False
            queue.send(b"child")
            fd = queue.fileno()
            queue.close()
            try:
                os.fstat(fd)
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not queue.blocking
        MessageQueue.open(queue.name).close()
        queue.close()
    """
    # From 3.12 on a fork beside threads warns.
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, timeout=30)


def test_pickling_opens_the_same_name(queue: MessageQueue) -> None:
    queue.send(b"there")
    with MessageQueue.open(queue.name or "", access="r") as reader:
        reader.blocking = False
        with pickle.loads(pickle.dumps(reader)) as again:
            assert (again.name, again.access, again.blocking, again.owner) == (queue.name, "r", False, False)
            assert again.recv() == b"there"
    data = pickle.dumps(queue)
    queue.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)


def test_from_a_descriptor(queue: MessageQueue) -> None:
    queue.send(b"passed on")
    with MessageQueue.from_fd(os.dup(queue.fileno())) as other:
        assert (other.name, other.max_messages, other.recv()) == (queue.name, 4, b"passed on")
    queue.unlink()
    with MessageQueue.from_fd(os.dup(queue.fileno())) as nameless:
        assert nameless.name is None
        with pytest.raises(TypeError, match="no name"):
            pickle.dumps(nameless)
        with pytest.raises(ValueError, match="no name"):
            nameless.unlink()
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="not a message queue's"):
        MessageQueue.from_fd(reading)
    os.close(reading)                                                        # it was not taken over
    os.close(writing)


@pytest.mark.parametrize("timed", [False, True])
def test_eight_threads_lose_nothing(name: str, timed: bool) -> None:
    count, timeout = 300, 60 if timed else None
    with MessageQueue.create(name, 4, 16, owner=True) as queue:

        def produce(number: int) -> None:
            for index in range(count):
                queue.send(b"%d %d" % (number, index), number, timeout)

        def consume() -> list[bytes]:
            return [queue.recv(timeout) for _ in range(count)]

        producers = [in_thread(lambda number=number: produce(number)) for number in range(4)]  # type: ignore[misc]
        consumers = [in_thread(consume) for _ in range(4)]
        for thread, _ in producers + consumers:
            thread.join(50)
        found = sorted(message for _, result in consumers for message in result[0])
        assert found == sorted(b"%d %d" % (number, index) for number in range(4) for index in range(count))


def test_threads_whose_waits_end_early_and_cancelled_tasks_lose_nothing(name: str) -> None:
    """Time-outs and cancellations at any moment, in both directions: what was not sent is sent again."""
    count = 400
    with MessageQueue.create(name, 4, 16, owner=True) as queue:

        def produce(number: int) -> None:
            rng = random.Random(number)
            for index in range(count):
                while True:
                    try:
                        queue.send(b"%d %d" % (number, index), number, rng.choice((0, 0.0001, 0.001)))
                        break
                    except TimeoutError:
                        pass

        async def produce_in_tasks(number: int) -> None:
            rng = random.Random(number)
            for index in range(count):
                while not await ended_early(rng, queue.send_async(b"%d %d" % (number, index), number)):
                    pass

        def consume(number: int) -> list[bytes]:
            rng, found = random.Random(number), []
            while True:
                try:
                    message = queue.recv(rng.choice((0, 0.0001, 0.001)))
                except TimeoutError:
                    continue
                if not message:
                    return found
                found.append(message)

        async def consume_in_tasks(number: int) -> list[bytes]:
            rng, found = random.Random(number), []
            while True:
                for message in await ended_early(rng, queue.recv_async()):
                    if not message:
                        return found
                    found.append(message)

        producers = [in_thread(lambda number=number: produce(number)) for number in range(2)]  # type: ignore[misc]
        producers += [
            in_thread(lambda number=number: asyncio.run(produce_in_tasks(number))) for number in (2, 3)  # type: ignore[misc]
        ]
        consumers = [in_thread(lambda number=number: consume(number)) for number in (4, 5)]  # type: ignore[misc]
        consumers += [
            in_thread(lambda number=number: asyncio.run(consume_in_tasks(number))) for number in (6, 7)  # type: ignore[misc]
        ]
        for thread, result in producers:
            thread.join(50)
            assert result == [None]
        for _ in consumers:
            queue.send(b"", timeout=50)                                      # of the lowest priority: after all others
        for thread, _ in consumers:
            thread.join(50)
        found = sorted(message for _, result in consumers for message in result[0])
        assert found == sorted(b"%d %d" % (number, index) for number in range(4) for index in range(count))


async def ended_early(rng: random.Random, work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Cancel it unless it is done within a moment: its result, or nothing."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=rng.choice((0, 0.0001, 0.001)))
    task.cancel()
    try:
        return [await task]
    except asyncio.CancelledError:
        return []


PROCESS = """
import asyncio, random, sys
from anywire.ipc import MessageQueue

def again(call):                                # until it is done in time
    while True:
        try:
            return call(rng.choice((0, 0.0001, 0.001)))
        except TimeoutError:
            pass

async def take_in_tasks():
    while True:
        task = asyncio.ensure_future(queue.recv_async())
        await asyncio.wait([task], timeout=rng.choice((0, 0.0001, 0.001)))
        task.cancel()
        try:
            message = await task
        except asyncio.CancelledError:
            continue
        if not message:
            return
        print(message.decode())

name, what, number = sys.argv[1:]
rng = random.Random(number)
with MessageQueue.open(name) as queue:
    if what == "send":
        for index in range(300):
            queue.send(b"%s %d" % (number.encode(), index), 1)
    elif what == "send in time":
        for index in range(300):
            again(lambda timeout: queue.send(b"%s %d" % (number.encode(), index), 1, timeout))
    elif what == "take in time":
        for message in iter(lambda: again(queue.recv), b""):
            print(message.decode())
    elif what == "take in tasks":
        asyncio.run(take_in_tasks())
    else:
        for message in iter(queue.recv, b""):
            print(message.decode())
"""


@pytest.mark.processes
def test_eight_processes_lose_nothing(name: str) -> None:
    """Four send, three receive, and this one too: waiting for ever, with time-outs, and in tasks that are cancelled."""
    with MessageQueue.create(name, 4, 16, owner=True) as queue:
        command = [sys.executable, "-c", PROCESS, name]
        receivers = [
            subprocess.Popen([*command, what, "9"], stdout=subprocess.PIPE, text=True)
            for what in ("take", "take in time", "take in tasks")
        ]
        senders = [
            subprocess.Popen([*command, "send in time" if number % 2 else "send", str(number)]) for number in range(4)
        ]
        try:
            thread, own = in_thread(lambda: list(iter(queue.recv, b"")))
            assert [sender.wait(50) for sender in senders] == [0] * 4
            for _ in range(4):
                queue.send(b"")                                              # one for each who receives
            found = [line for receiver in receivers for line in receiver.communicate(timeout=50)[0].splitlines()]
            thread.join(50)
        finally:
            for process in receivers + senders:
                process.kill()
                process.wait()
        found += [message.decode() for message in own[0]]
        assert sorted(found) == sorted(f"{number} {index}" for number in range(4) for index in range(300))


def test_the_collector_and_descriptors(name: str) -> None:
    """A thousand openings leave nothing."""
    MessageQueue.create(name, 2, 10).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        with MessageQueue.open(name) as queue:
            queue.send(b"x")
            queue.recv()
    assert len(os.listdir("/proc/self/fd")) == before


def test_soft_limits_are_read_each_time() -> None:
    soft, hard = resource.getrlimit(mqueue_limits.RLIMIT_MSGQUEUE)
    resource.setrlimit(mqueue_limits.RLIMIT_MSGQUEUE, (soft // 2, hard))
    try:
        assert MessageQueue.limits().rlimit == soft // 2
    finally:
        resource.setrlimit(mqueue_limits.RLIMIT_MSGQUEUE, (soft, hard))


def test_the_table_of_assertions_is_whole() -> None:
    folder = Path(__file__).parent
    source = "".join((folder / name).read_text() for name in ("test_mqueue.py", "test_mqueue_notify.py"))
    for function, count in mqueue_assertions.COUNTS.items():
        tested, rest = mqueue_assertions.TESTED[function], mqueue_assertions.NOT_TESTED.get(function, {})
        numbers = [int(number) for key in (*tested, *rest) for number in key.split()]
        assert sorted(numbers) == list(range(1, count + 1)), function
        for test in tested.values():
            assert f"def {test}(" in source, test
