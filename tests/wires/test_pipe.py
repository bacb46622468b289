"""Anonymous pipes, between real processes of each kind. The conformance suite holds them to the rest."""

import asyncio
import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pipe_children
import pytest

import anywire
from anywire import sync


def open_fds():
    """What is open here, without the descriptor that looks and what only garbage holds."""
    gc.collect()
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def open_pipes(pid="self"):
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {link for link in links if link.startswith("pipe:")}


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """What a process opens once and keeps (the counters' page) is none of a test's leaks."""
    for end in both():
        end.abort()


def both(**options):
    """Both ends of a pipe, attached in this process by two threads."""
    ours, theirs = anywire.pipe(**options)
    made = []
    thread = threading.Thread(target=lambda: made.append(sync.attach(theirs)))
    thread.start()
    channel = sync.attach(ours)
    thread.join()
    return channel, made[0]


ECHO = """
import sys
from anywire import sync
with sync.connect(sys.argv[1]) as channel:
    for message in channel:
        channel.send(message)
"""

ASYNC_SERVER = """
import asyncio, sys
import anywire

async def echo(channel):
    async for message in channel:
        await channel.send(message)
    done.set_result(None)

async def main():
    global done
    done = asyncio.get_running_loop().create_future()
    async with anywire.serve(echo, sys.argv[1]):
        await done

asyncio.run(main())
"""


def popen(code, handle, *arguments, **options):
    """A child that gets the handle; the handle is closed here."""
    with handle:
        return subprocess.Popen(
            [sys.executable, "-c", code, handle.address, *map(str, arguments)], pass_fds=handle.fds, **options
        )


# --- children -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [ECHO, ASYNC_SERVER], ids=["connects", "serves"])
def test_a_subprocess_gets_the_descriptors_by_number(code):
    before = open_fds()
    ours, theirs = anywire.pipe()
    child = popen(code, theirs)
    with sync.attach(ours) as channel:
        for message in (b"", b"x", b"y" * 300_000):
            channel.send(message)
            assert channel.recv() == message
    assert child.wait(20) == 0
    assert open_fds() == before


@pytest.mark.parametrize("code", [ECHO, ASYNC_SERVER], ids=["connects", "serves"])
def test_a_subprocess_from_a_coroutine(code):
    async def main():
        ours, theirs = anywire.pipe()
        child = popen(code, theirs)
        async with anywire.attach(ours) as channel:
            await channel.send_many([b"%d" % i for i in range(5000)])
            assert [await channel.recv() for _ in range(5000)] == [b"%d" % i for i in range(5000)]
            assert channel.unconfirmed <= 5000
            assert channel.peer.wire == "pipe"
        return child

    before = open_fds()
    assert asyncio.run(main()).wait(20) == 0
    assert open_fds() == before


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_multiprocessing_child_gets_the_handle_as_argument(method):
    context = multiprocessing.get_context(method)
    ours, theirs = anywire.pipe()
    child = context.Process(target=pipe_children.echo, args=(theirs,))
    child.start()
    theirs.close()
    with sync.attach(ours) as channel:
        channel.send(b"hello")
        assert channel.recv(timeout=30) == b"hello"
        assert str(channel.address).startswith("pipe:?read=")
    child.join(20)
    assert child.exitcode == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_one_way_to_a_child(method, tmp_path):
    context = multiprocessing.get_context(method)
    ours, theirs = anywire.pipe(duplex=False)
    child = context.Process(target=pipe_children.collect, args=(theirs, tmp_path / "out"))
    child.start()
    theirs.close()
    with sync.attach(ours) as channel:
        channel.send_many([b"a", b"b" * 100_000])
        with pytest.raises(anywire.Unsupported, match="can only send"):
            channel.recv()
        assert channel.unconfirmed == 2  # nothing comes back on one way
    child.join(20)
    assert (tmp_path / "out").read_bytes() == b"a\n" + b"b" * 100_000 + b"\nend\n"


def test_a_foreign_program_reads_bytes():
    ours, theirs = anywire.pipe(duplex=False, stream=True)
    with theirs:
        child = subprocess.Popen(["wc", "-c"], stdin=theirs.fds[0], stdout=subprocess.PIPE)
    with sync.attach(ours) as stream:
        stream.write(b"x" * 200_000)
    assert child.communicate(timeout=20)[0].strip() == b"200000"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_kill_9_of_the_child_is_told_with_what_may_be_missing(method):
    context = multiprocessing.get_context(method)
    ours, theirs = anywire.pipe()
    child = context.Process(target=pipe_children.hang, args=(theirs,))
    child.start()
    theirs.close()
    channel = sync.attach(ours)
    pid = int(channel.recv(timeout=30))
    assert pid == child.pid
    channel.send(b"one")
    channel.send(b"two")
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(anywire.PeerLost) as caught:
        channel.recv(timeout=30)
    assert time.monotonic() - started < 5
    assert caught.value.unconfirmed == 2
    with pytest.raises(anywire.PeerLost):
        channel.close()
    child.join(20)


