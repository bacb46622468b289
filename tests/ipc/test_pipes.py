"""Bare pipes: sizes and their limits, atomic writes, ends, time-outs, tasks, threads, fork, pickle, collection."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import pickle
import subprocess
import threading

import pytest
from ipc_children import run

from anywire.ipc import Pipe, PipeReader, PipeWriter, pipe

PAGE = os.sysconf("SC_PAGESIZE")
PIPE_BUF = 4096


def test_bytes_arrive_and_the_end_is_told() -> None:
    with pipe() as (reader, writer):
        writer.write(b"hello")
        assert reader.pending == writer.pending == 5
        assert reader.read() == b"hello"
        writer.write(b"more")
        writer.write(b"")
        writer.close()
        buffer = bytearray(3)
        assert (reader.read_into(buffer), buffer) == (3, b"mor")
        assert list(reader) == [b"e"]
        assert reader.read() == b""
        assert reader.read_into(buffer) == 0
    assert reader.closed and writer.closed


def test_the_size_is_read_and_set_from_both_ends() -> None:
    with pipe(size=3 * PAGE) as (reader, writer):
        assert reader.size == writer.size == 4 * PAGE       # the kernel takes a power of two of pages
        writer.size = PAGE
        assert reader.size == PAGE
        writer.write(bytes(PAGE))
        with pytest.raises(BlockingIOError):
            writer.try_write(b"x")
        assert reader.resize(2 * PAGE) == 2 * PAGE
        writer.write(bytes(PAGE))
        with pytest.raises(OSError, match="more than 4096 bytes wait") as caught:
            reader.resize(PAGE)
        assert caught.value.errno == errno.EBUSY and caught.value.filename == reader.name
        with pytest.raises(ValueError, match="at least 1 byte"):
            reader.size = 0
        with pytest.raises(OSError):
            reader.resize(1 << 40)


@pytest.mark.processes
def test_the_limit_of_the_size_is_named() -> None:
    print_error = """
        from pathlib import Path
        from anywire.ipc import pipe
        most = int(Path("/proc/sys/fs/pipe-max-size").read_text())
        with pipe(size=most) as (reader, writer):
            assert reader.size == most
        try:
            pipe(size=most + 1)
        except PermissionError as error:
            assert error.filename.startswith("pipe:")
            print(error.strerror.replace(str(most), "MOST"))
    """
    assert "the limit is MOST: sysctl fs.pipe-max-size=BYTES raises it" in run(print_error, user=65534)


def test_small_writes_are_whole_or_nothing() -> None:
    with pipe(size=PAGE) as (reader, writer):
        writer.write(b"x" * 1000)
        with pytest.raises(BlockingIOError):
            writer.try_write(b"y" * PIPE_BUF)
        with pytest.raises(TimeoutError, match=r"0 of 4096 bytes") as caught:
            writer.write_atomic(b"y" * PIPE_BUF, timeout=0.01)
        assert caught.value.errno == errno.ETIMEDOUT and caught.value.filename == writer.name
        assert writer.written == reader.pending == 1000


def test_what_cannot_be_atomic_is_refused() -> None:
    with pipe() as (reader, writer):
        with pytest.raises(OSError, match="4097 bytes can't be written atomically.* 4096") as caught:
            writer.write_atomic(bytes(PIPE_BUF + 1))
        assert caught.value.errno == errno.EMSGSIZE
        assert reader.pending == 0
        writer.write_atomic(memoryview(bytes(PIPE_BUF)).cast("I"))
        assert reader.pending == PIPE_BUF


def test_a_large_write_that_times_out_says_how_much_was_written() -> None:
    with pipe(size=PAGE) as (reader, writer):
        with pytest.raises(TimeoutError, match="4096 of 10000 bytes were written"):
            writer.write(bytes(10000), timeout=0.01)
        assert writer.written == reader.pending == PAGE


def test_atomic_writes_of_many_threads_are_never_mixed() -> None:
    count, each = 8, 60
    with pipe(size=PAGE) as (reader, writer):
        def write(letter: bytes) -> None:
            for _ in range(each):
                writer.write_atomic(letter * PIPE_BUF)

        threads = [threading.Thread(target=write, args=(bytes([65 + number]),)) for number in range(count)]
        for thread in threads:
            thread.start()
        seen: dict[bytes, int] = {}
        for _ in range(count * each):
            record = b""
            while len(record) < PIPE_BUF:
                record += reader.read(PIPE_BUF - len(record))
            assert record == record[:1] * PIPE_BUF
            seen[record[:1]] = seen.get(record[:1], 0) + 1
        for thread in threads:
            thread.join()
        assert seen == {bytes([65 + number]): each for number in range(count)}


def test_packets_keep_their_bounds() -> None:
    with pipe(packets=True) as (reader, writer):
        writer.write(b"one")
        writer.write(b"two")
        assert [reader.read(), reader.read(2)] == [b"one", b"tw"]
        with pytest.raises(BlockingIOError):                # the rest of a packet is gone
            reader.try_read()


def test_without_readers_writing_is_an_error_that_says_so() -> None:
    with pipe() as (reader, writer):
        reader.close()
        with pytest.raises(BrokenPipeError, match="nobody has the read end open") as caught:
            writer.write(b"x")
        assert caught.value.filename == writer.name


def test_time_outs_take_nothing() -> None:
    with pipe() as (reader, writer):
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match="nothing came") as caught:
                reader.read(timeout=timeout)
            assert caught.value.errno == errno.ETIMEDOUT and caught.value.filename == reader.name
        with pytest.raises(ValueError, match="not negative"):
            reader.read(timeout=-1)
        writer.write(b"part")
        with pytest.raises(TimeoutError) as caught:
            reader.read_all(timeout=0.01)
        assert caught.value.partial == b"part"  # type: ignore[attr-defined]


def test_closing_ends_the_waits_of_other_threads() -> None:
    with pipe() as (reader, _writer):
        waiting = threading.Event()
        caught: list[OSError] = []

        def read() -> None:
            waiting.set()
            try:
                reader.read()
            except OSError as error:
                caught.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        waiting.wait()
        reader.close()
        thread.join()
        assert [error.errno for error in caught] == [errno.EBADF]
        with pytest.raises(OSError, match="is closed"):
            reader.fileno()


def test_tasks_wait_beside_each_other() -> None:
    async def main() -> None:
        with pipe(size=PAGE) as (reader, writer):
            readers = [asyncio.create_task(reader.read_async(1)) for _ in range(3)]
            await asyncio.sleep(0)
            readers[0].cancel()                             # it takes nothing with it
            await writer.write_async(b"ab")
            assert sorted([await readers[1], await readers[2]]) == [b"a", b"b"]
            with pytest.raises(TimeoutError, match="nothing came") as caught:
                await reader.read_async(timeout=0.01)
            assert caught.value.errno == errno.ETIMEDOUT
            with pytest.raises(TimeoutError, match="nothing came"):
                await reader.read_async(timeout=0)

            whole = asyncio.create_task(reader.read_all_async())
            await writer.write_async(bytes(10 * PAGE))
            writer.close()
            assert await whole == bytes(10 * PAGE)
            assert [part async for part in reader] == []
            assert await reader.read_into_async(bytearray(1)) == 0

    asyncio.run(main())


def test_a_cancelled_atomic_write_has_written_nothing() -> None:
    async def main() -> None:
        with pipe(size=PAGE) as (reader, writer):
            await writer.write_async(b"x")
            task = asyncio.create_task(writer.write_atomic_async(bytes(PIPE_BUF)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await reader.read_async() == b"x"
            with pytest.raises(BlockingIOError):
                reader.try_read()

    asyncio.run(main())


def test_closing_ends_the_waits_of_tasks() -> None:
    async def main() -> None:
        with pipe() as (reader, _):
            task = asyncio.create_task(reader.read_async())
            await asyncio.sleep(0)
            reader.close()
            with pytest.raises(OSError) as caught:
                await task
            assert caught.value.errno == errno.EBADF

    asyncio.run(main())


@pytest.mark.processes
def test_another_program_gets_a_blocking_end_of_its_own() -> None:
    with pipe() as (reader, writer):
        end = reader.reopen()
        with subprocess.Popen(["cat"], stdin=end, stdout=subprocess.PIPE) as cat:
            os.close(end)
            writer.write(b"through")
            writer.close()
            assert cat.communicate()[0] == b"through"
        assert not os.get_blocking(reader.fileno())


@pytest.mark.processes
def test_a_forked_child_shares_the_pipe_and_closes_for_itself() -> None:
    assert run("""
        import os
        from anywire.ipc import pipe
        with pipe() as (reader, writer):
            child = os.fork()
            if not child:
                reader.close()
                writer.write(b"of the child")
                del reader, writer              # no warning in the child: it is the parent's
                os._exit(0)
            writer.close()
            print(reader.read_all().decode())   # ends when the child has closed its copy
            os.waitpid(child, 0)
    """) == "of the child\n"


def _write(writer: PipeWriter) -> None:
    with writer:
        writer.write(b"spawned")


@pytest.mark.processes
def test_pickle_is_for_processes_being_started() -> None:
    with pipe() as (reader, writer):
        with pytest.raises(TypeError, match="send_fds"):
            pickle.dumps(writer)
        process = multiprocessing.get_context("spawn").Process(target=_write, args=(writer,))
        process.start()
        writer.close()
        assert reader.read_all(timeout=30) == b"spawned"
        process.join()


def test_a_dropped_end_warns_and_closes() -> None:
    made = [pipe()]
    fds = [end.fileno() for end in made[0]]
    with pytest.warns(ResourceWarning, match="was never closed"):
        made.clear()
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_inherited_descriptors_become_ends() -> None:
    first, second = os.pipe()
    with Pipe(PipeReader(first), PipeWriter(second)) as (reader, writer):
        writer.write(b"x")
        assert reader.read() == b"x"
        fd = writer.detach()
        assert writer.closed
        os.close(fd)
        assert reader.read() == b""


@pytest.mark.processes
def test_a_signal_that_comes_while_waiting_is_handled_and_the_wait_goes_on() -> None:
    assert run("""
        import os, signal, threading
        from anywire.ipc import pipe
        with pipe() as (reader, writer):
            signal.signal(signal.SIGUSR1, lambda *_: (print("handled"), writer.write(b"x")))
            signal.setitimer(signal.ITIMER_REAL, 0)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            print(reader.read(timeout=20))
    """) == "handled\nb'x'\n"
