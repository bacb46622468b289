"""System V shared memory: opening, attaching, views, removal, other processes."""

from __future__ import annotations

import errno
import gc
import os
import pickle
from collections.abc import Iterator

import ipc_children as children
import pytest
from sysv_helpers import NAMESPACE, c, some_key

from anywire.ipc.sysv import CREATE, EXCLUSIVE, HUGE, PRIVATE, SharedMemory

NOBODY = 65534


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory.create(some_key(), 1000, owner=True) as memory:
        yield memory


def test_opening_by_intent() -> None:
    key = some_key()
    for find in (lambda: SharedMemory.open(key), lambda: SharedMemory(key), lambda: SharedMemory.unlink(key)):
        with pytest.raises(FileNotFoundError):
            find()
    with SharedMemory.create_or_open(key, 100, owner=True) as one:
        assert bytes(one.buf) == bytes(100) and (len(one), one.size, one.buf.nbytes) == (100, 100, 100)
        with SharedMemory.open(key) as other, SharedMemory.create_or_open(key, 50) as third:
            assert (other.id, third.id, other.size, third.size) == (one.id, one.id, 100, 100)
            assert one.attach_count == 3
        for make in (lambda: SharedMemory.create(key, 100), lambda: SharedMemory(key, CREATE | EXCLUSIVE, size=100)):
            with pytest.raises(FileExistsError):
                make()
        with pytest.raises(OSError, match="key's is smaller") as caught:
            SharedMemory(key, size=101)
        assert caught.value.errno == errno.EINVAL
        SharedMemory.unlink(key)
    with pytest.raises(FileNotFoundError, match="no shared memory has this id"):
        SharedMemory.from_id(one.id)
    with SharedMemory.create(None, 1, owner=True) as made_up:
        assert SharedMemory.open(made_up.key, attach=False).id == made_up.id
    for size in (0, -1):
        with pytest.raises((OSError, ValueError), match="1"):
            SharedMemory.create(PRIVATE, size)


def test_views_share_and_hold_the_memory(memory: SharedMemory) -> None:
    with SharedMemory.open(memory.key) as other:
        memory.buf[990:1000] = b"0123456789"
        view = other.buf
        assert bytes(view[995:]) == b"56789"
        for end in (other.detach, other.close):
            with pytest.raises(BufferError, match="in use"):
                end()
        assert other.attached and not other.closed
        view.release()
        other.detach()
        assert not other.attached and other.address == 0 and memory.attach_count == 1
        other.detach()
        with pytest.raises(BufferError, match="not attached"):
            other.buf  # noqa: B018
        other.attach()
        assert other.address and bytes(other.buf[990:]) == b"0123456789"
        with pytest.raises(ValueError, match="already"):
            other.attach()
    with pytest.raises(ValueError, match="closed"):
        other.attach()


def test_a_view_outlives_the_reference(memory: SharedMemory) -> None:
    view = SharedMemory.open(memory.key).buf
    memory.buf[0] = 7
    gc.collect()
    assert view[0] == 7
    with pytest.warns(ResourceWarning, match="was not closed"):
        view.release()
    assert memory.attach_count == 1


def test_read_only_memory_refuses_to_be_written(memory: SharedMemory) -> None:
    with SharedMemory.open(memory.key, readonly=True) as reader:
        memory.buf[:3] = b"abc"
        assert reader.readonly and reader.buf.readonly and bytes(reader.buf[:3]) == b"abc"
        with pytest.raises(TypeError):
            reader.buf[0] = 1


def test_numpy_sees_it_without_a_copy(memory: SharedMemory) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.frombuffer(memory, dtype="i4")
    array[1] = 258
    assert bytes(memory.buf[4:8]) == b"\x02\x01\x00\x00"
    with pytest.raises(BufferError):
        memory.close()
    del array


def test_status(memory: SharedMemory) -> None:
    status = memory.stat()
    assert (status.key, status.uid, status.mode, status.size) == (memory.key, os.geteuid(), 0o600, 1000)
    assert (status.creator_pid, status.last_pid) == (os.getpid(), os.getpid())
    assert status.attached == 1 and not status.removed
    memory.set(mode=0o640)
    assert memory.stat().mode == 0o640


