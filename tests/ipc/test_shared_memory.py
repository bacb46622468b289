"""Shared memory: the table of opening, sizes, views, files, anonymous memory with seals, other processes.

`open-N`, `unlink-N` are assertions of the Open POSIX Test Suite (conformance/interfaces/shm_open, shm_unlink).
"""

from __future__ import annotations

import array
import errno
import fcntl
import gc
import mmap
import os
import pickle
import resource
import signal
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared_helpers import NOBODY, c_program, fresh_name, line_of, program, run

from anywire.ipc import Semaphore, SharedMemory

__all__ = ["c_program"]

EXCLUSIVE = os.O_RDWR | os.O_CREAT | os.O_EXCL


@pytest.fixture
def name() -> Iterator[str]:
    name = fresh_name("shm")
    yield name
    try:
        SharedMemory.unlink(name)
    except FileNotFoundError:
        pass


@pytest.fixture
def memory(name: str) -> Iterator[SharedMemory]:
    with SharedMemory.create(name, 5000) as memory:
        yield memory


# -- opening


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
@pytest.mark.parametrize(
    ("flags", "exists", "outcome"),
    [
        (0, False, FileNotFoundError),  # open-41
        (0, True, "old"),
        (os.O_CREAT, False, "new"),  # open-15
        (os.O_CREAT, True, "old"),
        (os.O_CREAT | os.O_EXCL, False, "new"),
        (os.O_CREAT | os.O_EXCL, True, FileExistsError),  # open-22, open-35
        (os.O_TRUNC, True, "empty"),  # open-25
    ],
)
def test_the_table_of_opening(name: str, access: int, flags: int, exists: bool, outcome: object) -> None:
    if exists:
        with SharedMemory.create(name, 10, 0o640) as first:
            first[:] = b"0123456789"
    if access == os.O_WRONLY:
        with pytest.raises(PermissionError, match="written only") as denied:
            SharedMemory(name, access | flags)
        assert denied.value.filename == name
    elif isinstance(outcome, type):
        with pytest.raises(outcome) as caught:
            SharedMemory(name, access | flags)
        assert caught.value.filename == name
    elif outcome == "empty" and access == os.O_RDONLY:
        with pytest.raises(ValueError, match="O_TRUNC needs O_RDWR"):  # open-27
            SharedMemory(name, access | flags)
    else:
        with SharedMemory(name, access | flags, 0o600) as opened:
            assert opened.readonly == (access == os.O_RDONLY)  # open-13, open-14
            assert bytes(opened) == (b"0123456789" if outcome == "old" else b"")  # open-21
            assert opened.mode == (0o640 if exists else 0o600)  # open-26
            if access == os.O_RDONLY:
                with pytest.raises((BufferError, TypeError)):
                    opened[:1] = b"x"


def test_by_intent(name: str) -> None:
    with SharedMemory.create_or_open(name, 100) as first, SharedMemory.create_or_open(name, 100) as second:
        first[99] = 7
        assert second[99] == 7 and second.size == len(second) == 100
        with pytest.raises(ValueError, match="has 100 bytes already, not 200"):
            SharedMemory.create_or_open(name, 200)
        with pytest.raises(FileExistsError):
            SharedMemory.create(name, 100)
        with SharedMemory.open(name, readonly=True) as third:
            assert third[99] == 7 and third.readonly
        assert os.fstat(first.fileno()).st_size == 100  # the exact size
        assert fcntl.fcntl(first.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC  # open-11
        assert first.fileno() != second.fileno()  # open-9


@pytest.mark.parametrize(
    ("bad", "number"), [("/" + "n" * 300, errno.ENAMETOOLONG), ("/a/b", errno.EINVAL), ("/", errno.EINVAL)]
)
def test_names_that_cannot_be(bad: str, number: int) -> None:
    for use in (lambda: SharedMemory.create(bad, 1), lambda: SharedMemory.unlink(bad)):  # open-39, unlink-10
        with pytest.raises(OSError) as caught:
            use()
        assert caught.value.errno in (number, errno.ENOENT) and caught.value.filename == bad


def test_what_fails_leaves_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="number of bytes"):
        SharedMemory.create(name, -1)
    with pytest.raises(OSError, match="df") as caught:
        SharedMemory.create(name, 1 << 45)  # open-42: more than there is, and this is said now
    assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM) and caught.value.filename == name
    with pytest.raises(ValueError, match="flags"):
        SharedMemory(name, os.O_RDWR | os.O_APPEND)
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(name)
    with SharedMemory.create(name, 1 << 40, reserve=False) as sparse:
        sparse[-1] = 1


