"""What only Unix sockets have: files, credentials, descriptors. The conformance suite holds them to the rest."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
import stat
import subprocess
import sys
import threading

import pytest

import anywire
from anywire import sync


def echo(channel):
    for message in channel:
        channel.send(message)


def pair(address):
    """Both ends of a new connection in this process: (connecting side, listening side)."""
    accepted = []
    with sync.listen(address) as listener:
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
        thread.start()
        ours = sync.connect(address)
        thread.join()
    return ours, accepted[0]


def open_fds():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def place(tmp_path):
    return f"unix://{tmp_path}/sock"


@contextlib.contextmanager
def child(code, *arguments):
    """A real process running `code`; ready when it printed a line. Killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- the socket file --------------------------------------------------------------------------------------------------


def test_the_file_is_there_while_it_listens_and_gone_after(place, tmp_path):
    with sync.serve(echo, place) as server, sync.connect(place) as channel:
        assert [str(address) for address in server.addresses] == [place]
        assert stat.S_ISSOCK((tmp_path / "sock").stat().st_mode)
        channel.send(b"hello")
        assert channel.recv() == b"hello"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["0600", "0666", "0700"])
def test_mode_is_the_file_mode_whatever_the_umask(place, tmp_path, mode):
    old = os.umask(0o077)
    try:
        with sync.listen(f"{place}?mode={mode}"):
            assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == int(mode, 8)
    finally:
        os.umask(old)


KILLED = """
import sys
from anywire import sync
sync.listen(sys.argv[1])
print("listening", flush=True)
sys.stdin.read()
"""


def test_a_killed_server_leaves_a_file_that_the_next_one_replaces(place, tmp_path):
    with child(KILLED, place) as process:
        assert process.stdout.readline() == "listening\n"
        process.kill()
        process.wait()
    assert os.listdir(tmp_path) == ["sock"]
    with pytest.raises(anywire.Refused, match="wait="):
        sync.connect(place)
    with sync.serve(echo, place), sync.connect(place) as channel:
        channel.send(b"again")
        assert channel.recv() == b"again"


def test_a_living_server_is_never_replaced(place, tmp_path):
    with sync.serve(echo, place):
        for other in (place, place + "?type=seqpacket"):
            with pytest.raises(OSError, match="somebody listens there") as caught:
                sync.listen(other)
            assert caught.value.errno == errno.EADDRINUSE
        with sync.connect(place) as channel:
            channel.send(b"still here")
            assert channel.recv() == b"still here"


def test_a_living_server_with_a_full_backlog_is_not_replaced(tmp_path):
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(path)
        full.listen(0)
        first.connect(path)
        with pytest.raises(OSError, match="somebody listens there"):
            sync.listen(f"unix://{path}")


def test_a_file_that_is_no_socket_is_never_deleted(place, tmp_path):
    (tmp_path / "sock").write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        sync.listen(place)
    assert (tmp_path / "sock").read_text() == "precious"


def test_close_leaves_a_file_that_is_no_longer_ours(place, tmp_path):
    listener = sync.listen(place)
    os.unlink(tmp_path / "sock")
    with sync.listen(place):
        listener.close()
        assert os.listdir(tmp_path) == ["sock"]
        with pytest.raises(OSError, match="somebody listens"):
            sync.listen(place)


def test_a_forked_child_does_not_delete_the_file(place, tmp_path):
    with sync.listen(place) as listener:
        pid = os.fork()
        if pid == 0:
            listener.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.listdir(tmp_path) == ["sock"]


RACER = """
import sys
from anywire import sync
for line in sys.stdin:
    try:
        listener = sync.listen(line.strip())
        print("won", flush=True)
    except OSError as error:
        listener = None
        print("lost" if error.errno == 98 else repr(error), flush=True)
    sys.stdin.readline()
    if listener is not None:
        listener.close()
    print("closed", flush=True)
"""


def test_of_servers_that_find_a_stale_file_together_one_wins(place, tmp_path):
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(child(RACER)) for _ in range(4)]
        for _ in range(40):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(tmp_path / "sock"))
            for racer in racers:
                racer.stdin.write(place + "\n")
                racer.stdin.flush()
            assert sorted(racer.stdout.readline() for racer in racers) == ["lost\n"] * 3 + ["won\n"]
            for racer in racers:
                racer.stdin.write("\n")
                racer.stdin.flush()
            assert {racer.stdout.readline() for racer in racers} == {"closed\n"}
            assert os.listdir(tmp_path) == []


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing/sock"):
        sync.listen(f"unix://{tmp_path}/missing/sock")


@pytest.mark.parametrize("address", ["unix:///" + "x" * 107, "unix:@" + "x" * 108])
def test_a_path_over_the_kernels_limit_is_pointed_at(address):
    with pytest.raises(anywire.AddressError, match=r"108 bytes; the kernel takes 107(?s:.)*\^\^\^"):
        sync.connect(address)


