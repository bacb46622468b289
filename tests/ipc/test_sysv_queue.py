"""System V message queues: choosing by type, waiting, removal, limits, other processes."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import ipc_children as children
import pytest
from sysv_helpers import NAMESPACE, PATIENCE, blocked, c, some_key, until

from anywire.ipc import sysv
from anywire.ipc.sysv import CREATE, EXCLUSIVE, PRIVATE, MessageQueue

NOBODY = 65534


@pytest.fixture
def queue() -> Iterator[MessageQueue]:
    with MessageQueue.create(some_key(), owner=True) as queue:
        yield queue


def filled(queue: MessageQueue, *types: int) -> None:
    for i, kind in enumerate(types):
        queue.send(b"%d" % i, kind)


# Choosing.


@pytest.mark.parametrize(
    ("choice", "excluding", "expected"),
    [(0, None, 3), (5, None, 5), (2, None, 2), (-4, None, 2), (-100, None, 2), (0, 3, 2), (0, 2, 3)],
)
def test_a_message_is_chosen_by_its_type(
    queue: MessageQueue, choice: int, excluding: int | None, expected: int
) -> None:
    filled(queue, 3, 2, 5, 2, 3)
    assert queue.recv(choice, excluding=excluding, block=False)[1] == expected
    assert queue.depth == 4


def test_of_one_type_the_oldest_comes_first(queue: MessageQueue) -> None:
    filled(queue, 3, 2, 3, 2)
    assert [queue.recv(2)[0], queue.recv(2)[0], queue.recv(0)[0], queue.recv(-9)[0]] == [b"1", b"3", b"0", b"2"]


def test_no_such_type_is_no_message(queue: MessageQueue) -> None:
    filled(queue, 7)
    for choice in ({"type": 6}, {"type": -6}, {"excluding": 7}):
        with pytest.raises(BlockingIOError, match="no such message"):
            queue.recv(block=False, **choice)  # type: ignore[arg-type]


def test_peek_leaves_the_message(queue: MessageQueue) -> None:
    filled(queue, 3, 2)
    assert [queue.peek(), queue.peek(1), queue.peek(1)] == [(b"0", 3), (b"1", 2), (b"1", 2)]
    assert queue.depth == 2
    with pytest.raises(IndexError):
        queue.peek(2)
    with pytest.raises(IndexError):
        queue.peek(-1)


def test_a_long_message_is_kept_or_cut(queue: MessageQueue) -> None:
    queue.send(b"0123456789")
    queue.send(b"0123456789")
    buffer = bytearray(4)
    with pytest.raises(OSError, match="stays in the queue") as caught:
        queue.recv_into(buffer)
    assert caught.value.errno == errno.E2BIG and queue.depth == 2
    assert queue.recv_into(buffer, truncate=True) == (4, 1) and buffer == b"0123"
    assert queue.recv(truncate=3) == (b"012", 1)
    assert queue.depth == 0


def test_any_buffer_goes_and_any_length_arrives(queue: MessageQueue) -> None:
    for data in (b"", bytearray(b"ab"), memoryview(b"abcd")[1:3], bytes(range(256)) * 32):
        queue.send(data)
        assert queue.recv() == (bytes(data), 1)
    queue.send(b"", 1 << 62)
    assert queue.recv() == (b"", 1 << 62)


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="makes an IPC namespace")
def test_messages_above_8192_bytes_arrive_once_the_limit_is_raised() -> None:
    children.run(NAMESPACE + """
        limit("msgmax", 100_000)
        limit("msgmnb", 400_000)
        with MessageQueue.create(PRIVATE, owner=True) as queue:
            for size in (100_000, 10, 8193):
                queue.send(bytes(size))
            assert len(queue.peek(0)[0]) == 100_000
            assert [len(queue.recv()[0]) for _ in range(3)] == [100_000, 10, 8193]
            queue.send(bytes(9000))
            assert queue.recv_into(bytearray(9000)) == (9000, 1)
    """)


def test_what_makes_no_sense_is_refused(queue: MessageQueue) -> None:
    for kind in (0, -1):
        with pytest.raises(ValueError, match="type"):
            queue.send(b"", kind)
    with pytest.raises(ValueError, match="not both"):
        queue.recv(2, excluding=3)
    with pytest.raises(ValueError, match="excluding"):
        queue.recv(excluding=0)
    with pytest.raises(ValueError, match="timeout"):
        queue.recv(timeout=-1)
    with pytest.raises(TypeError):
        queue.send("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ftok"):
        MessageQueue.open("/name")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="32 bits"):
        MessageQueue.open(1 << 32)


# Opening.


def test_opening_by_intent() -> None:
    key = some_key()
    with pytest.raises(FileNotFoundError) as caught:
        MessageQueue.open(key)
    assert caught.value.filename == f"key 0x{key:08x}"
    with pytest.raises(FileNotFoundError):
        MessageQueue(key)
    with MessageQueue.create_or_open(key, owner=True) as queue:
        assert (MessageQueue.open(key).id, MessageQueue.create_or_open(key).id) == (queue.id, queue.id)
        assert MessageQueue(key, CREATE).id == MessageQueue.from_id(queue.id).id == queue.id
        assert MessageQueue.from_id(queue.id).key == key
        for make in (lambda: MessageQueue.create(key), lambda: MessageQueue(key, CREATE | EXCLUSIVE)):
            with pytest.raises(FileExistsError):
                make()
    with pytest.raises(FileNotFoundError):
        MessageQueue.open(key)
    with pytest.raises(FileNotFoundError, match="no queue has this id"):
        MessageQueue.from_id(queue.id)
    MessageQueue.create(key)
    MessageQueue.unlink(key)
    with pytest.raises(FileNotFoundError):
        MessageQueue.unlink(key)


def test_private_queues_and_made_up_keys() -> None:
    with MessageQueue.create(PRIVATE, owner=True) as one, MessageQueue.create(PRIVATE, owner=True) as other:
        assert one.id != other.id and one.key == 0
        with pytest.raises(ValueError, match="from_id"):
            MessageQueue.open(PRIVATE)
    with MessageQueue.create(None, owner=True) as queue:
        assert queue.key > 0 and MessageQueue.open(queue.key).id == queue.id


def test_keys_above_two_to_the_31_are_those_of_c() -> None:
    with MessageQueue.create(0xFFFFFF00, owner=True) as queue:
        assert queue.key == -256
        assert MessageQueue.open(-256).id == queue.id


@pytest.mark.processes
def test_ftok_is_the_c_librarys(tmp_path: object) -> None:
    assert sysv.ftok(__file__, 65) == int(c("ftok", __file__, 65))
    for project in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            sysv.ftok(__file__, project)
    with pytest.raises(FileNotFoundError) as caught:
        sysv.ftok(f"{tmp_path}/missing", 1)
    assert caught.value.filename == f"{tmp_path}/missing"


def test_status_and_what_can_be_set(queue: MessageQueue) -> None:
    before = time.time()
    queue.send(b"12345")
    status = queue.stat()
    assert status[:6] == (queue.key, os.geteuid(), os.getegid(), os.geteuid(), os.getegid(), 0o600)
    assert (status.depth, status.bytes, status.last_send_pid, status.last_recv_pid) == (1, 5, os.getpid(), 0)
    assert status.last_send_time >= before - 1 and status.last_recv_time == 0
    assert queue.recv() and queue.stat().last_recv_pid == os.getpid()
    queue.set(mode=0o640, max_bytes=100)
    assert (queue.stat().mode, queue.stat().max_bytes) == (0o640, 100)


# Waiting.


def test_a_time_out_is_told_and_takes_nothing(queue: MessageQueue) -> None:
    for seconds in (0, 0.02):
        before = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            queue.recv(4, timeout=seconds)
        assert time.monotonic() - before >= seconds
        assert caught.value.errno == errno.ETIMEDOUT and caught.value.filename == queue.name
    queue.send(b"late", 4)
    assert queue.recv(4, timeout=0) == (b"late", 4)


def test_a_full_queue(queue: MessageQueue) -> None:
    queue.set(max_bytes=10)
    queue = MessageQueue.from_id(queue.id)
    queue.send(b"12345678")
    with pytest.raises(BlockingIOError, match="full"):
        queue.send(b"123", block=False)
    with pytest.raises(TimeoutError, match="no room"):
        queue.send(b"123", timeout=0.02)
    with pytest.raises(OSError, match="holds 10 in all") as caught:
        queue.send(b"12345678901")
    assert caught.value.errno == errno.EMSGSIZE
    assert queue.depth == 1


def test_a_message_above_msgmax_names_the_limit(queue: MessageQueue) -> None:
    size = sysv.limits().msgmax + 1
    if size > queue.stat().max_bytes:
        pytest.skip("this machine's queues hold less than its largest message")
    with pytest.raises(OSError, match=r"kernel\.msgmax is .* sysctl -w kernel\.msgmax") as caught:
        queue.send(bytes(size))
    assert caught.value.errno == errno.EMSGSIZE


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("full", [False, True])
def test_removal_ends_waits(queue: MessageQueue, timeout: float | None, full: bool) -> None:
    errors: list[OSError] = []
    if full:
        queue.send(bytes(8192))
        queue.send(bytes(8192))

    def wait() -> None:
        try:
            queue.send(b"x", timeout=timeout) if full else queue.recv(timeout=timeout)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: blocked(os.getpid(), thread.native_id or 0, "do_msg"))
    queue.remove()
    thread.join(PATIENCE)
    assert errors[0].errno == errno.EIDRM and "removed while" in str(errors[0]) and errors[0].filename == queue.name
    for call in (queue.recv, lambda: queue.send(b""), queue.stat, queue.remove):
        with pytest.raises(OSError, match="has been removed") as caught:
            call()
        assert caught.value.errno == errno.EIDRM


def test_signals_handlers_run_and_the_wait_goes_on(queue: MessageQueue) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    main = threading.get_native_id()

    def poke() -> None:
        for _ in range(3):
            until(lambda: blocked(os.getpid(), main, "do_msgrcv"))
            count = len(seen)
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: len(seen) > count)  # noqa: B023
        queue.send(b"at last")

    thread = threading.Thread(target=poke)
    try:
        thread.start()
        assert queue.recv(timeout=PATIENCE) == (b"at last", 1)
        thread.join()
        with pytest.raises(ZeroDivisionError):
            signal.signal(signal.SIGUSR1, lambda *_: 1 / 0)
            threading.Timer(0, lambda: (until(lambda: blocked(os.getpid(), main, "do_msgrcv")),
                                        os.kill(os.getpid(), signal.SIGUSR1))).start()
            queue.recv()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 3


def test_a_time_out_works_where_all_signals_are_blocked(queue: MessageQueue) -> None:
    def wait() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for _ in range(2):
            with pytest.raises(TimeoutError):
                queue.recv(timeout=0.01)
        done.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    done: list[set[int]] = []
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(PATIENCE)
    assert signal.SIGRTMAX - 5 in done[0], "the mask is as it was"


@pytest.mark.processes
def test_another_signal_is_taken_when_somebody_takes_ours() -> None:
    children.run("""
        import signal
        from anywire.ipc.sysv import PRIVATE, MessageQueue
        with MessageQueue.create(PRIVATE, owner=True) as queue:
            for number in range(signal.SIGRTMAX - 5, signal.SIGRTMAX - 8, -1):
                signal.signal(number, lambda *_: print("a signal that is not ours"))
                try:
                    queue.recv(timeout=0.01)
                except TimeoutError:
                    pass
    """)


def test_waiting_uses_no_time_of_the_processor(queue: MessageQueue) -> None:
    before = time.thread_time()
    with pytest.raises(TimeoutError):
        queue.recv(timeout=0.3)
    assert time.thread_time() - before < 0.05


def test_iteration_ends_with_the_queue(queue: MessageQueue) -> None:
    filled(queue, 1, 2)
    found = []
    for data, kind in queue:
        found.append((data, kind))
        if len(found) == 2:
            queue.remove()
    assert found == [(b"0", 1), (b"1", 2)]


# In an event loop.


def test_tasks_wait_in_turn_by_one_thread(queue: MessageQueue) -> None:
    async def main() -> None:
        before = threading.active_count()
        tasks = [asyncio.create_task(queue.recv_async(2)) for _ in range(20)]
        other = asyncio.create_task(queue.recv_async(3, timeout=PATIENCE))
        await asyncio.sleep(0)
        queue.send(b"three", 3)
        assert await other == (b"three", 3)
        assert threading.active_count() <= before + 2
        for i in range(20):
            await queue.send_async(b"%d" % i, 2)
        assert await asyncio.gather(*tasks) == [(b"%d" % i, 2) for i in range(20)]

    asyncio.run(main())


def test_a_task_waits_for_room(queue: MessageQueue) -> None:
    async def main() -> None:
        queue.send(bytes(8192))
        queue.send(bytes(8192))
        task = asyncio.create_task(queue.send_async(b"next"))
        with pytest.raises(TimeoutError, match="no room"):
            await queue.send_async(b"never", timeout=0.02)
        assert queue.depth == 2
        await queue.recv_async()
        await task
        await queue.recv_async()
        assert await queue.recv_async() == (b"next", 1)

    asyncio.run(main())


def test_a_tasks_time_out_and_removal(queue: MessageQueue) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError, match=r"0\.02 s") as caught:
            await queue.recv_async(timeout=0.02)
        assert caught.value.filename == queue.name
        task = asyncio.create_task(queue.recv_async())
        line = asyncio.create_task(queue.recv_async(timeout=0.02))
        with pytest.raises(TimeoutError, match=r"0\.02 s"):
            await line
        queue.remove()
        with pytest.raises(OSError, match="removed while"):
            await task
        assert [message async for message in queue] == []

    asyncio.run(main())


def test_a_cancelled_task_has_taken_nothing(queue: MessageQueue) -> None:
    """Cancelled at any moment, also when the message is on its way: it is in the queue, or its task has it."""

    async def main() -> None:
        got = lost = 0
        for i in range(150):
            task = asyncio.create_task(queue.recv_async())
            for _ in range(i % 4):
                await asyncio.sleep(0)
            if i % 3:
                await asyncio.sleep(0.0005)
            queue.send(b"%d" % i)
            if i % 2:
                time.sleep(0.0003)              # the helper's thread has it by now, and the loop does not know
            task.cancel()
            try:
                assert await task == (b"%d" % i, 1)
                got += 1
            except asyncio.CancelledError:
                lost += 1
                assert queue.recv(block=False) == (b"%d" % i, 1)
            assert queue.depth == 0
        assert lost

    asyncio.run(main())


def test_a_message_is_put_back_when_there_is_room_again(queue: MessageQueue) -> None:
    queue.send(bytes(8192), 1)
    queue.send(bytes(8192), 2)
    queue._put_back((b"back", 3))
    assert queue.depth == 2
    queue.recv(1)
    assert queue.recv(3, timeout=PATIENCE) == (b"back", 3)


def test_a_loop_that_closes_takes_nothing(queue: MessageQueue) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(queue.recv_async())
    loop.run_until_complete(asyncio.sleep(0.01))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
    queue.send(b"still there")
    assert queue.recv(timeout=PATIENCE) == (b"still there", 1)


# Processes.


@pytest.mark.processes
def test_a_c_program_shares_the_queue(queue: MessageQueue) -> None:
    queue.send(b"from Python", 5)
    assert c("recv", queue.key, 5) == "5 from Python"
    c("send", queue.key, 6, "from C")
    assert queue.recv(-10) == (b"from C", 6)


@pytest.mark.processes
def test_fork_shares_and_the_parent_owns() -> None:
    children.run("""
        import os
        from anywire.ipc.sysv import MessageQueue
        queue = MessageQueue.create(None, owner=True)
        queue.send(b"before")
        pid = os.fork()
        if pid == 0:
            assert queue.recv(1) == (b"before", 1) and not queue.owner
            queue.send(b"child", 2)
            queue.close()
        else:
            assert queue.recv(2, timeout=20) == (b"child", 2)
            assert os.waitpid(pid, 0)[1] == 0
            assert queue.depth == 0, "the child's close has removed nothing"
            queue.close()
    """)


@pytest.mark.processes
def test_a_forked_child_waits_in_a_loop_of_its_own(queue: MessageQueue) -> None:
    children.run("""
        import asyncio, os, sys
        from anywire.ipc.sysv import MessageQueue
        queue = MessageQueue.from_id(int(sys.argv[1]))
        async def one():
            task = asyncio.create_task(queue.recv_async())
            await asyncio.sleep(0.01)
            queue.send(b"x")
            assert await task == (b"x", 1)
        asyncio.run(one())
        pid = os.fork()
        asyncio.run(one())
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
    """, str(queue.id))


def test_a_pickled_queue_is_the_same_one(queue: MessageQueue) -> None:
    copy = pickle.loads(pickle.dumps(queue))
    copy.send(b"by id")
    assert queue.recv() == (b"by id", 1) and copy.key == queue.key and not copy.owner
    with MessageQueue.create(PRIVATE) as private:
        assert pickle.loads(pickle.dumps(private)).id == private.id
        data = pickle.dumps(private)
        private.remove()
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)


def test_an_owner_that_is_forgotten_removes_and_warns() -> None:
    queue: MessageQueue | None = MessageQueue.create(PRIVATE, owner=True)
    assert queue is not None
    ident = queue.id
    with pytest.warns(ResourceWarning, match="an owner, was not closed"):
        queue = None
    with pytest.raises(FileNotFoundError):
        MessageQueue.from_id(ident)


def test_a_closed_reference_refuses(queue: MessageQueue) -> None:
    other = MessageQueue.open(queue.key)
    with other:
        assert not other.closed
    other.close()
    assert other.closed
    for call in (other.recv, lambda: other.send(b""), other.peek):
        with pytest.raises(ValueError, match="closed"):
            call()
    queue.send(b"the queue lives")


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_mode_decides() -> None:
    program = """
        import sys
        from anywire.ipc.sysv import MessageQueue
        key = int(sys.argv[1])
        def outcome(call):
            try:
                return call()
            except OSError as error:
                return type(error).__name__, error.filename == f"key 0x{key:08x}"
        queue = MessageQueue.create_or_open(key)
        print(outcome(lambda: queue.send(b"x", block=False)))
        print(outcome(lambda: queue.recv(block=False)))
        print(outcome(queue.remove))
        print(outcome(lambda: queue.set(max_bytes=1)))
    """
    denied = "('PermissionError', True)"
    for mode, expected in ((0o600, [denied] * 4), (0o602, ["None", *[denied] * 3]),
                           (0o604, [denied, "(b'for you', 1)", denied, denied])):
        with MessageQueue.create(some_key(), mode, owner=True) as queue:
            queue.send(b"for you")
            assert children.run(program, str(queue.key), user=NOBODY).splitlines() == expected


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_more_bytes_than_a_user_may_have_names_the_limit() -> None:
    program = """
        from anywire.ipc.sysv import PRIVATE, MessageQueue, limits
        try:
            MessageQueue.create(PRIVATE, max_bytes=limits().msgmnb + 1)
        except PermissionError as error:
            print(error)
    """
    assert "sysctl -w kernel.msgmnb=" in children.run(program, user=NOBODY)


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="makes an IPC namespace")
def test_no_more_queues_names_the_limit() -> None:
    said = children.run(NAMESPACE + """
        limit("msgmni", 1)
        MessageQueue.create(1)
        try:
            MessageQueue.create(2)
        except OSError as error:
            print(error)
    """)
    assert "kernel.msgmni is 1; raise it: sysctl -w kernel.msgmni=" in said


WORKER = """
    import sys, threading
    from anywire.ipc.sysv import MessageQueue
    queue, count = MessageQueue.open(int(sys.argv[1])), int(sys.argv[2])
    for i in range(count):
        data, _ = queue.recv(1, timeout=30)
        queue.send(data + b" " + sys.argv[3].encode(), 2, timeout=30)