def test_no_descriptors_left(name: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            SharedMemory.create(name, 1)
        assert caught.value.errno == errno.EMFILE  # open-38
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.processes
def test_mode_and_umask(name: str) -> None:
    run(
        """
        import os, sys
        os.umask(0o026)
        from anywire.ipc import SharedMemory
        SharedMemory.create(sys.argv[1], 1, 0o666).close()
        """,
        name,
    )
    with SharedMemory.open(name) as memory:
        status = os.fstat(memory.fileno())
        assert memory.mode == 0o640  # open-18
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())  # open-16, open-17


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_without_permission(name: str) -> None:
    """open-32, open-34, unlink-9; reading is allowed to all."""
    SharedMemory.create(name, 3, 0o644).close()
    said = run(
        "from anywire.ipc import SharedMemory\nimport os, sys"
        + NOBODY
        + "name = sys.argv[1]\n"
        "with SharedMemory.open(name, readonly=True) as memory: print(memory.size)\n"
        "for what in SharedMemory.open, SharedMemory.unlink, lambda n: SharedMemory(n, os.O_RDWR | os.O_TRUNC):\n"
        "    try: what(name)\n"
        "    except PermissionError as error: print(error.filename == name)\n",
        name,
    )
    assert said == "3\nTrue\nTrue\nTrue\n"
    with SharedMemory.open(name) as memory:
        assert memory.size == 3


def test_unlinking(name: str) -> None:
    with SharedMemory.create(name, 4) as old:
        old[:] = b"past"
        old.unlink()  # unlink-1, unlink-2
        with pytest.raises(FileNotFoundError) as caught:
            SharedMemory.open(name)  # unlink-4
        assert caught.value.filename == name
        with pytest.raises(FileNotFoundError):
            SharedMemory.unlink(name)  # unlink-11
        with SharedMemory.create(name, 4) as new:  # unlink-5
            assert bytes(old) == b"past" and bytes(new) == bytes(4)  # unlink-3


@pytest.mark.processes
def test_only_an_owner_removes_the_name(name: str) -> None:
    owner = SharedMemory.create(name, 10, owner=True)
    owner[0] = 9
    text = """
        import sys
        from anywire.ipc import SharedMemory
        memory = SharedMemory.open(sys.argv[1])
        print(memory[0])
        memory.close()
    """
    assert run(text, name) == "9\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3.12 warns of a fork beside threads
        child = os.fork()
    if child == 0:
        owner.close()  # it is not the owner's process
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    SharedMemory.open(name).close()
    owner.close()
    owner.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(name)
    SharedMemory.create(name, 5).close()
    with SharedMemory.open(name) as lasting:  # open-28: it was not lost with the last who had it open
        assert lasting.size == 5


# -- bytes


def test_bytes_and_views(memory: SharedMemory) -> None:
    memory[10:15] = b"hello"
    assert bytes(memory[10:15]) == b"hello" and memory[10] == ord("h") and memory[-1] == 0
    view = memoryview(memory)
    assert view.nbytes == 5000 and not view.readonly and view.format == "B"
    with view.cast("i") as numbers:
        numbers[3] = -1
    assert bytes(memory[12:16]) == b"\xff" * 4
    part = view[3:5]
    for use, what in (
        (memory.close, "closed"),
        (lambda: memory.resize(10), "resized"),
    ):
        with pytest.raises(BufferError, match=f"can't be {what} while 1 views"):
            use()
    view.release()
    with pytest.raises(BufferError):
        memory.close()
    assert memory[3:5] == part
    part.release()
    memory.close()
    for use in (lambda: memory.size, lambda: memory[0], memory.fileno, lambda: memory.resize(1), memory.__enter__):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert memory.closed and repr(memory) == "<SharedMemory, closed>"


def test_nothing_is_a_size_too(name: str) -> None:
    with SharedMemory.create(name, 0) as empty:
        assert bytes(empty) == b"" and empty.size == 0
        empty.resize(3)
        empty[:] = b"abc"
        empty.resize(0)
        assert bytes(empty) == b""
        empty.flush()