def test_removed_memory_lives_until_the_last_detach(memory: SharedMemory) -> None:
    memory.remove()
    assert memory.stat().removed
    memory.buf[0] = 1
    with SharedMemory.from_id(memory.id) as late:
        assert late.buf[0] == 1, "Linux lets it be attached by id still"
    with pytest.raises(FileNotFoundError):
        SharedMemory.open(memory.key)
    memory.detach()
    for call in (memory.stat, memory.attach, memory.remove):
        with pytest.raises(OSError, match="has been removed") as caught:
            call()
        assert caught.value.errno == errno.EIDRM


def test_an_address_may_be_asked_for(memory: SharedMemory) -> None:
    with SharedMemory.open(memory.key) as other:
        free = other.address
        other.detach()
        other.attach(address=free + 5)
        assert other.address == free, "rounded down"
        other.detach()
        with pytest.raises(OSError, match="something else is at the address"):
            other.attach(address=memory.address)


@pytest.mark.processes
def test_a_c_program_shares_the_memory(memory: SharedMemory) -> None:
    memory.buf[10:16] = b"Python"
    assert c("shm", memory.key, 10, "from C") == "Python"
    assert bytes(memory.buf[10:16]) == b"from C"


@pytest.mark.processes
def test_fork_shares_and_pickle_attaches(memory: SharedMemory) -> None:
    children.run("""
        import os, sys
        from anywire.ipc.sysv import SharedMemory
        memory = SharedMemory.from_id(int(sys.argv[1]))
        assert memory.attach_count == 2
        pid = os.fork()
        if pid == 0:
            assert memory.attach_count == 3
            memory.buf[0] = 9
        else:
            assert os.waitpid(pid, 0)[1] == 0
            assert memory.buf[0] == 9 and memory.attach_count == 2
        memory.close()
    """, str(memory.id))
    assert memory.buf[0] == 9 and memory.attach_count == 1 and not memory.stat().removed
    with pickle.loads(pickle.dumps(memory)) as copy:
        assert copy.buf[0] == 9 and not copy.readonly and not copy.owner
    with SharedMemory.open(memory.key, readonly=True) as reader, pickle.loads(pickle.dumps(reader)) as copy:
        assert copy.readonly


def test_an_owner_that_is_forgotten_removes_and_warns() -> None:
    memory: SharedMemory | None = SharedMemory.create(PRIVATE, 10, owner=True)
    assert memory is not None
    ident = memory.id
    with pytest.warns(ResourceWarning, match="an owner, was not closed"):
        memory = None
    with pytest.raises(FileNotFoundError):
        SharedMemory.from_id(ident)


@pytest.mark.processes
def test_a_killed_process_has_detached(memory: SharedMemory) -> None:
    program = """
        import sys
        from anywire.ipc.sysv import SharedMemory
        memory = SharedMemory.from_id(int(sys.argv[1]))
        print("attached", flush=True)
        sys.stdin.read()
    """
    with children.started(program, str(memory.id)) as process:
        assert children.line(process) == "attached"
        assert memory.attach_count == 2
        process.kill()
        process.wait()
    assert memory.attach_count == 1


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_mode_decides() -> None:
    program = """
        import sys
        from anywire.ipc.sysv import SharedMemory
        for readonly in (False, True):
            try:
                with SharedMemory.open(int(sys.argv[1]), readonly=readonly) as memory:
                    print(memory.buf[0])
            except PermissionError as error:
                print(error.filename is not None)
    """
    for mode, expected in ((0o600, ["True", "True"]), (0o604, ["True", "5"]), (0o606, ["5", "5"])):
        with SharedMemory.create(some_key(), 10, mode, owner=True) as memory:
            memory.buf[0] = 5
            assert children.run(program, str(memory.key), user=NOBODY).split() == expected


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="makes an IPC namespace")
def test_the_limits_are_named() -> None:
    said = children.run(NAMESPACE + """
        limit("shmmax", 8192)
        limit("shmmni", 1)
        def tell(size):
            try:
                SharedMemory.create(None, size, attach=False)
            except OSError as error:
                print(error)
        tell(8193)
        tell(8192)
        tell(1)
        limit("shmmni", 10)
        limit("shmall", 2)
        tell(1)
    """).splitlines()
    assert len(said) == 3
    assert "kernel.shmmax is 8192; raise it: sysctl -w kernel.shmmax=" in said[0]
    assert "kernel.shmmni is 1" in said[1] and "kernel.shmall is 2" in said[2]


def test_huge_pages_are_given_or_refused_with_the_reason() -> None:
    try:
        memory = SharedMemory.create(PRIVATE, 2 << 20, flags=HUGE, owner=True)
    except OSError as error:
        assert "huge" in str(error)
    else:
        memory.close()
