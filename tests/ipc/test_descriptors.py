"""Descriptors over sockets, eventfd, timerfd: limits, time-outs, tasks, copies in other processes."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import pickle
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ipc_children import run

from anywire.ipc import ClockSet, EventFd, TimerFd, pipe, recv_fds, recv_fds_async, send_fds, send_fds_async

MOST = 2**64 - 2


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, request.param)
    with ours, theirs:
        yield ours, theirs


def same(first: int, second: int) -> bool:
    return os.path.sameopenfile(first, second)


def test_descriptors_arrive_as_copies_that_exec_closes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with pipe() as (reader, writer):
        send_fds(ours, [reader, writer.fileno()], b"two")
        data, fds = recv_fds(theirs)
        assert data == b"two"
        assert same(fds[0], reader.fileno()) and same(fds[1], writer.fileno())
        assert not any(os.get_inheritable(fd) for fd in fds)
        for fd in fds:
            os.close(fd)
    ours.send(b"none")
    assert recv_fds(theirs) == (b"none", [])


def test_as_many_as_the_kernel_takes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    send_fds(ours, [0] * 253)
    data, fds = recv_fds(theirs)
    assert (data, len(fds)) == (b"\0", 253)
    for fd in fds:
        os.close(fd)
    for wrong in ([], [0] * 254):
        with pytest.raises(ValueError, match="1 to 253 descriptors"):
            send_fds(ours, wrong)
    with pytest.raises(ValueError, match="at least one byte"):
        send_fds(ours, [0], b"")
    with pytest.raises(OSError) as caught:
        send_fds(ours, [12345])
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_more_than_asked_for_are_closed_and_told(pair: tuple[socket.socket, socket.socket], most: int) -> None:
    ours, theirs = pair
    before = len(os.listdir("/proc/self/fd"))
    send_fds(ours, [0, 0, 0, 0])
    with pytest.raises(OSError, match=f"more than {most} descriptors") as caught:
        recv_fds(theirs, most=most)
    assert caught.value.errno == errno.EMSGSIZE
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.processes
def test_more_than_this_process_may_open() -> None:
    assert run("""
        import os, resource, socket
        from anywire.ipc import recv_fds, send_fds
        ours, theirs = socket.socketpair()
        with ours, theirs:
            send_fds(ours, [0] * 20)
            before = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 4, before + 4))
            try:
                recv_fds(theirs)
            except OSError as error:
                print("RLIMIT_NOFILE" in error.strerror, len(os.listdir("/proc/self/fd")) == before)
    """) == "True True\n"


def test_sockets_time_out_and_say_so(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with pytest.raises(TimeoutError, match="nothing came") as caught:
        recv_fds(theirs, timeout=0.01)
    assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(TimeoutError, match="no room"):
        for _ in range(10000):
            send_fds(ours, [0], bytes(4096), timeout=0.01)
    theirs.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):     # of a stream, of packets that were not read
        send_fds(ours, [0])


def test_a_stream_carries_all_of_the_data() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data = os.urandom(1 << 20)
        thread = threading.Thread(target=send_fds, args=(ours, [0], data))
        thread.start()
        received, fds = b"", []
        while len(received) < len(data):
            part, more = recv_fds(theirs)
            received += part
            fds += more
        thread.join()
        assert received == data and len(fds) == 1
        os.close(fds[0])
        ours.close()
        assert recv_fds(theirs) == (b"", [])


def test_tasks_send_and_receive(pair: tuple[socket.socket, socket.socket]) -> None:
    async def main() -> None:
        ours, theirs = pair
        lost = asyncio.create_task(recv_fds_async(theirs))
        await asyncio.sleep(0)
        lost.cancel()                               # it takes nothing with it
        with pytest.raises(asyncio.CancelledError):
            await lost
        receiving = asyncio.create_task(recv_fds_async(theirs))
        await asyncio.sleep(0)
        await send_fds_async(ours, [0], b"x")
        data, fds = await receiving
        assert data == b"x" and same(fds[0], 0)
        os.close(fds[0])
        with pytest.raises(TimeoutError, match="nothing came"):
            await recv_fds_async(theirs, timeout=0.01)
        with pytest.raises(TimeoutError, match="no room"):
            for _ in range(10000):
                await send_fds_async(ours, [0], bytes(4096), timeout=0.01)

    asyncio.run(main())


def test_an_eventfd_counts() -> None:
    with EventFd(2) as event:
        event.add(3)
        assert event.take() == 5
        with pytest.raises(BlockingIOError):
            event.try_take()
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match="it stayed 0") as caught:
                event.take(timeout=timeout)
            assert caught.value.filename == "eventfd"
    with EventFd(2**40) as event:
        assert event.try_take() == 2**40
        event.add(MOST)
        with pytest.raises(TimeoutError, match="no room for 1"):
            event.add(timeout=0.01)
        for wrong in (-1, 2**64 - 1):
            with pytest.raises(ValueError, match="can't be added"):
                event.add(wrong)
            with pytest.raises(ValueError, match="counts from 0"):
                EventFd(wrong)


def test_a_semaphore_gives_one_at_a_time() -> None:
    with EventFd(3, semaphore=True) as event:
        assert [event.take(), event.take(), event.try_take()] == [1, 1, 1]
        with pytest.raises(BlockingIOError):
            event.try_take()


def test_threads_take_what_others_add() -> None:
    with EventFd(semaphore=True) as event, EventFd() as total:
        def take() -> None:
            for _ in range(100):
                total.add(event.take())

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(800):
            event.add()
        for thread in threads:
            thread.join()
        assert total.take() == 800
        with pytest.raises(BlockingIOError):
            event.try_take()


def test_tasks_take_what_others_add() -> None:
    async def main() -> None:
        with EventFd(semaphore=True) as event:
            tasks = [asyncio.create_task(event.take_async()) for _ in range(3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            await event.add_async(2)
            assert await asyncio.gather(*tasks[1:]) == [1, 1]
            with pytest.raises(TimeoutError):
                await event.take_async(timeout=0.01)

    asyncio.run(main())


@pytest.mark.processes
def test_a_c_program_counts_on_the_same_eventfd(tmp_path: Path) -> None:
    source = tmp_path / "add.c"
    source.write_text(r"""
        #include <stdlib.h>
        #include <sys/eventfd.h>
        int main(int argc, char** argv) {
            eventfd_t count;
            if (eventfd_read(atoi(argv[1]), &count) < 0 || count != 7) return 1;
            return eventfd_write(atoi(argv[1]), 8) < 0;
        }
    """)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "add", source], check=True, timeout=60)
    with EventFd(7) as event:
        fd = event.fileno()
        assert subprocess.run([tmp_path / "add", str(fd)], pass_fds=[fd], timeout=30, check=False).returncode == 0
        assert event.try_take() == 8


def test_a_timer_expires_and_is_never_early() -> None:
    with TimerFd() as timer:
        assert timer.left is None
        with pytest.raises(TimeoutError, match="did not expire"):
            timer.wait(timeout=0.01)
        began = time.monotonic()
        timer.set(0.02)
        assert 0 < (timer.left or 0) <= 0.02
        assert timer.wait(timeout=20) == 1
        assert time.monotonic() - began >= 0.02
        assert timer.left is None
        with pytest.raises(BlockingIOError):
            timer.try_wait()


@pytest.mark.parametrize("clock", ["monotonic", "real", "boot"])
def test_intervals_are_counted_on_every_clock(clock: str) -> None:
    with TimerFd(clock) as timer:
        timer.set(0, every=0.001)
        assert timer.interval == 0.001
        told = 0
        while told < 5:
            told += timer.wait(timeout=20)
        timer.set(60)
        with pytest.raises(BlockingIOError):        # what nobody took is forgotten
            timer.try_wait()
        timer.stop()
        assert timer.left is None


def test_absolute_times() -> None:
    with TimerFd() as timer:
        timer.set_at(time.monotonic() - 5)
        assert timer.wait(timeout=20) == 1
        timer.set_at(0)
        assert timer.wait(timeout=20) == 1
        with pytest.raises(ValueError, match="only the real clock"):
            timer.set_at(1, cancel_on_set=True)
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="from 0 to 9e9"):
                timer.set(wrong)
    with pytest.raises(ValueError, match="monotonic, real, boot"):
        TimerFd("wall")
    with TimerFd("real") as timer:
        timer.set_at(time.time() + 0.01)
        assert timer.wait(timeout=20) == 1


def test_setting_the_clock_is_told() -> None:
    with TimerFd("real") as timer, TimerFd("real") as unasked:
        timer.set_at(time.time() + 600, cancel_on_set=True)
        unasked.set_at(time.time() + 600)
        try:
            time.clock_settime_ns(time.CLOCK_REALTIME, time.clock_gettime_ns(time.CLOCK_REALTIME))
        except PermissionError:
            pytest.skip("only root may set the clock")
        with pytest.raises(ClockSet) as caught:
            timer.wait(timeout=20)
        assert caught.value.errno == errno.ECANCELED
        with pytest.raises(BlockingIOError):
            timer.try_wait()                        # told once; it goes on
        assert timer.left
        with pytest.raises(BlockingIOError):
            unasked.try_wait()


def test_a_task_waits_for_a_timer() -> None:
    async def main() -> None:
        with TimerFd() as timer:
            lost = asyncio.create_task(timer.wait_async())
            await asyncio.sleep(0)
            lost.cancel()
            timer.set(0.01)
            assert await timer.wait_async() == 1

    asyncio.run(main())


def _child(event: EventFd, timer: TimerFd) -> None:
    with event, timer:
        event.add(timer.wait(timeout=20) * 100)


@pytest.mark.processes
def test_children_share_them_by_fork_and_by_pickle() -> None:
    with EventFd() as event, TimerFd() as timer:
        for thing in (event, timer):
            with pytest.raises(TypeError, match="send_fds"):
                pickle.dumps(thing)
        timer.set(0.001)
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(event, timer))
        process.start()
        assert event.take(timeout=20) == 100
        process.join()
    assert run("""
        import os
        from anywire.ipc import EventFd
        with EventFd() as event:
            child = os.fork()
            if not child:
                event.add(4)
                os._exit(0)
            print(event.take(timeout=20))
            os.waitpid(child, 0)
    """) == "4\n"


@pytest.mark.parametrize("make", [EventFd, TimerFd])
def test_dropped_ones_warn(make: type[EventFd] | type[TimerFd]) -> None:
    made = [make()]
    with pytest.warns(ResourceWarning, match="never closed"):
        made.clear()


def test_descriptors_reach_c_in_scm_rights() -> None:
    # What another program reads from the socket: one control message, SOL_SOCKET, SCM_RIGHTS, ints.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_fds(ours, [0, 1], b"z")
        data, ancillary, _, _ = theirs.recvmsg(10, 1000)
        assert data == b"z" and len(ancillary) == 1
        assert ancillary[0][:2] == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for fd in struct.unpack("2i", ancillary[0][2]):
            os.close(fd)