def test_a_semaphore_inside(memory: SharedMemory) -> None:
    semaphore = Semaphore.create_in(memory, 64, 1)
    with pytest.raises(BufferError, match="semaphores"):
        memory.close()
    semaphore.close()


def test_numpy(memory: SharedMemory) -> None:
    numpy = pytest.importorskip("numpy")
    numbers = memory.array("int32", (10, 20), 16)
    numbers[9, 19] = 77
    assert array.array("i", bytes(memory[16 + 199 * 4 : 16 + 200 * 4]))[0] == 77
    assert memory.array(numpy.float64).shape == (625,)
    assert memory.array("u1", 4, 4996).flags.writeable
    with pytest.raises(ValueError, match="no room for"):
        memory.array("i4", 2000)
    with pytest.raises(BufferError):
        memory.close()
    del numbers
    with SharedMemory.open(str(memory.name), readonly=True) as same:
        assert not same.array("u1").flags.writeable


def test_growing(name: str) -> None:
    with SharedMemory.create(name, 100) as here, SharedMemory.open(name) as there:
        here[:] = b"x" * 100
        here.resize(1 << 20)
        assert here.size == 1 << 20 and bytes(here[98:102]) == b"xx\0\0"
        here[-1] = 5
        assert there.size == 100
        held = memoryview(there)
        with pytest.raises(BufferError, match="mapped anew"):
            there.refresh()
        held.release()
        assert there.refresh() == 1 << 20 and there[-1] == 5
        there.resize(50)
        assert here.refresh() == 50
        with pytest.raises(ValueError, match="number of bytes"):
            here.resize(-1)
        with pytest.raises(OSError, match="df"):
            here.resize(1 << 45)
        assert here.size == 50 and os.fstat(here.fileno()).st_size == 50
        with SharedMemory.open(name, readonly=True) as only, pytest.raises(OSError, match="reading only"):
            only.resize(60)


def test_collected_while_open(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory = SharedMemory.create(name, 10, owner=True)
        fd = memory.fileno()
        view = memoryview(memory)
        del memory
        gc.collect()
        assert not caught  # the view keeps it
        view.release()
        del view
        gc.collect()
    assert [str(warning.message) for warning in caught] == ["shared memory was never closed"]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(name)


# -- other processes


def test_pickle(memory: SharedMemory) -> None:
    memory[0] = 3
    with pickle.loads(pickle.dumps(memory)) as same:
        same[0] += 1
    assert memory[0] == 4
    with SharedMemory.open(str(memory.name), readonly=True) as only, pickle.loads(pickle.dumps(only)) as again:
        assert again.readonly and again[0] == 4
    with SharedMemory.anonymous(10) as nameless, pytest.raises(TypeError, match="from_fd"):
        pickle.dumps(nameless)


@pytest.mark.processes
def test_c_programs_share_it(name: str, c_program: str) -> None:
    with SharedMemory.create(name, 5000) as memory:
        memory[:2] = b"ab"
        said = subprocess.run([c_program, "turn-round", name], check=True, capture_output=True, text=True).stdout
        assert said == "5000\n" and bytes(memory[:2]) == b"ba"
    subprocess.run([c_program, "make-memory", name + "c", "77"], check=True)
    with SharedMemory.open(name + "c") as theirs:
        assert theirs.size == 77 and bytes(theirs) == bytes(range(77))
        theirs.unlink()


@pytest.mark.processes
def test_killed_processes(name: str) -> None:
    """What was written stays, the name stays, and who has it mapped is known."""
    text = """
        import sys
        from anywire.ipc import SharedMemory
        memory = SharedMemory.create(sys.argv[1], 10)
        memory[0] = 1
        print("ready")
        sys.stdin.readline()
    """
    with program(text, name) as child:
        assert line_of(child) == "ready"
        with SharedMemory.open(name) as memory:
            assert memory.processes() == sorted([os.getpid(), child.pid])
            child.kill()
            child.wait()
            assert memory.processes() == [os.getpid()] and memory[0] == 1


@pytest.mark.processes
def test_8_processes_meet_at_one_name(name: str) -> None:
    """All create_or_open at the same time: it is one object (open-23), of its full size for each of them."""
    text = """
        import sys
        from anywire.ipc import SharedMemory
        sys.stdin.readline()
        with SharedMemory.create_or_open(sys.argv[1], 8) as memory:
            memory[int(sys.argv[2])] = 1
        try:
            SharedMemory.create(sys.argv[1] + "x", 1).close()
            print("mine")
        except FileExistsError:
            print("other's")
    """
    children = [program(text, name, number) for number in range(8)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    said = [child.communicate()[0] for child in children]
    assert sorted(said) == ["mine\n"] + 7 * ["other's\n"]
    SharedMemory.unlink(name + "x")
    with SharedMemory.open(name) as memory:
        assert bytes(memory) == b"\1" * 8


# -- files


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with pytest.raises(FileNotFoundError):
        SharedMemory.file(path)
    with SharedMemory.file(path, 10, create=True) as memory:
        memory[:] = b"0123456789"
        memory.flush()
        assert path.read_bytes() == b"0123456789" and path.stat().st_mode & 0o777 == 0o600
        with pickle.loads(pickle.dumps(memory)) as same:
            assert same[9] == ord("9") and same.name == str(path)
        assert memory.seals == frozenset()
    with SharedMemory.file(path, 20) as longer:
        assert bytes(longer[8:12]) == b"89\0\0"
    with pytest.raises(ValueError, match="has 20 bytes already, not 5"):
        SharedMemory.file(path, 5)
    with SharedMemory.file(path, readonly=True) as only:
        assert only.readonly and only.size == 20
        with pytest.raises(ValueError, match="reading only"):
            SharedMemory.file(path, 30, readonly=True)
    for wrong in (tmp_path, "/dev/null"):
        with pytest.raises(OSError):  # a directory: IsADirectoryError
            SharedMemory.file(wrong)
    assert path.exists()


# -- anonymous


def test_anonymous_memory_is_passed_by_its_descriptor() -> None:
    with SharedMemory.anonymous(1000, "frames") as memory:
        assert memory.name is None and "anonymous, 1000 bytes" in repr(memory)
        assert "memfd:frames" in Path("/proc/self/maps").read_text()
        with SharedMemory.from_fd(os.dup(memory.fileno())) as same:
            same[:5] = b"hello"
        assert bytes(memory[:5]) == b"hello"
        only = SharedMemory.from_fd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY), readonly=True)
        assert only[4] == ord("o")
        only.close()
        with pytest.raises(OSError, match="reading only") as caught:
            SharedMemory.from_fd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY))
        assert caught.value.errno == errno.EACCES
        with pytest.raises(ValueError, match="no name"):
            memory.unlink()


