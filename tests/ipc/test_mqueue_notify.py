"""Message queues that tell of messages: on a thread, in the event loop, by signal; and asking again in time."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue

import ipc_children as children
import pytest

from anywire.ipc import MessageQueue


@pytest.fixture
def queue() -> Iterator[MessageQueue]:
    with MessageQueue.create(f"/anywire-test-{secrets.token_hex(6)}", 8, 64, owner=True) as found:
        yield found


def take_all(queue: MessageQueue) -> list[bytes]:
    found = []
    try:
        while True:
            found.append(queue.recv(block=False))
    except BlockingIOError:
        return found


def test_each_message_into_the_empty_queue_is_told_of(queue: MessageQueue) -> None:
    told: SimpleQueue[list[bytes]] = SimpleQueue()
    with queue.notify(lambda: told.put(take_all(queue))) as notification:
        for number in range(20):
            queue.send(b"%d" % number)
            assert told.get(timeout=10) == [b"%d" % number]
        assert notification.active
    assert not notification.active


def test_it_is_armed_before_the_call(queue: MessageQueue) -> None:
    """A message that comes while the callback takes the others is not missed, whenever it comes."""
    got: list[bytes] = []
    enough = threading.Event()

    def callback() -> None:
        got.extend(take_all(queue))
        if len(got) >= 400:
            enough.set()

    with queue.notify(callback):
        for number in range(400):
            queue.send(b"%d" % number)
        assert enough.wait(20)
    assert got == [b"%d" % number for number in range(400)]


def test_messages_that_wait_already_are_told_of(queue: MessageQueue) -> None:
    queue.send(b"early")
    told: SimpleQueue[list[bytes]] = SimpleQueue()
    with queue.notify(lambda: told.put(take_all(queue))):
        assert told.get(timeout=10) == [b"early"]


def test_once_is_once_and_only_into_the_empty_queue(queue: MessageQueue) -> None:
    told: SimpleQueue[int] = SimpleQueue()
    queue.send(b"0")
    notification = queue.notify(lambda: told.put(queue.depth), once=True)
    queue.send(b"1")                                                # not into the empty queue
    take_all(queue)
    queue.send(b"2")
    assert told.get(timeout=10) == 1
    assert not notification.active
    take_all(queue)
    queue.send(b"3")                                                # nobody is to be told any more
    queue.notify(print, once=True).cancel()                         # and anybody may ask
    assert told.empty()


@pytest.mark.processes
def test_one_at_a_time(queue: MessageQueue) -> None:
    with queue.notify(print, once=True):
        for ask in (lambda: queue.notify(print), lambda: queue.notify_signal(signal.SIGUSR1)):
            with pytest.raises(OSError, match=f"process {os.getpid()} is to be notified already") as error:
                ask()
            assert error.value.errno == errno.EBUSY and error.value.filename == queue.name
        program = """
            import errno, sys
            from anywire.ipc import MessageQueue
            with MessageQueue.open(sys.argv[1]) as queue:
                try:
                    queue.notify(print)
                except OSError as error:
                    assert error.errno == errno.EBUSY
                else:
                    raise SystemExit("was let in")
                queue.stop_notify()                                 # takes back only what is its own
        """
        children.run(program, str(queue.name))
        with pytest.raises(OSError, match="already"):
            queue.notify(print)
    with queue.notify(print):
        pass


@pytest.mark.processes
def test_who_is_blocked_receiving_gets_it_and_nobody_is_told(queue: MessageQueue) -> None:
    program = """
        import os, sys
        from anywire.ipc import MessageQueue
        with MessageQueue.open(sys.argv[1]) as queue:
            print(os.getpid(), flush=True)
            print(queue.recv().decode(), flush=True)
    """
    told: SimpleQueue[list[bytes]] = SimpleQueue()
    with children.started(program, str(queue.name)) as process:
        pid = int(children.line(process))
        while not sleeps(pid):
            time.sleep(0.001)
        with queue.notify(lambda: told.put(take_all(queue))):
            queue.send(b"for the blocked one")
            assert children.line(process) == "for the blocked one"
            queue.send(b"for us")
            assert told.get(timeout=10) == [b"for us"]
    assert told.empty()


def sleeps(pid: int) -> bool:
    """Whether a process does, in the only call in which it may here."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0] == "S"


