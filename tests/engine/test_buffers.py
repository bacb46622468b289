"""Buffers against bytearray, on real descriptors: every mixture of appending, filling, draining, taking and finding."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anywire.engine import BlockPool, Buffer


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


PIECES = st.binary(max_size=40) | st.integers(0, 30_000).map(lambda n: bytes(i * n & 0xFF for i in range(n)))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), PIECES),
        st.tuples(st.just("append a bytearray"), PIECES),
        st.tuples(st.just("fill"), PIECES),
        st.tuples(st.just("drain"), st.integers(1, 50_000)),
        st.tuples(st.just("take"), st.integers(0, 50_000)),
        st.tuples(st.just("peek"), st.integers(0, 50_000)),
        st.tuples(st.just("skip"), st.integers(0, 50_000)),
        st.tuples(st.just("find"), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("find what is here"), st.integers(0, 50_000)),
        st.tuples(st.just("move"), PIECES),
    ),
    max_size=25,
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([1, 3, 64, 4096, 16384]), STEPS)
def test_like_a_bytearray(block_size, steps) -> None:
    pool = BlockPool(block_size, 4)
    buffer, model = Buffer(pool), bytearray()
    reading, writing = os.pipe2(os.O_NONBLOCK)
    drained, drain = os.pipe2(os.O_NONBLOCK)
    try:
        for step, value in steps:
            if step == "append":
                buffer.append(value)
                model += value
            elif step == "append a bytearray":
                changing = bytearray(value)
                buffer.append(changing)
                model += value
                changing[:] = bytes(len(changing))  # what the caller does with it afterwards is its affair
                changing.extend(b"not locked")
            elif step == "fill":
                os.write(writing, value) if value else None
                got = bytearray()
                while (n := buffer.fill(reading)) is not None:
                    got += value[len(got) : len(got) + n]
                assert got == value
                model += value
            elif step == "drain":
                n = buffer.drain(drain, value)
                assert n == min(value, len(model))
                assert (os.read(drained, n) if n else b"") == model[:n]
                del model[:n]
            elif step == "take":
                assert buffer.take(value) == model[:value]
                del model[:value]
            elif step == "peek":
                assert buffer.peek(value) == model[:value]
            elif step == "skip" and value <= len(model):
                buffer.skip(value)
                del model[:value]
            elif step == "find":
                assert buffer.find(value) == model.find(value)
                start = len(model) // 2
                assert buffer.find(value, start) == model.find(value, start)
            elif step == "find what is here" and model:
                at = value % len(model)
                part = bytes(model[at : at + 1 + value % 9])
                assert buffer.find(part) == model.find(part)
                assert buffer.find(part, at) == at
            elif step == "move":
                other = Buffer(pool)
                other.append(value)
                buffer.move(other)
                model += value
                assert len(other) == 0 and other.take() == b""
            assert len(buffer) == len(model)
        assert buffer.peek() == model
        assert buffer.take() == model
        assert pool.used <= 1, "an empty buffer keeps one block at most"
        del buffer
        with contextlib.suppress(UnboundLocalError, NameError):
            del other
        assert pool.used == 0 and pool.free_count <= 4
    finally:
        for end in (reading, writing, drained, drain):
            os.close(end)


@pytest.mark.parametrize("room", range(1, 14))
def test_a_write_that_stops_at_any_byte(room) -> None:
    """Three pieces, one of them empty, one by reference; the kernel takes `room` bytes at a time."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    buffer = Buffer(BlockPool(4))
    for piece in (b"abcde", b"", memoryview(b"fgh"), b"ijklm"):
        buffer.append(piece)
    got = b""
    while buffer:
        assert buffer.drain(writing, room) == min(room, 13 - len(got))
        got += os.read(reading, 100)
    assert got == b"abcdefghijklm"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64])
def test_finding_across_blocks(block_size) -> None:
    buffer = Buffer(BlockPool(block_size))
    content = b"aab\raab\r\naaab" * 9
    buffer.append(b"cut off" + content)
    buffer.skip(7)
    for start in range(len(content)):
        for length in (1, 2, 3, 8):
            part = content[start : start + length]
            assert buffer.find(part) == content.find(part)
            assert buffer.find(part, start) == start
        assert buffer.find(b"\r\n\r", start) == -1


def test_more_pieces_than_the_kernel_takes(pair) -> None:
    """IOV_MAX is 1024."""
    a, b = pair
    pool = BlockPool(1)
    buffer = Buffer(pool)
    buffer.append(bytes(range(256)) * 16)
    assert pool.used == 4096 > os.sysconf("SC_IOV_MAX")
    got = b""
    while buffer:
        buffer.drain(a.fileno())
        got += b.recv(10_000)
    assert got == bytes(range(256)) * 16


