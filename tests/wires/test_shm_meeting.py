"""How two sides of `shm://` meet: who may, what each checks before it maps the other's memory, what refusals say."""

import asyncio
import contextlib
import itertools
import logging
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
import shm_peer as raw

import anywire
from anywire import sync

KIB, MIB = 1 << 10, 1 << 20
_names = itertools.count()


def unique(scheme="shm"):
    return f"{scheme}://anywire-meet-{os.getpid()}-{next(_names)}"


@contextlib.contextmanager
def accepting(address, **options):
    """A listener with a thread in accept; gives the list of what it got."""
    got = []
    with sync.listen(address, pool="1MiB", **options) as listener:

        def accept():
            with contextlib.suppress(anywire.ChannelClosed):
                while True:
                    got.append(listener.accept())

        thread = threading.Thread(target=accept)
        thread.start()
        until(lambda: in_kernel(thread.native_id))
        try:
            yield got
        finally:
            listener.close()
            thread.join(30)
            assert not thread.is_alive()
            for channel in got:
                channel.abort()


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def in_kernel(tid):
    """Whether a thread sleeps: it is in accept, and has all the descriptors that it needs there."""
    with open(f"/proc/{tid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def back_to(before):
    """The other thread of this process closes what it has in its own time."""
    until(lambda: open_fds() <= before)


def until(condition):
    while not condition():
        time.sleep(0.001)


def refusal(sock):
    flags, extensions, fds = raw.read_preamble(sock)
    assert flags & 1 and not fds
    return extensions[1].decode()


# --- what the listening side checks -----------------------------------------------------------------------------------

WRONG = {
    "no seals on the data": ({"data_seals": 0}, {}, "data memory has seals 0x0 and needs"),
    "data that may shrink": ({"data_seals": raw.DATA_SEALS & ~raw.SHRINK}, {}, "data memory has seals"),
    "data that may grow": ({"data_seals": raw.DATA_SEALS & ~raw.GROW}, {}, "data memory has seals"),
    "data that others may write": ({"data_seals": raw.DATA_SEALS & ~raw.FUTURE_WRITE}, {}, "data memory has seals"),
    "seals that may be added": ({"data_seals": raw.DATA_SEALS & ~raw.SEAL}, {}, "data memory has seals"),
    "no seals on the control page": ({"control_seals": 0}, {}, "control memory has seals 0x0"),
    "data too short": ({"data_size": MIB}, {}, "data memory has 1048576 bytes and announced 1114112"),
    "another magic": ({"magic": 1}, {}, "not what it announced"),
    "another version inside": ({"version": 9}, {}, "not what it announced"),
    "a nonce that does not match": ({"nonce_there": 5}, {}, "not what it announced"),
    "another layout": ({}, {"version": 2}, "layout 2, ours 1"),
    "a ring that is no power of two": ({}, {"ring": 65535}, "make no sense"),
    "a ring of nothing": ({}, {"ring": 0}, "make no sense"),
    "a ring too large": ({}, {"ring": 1 << 31}, "make no sense"),
    "a pool too large": ({}, {"pool": 1 << 41}, "make no sense"),
    "half a page of pool": ({}, {"pool": MIB + 2048}, "make no sense"),
}


@pytest.mark.parametrize("what", WRONG)
def test_memory_that_is_not_right_is_refused_with_the_reason(what):
    memory, hello, reason = WRONG[what]
    address = unique()
    with accepting(address) as got:
        before = open_fds()
        ours = raw.Memories(**memory)
        with raw.dial(address) as sock:
            socket.send_fds(sock, [raw.preamble({2: ours.hello(**hello)})], ours.fds)
            assert reason in refusal(sock)
            assert sock.recv(1) == b""
        ours.close()
        back_to(before)
        assert got == []


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_another_number_of_descriptors_is_refused(count):
    address = unique()
    with accepting(address):
        before = open_fds()
        ours = raw.Memories()
        with raw.dial(address) as sock:
            fds = (ours.fds * 4)[:count]
            if fds:
                socket.send_fds(sock, [raw.preamble({2: ours.hello()})], fds)
            else:
                sock.sendall(raw.preamble({2: ours.hello()}))
            assert f"{count} descriptors of its memory came, not 2" in refusal(sock)
        ours.close()
        back_to(before)


def test_a_flood_of_descriptors_is_dropped():
    address = unique()
    with accepting(address):
        before = open_fds()
        with raw.dial(address) as sock, open(os.devnull) as null, contextlib.suppress(ConnectionError):
            for byte in raw.preamble({2: bytes(60000)}):
                socket.send_fds(sock, [bytes([byte])], [null.fileno()] * 8)
            while sock.recv(100):
                pass
        back_to(before)


def test_descriptors_that_are_no_memory_are_refused():
    address = unique()
    with accepting(address), raw.dial(address) as sock, open("/etc/passwd") as file:
        ours = raw.Memories()
        socket.send_fds(sock, [raw.preamble({2: ours.hello()})], [file.fileno(), ours.fds[1]])
        assert "no memfd" in refusal(sock)
        ours.close()


def test_a_peer_of_another_wire_is_told():
    """A framed peer, which has no memory, and one that sends no preamble at all."""
    address = unique()
    with accepting(address), raw.dial(address) as sock:
        sock.sendall(raw.preamble({}))
        assert "speaks no shared memory" in refusal(sock)
    with accepting(address), raw.dial(address) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert sock.recv(100) == b""


@pytest.mark.parametrize("byte", [b"", b"\x89any", raw.preamble({2: bytes(100)})[:40]])
def test_silence_is_dropped_after_the_handshake_timeout_and_delays_nobody(byte):
    address = unique()
    with accepting(address, handshake_timeout=0.2) as got, raw.dial(address) as silent:
        silent.sendall(byte)
        with sync.connect(address, pool="1MiB") as channel:
            channel.send(b"not delayed")
            until(lambda: got)
            assert got[0].recv() == b"not delayed"
            channel.abort()
        assert silent.recv(1) == b""


def test_a_peer_that_goes_silent_before_its_last_word():
    """It never says that it mapped our memory."""
    address = unique()
    with accepting(address, handshake_timeout=0.2) as got:
        ours = raw.Memories()
        with raw.dial(address) as sock:
            socket.send_fds(sock, [raw.preamble({2: ours.hello()})], ours.fds)
            _, extensions, fds = raw.read_preamble(sock)
            raw.Theirs(fds, extensions[2]).close()
            assert sock.recv(1) == b""
        ours.close()
        assert got == []


def test_a_peer_that_did_not_map_our_memory_is_dropped():
    address = unique()
    with accepting(address) as got:
        ours = raw.Memories()
        with raw.dial(address) as sock:
            socket.send_fds(sock, [raw.preamble({2: ours.hello()})], ours.fds)
            _, extensions, fds = raw.read_preamble(sock)
            raw.Theirs(fds, extensions[2]).close()
            sock.sendall(b"M")                       # without writing the nonce back
            assert sock.recv(1) == b""
        ours.close()
        assert got == []


def test_an_honest_peer_in_plain_python_is_served():
    """What the other tests break a part of."""
    address = unique()
    with accepting(address) as got:
        ours = raw.Memories()
        sock, theirs = raw.meet(address, ours)
        ours.record(raw.INLINE, b"hello")
        ours.data[ours.ring : ours.ring + 4] = b"pool"
        ours.record(raw.EXTENT, struct.pack("<QQ", 0, 4))
        ours.show()
        sock.sendall(b"!")
        until(lambda: got)
        assert got[0].recv(timeout=30) == b"hello"
        view = got[0].recv(copy=False, timeout=30)
        assert view == b"pool"
        assert ours.get("Q", raw.TAKEN) == 2 and ours.get("Q", raw.RETURNED) == 0
        view.release()
        assert ours.get("Q", raw.RETURNED) == 1 and ours.get("I", raw.RETURNS) == 0
        got[0].send(b"answer")
        assert theirs.get("Q", raw.HEAD) == 16
        assert struct.unpack_from("<II6s", theirs.data) == (6, raw.INLINE, b"answer")
        ours.record(raw.END)
        ours.show()
        with pytest.raises(anywire.EndOfChannel):
            got[0].recv(timeout=30)
        sock.close()
        theirs.close()
        ours.close()


# --- what the connecting side checks ----------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(address, answer):
    """A listener in plain Python that answers the first peer with `answer(sock)`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(raw.meeting_place(address))
        listener.listen()

        def run():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(ConnectionError, EOFError):
                sock.settimeout(20)
                _, extensions, fds = raw.read_preamble(sock)
                answer(sock, extensions, fds)
                for fd in fds:
                    os.close(fd)

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(30)


@pytest.mark.parametrize("what", WRONG)
def test_the_listeners_memory_is_checked_too(what):
    memory, hello, reason = WRONG[what]
    address = unique()
    told = []

    def answer(sock, extensions, fds):
        theirs = raw.Theirs(list(map(os.dup, fds)), extensions[2])
        theirs.prove()
        ours = raw.Memories(**memory)
        socket.send_fds(sock, [raw.preamble({2: ours.hello(**hello)})], ours.fds)
        told.append(refusal(sock))
        ours.close()
        theirs.close()

    with listening(address, answer), pytest.raises(anywire.Refused, match=reason):
        sync.connect(address, pool="1MiB")
    assert reason in told[0]


def test_a_listener_that_did_not_map_our_memory():
    address = unique()

    def answer(sock, extensions, fds):
        ours = raw.Memories()
        socket.send_fds(sock, [raw.preamble({2: ours.hello()})], ours.fds)
        sock.recv(1)
        ours.close()

    with listening(address, answer), pytest.raises(anywire.BadFrame, match="did not map our memory"):
        sync.connect(address, pool="1MiB")


def test_a_listener_that_says_nothing():
    address = unique()
    with (
        listening(address, lambda sock, extensions, fds: sock.recv(1)),
        pytest.raises(anywire.TimedOut, match="is it an anywire peer"),
    ):
        sync.connect(address, pool="1MiB", handshake_timeout=0.1)


def test_a_listener_that_speaks_something_else():
    address = unique()
    with (
        listening(address, lambda sock, extensions, fds: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        pytest.raises(anywire.BadFrame, match="HTTP"),
    ):
        sync.connect(address, pool="1MiB")


# --- who may ----------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys, threading
from anywire import sync
import anywire
own = sys.argv[1] + "-own"               # once as root: what is imported late could not be read afterwards
with sync.serve(lambda channel: channel.send(channel.recv()), own), sync.connect(own) as channel:
    channel.send(b"")
    channel.recv()
os.setgid(65534); os.setuid(65534)
try:
    channel = sync.connect(sys.argv[1], pool="1MiB", authorize=(lambda peer: True) if sys.argv[2] == "yes" else None)
    channel.send(b"from %d" % os.getuid())
    print(channel.recv().decode())
except anywire.AnywireError as error:
    print(type(error).__name__, error)
"""


def as_nobody(address, authorize):
    if os.geteuid():
        pytest.skip("only root can become another user")
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, address, authorize], capture_output=True, text=True, check=False, timeout=50
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_another_user_is_refused_and_authorize_widens_it():
    address = unique()
    with accepting(address) as got:
        assert "Refused" in as_nobody(address, "yes")
        assert got == []
    seen = []

    def authorize(peer):
        seen.append((peer.uid, peer.pid))
        return True

    with sync.serve(
        lambda channel: [channel.send(b"you are " + message) for message in channel], address,
        pool="1MiB", authorize=authorize,
    ):  # fmt: skip
        assert as_nobody(address, "yes") == "you are from 65534\n"
    assert seen[0][0] == 65534