def test_the_longest_path_and_any_bytes_work(tmp_path):
    room = 107 - len(os.fsencode(tmp_path)) - 1
    for name in ("n" * room, "sp%20ace", "%FF%FE", "@at"):
        with sync.serve(echo, f"unix://{tmp_path}/{name}") as server, sync.connect(server.addresses[0]) as channel:
            channel.send(b"x")
            assert channel.recv() == b"x"
    assert os.listdir(tmp_path) == []


def test_abstract_names_leave_no_file(tmp_path):
    address = f"unix:@anywire-test-{os.getpid()}%00tail"
    with sync.serve(echo, address), sync.connect(address) as channel:
        assert channel.peer.address == address
        channel.send(b"x")
        assert channel.recv() == b"x"
        with pytest.raises(OSError, match="somebody listens"):
            sync.listen(address)
    with pytest.raises(anywire.Refused):
        sync.connect(address)


def test_the_other_type_is_said(place):
    with sync.serve(echo, place), pytest.raises(OSError, match="another type"):
        sync.connect(place + "?type=seqpacket")


def test_connecting_waits_while_the_backlog_is_full(tmp_path):
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            with pytest.raises(anywire.TimedOut):
                sync.connect_stream(f"unix://{path}", timeout=0.1)
            made = []
            thread = threading.Thread(target=lambda: made.append(sync.connect_stream(f"unix://{path}", timeout=20)))
            thread.start()
            server.accept()[0].close()
            thread.join()
            made[0].abort()


# --- who is there -----------------------------------------------------------------------------------------------------


CLIENT = """
import sys
from anywire import sync
with sync.connect(sys.argv[1]) as channel:
    print(channel.peer.pid, channel.peer.uid, channel.peer.gid, flush=True)
    channel.send(b"x")
    sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_both_sides_know_the_others_process_and_user(place, kind):
    address = f"{place}?type={kind}"
    with sync.listen(address) as listener, child(CLIENT, address) as process, listener.accept() as channel:
        assert (channel.peer.pid, channel.peer.uid, channel.peer.gid) == (process.pid, os.getuid(), os.getgid())
        assert channel.recv() == b"x"
        told = process.stdout.readline().split()
        assert told == [str(os.getpid()), str(os.getuid()), str(os.getgid())]
        process.stdin.write("\n")
        process.stdin.flush()


OTHER_USER = """
import os, sys
from anywire import sync
import anywire.wires.unix
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    channel = sync.connect(sys.argv[1])
    channel.recv()
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_another_user_is_refused_unless_admitted(tmp_path):
    os.chmod(tmp_path, 0o755)
    address = f"unix:@anywire-user-{os.getpid()}"
    seen = []

    def admit(peer):
        seen.append(peer.uid)
        return "not today"

    with sync.serve(echo, address), child(OTHER_USER, address) as process:
        told = process.stdout.readline()
        assert told.startswith("Refused")
        assert "user 65534 is not user 0" in told
    with sync.serve(echo, address, authorize=admit), child(OTHER_USER, address) as process:
        assert "not today" in process.stdout.readline()
    assert seen == [65534]


# --- descriptors ------------------------------------------------------------------------------------------------------


def returner(channel):
    message, fds = channel.recv_fds()
    channel.send_fds(fds, message)
    for fd in fds:
        os.close(fd)


def same_file(fd, other):
    return os.path.sameopenfile(fd, other)


@pytest.mark.parametrize("size", [0, 5, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, 253])
def test_descriptors_go_with_messages(place, count, size):
    before = open_fds()
    message = os.urandom(size)
    with sync.serve(returner, place), sync.connect(place) as channel:
        assert channel.endpoint.carries_fds
        r, w = os.pipe()
        channel.send_fds([r] * count, message)
        back, fds = channel.recv_fds()
        assert back == message
        assert len(fds) == count
        assert all(same_file(fd, r) and not os.get_inheritable(fd) for fd in fds)
        for fd in (*fds, r, w):
            os.close(fd)
    assert open_fds() == before


def test_descriptors_async(place):
    async def give_back(channel):
        message, fds = await channel.recv_fds()
        await channel.send_fds(fds, message)
        for fd in fds:
            os.close(fd)

    async def main():
        message = os.urandom(1 << 20)
        async with anywire.serve(give_back, place), anywire.connect(place) as channel:
            with open("/dev/null") as null:
                await channel.send_fds([null, null.fileno()], message)
                back, fds = await channel.recv_fds()
                assert back == message
                assert [same_file(fd, null.fileno()) for fd in fds] == [True, True]
                for fd in fds:
                    os.close(fd)

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_too_many_or_closed_descriptors_send_nothing(place):
    with sync.serve(echo, place), sync.connect(place) as channel:
        r, w = os.pipe()
        with pytest.raises(ValueError, match="254 descriptors in one message; the kernel passes at most 253"):
            channel.send_fds([r] * 254, b"x")
        os.close(w)
        with pytest.raises(OSError, match="Bad file descriptor"):
            channel.send_fds([r, w], b"x")
        os.close(r)
        channel.send(b"unharmed")
        assert channel.recv() == b"unharmed"


