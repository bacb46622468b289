"""Kernel messages: what a packet socket hides and the wire must not.

The other end is a plain socket where that shows more."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

import anywire
from anywire import sync


@pytest.fixture
def address(tmp_path):
    return f"unix://{tmp_path}/sock?type=seqpacket"


def plain_server(address):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address.removeprefix("unix://").partition("?")[0])
    server.listen(8)
    return server


@pytest.fixture
def pair(address):
    """A channel and the plain socket at its other end: the user's bytes go unchanged."""
    with plain_server(address) as server:
        channel = sync.connect(address)
        raw = server.accept()[0]
        raw.settimeout(20)
        with raw:
            yield channel, raw
        channel.abort()


def echo(channel):
    for message in channel:
        channel.send(message)


def test_bytes_go_unchanged_and_whole_both_ways(pair):
    channel, raw = pair
    for message in (b"one", b"", b"\0" * 70000, b""):
        channel.send(message)
        assert raw.recv(1 << 20) == message
        raw.send(message)
        assert channel.recv() == message


def test_an_empty_message_is_not_the_end(pair):
    channel, raw = pair
    raw.send(b"")
    raw.send(b"")
    raw.shutdown(socket.SHUT_WR)
    assert channel.recv() == b""
    assert channel.recv_many() == [b""]
    for _ in range(2):
        with pytest.raises(anywire.EndOfChannel, match="a crash looks the same"):
            channel.recv()
    channel.send(b"still open this way")
    assert raw.recv(100) == b"still open this way"


def test_empty_messages_sent_before_the_channel_existed(address):
    # Sent before SO_PASSCRED was set on the receiving socket: the kernel still says that it is a packet.
    with sync.listen(address) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(address.removeprefix("unix://").partition("?")[0])
        raw.send(b"")
        raw.send(b"")
        raw.close()
        with listener.accept() as channel:
            assert list(channel) == [b"", b""]


def test_the_traits_are_those_of_the_table(pair):
    traits = pair[0].traits
    assert traits.kind == {"message"}
    assert traits.clean_end == "no"
    assert traits.message_limit == "socket buffer"
    assert traits.sees_death == "at once"


@pytest.mark.parametrize("by", ["address", "keyword"])
def test_a_message_over_the_socket_buffer_is_refused_and_the_channel_lives(address, by):
    plain = address.partition("?")[0]
    with sync.serve(echo, address), sync.connect(address) as channel:
        limit = channel.endpoint.send_limit
        with pytest.raises(anywire.TooLarge, match="sndbuf=") as caught:
            channel.send(bytes(limit + 1))
        assert caught.value.limit == limit
        with pytest.raises(anywire.TooLarge):
            channel.send_many([bytes(limit + 1)])
        channel.send(bytes(limit))
        assert channel.recv() == bytes(limit)
    larger = f"{address}&sndbuf=600KiB" if by == "address" else plain
    options = {} if by == "address" else {"type": "seqpacket", "sndbuf": 600 << 10}
    with sync.serve(echo, larger, **options), sync.connect(larger, **options) as channel:
        assert channel.traits.kind == {"message"}
        message = os.urandom(1_000_000)
        channel.send(message)
        assert channel.recv() == message


def test_nothing_is_ever_cut(address):
    def server(channel):
        channel.send(b"small")
        channel.send(b"x" * 1001)

    with sync.serve(server, address), sync.connect(address, max_message=1000) as channel:
        assert channel.recv() == b"small"
        for _ in range(2):
            with pytest.raises(anywire.TooLarge, match="1,001 bytes is over the limit of 1,000"):
                channel.recv()


def test_recv_into_keeps_a_message_that_does_not_fit(pair):
    channel, raw = pair
    buffer = bytearray(5)
    raw.send(b"123456789")
    raw.send(b"next")
    for _ in range(2):
        with pytest.raises(BufferError, match="9 bytes and the buffer 5; the message stays queued"):
            channel.recv_into(buffer)
    assert channel.recv() == b"123456789"
    assert channel.recv_into(buffer) == 4
    assert buffer[:4] == b"next"
    raw.send(b"")
    assert channel.recv_into(bytearray()) == 0


def test_recv_refuses_a_packet_with_descriptors_and_keeps_it(pair):
    channel, raw = pair
    with open("/dev/null") as null:
        for _ in range(3):
            socket.send_fds(raw, [b"with"], [null.fileno()] * 253)
        before = len(os.listdir("/proc/self/fd"))
        for take in (channel.recv, lambda: channel.recv_into(bytearray(10))):
            for _ in range(2):
                with pytest.raises(anywire.Unsupported, match="recv_fds"):
                    take()
            message, fds = channel.recv_fds()
            assert message == b"with"
            assert len(fds) == 253
            for fd in fds:
                os.close(fd)
        with pytest.raises(anywire.Unsupported):
            channel.recv()
        channel.abort()
        assert len(os.listdir("/proc/self/fd")) == before - 1


@pytest.mark.parametrize("count", [0, 1, 253])
def test_descriptors(address, count):
    def server(channel):
        message, fds = channel.recv_fds()
        channel.send_fds(fds, message)
        for fd in fds:
            os.close(fd)

    with sync.serve(server, address), sync.connect(address) as channel, open("/dev/null") as null:
        channel.send_fds([null] * count, b"")
        message, fds = channel.recv_fds()
        assert message == b""
        assert len(fds) == count
        for fd in fds:
            assert os.path.sameopenfile(fd, null.fileno())
            os.close(fd)
        with pytest.raises(ValueError, match="254"):
            channel.send_fds([null] * 254)