def test_authorize_refuses_with_its_reason():
    address = unique()
    with accepting(address, authorize=lambda peer: "not on Sundays"):
        before = open_fds()
        with pytest.raises(anywire.Refused, match="not on Sundays"):
            sync.connect(address, pool="1MiB")
        back_to(before)


# --- no memory --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limit(which, value):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def test_without_memory_the_error_says_so():
    """RLIMIT_FSIZE: no file, and so no memfd, may be as large."""
    address = unique()
    with accepting(address), limit(resource.RLIMIT_FSIZE, 100_000):
        before = open_fds()
        with pytest.raises(OSError, match=f"connect {address}.*no shared memory"):
            sync.connect(address, pool="1MiB")
        back_to(before)


def test_without_descriptors_the_error_says_so():
    address = unique()
    with accepting(address):
        for left in range(1, 4):
            used = max(map(int, os.listdir("/proc/self/fd"))) + 1
            with contextlib.ExitStack() as stack:
                for _ in range(used - open_fds() + 1):
                    stack.enter_context(open(os.devnull))
                most = max(map(int, os.listdir("/proc/self/fd"))) + left
                with (
                    limit(resource.RLIMIT_NOFILE, most),
                    pytest.raises((OSError, anywire.AnywireError), match=r"connect shm://"),
                ):
                    sync.connect(address, pool="1MiB", timeout=1)
    with accepting(address) as got, sync.connect(address, pool="1MiB") as channel:
        channel.send(b"there again")
        until(lambda: got)
        assert got[0].recv() == b"there again"
        channel.abort()


