"""FIFOs, between real processes. The conformance suite holds them to the rest."""

import asyncio
import errno
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

import anywire
from anywire import sync
from anywire.framing.fragments import Fragments, fragments_of
from anywire.ipc import fifo


def run(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **options)


def joined(listener, address):
    """Both ends of a new connection: (connecting side, listening side)."""
    made = []

    def connect():
        made.append(sync.connect(address))
        made[0].send(b"first")

    thread = threading.Thread(target=connect)
    thread.start()
    accepted = listener.accept(timeout=20)
    thread.join(20)
    assert accepted.recv(timeout=20) == b"first"
    return made[0], accepted


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?reply=true", "?writers=many"])
def test_nothing_waits_and_each_absence_has_its_words(tmp_path, query):
    address = f"fifo://{tmp_path}/x{query}"
    with pytest.raises(anywire.Refused, match="there is no FIFO"):
        sync.connect(address)
    os.mkfifo(tmp_path / "x")
    with pytest.raises(anywire.Refused, match="nobody reads it"):
        sync.connect(address)
    os.unlink(tmp_path / "x")
    (tmp_path / "x").write_text("")
    with pytest.raises(OSError, match="no FIFO"):
        sync.connect(address)
    with pytest.raises(OSError, match="no FIFO") as caught:
        sync.listen(address)
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("query", ["", "?reply=true", "?writers=many"])
def test_a_living_listener_is_never_replaced(tmp_path, query):
    address = f"fifo://{tmp_path}/x{query}"
    with sync.listen(address) as listener:
        with pytest.raises(OSError, match="somebody reads there"):
            sync.listen(address)
        for end in joined(listener, address):
            end.abort()
    assert os.listdir(tmp_path) == []