"""


@pytest.mark.processes
def test_threads_and_processes_hammer_it_and_nothing_is_lost(queue: MessageQueue) -> None:
    each = 100
    answers: Counter[bytes] = Counter()
    lock = threading.Lock()

    def ask(name: int) -> None:
        for i in range(each):
            queue.send(b"%d.%d" % (name, i), 1, timeout=PATIENCE)
            data, _ = queue.recv(2, timeout=PATIENCE)
            with lock:
                answers[data.split()[0]] += 1

    threads = [threading.Thread(target=ask, args=[name]) for name in range(8)]
    workers = [children.started(WORKER, str(queue.key), str(each), str(i)) for i in range(8)]
    processes = [worker.__enter__() for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == Counter({b"%d.%d" % (name, i): 1 for name in range(8) for i in range(each)})
        assert [process.wait(PATIENCE) for process in processes] == [0] * 8
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)


@pytest.mark.processes
def test_a_sender_killed_in_mid_send_tears_nothing(queue: MessageQueue) -> None:
    program = """
        import sys
        from anywire.ipc.sysv import MessageQueue
        queue = MessageQueue.open(int(sys.argv[1]))
        print("ready", flush=True)
        i = 0
        while True:
            queue.send(b"%8d" % i * 1000)
            i += 1
    """
    for turn in range(3):
        with children.started(program, str(queue.key)) as process:
            assert children.line(process) == "ready"
            for i in range(50 + 7 * turn):
                assert queue.recv(timeout=PATIENCE)[0] == b"%8d" % i * 1000
            process.kill()
            process.wait()
        i += 1
        while queue.depth:
            assert queue.recv()[0] == b"%8d" % i * 1000, "whole, in order, none missing"
            i += 1
