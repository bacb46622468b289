"""Locks of open file descriptions, who has them, and whole appends."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from ipc_children import PATIENCE, line, run, started

from anywire.ipc import Appender, FileLock, append

HOLD = """
    import sys
    from anywire.ipc import FileLock
    lock = FileLock(sys.argv[1], start=int(sys.argv[2]), length=int(sys.argv[3]), shared=len(sys.argv) > 4)
    with lock:
        print("held", flush=True)
        sys.stdin.read()
"""


def test_two_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first, second = FileLock(path), FileLock(path)
    with first:
        assert first.held and not second.held
        with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} .* exclusive lock from byte 0 on") as busy:
            second.try_acquire()
        assert busy.value.filename == path
        for timeout in (0, 0.01):
            with pytest.raises(TimeoutError, match=f"process {os.getpid()}") as late:
                second.acquire(timeout=timeout)
            assert late.value.errno == errno.ETIMEDOUT
        with pytest.raises(RuntimeError, match="held already"):
            first.acquire()
    assert not first.held
    with second:
        pass
    with pytest.raises(RuntimeError, match="not held"):
        second.release()
    assert len([fd for fd in os.listdir("/proc/self/fd") if link(fd) == path]) == 0


def link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_shared_ones_share_and_exclude_writers(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path, shared=True), FileLock(path, shared=True) as second:
        with pytest.raises(BlockingIOError, match="a shared lock"):
            FileLock(path).try_acquire()
        assert second.holders() == []
    with FileLock(path), pytest.raises(BlockingIOError, match="an exclusive lock"):
        FileLock(path, shared=True).try_acquire()


def test_ranges_exclude_where_they_meet(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with FileLock(path, start=10, length=10):
        for start, length in ((0, 10), (20, 5), (20, 0)):
            with FileLock(path, start=start, length=length) as other:
                assert other.held
        for start, length in ((0, 11), (19, 1), (15, 0), (0, 0)):
            with pytest.raises(BlockingIOError, match="from byte 10 to 19"):
                FileLock(path, start=start, length=length).try_acquire()
    with pytest.raises(ValueError, match="starts at 0 or later"):
        FileLock(path, start=-1)


@pytest.mark.processes
def test_another_process_is_named_and_kill_9_releases(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with started(HOLD, path, "0", "0") as holder:
        assert line(holder) == "held"
        lock = FileLock(path)
        [told] = lock.holders()
        assert (told.pid, told.shared, told.start, told.length) == (holder.pid, False, 0, 0)
        assert told.name in str(told)
        with pytest.raises(TimeoutError, match=f"process {holder.pid} "):
            lock.acquire(timeout=0)
        taken = threading.Thread(target=lock.acquire)
        taken.start()
        holder.kill()
        taken.join(PATIENCE)
        assert lock.held
        lock.release()


@pytest.mark.processes
def test_a_lock_of_the_older_kind_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = """
        import fcntl, sys
        with open(sys.argv[1], "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX, 5, 5)
            print("held", flush=True)
            sys.stdin.read()
    """
    with started(program, str(path)) as holder:
        assert line(holder) == "held"
        with pytest.raises(BlockingIOError, match=rf"process {holder.pid} .* an exclusive lock from byte 5 to 9"):
            FileLock(path).try_acquire()


@pytest.mark.processes
def test_c_takes_the_same_locks(tmp_path: Path) -> None:
    source = tmp_path / "lock.c"
    source.write_text(r"""
        #define _GNU_SOURCE
        #include <errno.h>
        #include <fcntl.h>
        #include <unistd.h>
        int main(int argc, char** argv) {
            int fd = open(argv[1], O_RDWR);
            struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 1 };
            if (fcntl(fd, F_OFD_SETLK, &lock) == 0) return 1;
            if (errno != EAGAIN) return 2;
            lock.l_start = 4;
            return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : 3;
        }
    """)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "lock", source], check=True, timeout=60)
    with FileLock(tmp_path / "f", length=4):
        assert subprocess.run([tmp_path / "lock", tmp_path / "f"], timeout=30, check=False).returncode == 0


def test_a_lock_of_an_open_file_is_its_description_s(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b") as file, open(tmp_path / "f", "rb") as other:
        with FileLock(file) as lock:
            assert lock.name == str(tmp_path / "f")
            with pytest.raises(BlockingIOError):
                FileLock(other, shared=True).try_acquire()
            with pytest.raises(OSError, match="must be open for writing") as caught:
                FileLock(other).try_acquire()
            assert caught.value.errno == errno.EBADF
        assert not file.closed
        lock.acquire()
        copy = os.dup(file.fileno())
        same = FileLock(copy)
        same.try_acquire()                                  # the same description: not excluded,
        same.release()
        with FileLock(tmp_path / "f"):                      # and unlocked for both
            pass
        lock.release()
        lock.acquire()
        file.close()
        with pytest.raises(BlockingIOError):
            FileLock(tmp_path / "f").try_acquire()
        os.close(copy)                                      # the last copy of it
        with FileLock(tmp_path / "f"):
            pass
        with pytest.raises(OSError):
            lock.release()


def test_tasks_wait_and_cancel(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "lock"
        async with FileLock(path) as first:
            lock = FileLock(path)
            with pytest.raises(TimeoutError, match=f"process {os.getpid()}"):
                await lock.acquire_async(timeout=0.01)
            lost = asyncio.create_task(FileLock(path).acquire_async())
            waiting = asyncio.create_task(lock.acquire_async())
            await asyncio.sleep(0)
            lost.cancel()
            assert first.held
        await waiting
        assert lock.held
        lock.release()

    asyncio.run(main())


def test_a_cancelled_wait_that_had_won_gives_it_back(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "lock"
        first, second = FileLock(path), FileLock(path)
        first.acquire()
        task = asyncio.create_task(second.acquire_async())
        await asyncio.sleep(0)
        first.release()
        while not second.held:                              # its thread has it; this loop doesn't turn meanwhile
            time.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not second.held
        with FileLock(path):
            pass
        assert not [fd for fd in os.listdir("/proc/self/fd") if link(fd) == str(path)]

    asyncio.run(main())


IDLE = """
    import asyncio, resource, sys, threading
    from anywire.ipc import Fifo, FileLock
    path, kind = sys.argv[1:]
    calls = {
        "FileLock": lambda: FileLock(path).acquire(timeout=60),
        "FileLock in a task": lambda: asyncio.run(FileLock(path).acquire_async()),
        "Fifo": lambda: Fifo.open(path).open_writer(timeout=60),
        "Fifo in a task": lambda: asyncio.run(Fifo.open(path).open_writer_async()),
    }
    threading.Thread(target=calls[kind], daemon=True).start()
    print("begun", flush=True)
    for _ in range(2):
        sys.stdin.readline()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["FileLock", "FileLock in a task", "Fifo", "Fifo in a task"])