@pytest.mark.parametrize("stream", [False, True], ids=["handle", "attached"])
def test_a_forked_child_sees_the_parents_death(tmp_path, stream):
    """It inherits the parent's ends too; while it kept them open, its own end would never be over."""
    out = tmp_path / "out"
    parent = os.fork()
    if parent == 0:
        ours, theirs = anywire.pipe(stream=stream)
        if stream:
            end = sync.attach(ours)
        child = multiprocessing.get_context("fork").Process(target=pipe_children.leave_with_parent, args=(theirs, out))
        child.start()
        theirs.close()
        if not stream:
            end = sync.attach(ours)
        end.read_exactly(5) if stream else end.recv()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert out.read_text() == ("read b''" if stream else "PeerLost")


@pytest.mark.no_sanitize  # forks beside other threads: gcc's ASan may hold its allocator's lock at that moment
def test_an_open_channel_refuses_in_a_forked_child_and_holds_nothing_there():
    ours, theirs = both()
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in (ours.endpoint.read_fd, ours.endpoint.write_fd)}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert not mine & open_pipes()
            with pytest.raises(anywire.Forked):
                ours.send(b"x")
            ours.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    ours.send(b"still here")
    assert theirs.recv() == b"still here"
    ours.abort()
    theirs.abort()


def test_a_grandchild_does_not_inherit_the_descriptors():
    code = """
import subprocess, sys
from anywire import sync
with sync.connect(sys.argv[1]) as channel:
    grandchild = subprocess.Popen(["sleep", "60"], close_fds=False)
    channel.send(str(grandchild.pid).encode())
"""
    ours, theirs = anywire.pipe()
    child = popen(code, theirs)
    with sync.attach(ours) as channel:
        grandchild = int(channel.recv(timeout=30))
        try:
            with pytest.raises(anywire.EndOfChannel):
                channel.recv(timeout=30)
            assert not open_pipes(grandchild) & open_pipes()
        finally:
            os.kill(grandchild, signal.SIGKILL)
    child.wait(20)


# --- what it promises -----------------------------------------------------------------------------------------------


def test_traits_address_and_counters():
    ours, theirs = both()
    with ours, theirs:
        traits = ours.traits
        assert traits.kind == {"stream"}
        assert traits.cells() == {
            "kind": "stream",
            "connection": "yes",
            "ordered": "yes",
            "reliable": "yes",
            "clean_end": "yes (framed)",
            "sees_death": "at once",
            "half_close": "yes",
            "crosses_hosts": "no",
            "credentials": "inherited",
            "copies": "2",
            "message_limit": "configured",
        }
        ours.send(b"four")
        assert theirs.recv() == b"four"
        assert ours.stats().messages_sent == theirs.stats().messages_received == 1
        threading.Thread(target=theirs.close).start()
    assert ours.closed and theirs.closed


def test_half_close_leaves_the_other_direction():
    ours, theirs = both()
    ours.send(b"last")
    ours.send_eof()
    assert list(theirs) == [b"last"]
    theirs.send(b"answer")
    assert ours.recv() == b"answer"
    ours.abort()
    theirs.abort()


def test_half_close_of_a_stream_closes_the_write_end():
    ours, theirs = both(stream=True)
    ours.write(b"abc")
    ours.write_eof()
    assert theirs.read_exactly(3) == b"abc"
    assert theirs.read() == b""
    theirs.write(b"def")
    assert ours.read_exactly(3) == b"def"
    with pytest.raises(anywire.ChannelClosed):
        ours.write(b"x")
    ours.close()
    theirs.close()


def test_half_close_of_an_async_stream_while_others_queue():
    async def main():
        one, other = anywire.pipe(stream=True)
        ours, theirs = await anywire.attach(one), await anywire.attach(other)
        full = asyncio.create_task(ours.write(b"x" * 500_000))
        await asyncio.sleep(0)
        end = asyncio.create_task(ours.write_eof())
        late = asyncio.create_task(ours.write(b"late"))
        got = b""
        async for chunk in theirs:
            got += chunk
        assert got == b"x" * 500_000
        await full
        await end
        with pytest.raises(anywire.ChannelClosed):
            await late
        await theirs.write(b"back")
        assert await ours.read_exactly(4) == b"back"
        await ours.close()
        await theirs.close()

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