def test_the_mode_and_that_of_a_fifo_in_the_way(tmp_path):
    path = tmp_path / "x"
    with sync.listen(f"fifo://{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sync.listen(f"fifo://{path}?mode=0622"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o622
    os.mkfifo(path)
    os.chmod(path, 0o640)
    with sync.listen(f"fifo://{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not path.exists()


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        sync.listen(f"fifo://{tmp_path}/nowhere/x")


# --- kill -9 --------------------------------------------------------------------------------------------------------

LISTEN = """
import sys
from anywire import sync
with sync.listen(sys.argv[1]) as listener:
    print("listening", flush=True)
    channel = listener.accept()
    print(channel.recv(), flush=True)
    sys.stdin.read()
"""

CONNECT = """
import sys
from anywire import sync
channel = sync.connect(sys.argv[1])
channel.send(b"hello")
print("sent", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("query", ["", "?reply=true", "?writers=many"])
def test_a_killed_listener_is_seen_and_replaced(tmp_path, query):
    address = f"fifo://{tmp_path}/x{query}"
    child = run(LISTEN, address, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "listening\n"
        channel = sync.connect(address)
        channel.send(b"hello")
        assert child.stdout.readline() == "b'hello'\n"
        child.kill()
        child.wait()
        with pytest.raises(anywire.PeerLost):
            channel.recv(timeout=20) if "reply" in query else channel.send(b"more")
        channel.abort()
        assert os.listdir(tmp_path) == ["x"]
        with sync.listen(address) as listener:
            for end in joined(listener, address):
                end.abort()
        assert os.listdir(tmp_path) == []
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("query", ["", "?reply=true"])
def test_a_killed_client_is_seen_and_leaves_nothing(tmp_path, query):
    address = f"fifo://{tmp_path}/x{query}"
    with sync.listen(address) as listener:
        child = run(CONNECT, address, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            channel = listener.accept(timeout=20)
            assert child.stdout.readline() == "sent\n"
            assert os.listdir(tmp_path) == ["x"]
            child.kill()
            assert channel.recv(timeout=20) == b"hello"
            with pytest.raises(anywire.PeerLost):
                channel.recv(timeout=20)
            channel.abort()
        finally:
            child.kill()
            child.communicate()
    assert os.listdir(tmp_path) == []


def test_what_killed_processes_left_is_swept(tmp_path):
    for name in (".x.0123456789abcdef.reply", ".x.0123456789abcdef.next", ".y.0123456789abcdef.reply"):
        os.mkfifo(tmp_path / name)
    kept = os.open(tmp_path / ".y.0123456789abcdef.reply", os.O_RDONLY | os.O_NONBLOCK)
    os.mkfifo(tmp_path / ".x.ffffffffffffffff.reply")
    living = os.open(tmp_path / ".x.ffffffffffffffff.reply", os.O_RDONLY | os.O_NONBLOCK)
    with sync.listen(f"fifo://{tmp_path}/x"):
        left = sorted(os.listdir(tmp_path))
    os.close(kept)
    os.close(living)
    assert left == [".x.ffffffffffffffff.reply", ".y.0123456789abcdef.reply", "x"]


# --- many writers ---------------------------------------------------------------------------------------------------

WRITE = """
import sys
from anywire import sync
letter, count, size = sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
with sync.connect(sys.argv[1]) as channel:
    for i in range(count):
        channel.send(letter + b"%06d" % i + letter * (size * (i % 7)))
"""


@pytest.mark.parametrize("size", [10, 5000])
def test_whole_messages_of_many_processes(tmp_path, size):
    address = f"fifo://{tmp_path}/x?writers=many"
    listener = sync.listen(address)
    writers = [run(WRITE, address, letter, 100, size) for letter in "abcd"]
    channel = listener.accept(timeout=20)
    got = [channel.recv(timeout=20) for _ in range(400)]
    listener.close()
    assert list(channel) == []  # the end: nobody can come any more
    assert [writer.wait(20) for writer in writers] == [0, 0, 0, 0]
    for letter in b"abcd":
        mine = [message for message in got if message[0] == letter]
        assert mine == [bytes([letter]) + b"%06d" % i + bytes([letter]) * (size * (i % 7)) for i in range(100)]
    channel.close()
    assert os.listdir(tmp_path) == []


def test_a_writer_killed_in_mid_message_costs_only_that_message(tmp_path):
    address = f"fifo://{tmp_path}/x?writers=many"
    with sync.listen(address) as listener:
        child = run(WRITE, address, "a", 2, 1_000_000)
        channel = listener.accept(timeout=20)
        assert channel.recv(timeout=20) == b"a000000"
        assert select.select([channel.endpoint.read_fd], [], [], 20)[0], "the second message never began"
        child.kill()
        child.wait()
        sender = sync.connect(address)
        thread = threading.Thread(target=lambda: [sender.send(b"b" * 100_000) for _ in range(3)])
        thread.start()
        for _ in range(3):
            assert channel.recv(timeout=20) == b"b" * 100_000
        thread.join()
        assert channel.endpoint.fragments.unfinished == 0
        assert channel.stats().drops == 1
        sender.close()
        channel.close()


def test_foreign_bytes_cost_nobody_a_message(tmp_path, caplog):
    address = f"fifo://{tmp_path}/x?writers=many"
    with sync.listen(address) as listener, sync.connect(address) as sender:
        sender.send(b"one")
        channel = listener.accept(timeout=20)
        assert channel.recv() == b"one"
        subprocess.run(f"echo this was never a fragment > {tmp_path}/x", shell=True, check=True)
        sender.send(b"two")
        assert channel.recv(timeout=20) == b"two"
        assert "this was never" in caplog.text
        channel.close()


def test_a_channel_closed_by_its_handler_comes_again_with_the_rest(tmp_path):
    address = f"fifo://{tmp_path}/x?writers=many"
    with sync.listen(address) as listener, sync.connect(address) as sender:
        sender.send_many([b"%d" % i for i in range(10)])
        got = []
        while len(got) < 10:
            with listener.accept(timeout=20) as channel:
                got.append(channel.recv(timeout=20))
        assert got == [b"%d" % i for i in range(10)]


# --- a FIFO for each writer -----------------------------------------------------------------------------------------


def test_foreign_programs_use_the_bytes(tmp_path):
    with sync.listen_stream(f"fifo://{tmp_path}/in") as listener:
        echo = subprocess.Popen(f"echo hello > {tmp_path}/in", shell=True)
        with listener.accept(timeout=20) as stream:
            assert stream.read_until(b"\n", timeout=20) == b"hello\n"
            assert stream.read(timeout=20) == b""
        echo.wait(20)
    os.mkfifo(tmp_path / "out")
    cat = subprocess.Popen(["cat", tmp_path / "out"], stdout=subprocess.PIPE)
    with sync.connect_stream(f"fifo://{tmp_path}/out", wait=20) as stream:
        stream.write(b"to cat")
    assert cat.communicate(timeout=20)[0] == b"to cat"


def test_writers_side_by_side_have_a_channel_each(tmp_path):
    address = f"fifo://{tmp_path}/x"
    with sync.listen(address) as listener:
        senders, channels = [], []
        for i in range(5):
            senders.append(sync.connect(address))
            senders[-1].send(b"%d" % i)
            channels.append(listener.accept(timeout=20))
        for i, channel in enumerate(channels):
            assert channel.recv() == b"%d" % i
        for end in senders + channels:
            end.abort()


def test_many_clients_at_once_from_coroutines(tmp_path):
    async def main():
        async def echo(channel):
            async for message in channel:
                await channel.send(message)

        async def client(i):
            async with anywire.connect(server.addresses[0]) as channel:
                for j in range(20):
                    await channel.send(b"%d %d" % (i, j))
                    assert await channel.recv() == b"%d %d" % (i, j)

        async with anywire.serve(echo, f"fifo://{tmp_path}/x?reply=true") as server:
            await asyncio.gather(*(client(i) for i in range(30)))
            assert os.listdir(tmp_path) == ["x"]

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the counters' page


def test_close_waits_until_all_was_read_and_tells_when_it_was_not(tmp_path):
    address = f"fifo://{tmp_path}/x"
    with sync.listen(address) as listener:
        for dies in (False, True):
            sender = sync.connect(address)
            sender.send_many([b"x" * 1000] * 20)
            channel = listener.accept(timeout=20)
            closed = []

            def close(sender=sender, closed=closed):
                try:
                    sender.close(timeout=20)
                    closed.append(None)
                except anywire.PeerLost as error:
                    closed.append(error)

            thread = threading.Thread(target=close)
            thread.start()
            if not dies:
                assert len(list(channel)) == 20
            channel.abort()
            thread.join(20)
            assert isinstance(closed[0], anywire.PeerLost) == dies or closed == [None]


def test_a_writer_that_came_and_left_is_forgotten(tmp_path):
    with sync.listen(f"fifo://{tmp_path}/x") as listener:
        for _ in range(3):
            os.close(os.open(tmp_path / "x", os.O_WRONLY | os.O_NONBLOCK))
            with pytest.raises(anywire.TimedOut):
                assert listener.accept(timeout=0.02) is listener
        with sync.connect(f"fifo://{tmp_path}/x") as sender:
            sender.send(b"now")
            with listener.accept(timeout=20) as channel:
                assert list(iter(lambda: channel.recv(timeout=20), b"now")) == []
                sender.abort()


def test_a_listener_closed_in_the_handshake_refuses(tmp_path):
    address = f"fifo://{tmp_path}/x?reply=true"
    listener = sync.listen(address)
    caught = []

    def connect():
        try:
            sync.connect(address)
        except anywire.Refused as error:
            caught.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    read = listener._acceptors[0].listening.fd
    wait_until(lambda: fifo.pending(read))
    listener.close()
    thread.join(20)
    assert "went away" in str(caught[0])
    assert os.listdir(tmp_path) == []


def test_only_the_users_own_listener_unless_admitted(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a FIFO to another user")
    address = f"fifo://{tmp_path}/x"
    with sync.listen(address) as listener:
        os.chown(tmp_path / "x", 12345, -1)
        with pytest.raises(anywire.Refused, match="12345"):
            sync.connect(address)
        with listener.accept(timeout=20) as channel, pytest.raises(anywire.PeerLost):
            channel.recv(timeout=20)
        os.chown(tmp_path / "x", 12345, -1)
        sync.connect(address, authorize=lambda peer: peer.uid == 12345, wait=5).abort()


def test_a_signal_lock_is_given_back_by_the_kernel(tmp_path):
    path = str(tmp_path / "x")
    read = fifo.make(path, 0o600)
    assert not fifo.is_writer_alive(read, 77)
    child = os.fork()
    if child == 0:
        fifo.claim_writer(fifo.open_writer(path), 77)
        signal.pause()
    wait_until(lambda: fifo.is_writer_alive(read, 77))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not fifo.is_writer_alive(read, 77)
    os.close(read)


# --- hostile and unlucky ----------------------------------------------------------------------------------------------


def test_a_writers_number_that_no_writer_has_is_a_dead_writers(tmp_path):
    """Anybody who may write to the FIFO can claim any 64-bit number; the kernel's locks have 63."""
    address = f"fifo://{tmp_path}/x?writers=many"
    with sync.listen(address) as listener, sync.connect(address) as writer:
        writer.send(b"before")
        reader = listener.accept(timeout=20)
        assert reader.recv(timeout=20) == b"before"
        raw = fifo.open_writer(str(tmp_path / "x"))
        for number in ((1 << 64) - 1, (1 << 64) - 2, 1 << 63, (1 << 63) - 1):
            os.write(raw, fragments_of(number, b"x" * 5000)[:4096])     # the rest never comes
            writer.send(b"between")
            assert reader.recv(timeout=20) == b"between"
        os.close(raw)
        reader.close()


def test_unfinished_messages_of_invented_writers_are_bounded(tmp_path):
    """A hostile writer can hold the locks of all numbers; what it begins and never ends must not fill the memory."""
    fragments = Fragments(1 << 20)
    for number in range(20_000):
        fragments.feed(fragments_of(number, b"x" * 5000)[:4096])
        fragments.problems.clear()
    assert fragments.unfinished <= 4096
    fragments.feed(fragments_of(1 << 60, b"whole"))
    assert list(fragments.ready) == [b"whole"]


def test_refusing_everybody_drops_what_waits_and_does_not_spin(tmp_path):
    address = f"fifo://{tmp_path}/x?writers=many"
    asked = []
    with (
        sync.listen(address, authorize=lambda peer: bool(asked.append(peer))) as listener,
        sync.connect(address) as writer,
    ):
        writer.send(b"unwanted")
        with pytest.raises(anywire.TimedOut):
            listener.accept(timeout=1)
        assert len(asked) < 5
        writer.send(b"unwanted too")
        before = len(asked)
        with pytest.raises(anywire.TimedOut):
            listener.accept(timeout=0.3)
        assert before < len(asked) < before + 5


def test_a_listener_whose_name_was_taken_away_says_so(tmp_path):
    address = f"fifo://{tmp_path}/x"
    with sync.listen(address) as listener:
        client = sync.connect(address)
        client.send(b"first")
        os.unlink(tmp_path / "x")
        accepted = listener.accept(timeout=20)
        assert accepted.recv(timeout=20) == b"first"
        with pytest.raises(anywire.ChannelClosed, match="nobody else can come"):
            listener.accept(timeout=20)
        client.abort()
        accepted.abort()