def test_seals() -> None:
    with SharedMemory.anonymous(100) as memory:
        assert memory.seals == frozenset()
        memory.seal("shrink", "grow")
        assert memory.seals == {"shrink", "grow"}
        for size in (50, 200):
            with pytest.raises(PermissionError, match="sealed"):
                memory.resize(size)
        memory[0] = 1
        with pytest.raises(OSError, match="sealing write") as caught:  # it is mapped for writing
            memory.seal("write")
        assert caught.value.errno == errno.EBUSY
        memory.seal("future_write", "seal")
        memory[0] = 2
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fileno(), 100)
        with pytest.raises(PermissionError, match="sealing grow"):
            memory.seal("grow")
        with pytest.raises(ValueError, match="no seal is called 'wax'"):
            memory.seal("wax")
    with SharedMemory.anonymous(100, sealable=False) as memory:
        with pytest.raises(PermissionError):
            memory.seal("grow")
        assert memory.seals == {"seal"}


def test_huge_pages(name: str) -> None:
    with SharedMemory.create(name, 4 << 20, huge=True) as asked:  # a wish
        asked[-1] = 1
    try:
        with SharedMemory.anonymous(2 << 20, huge=True) as memory:
            memory[-1] = 1
    except OSError as error:  # none are set aside here: it must say so, now
        assert "nr_hugepages" in str(error) or "df" in str(error), error


@pytest.mark.processes
@pytest.mark.no_sanitize
def test_cut_off_memory_kills_unless_sealed(name: str) -> None:
    """The system's rule, as the docs tell it: SIGBUS."""
    text = """
        import resource, sys
        from anywire.ipc import SharedMemory
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        memory = SharedMemory.open(sys.argv[1])
        print("ready")
        sys.stdin.readline()
        print(memory[8000])
    """
    with SharedMemory.create(name, 10_000) as memory:
        with program(text, name) as child:
            assert line_of(child) == "ready"
            memory.resize(10)
            child.communicate("\n")
        assert child.returncode == -signal.SIGBUS