@pytest.mark.parametrize("way", ["recv", "send"])
def test_abort_wakes_threads_that_wait(way):
    ours, theirs = both()
    waiting = threading.Event()
    caught = []

    def wait():
        try:
            if way == "recv":
                waiting.set()
                ours.recv()
            else:
                while True:
                    if ours.stats().send_waits:
                        waiting.set()
                    ours.send(b"x" * 100_000)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not (waiting.is_set() if way == "recv" else ours.stats().send_waits):
        time.sleep(0.001)
    ours.abort()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(caught[0], anywire.ChannelClosed)
    theirs.abort()


def test_a_slow_reader_slows_the_writer_and_nothing_is_lost():
    ours, theirs = both()
    sent = []

    def send():
        for i in range(400):
            ours.send(b"%06d" % i * 1000)
            sent.append(i)

    thread = threading.Thread(target=send)
    thread.start()
    while not ours.stats().send_waits:
        time.sleep(0.001)
    assert len(sent) < 100
    for i in range(400):
        assert theirs.recv(timeout=20) == b"%06d" % i * 1000
    thread.join(20)
    ours.abort()
    theirs.abort()


def test_cancelled_operations_lose_nothing():
    async def main():
        one, other = anywire.pipe()
        ours, theirs = await asyncio.gather(anywire.attach(one), anywire.attach(other))

        async def send():
            for i in range(300):
                await ours.send(b"%06d" % i * 2000)

        sending = asyncio.create_task(send())
        got = []
        while len(got) < 300:
            task = asyncio.create_task(theirs.recv())
            await asyncio.sleep(0)
            task.cancel()
            try:
                got.append(await task)
            except asyncio.CancelledError:
                got.append(await theirs.recv())
        assert got == [b"%06d" % i * 2000 for i in range(300)]
        await sending
        stuck = asyncio.create_task(ours.send(b"z" * 1_000_000))
        await asyncio.sleep(0)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        sender = asyncio.create_task(ours.send(b"after"))
        first = await theirs.recv()
        assert first in (b"z" * 1_000_000, b"after")
        if first != b"after":
            assert await theirs.recv() == b"after"
        await sender
        await asyncio.gather(ours.close(), theirs.close())

    asyncio.run(main())


def test_a_thousand_times_leaves_nothing():
    before = open_fds()
    for i in range(300):
        ours, theirs = both()
        ours.send(b"x")
        assert theirs.recv() == b"x"
        (ours.abort if i % 2 else theirs.abort)()
        with pytest.raises(anywire.PeerLost):
            (theirs if i % 2 else ours).recv()
        ours.abort()
        theirs.abort()
    assert open_fds() == before


# --- what can go wrong ----------------------------------------------------------------------------------------------


def test_addresses_point_at_the_bad_part():
    for address, why in (
        ("pipe:", "name the inherited descriptors"),
        ("pipe:?read=3&write=3", "two ways need two descriptors"),
        ("pipe:?read=x", "whole number"),
        ("pipe:?raed=3", "did you mean 'read'"),
        ("pipe://host?read=3", "host"),
    ):
        with pytest.raises(anywire.AddressError, match=why):
            sync.connect(address)


def test_descriptors_that_are_no_pipe_end_of_that_direction(tmp_path):
    read, write = os.pipe()
    try:
        with open(tmp_path / "file", "w") as file:
            wrong = [
                (f"pipe:?read={write}", "is the write end"),
                (f"pipe:?write={read}", "is the read end"),
                (f"pipe:?read={file.fileno()}", "is no pipe"),
                ("pipe:?read=9999", "pass_fds"),
            ]
            for address, why in wrong:
                for call in (sync.connect, sync.connect_stream, sync.listen):
                    with pytest.raises(OSError, match=why) as caught:
                        call(address)
                    assert caught.value.errno == errno.EBADF
        os.fstat(read)  # what was refused stays the caller's
        os.fstat(write)
    finally:
        os.close(read)
        os.close(write)


def test_the_other_end_was_closed_before_it_said_anything():
    ours, theirs = anywire.pipe()
    theirs.close()
    before = open_fds()
    with pytest.raises((anywire.PeerLost, BrokenPipeError)):
        sync.attach(ours)
    gc.collect()
    assert len(open_fds()) == len(before) - 2


def test_silence_is_told():
    ours, theirs = anywire.pipe()
    with pytest.raises(anywire.TimedOut, match="preamble"):
        sync.attach(ours, timeout=0.05)
    theirs.close()