def test_order_of_messages_and_descriptors_is_kept(place):
    def read_all(channel):
        for i in range(60):
            message, fds = channel.recv_fds()
            assert message == b"%d" % i
            assert len(fds) == i % 3
            for fd in fds:
                assert os.pread(fd, 10, 0) == b"%d" % i
                os.close(fd)
        channel.send(b"all right")

    with sync.serve(read_all, place), sync.connect(place) as channel:
        for i in range(60):
            fd = os.memfd_create("test")
            os.write(fd, b"%d" % i)
            if i % 3:
                channel.send_fds([fd] * (i % 3), b"%d" % i)
            else:
                channel.send(b"%d" % i)
            os.close(fd)
        assert channel.recv() == b"all right"


def test_recv_refuses_a_message_with_descriptors_and_keeps_it(place):
    channel, other = pair(place)
    with open("/dev/null") as null:
        channel.send_fds([null], b"m")
    for _ in range(2):
        with pytest.raises(anywire.Unsupported, match="recv_fds"):
            other.recv()
    message, fds = other.recv_fds()
    assert message == b"m"
    os.close(*fds)
    channel.abort()
    other.abort()


def raw_pair(place):
    """A framed channel and the bare socket at its other end, past the preambles."""
    from anywire.framing.preamble import Preamble

    listener = sync.listen(place)
    kept = []
    thread = threading.Thread(target=lambda: kept.append(listener.accept()))
    thread.start()
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(place.removeprefix("unix://"))
    raw.sendall(Preamble(1 << 20).encode())
    thread.join()
    listener.close()
    raw.recv(24, socket.MSG_WAITALL)
    return kept[0], raw


def test_descriptors_that_nobody_announced_are_closed(place):
    from anywire.framing.codec import encode

    channel, raw = raw_pair(place)
    with raw:
        with open("/dev/null") as null:
            before = open_fds()
            for _ in range(5):
                socket.send_fds(raw, [encode(b"plain")], [null.fileno()] * 250)
                assert channel.recv() == b"plain"
                assert open_fds() == before
        channel.abort()


def test_a_bare_stream_closes_descriptors_that_come(place):
    with sync.listen_stream(place) as listener, socket.socket(socket.AF_UNIX) as raw:
        raw.connect(place.removeprefix("unix://"))
        with listener.accept() as stream, open("/dev/null") as null:
            before = open_fds()
            for _ in range(10):
                socket.send_fds(raw, [b"x"], [null.fileno()] * 253)
                assert stream.read() == b"x"
            assert open_fds() == before
            raw.close()


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_descriptors_that_the_kernel_could_not_install_are_not_passed_over(place, kind):
    channel, other = pair(f"{place}?type={kind}")
    with open("/dev/null") as null:
        channel.send_fds([null] * 100, b"x")
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 10, hard))
    try:
        with pytest.raises(anywire.PeerLost, match="RLIMIT_NOFILE"):
            other.recv_fds()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    other.abort()
    channel.abort()
    assert open_fds() == before - 2


def test_other_wires_refuse_descriptors():
    with (
        sync.serve(echo, "tcp://127.0.0.1:0") as server,
        sync.connect(server.addresses[0]) as channel,
        pytest.raises(anywire.Unsupported, match="Unix sockets do"),
    ):
        channel.send_fds([0])


# --- moving -----------------------------------------------------------------------------------------------------------


TAKER = """
import socket, sys
from anywire import sync
from anywire.contract.handle import Handle
with sync.connect(sys.argv[1]) as boss:
    packed, fds = boss.recv_fds()
    made = sync.attach(Handle.unpack(packed, fds))
    if isinstance(made, sync.Listener):
        with made as listener, listener.accept() as channel:
            channel.send(b"accepted in the child")
            channel.recv_many()
    else:
        print(made.peer.pid, flush=True)
        made.send(b"sent by the child")
        print(made.recv(), flush=True)
        made.close()
"""


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_a_listener_moves_to_another_process_with_its_file(place, tmp_path, kind):
    boss = f"unix:@anywire-boss-{os.getpid()}"
    address = f"{place}?type={kind}"
    with sync.listen(boss) as bosses, child(TAKER, boss) as process, bosses.accept() as channel:
        handle = sync.listen(address).detach()
        channel.send_fds(handle.fds, handle.pack())
        handle.close()
        with sync.connect(address) as client:
            assert client.recv() == b"accepted in the child"
            client.send(b"done")
        channel.close()                         # the child's waits for it
        process.wait(10)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_an_open_channel_moves_to_another_process(place, kind):
    boss = f"unix:@anywire-boss-{os.getpid()}"
    address = f"{place}?type={kind}"
    with sync.listen(boss) as bosses, child(TAKER, boss) as process, bosses.accept() as channel:
        ours, theirs = pair(address)
        theirs.send(b"waits in the kernel")
        handle = ours.detach()
        channel.send_fds(handle.fds, handle.pack())
        handle.close()
        assert theirs.recv() == b"sent by the child"
        assert process.stdout.readline() == f"{os.getpid()}\n"
        assert process.stdout.readline() == "b'waits in the kernel'\n"
        theirs.close()