def test_another_descriptor_of_the_queue_is_closed(queue: MessageQueue) -> None:
    """The kernel then forgets what this process had asked for; we ask again."""
    told: SimpleQueue[list[bytes]] = SimpleQueue()
    with queue.notify(lambda: told.put(take_all(queue))):
        for number in range(5):
            MessageQueue.open(str(queue.name)).close()
            queue.send(b"%d" % number)
            assert told.get(timeout=10) == [b"%d" % number]


def test_closing_the_queue_ends_it(queue: MessageQueue) -> None:
    before = threading.active_count()
    notification = queue.notify(print)
    with MessageQueue.open(str(queue.name)) as other:
        queue.close()
        assert not notification.active
        with other.notify(print):
            pass
    while threading.active_count() > before:                        # its thread ends
        time.sleep(0.001)
    notification.cancel()


def test_a_callback_that_raises_is_logged_and_called_again(
    queue: MessageQueue, caplog: pytest.LogCaptureFixture
) -> None:
    told: SimpleQueue[list[bytes]] = SimpleQueue()

    def callback() -> None:
        told.put(take_all(queue))
        raise RuntimeError("from the callback")

    with queue.notify(callback):
        for number in range(2):
            queue.send(b"%d" % number)
            assert told.get(timeout=10) == [b"%d" % number]
        queue.send(b"2")
        told.get(timeout=10)
    assert "from the callback" in caplog.text and str(queue.name) in caplog.text


def test_in_the_event_loop(queue: MessageQueue) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[list[bytes]] = asyncio.Queue()
        queue.send(b"early")
        with queue.notify(lambda: told.put_nowait(take_all(queue)), loop=loop) as notification:
            assert await asyncio.wait_for(told.get(), 10) == [b"early"]
            for number in range(5):
                queue.send(b"%d" % number)
                assert await asyncio.wait_for(told.get(), 10) == [b"%d" % number]
            await asyncio.to_thread(notification.cancel)            # from another thread too
        queue.send(b"after")
        notification = queue.notify(lambda: told.put_nowait([]), loop=loop, once=True)
        take_all(queue)
        queue.send(b"x")
        assert await asyncio.wait_for(told.get(), 10) == []
        assert not notification.active and told.empty()

    before = set(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.processes
def test_by_signal(queue: MessageQueue) -> None:
    """With the value, and who sent the message; once. In a process with one thread, which blocks the signal."""
    program = """
        import errno, os, signal, subprocess, sys
        from anywire.ipc import MessageQueue
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})

        def came():
            info = signal.sigtimedwait({signal.SIGRTMIN}, 0)            # sent in the turn of the message itself
            return info and (info.si_pid, info.si_uid, info.si_code)

        with MessageQueue.open(sys.argv[1]) as queue:
            queue.notify_signal(signal.SIGRTMIN, 77)
            sender = "import sys; from anywire.ipc import MessageQueue; MessageQueue(sys.argv[1]).send(b'x')"
            with subprocess.Popen([sys.executable, "-W", "ignore", "-c", sender, sys.argv[1]]) as child:
                assert child.wait(20) == 0
            assert came() == (child.pid, os.getuid(), -3)               # SI_MESGQ
            assert queue.recv() == b"x"
            queue.send(b"x")
            assert came() is None                                       # it was for one message
            assert queue.recv() == b"x"
            queue.notify_signal(signal.SIGRTMIN)
            queue.stop_notify()
            queue.send(b"x")
            assert came() is None
            try:
                queue.notify_signal(1000)
            except OSError as error:
                assert error.errno == errno.EINVAL
            else:
                raise SystemExit("no such signal")
    """
    children.run(program, str(queue.name))


@pytest.mark.processes
def test_a_forked_child_has_none(queue: MessageQueue) -> None:
    program = """
        import os, queue as queues
        from anywire.ipc import MessageQueue
        told = queues.SimpleQueue()
        queue = MessageQueue.create(None, 2, 10, owner=True)
        notification = queue.notify(lambda: told.put(queue.recv(block=False)))
        if (pid := os.fork()) == 0:
            good = not notification.active
            queue.close()
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        queue.send(b"x")
        assert told.get(timeout=10) == b"x" and notification.active
        queue.close()
    """
    # From 3.12 on a fork beside threads warns.
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], check=True, timeout=30)