@pytest.mark.parametrize("short", ["connecting", "listening"])
def test_it_falls_back_over_the_socket_and_says_why(short, caplog):
    """Two processes: one has no memory for it."""
    address = unique("shm+unix")
    other = """
import logging, resource, sys
from anywire import sync
logging.basicConfig(stream=sys.stdout)
if sys.argv[2] == "short":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
channel = sync.connect(sys.argv[1], pool="1MiB", wait=20)
channel.send(b"x" * 300_000)
print(channel.recv())
channel.close()
"""
    with contextlib.ExitStack() as stack:
        if short == "listening":
            stack.enter_context(limit(resource.RLIMIT_FSIZE, 100_000))
        with sync.listen(address, pool="1MiB") as listener, caplog.at_level(logging.WARNING, "anywire"):
            process = subprocess.Popen(
                [sys.executable, "-c", other, address, "short" if short == "connecting" else ""],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            channel = listener.accept()
            assert channel.recv() == b"x" * 300_000
            channel.send(b"got it")
            with pytest.raises(anywire.EndOfChannel):
                channel.recv()
            channel.close()
            out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "b'got it'" in out
    assert "no shared memory, the messages go over the socket" in out
    assert "no shared memory, the messages go over the socket" in caplog.text
    assert "File too large" in out and "File too large" in caplog.text


def test_who_asked_for_shared_memory_gets_no_socket():
    """`shm://` beside `shm+unix://`: the listener would fall back, the connecting side asked for memory."""
    name = unique()
    code = """
import resource, sys
from anywire import sync
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with sync.serve(print, sys.argv[1].replace("shm:", "shm+unix:"), pool="1MiB"):
    print("ready", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(anywire.Refused, match="no shared memory: File too large"):
            sync.connect(name, pool="1MiB")
    finally:
        process.kill()
        process.communicate()


# --- options and addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("ring", 5000, "power of two from 4KiB to 1GiB"),
        ("ring", 2048, "power of two from 4KiB to 1GiB"),
        ("ring", "2GiB", "power of two from 4KiB to 1GiB"),
        ("pool", 4096, "from 1MiB to 1TiB"),
        ("pool", "2TiB", "from 1MiB to 1TiB"),
        ("waiting", "sometimes", "adaptive"),
        ("spin_us", -1, "microseconds"),
        ("spin_us", 1e7, "microseconds"),
        ("spin_us", "soon", "microseconds"),
        ("spin_us", [], "microseconds"),
    ],
)
def test_options_that_make_no_sense(option, value, reason):
    for use in (sync.connect, sync.listen):
        with pytest.raises(ValueError, match=reason):
            use(unique(), **{option: value})
    with pytest.raises(ValueError, match=reason):
        sync.listen(f"{unique()}?{option}={value}")


def test_each_side_has_its_own_sizes():
    address = unique()
    with sync.listen(address, ring="4KiB", pool="1MiB") as listener:
        accepted = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
        thread.start()
        channel = sync.connect(address, ring="1MiB", pool="8MiB")
        thread.join()
        count = 0
        while channel.try_send(bytes(1000)):
            count += 1
        back = 0
        while accepted[0].try_send(bytes(300)):
            back += 1
        assert count > 900 and back < 14
        channel.abort()
        accepted[0].abort()


def test_names():
    for bad in ("shm://", "shm:///path", "shm://host:1", "shm://" + "x" * 100):
        with pytest.raises(anywire.AddressError):
            sync.connect(bad)
    address = unique()
    with sync.listen(address), pytest.raises(OSError, match="somebody listens there"):
        sync.listen(address)
    with pytest.raises(anywire.Refused, match="nobody listens"):
        sync.connect(address)


def test_the_meeting_awaited():
    async def main():
        address = unique()
        async with anywire.listen(address, pool="1MiB", handshake_timeout=0.2) as listener:
            accepting_ = asyncio.create_task(listener.accept())
            with raw.dial(address) as silent:
                loop = asyncio.get_running_loop()
                channel = await anywire.connect(address, pool="1MiB")
                other = await accepting_
                await channel.send(b"x")
                assert await other.recv() == b"x"
                assert await loop.run_in_executor(None, silent.recv, 1) == b""
            channel.abort()
            other.abort()

    asyncio.run(main())