def test_full_and_empty(pair) -> None:
    a, b = pair
    buffer = Buffer()
    assert buffer.drain(a.fileno()) == 0, "nothing was here"
    assert buffer.fill(a.fileno()) is None, "nothing is here yet"
    buffer.append(bytes(10_000_000))
    first = buffer.drain(a.fileno())
    assert first and buffer.drain(a.fileno()) is None and len(buffer) == 10_000_000 - first
    b.close()
    with pytest.raises(OSError, match=f"descriptor {a.fileno()}") as caught:
        buffer.drain(a.fileno())
    assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)
    with pytest.raises(ValueError, match="look like the end"):
        buffer.fill(a.fileno(), 0)


def test_the_end(pair) -> None:
    a, b = pair
    b.send(b"last")
    b.close()
    buffer = Buffer()
    assert (buffer.fill(a.fileno()), buffer.fill(a.fileno()), buffer.take()) == (4, 0, b"last")


@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_a_write_after_the_end_is_an_error_and_no_signal(kind) -> None:
    """With SIGPIPE's default action, which Python turns off and some programs turn on again. A SIGPIPE that waited
    before still waits afterwards."""
    code = f"""
import os, signal, socket
from anywire.engine import Buffer
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if {kind!r} == "socket":
    a, b = socket.socketpair()
    a.shutdown(socket.SHUT_WR)
    fd = a.fileno()
else:
    reading, fd = os.pipe()
    os.close(reading)
buffer = Buffer()
buffer.append(b"x")
for _ in range(2):
    try:
        buffer.drain(fd)
    except BrokenPipeError as error:
        print("EPIPE", len(buffer))
print(signal.SIGPIPE in signal.sigpending(), signal.SIGPIPE in signal.pthread_sigmask(signal.SIG_BLOCK, []))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
os.kill(os.getpid(), signal.SIGPIPE)
try:
    buffer.drain(fd)
except BrokenPipeError:
    print(signal.SIGPIPE in signal.sigpending())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.split("\n"), done.stderr) == (
        0, ["EPIPE 1", "EPIPE 1", "False False", "True", ""], "",
    )


def test_old_bytes_stay_where_they_are() -> None:
    """What is large and can't change is referred to, and comes out as the same object."""
    large, buffer = bytes(100_000), Buffer()
    before = sys.getrefcount(large)
    buffer.append(large)
    assert sys.getrefcount(large) == before + 1
    buffer.append(b"more")
    assert buffer.take(100_000) is large
    assert buffer.take() == b"more"
    buffer.append(large)
    buffer.take(1)
    del buffer
    assert sys.getrefcount(large) == before


def test_the_window_grows_and_shrinks(pair) -> None:
    """One block for those that say little; the whole for those that flood."""
    a, b = pair
    a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    b.send(bytes(180_000))
    buffer, sizes = Buffer(), []
    while (n := buffer.fill(a.fileno())) is not None:
        sizes.append(n)
    assert sizes[0] == 16384 and max(sizes) >= 4 * 16384 and sum(sizes) == 180_000
    used = buffer.pool.used
    b.send(b"x")
    buffer.fill(a.fileno())
    assert buffer.pool.used <= used + 1, "empty blocks went back"


def test_in_a_cycle() -> None:
    """The collector clears objects of a cycle before they are destroyed; blocks go back all the same."""
    class Owner:
        pass

    pool = BlockPool()
    owner = Owner()
    owner.buffer, owner.owner = Buffer(pool), owner  # type: ignore[attr-defined]
    owner.buffer.append(bytes(100))  # type: ignore[attr-defined]
    assert pool.used == 1
    del owner
    gc.collect()
    assert pool.used == 0


def test_wrong_arguments() -> None:
    buffer = Buffer()
    buffer.append(b"abc")
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"{count} bytes of 3"):
            buffer.skip(count)
    with pytest.raises(ValueError, match="look for"):
        buffer.find(b"")
    with pytest.raises(TypeError):
        buffer.append("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different pools"):
        buffer.move(Buffer(BlockPool()))
    with pytest.raises(ValueError, match="above 0"):
        BlockPool(0)
    buffer.move(buffer)
    assert buffer.take(-1) == b"" and buffer.take() == b"abc"
    with pytest.raises(OSError, match="descriptor 999") as caught:
        buffer.fill(999)
    assert caught.value.errno == errno.EBADF