def test_a_wait_sleeps_while_nothing_happens(tmp_path: Path, kind: str) -> None:
    """By how often a process went to sleep: it would be 25 times if it looked each 20 ms. How often a busy machine took
    the CPU from it says nothing."""
    path = str(tmp_path / "file")
    if kind.startswith("Fifo"):
        os.mkfifo(path)
    with FileLock(path) if kind.startswith("FileLock") else nullcontext(), started(IDLE, path, kind) as process:
        assert line(process) == "begun" and process.stdin is not None
        switches = []
        for _ in range(2):
            time.sleep(0.5)
            process.stdin.write("\n")
            process.stdin.flush()
            switches.append(int(line(process)))
    assert switches[1] - switches[0] < 15


@pytest.mark.processes
def test_fork_keeps_it_until_the_child_lets_go(tmp_path: Path) -> None:
    assert run("""
        import os, sys
        from anywire.ipc import FileLock, pipe
        path = sys.argv[1]
        lock = FileLock(path)
        lock.acquire()
        with pipe() as (reader, writer):
            child = os.fork()
            if not child:
                print(lock.held, flush=True)            # the child does not hold it,
                writer.close()
                reader.read()
                lock.release()                          # and closes its copy alone
                os._exit(0)
            try:
                FileLock(path).try_acquire()
            except BlockingIOError:
                print("still locked", flush=True)
            reader.close()
            writer.close()
            os.waitpid(child, 0)
            try:
                FileLock(path).try_acquire()
            except BlockingIOError:
                print("still locked", flush=True)
        lock.release()
        with FileLock(path):
            print("free")
    """, str(tmp_path / "lock")) == "False\nstill locked\nstill locked\nfree\n"