def test_a_closed_peer_is_told_by_send_and_what_it_sent_is_still_read(pair):
    channel, raw = pair
    raw.send(b"before")
    raw.close()
    with pytest.raises(anywire.PeerLost) as caught:
        channel.send(b"nobody")
    assert caught.value.unconfirmed == 0
    assert channel.recv() == b"before"


def test_a_peer_that_closed_without_reading_is_a_loss_after_its_messages(pair):
    channel, raw = pair
    channel.send(b"never read")
    raw.send(b"first")
    raw.send(b"second")
    raw.close()
    assert [channel.recv(), channel.recv()] == [b"first", b"second"]
    with pytest.raises(anywire.PeerLost, match="before it had read everything") as caught:
        channel.recv()
    assert caught.value.unconfirmed == 1
    with pytest.raises(anywire.PeerLost):
        channel.close()


DIES = """
import sys, os, signal
from anywire import sync
channel = sync.connect(sys.argv[1])
channel.send(b"last words")
sys.stdin.readline()
"""


def test_kill_9_is_seen_at_once_after_what_was_sent(address):
    with sync.listen(address) as listener:
        process = subprocess.Popen([sys.executable, "-c", DIES, address], stdin=subprocess.PIPE)
        try:
            channel = listener.accept()
            assert channel.recv() == b"last words"
            told = []

            def receive():
                try:
                    channel.recv()
                except anywire.EndOfChannel:
                    told.append(time.monotonic())

            thread = threading.Thread(target=receive)
            thread.start()
            process.kill()
            killed = time.monotonic()
            thread.join(10)
            assert told
            assert told[0] - killed < 1
            channel.close()
        finally:
            process.kill()
            process.communicate()


def test_back_pressure_and_order(address):
    def slow(channel):
        channel.recv()
        go.wait(20)
        assert [int(message[:8]) for message in channel] == list(range(1, sent))

    go = threading.Event()
    with sync.serve(slow, address), sync.connect(address) as channel:
        sent = 0
        while channel.try_send(b"%08d" % sent + bytes(10000)):
            sent += 1
            assert sent < 10000
        with pytest.raises(anywire.TimedOut):
            channel.send(bytes(10000), timeout=0.05)
        go.set()


def test_close_delivers_what_was_sent_and_drops_what_still_comes(pair):
    channel, raw = pair
    for i in range(3):
        channel.send(b"%d" % i)
    raw.send(b"unread")
    thread = threading.Thread(target=channel.close)
    thread.start()
    assert [raw.recv(10) for _ in range(4)] == [b"0", b"1", b"2", b""]
    raw.send(b"late")
    raw.shutdown(socket.SHUT_WR)
    thread.join()
    assert raw.recv(10) == b""
    assert channel.closed


def test_abort_wakes_a_blocked_receiver(pair):
    channel, _ = pair
    failures = []

    def receive():
        try:
            channel.recv()
        except anywire.AnywireError as error:
            failures.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    while not channel.stats().recv_waits and thread.is_alive() and not blocked_in_kernel(thread):
        time.sleep(0)
    channel.abort()
    thread.join(10)
    assert isinstance(failures[0], (anywire.ChannelClosed, anywire.EndOfChannel))


def blocked_in_kernel(thread):
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        return file.read().split()[0] == "47"  # recvmsg on x86-64; elsewhere the thread's first wait is enough


def test_async_cancelled_receives_lose_nothing(address):
    async def main():
        async def numbers(channel):
            for i in range(2000):
                await channel.send(b"%d" % i)

        async with anywire.serve(numbers, address), anywire.connect(address) as channel:
            got, cancelled = [], 0
            while len(got) < 2000:
                task = asyncio.create_task(channel.recv())
                if len(got) % 2:
                    await asyncio.sleep(0)
                    task.cancel()
                try:
                    got.append(int(await task))
                except asyncio.CancelledError:
                    cancelled += 1
                    got.append(int(await channel.recv()))
            assert got == list(range(2000))
            assert cancelled

    asyncio.run(main())


def test_async_half_close_and_empty_messages(address):
    async def main():
        async def server(channel):
            count = 0
            async for message in channel:
                assert message == b""
                count += 1
            await channel.send(b"%d" % count)

        async with anywire.serve(server, address), anywire.connect(address) as channel:
            await channel.send_many([b""] * 5)
            await channel.send_eof()
            assert await channel.recv() == b"5"
            with pytest.raises(anywire.ChannelClosed):
                await channel.send(b"x")

    asyncio.run(main())


def test_one_system_call_for_each_message(pair):
    channel, raw = pair
    raw.settimeout(None)  # with a time-out Python's own socket would poll
    if subprocess.run(["sh", "-c", "command -v strace"], capture_output=True, check=False).returncode:
        before = channel.stats()
        channel.send(b"x")
        raw.send(b"y")
        channel.recv()
        after = channel.stats()
        assert (after.send_waits, after.recv_waits) == (before.send_waits, before.recv_waits)
        return
    strace = subprocess.Popen(
        ["strace", "-f", "-e", "trace=network,poll,ppoll", "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True
    )
    assert "attached" in strace.stderr.readline()
    channel.send(b"x")
    raw.send(b"y")
    channel.recv()
    strace.terminate()
    calls = strace.communicate()[1]
    assert calls.count("sendmsg(") == 1
    assert calls.count("recvmsg(") == 1
    assert "poll(" not in calls
