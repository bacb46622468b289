"""`Fifo`: made by intent, opened by the rules of fifo(7), told in words."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from ipc_children import run

from anywire.ipc import Fifo


def test_made_by_intent(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    with pytest.raises(FileNotFoundError):
        Fifo.open(path)
    former = os.umask(0o077)
    try:
        Fifo.create(path, 0o666)
    finally:
        os.umask(former)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666     # whatever the umask
    with pytest.raises(FileExistsError) as caught:
        Fifo.create(path)
    assert caught.value.filename == path
    Fifo.create_or_open(path, 0o600)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666     # it was there
    Fifo.unlink(path)
    with Fifo.create_or_open(path, owner=True) as fifo:
        assert stat.S_ISFIFO(os.stat(path).st_mode)
        assert pickle.loads(pickle.dumps(fifo)).path == path
    assert not os.path.exists(path)                         # the owner unlinks
    with pytest.raises(FileNotFoundError):
        fifo.unlink()


def test_other_files_are_never_opened(tmp_path: Path) -> None:
    file = tmp_path / "regular"
    file.touch()
    for make in (Fifo.open, Fifo.create_or_open):
        with pytest.raises(OSError, match="no FIFO") as caught:
            make(file)
        assert caught.value.errno == errno.EINVAL and caught.value.filename == str(file)


def test_a_writer_without_readers_is_told_what_to_do(tmp_path: Path) -> None:
    fifo = Fifo.create(tmp_path / "f")
    with pytest.raises(OSError, match="start the reader first") as caught:
        fifo.try_open_writer()
    assert caught.value.errno == errno.ENXIO and caught.value.filename == fifo.path
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match="nobody has the FIFO open for reading") as late:
            fifo.open_writer(timeout=timeout)
        assert late.value.errno == errno.ETIMEDOUT
    with fifo.open_reader(), fifo.try_open_writer() as writer:
        writer.write(b"x")


def test_a_reader_waits_for_its_first_writer_and_ends_with_the_last(tmp_path: Path) -> None:
    fifo = Fifo.create(tmp_path / "f")
    with fifo.open_reader() as reader:
        with pytest.raises(BlockingIOError):
            reader.try_read()                               # read(2) says "end" here
        with pytest.raises(TimeoutError):
            reader.read_into(bytearray(1), timeout=0.01)
        for word in (b"first", b"second"):
            with fifo.open_writer() as writer:
                with pytest.raises(BlockingIOError):
                    reader.try_read()
                writer.write(word)
            assert reader.read() == word
            assert reader.read() == b""                     # until the next one comes


def test_a_lasting_reader_outlives_its_writers(tmp_path: Path) -> None:
    fifo = Fifo.create(tmp_path / "f")
    with fifo.open_reader(lasting=True) as reader:
        for word in (b"first", b"second"):
            with fifo.open_writer() as writer:
                writer.write(word)
            assert reader.read() == word
            with pytest.raises(BlockingIOError):
                reader.try_read()


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_writer_waits_for_a_reader(tmp_path: Path, timeout: float | None) -> None:
    fifo = Fifo.create(tmp_path / "f")
    opened = []
    thread = threading.Thread(target=lambda: opened.append(fifo.open_writer(timeout=timeout)))
    thread.start()
    with fifo.open_reader() as reader:
        thread.join()
        with opened[0] as writer:
            writer.write(b"x")
        assert reader.read() == b"x"


def test_a_task_waits_for_a_reader(tmp_path: Path) -> None:
    async def main() -> None:
        fifo = Fifo.create(tmp_path / "f")
        with pytest.raises(TimeoutError):
            await fifo.open_writer_async(timeout=0.01)
        waiting = asyncio.create_task(fifo.open_writer_async())
        await asyncio.sleep(0)
        with fifo.open_reader() as reader, await waiting as writer:
            await writer.write_async(b"x")
            assert await reader.read_async() == b"x"

    asyncio.run(main())


def test_a_cancelled_opening_that_had_won_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        fifo = Fifo.create(tmp_path / "f")
        task = asyncio.create_task(fifo.open_writer_async())
        await asyncio.sleep(0)
        with fifo.open_reader() as reader:
            while not any(opened(fd, fifo.path) for fd in os.listdir("/proc/self/fd") if int(fd) != reader.fileno()):
                time.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await reader.read_async(timeout=30) == b""       # the end: the writer is gone

    asyncio.run(main())


def opened(fd: str, path: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == path
    except OSError:
        return False


def test_a_name_that_goes_away_or_is_another_s_is_noticed(tmp_path: Path) -> None:
    """While open(2) waits for who has the old one."""
    errors: list[OSError] = []
    fifo = Fifo.create(tmp_path / "f")

    def wait(timeout: float | None) -> None:
        try:
            fifo.open_writer(timeout=timeout).close()
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, args=[None])
    thread.start()
    until_blocked(thread)
    os.rename(Fifo.create(tmp_path / "other").path, fifo.path)
    with fifo.open_reader() as reader:
        assert reader.read() == b""                         # the writer came, and went
    thread.join()
    thread = threading.Thread(target=wait, args=[30])
    thread.start()
    until_blocked(thread)
    fifo.unlink()
    thread.join()
    assert len(errors) == 1 and isinstance(errors[0], FileNotFoundError) and errors[0].filename == fifo.path


def until_blocked(thread: threading.Thread) -> None:
    """Until it is inside open(2) or openat(2), of x86 and others."""
    while not Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith(("2 0x", "257 ", "56 ")):
        time.sleep(0.001)


@pytest.mark.processes
def test_the_shell_is_at_the_other_end(tmp_path: Path) -> None:
    fifo = Fifo.create(tmp_path / "f")
    with fifo.open_reader() as reader, subprocess.Popen(["sh", "-c", f"echo hello > {fifo.path}"]):
        assert reader.read_all(timeout=30) == b"hello\n"
    with subprocess.Popen(["cat", fifo.path], stdout=subprocess.PIPE) as cat:
        with fifo.open_writer(timeout=30) as writer:
            writer.write(b"back")
        assert cat.communicate(timeout=30)[0] == b"back"


def test_unlinked_names_go_and_open_ends_stay(tmp_path: Path) -> None:
    fifo = Fifo.create(tmp_path / "f")
    with fifo.open_reader() as reader, fifo.open_writer() as writer:
        fifo.unlink()
        writer.write(b"x")
        assert reader.read() == b"x"
        with pytest.raises(FileNotFoundError):
            fifo.open_writer(timeout=1)


@pytest.mark.processes
def test_the_mode_decides_who_may() -> None:
    with tempfile.TemporaryDirectory() as directory, Fifo.create(f"{directory}/f", 0o622) as fifo, fifo.open_reader():
        os.chmod(directory, 0o755)
        assert run("""
            import sys
            from anywire.ipc import Fifo
            fifo = Fifo.open(sys.argv[1])
            fifo.open_writer(timeout=1).close()
            try:
                fifo.open_reader()
            except PermissionError as error:
                print(error.filename == fifo.path)
        """, fifo.path, user=65534) == "True\n"