def test_pickle_carries_the_path(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", shared=True, start=3, length=4)
    with lock:
        copy = pickle.loads(pickle.dumps(lock))
        assert not copy.held
        assert (copy.name, copy.shared, copy.start, copy.length) == (lock.name, True, 3, 4)
    with open(tmp_path / "f", "wb") as file, pytest.raises(TypeError, match="of an open file"):
        pickle.dumps(FileLock(file))


def test_a_dropped_lock_warns_and_releases(tmp_path: Path) -> None:
    made = [FileLock(tmp_path / "lock")]
    made[0].acquire()
    with pytest.warns(ResourceWarning, match="never released"):
        made.clear()
    FileLock(tmp_path / "lock").holders()
    with FileLock(tmp_path / "lock"):
        pass


COUNT = """
    import sys, threading
    from anywire.ipc import FileLock
    def count():
        for _ in range(25):
            with FileLock(sys.argv[1] + ".lock"):
                with open(sys.argv[1], "r+") as file:
                    number = int(file.read())
                    file.seek(0)
                    file.write(str(number + 1))
    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


@pytest.mark.processes
def test_threads_and_processes_never_hold_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    command = [sys.executable, "-c", textwrap.dedent(COUNT), str(path)]
    counters = [subprocess.Popen(command) for _ in range(8)]
    assert [each.wait(PATIENCE) for each in counters] == [0] * 8
    assert path.read_text() == str(8 * 2 * 25)


def test_records_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Appender(path) as first, Appender(path) as second:
        threads = [
            threading.Thread(target=lambda file=file, letter=letter: [
                file.append(letter * 5000, b"\n") for _ in range(100)
            ])
            for file, letter in ((first, b"a"), (second, b"b"), (first, b"c"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        append(path, b"")
        append(path, b"end", b"\n")
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and lines.pop() == b"end"
    assert sorted(lines) == sorted([letter * 5000 for letter in (b"a", b"b", b"c")] * 100)


@pytest.mark.processes
def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    assert run("""
        import errno, resource, sys
        from anywire.ipc import Appender
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        with Appender(sys.argv[1]) as file:
            file.append(b"123456")
            for number in (errno.EIO, errno.EFBIG):
                try:
                    file.append(b"123456")
                except OSError as error:
                    print(error.errno == number, error.filename == sys.argv[1], error.strerror)
    """, str(tmp_path / "log")).splitlines() == [
        "True True only 4 of 6 bytes fitted (disk, quota or file size limit); those are in the file",
        "True True File too large",
    ]


def test_tasks_append(tmp_path: Path) -> None:
    async def main() -> None:
        with Appender(tmp_path / "log") as file:
            await asyncio.gather(*(file.append_async(b"%d\n" % number) for number in range(20)))

    asyncio.run(main())
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(20))


def test_an_appender_is_a_descriptor_of_its_own(tmp_path: Path) -> None:
    made = [Appender(tmp_path / "log", 0o640)]
    assert fcntl.fcntl(made[0], fcntl.F_GETFL) & os.O_APPEND
    assert not os.get_inheritable(made[0].fileno())
    with pytest.raises(TypeError, match="send_fds"):
        pickle.dumps(made[0])
    with pytest.warns(ResourceWarning, match="never closed"):
        made.clear()
    with pytest.raises(FileNotFoundError):
        Appender(tmp_path / "no" / "log")