def test_garbage_is_shown():
    ours, theirs = anywire.pipe()
    os.write(theirs.fds[1], b"GET / HTTP/1.1\r\n\r\n" + bytes(16))
    with pytest.raises(anywire.BadFrame, match="GET"):
        sync.attach(ours)
    theirs.close()


def test_a_handle_is_used_once_and_pickles_only_for_a_child():
    import pickle

    ours, theirs = anywire.pipe(stream=True)
    stream = sync.attach(ours)
    with pytest.raises(ValueError, match="before"):
        sync.attach(ours)
    with pytest.raises(TypeError, match="send_fds"):
        pickle.dumps(theirs)
    theirs.close()
    theirs.close()
    stream.close()
    with pytest.warns(ResourceWarning, match="never attached"):
        anywire.pipe()


def test_a_listener_that_nobody_used_gives_the_descriptors_back():
    ours, theirs = anywire.pipe()
    fds = {str(fd) for fd in theirs.take()}
    before = open_fds() - fds
    listener = sync.listen(theirs.address)
    with pytest.raises(anywire.TimedOut):
        assert listener.accept(timeout=0.01) is listener
    listener.close()
    listener.close()
    assert open_fds() == before
    ours.close()


# --- moving ---------------------------------------------------------------------------------------------------------

TAKER = """
import sys
import anywire
from anywire import sync
with sync.connect(sys.argv[1]) as control:
    packed, fds = control.recv_fds()
    with sync.attach(anywire.Handle.unpack(packed, fds)) as channel:
        for message in channel:
            channel.send(message.upper())
"""


def test_an_open_channel_moves_to_another_process(tmp_path):
    ours, theirs = both()
    ours.send(b"one")
    ours.send(b"two")
    assert theirs.recv() == b"one"
    control = f"unix://{tmp_path}/control"
    with sync.listen(control) as listener:
        child = subprocess.Popen([sys.executable, "-c", TAKER, control])
        with listener.accept(timeout=30) as channel:
            handle = theirs.detach()
            channel.send_fds(handle.fds, handle.pack())
            handle.close()
            assert ours.recv(timeout=30) == b"TWO"
            ours.close()
    assert child.wait(20) == 0


# --- one peer, once ---------------------------------------------------------------------------------------------------


def listening_pipe():
    """(the address of a pipe to listen on, the peer's read end, the peer's write end)"""
    to_us, from_them = os.pipe()
    to_them, from_us = os.pipe()
    return f"pipe:?read={to_us}&write={from_us}", to_them, from_them


@pytest.mark.parametrize("front", ["async", "blocking"])
def test_accept_ends_when_the_only_peer_failed(front):
    """No second peer can come through a pipe, so waiting for one would be for ever."""
    address, read, write = listening_pipe()
    os.write(write, b"what is this? no preamble")

    async def on_a_loop():
        async with anywire.listen(address) as listener:
            await listener.accept(timeout=20)

    with pytest.raises(anywire.ChannelClosed, match="nobody else can come"):
        if front == "async":
            asyncio.run(on_a_loop())
        else:
            with sync.listen(address) as listener:
                listener.accept(timeout=20)
    os.close(read)
    os.close(write)


def test_a_server_of_one_pipe_serves_until_it_is_closed():
    """That nobody else can come ends accepting, not the server."""
    address, read, write = listening_pipe()

    async def main():
        done = asyncio.Event()

        async def echo(channel):
            async for message in channel:
                await channel.send(message)
            done.set()

        server = anywire.serve(echo, address)
        serving = asyncio.create_task(server.serve_forever())
        async with await anywire.connect(f"pipe:?read={read}&write={write}") as channel:
            for _ in range(3):
                await channel.send(b"x")
                assert await channel.recv(timeout=20) == b"x"
            assert not serving.done()
        await asyncio.wait_for(done.wait(), 20)
        assert not serving.done()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    asyncio.run(main())


def test_an_attach_that_fails_leaves_no_descriptor():
    """Out of descriptors, who is at the other end of a Unix socket can't be asked: the socket must not stay open."""
    import resource
    import socket as sockets

    for how in ("unix", "packet"):
        kind = sockets.SOCK_SEQPACKET if how == "packet" else sockets.SOCK_STREAM
        one, two = sockets.socketpair(sockets.AF_UNIX, kind)
        handle = anywire.Handle("channel", "channel", how, "unix:/nowhere", [one.detach()], {"max_message": 1000})
        number = handle.fds[0]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            with pytest.raises(OSError):
                sync.attach(handle)
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not os.path.exists(f"/proc/self/fd/{number}")
        two.close()
