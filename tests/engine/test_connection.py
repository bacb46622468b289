"""Buffered connections: water marks, time-outs, rate limits, ends and errors; connects, low-water marks."""

from __future__ import annotations

import errno
import gc
import socket
import struct
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from anywire.engine import BufferedConnection, Condition, RateLimit, Reactor
from anywire.engine.demultiplexers import by_name, names
from anywire.engine.sockets import begin_connect, connect_result, set_low_water


@pytest.fixture(params=names())
def reactor(request: pytest.FixtureRequest) -> Iterator[Reactor]:
    with Reactor(by_name(request.param)) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        yield a, b


def until(reactor: Reactor, condition: Any) -> None:
    """Take turns until something is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to be so"
        reactor.turn(1)


def test_there_and_back(reactor, pair) -> None:
    """Four megabytes through an echo, so that both buffers fill."""
    sent = bytes(range(256)) * 16384
    got = bytearray()
    ends: list[object] = []

    def echo(connection: BufferedConnection) -> None:
        connection.write(connection.input)

    def collect(connection: BufferedConnection) -> None:
        got.extend(connection.read())

    server = BufferedConnection(
        reactor, pair[0], on_data=echo, on_end=lambda connection, error: (ends.append(error), connection.shutdown())
    )
    client = BufferedConnection(
        reactor, pair[1], on_data=collect, on_end=lambda connection, error: ends.append(error)
    )
    assert not client.write(sent), "over write_high: kept, and says so"
    client.shutdown()
    until(reactor, lambda: len(ends) == 2)
    assert got == sent and ends == [None, None]
    assert server.read_bytes == server.written_bytes == client.read_bytes == client.written_bytes == len(sent)
    with pytest.raises(BrokenPipeError, match="shut down"):
        client.write(b"x")
    server.close()
    client.close()
    client.close()
    with pytest.raises(BrokenPipeError, match="closed"):
        server.write(b"x")
    assert reactor.watches.count == 1 and len(reactor.timers) == 0


def test_read_low_water(reactor, pair) -> None:
    seen: list[bytes] = []
    connection = BufferedConnection(
        reactor, pair[0], read_low=4, on_data=lambda c: seen.append(c.read()), on_end=lambda c, e: seen.append(b"end")
    )
    pair[1].send(b"abc")
    reactor.turn(1)
    assert seen == []
    pair[1].send(b"de")
    reactor.turn(1)
    assert seen == [b"abcde"]
    pair[1].send(b"f")
    pair[1].close()
    until(reactor, lambda: len(seen) == 3)
    assert seen[1:] == [b"f", b"end"], "what is left is told at the end"
    connection.close()


def test_read_high_water(reactor, pair) -> None:
    """Nothing more is read until some is taken: the peer is slowed down."""
    connection = BufferedConnection(reactor, pair[0], read_high=1000)
    pair[1].send(bytes(5000))
    reactor.turn(1)
    assert len(connection.input) == 1000
    assert reactor.turn(0) == 0, "no busy loop at the mark"
    assert len(connection.read(400)) == 400
    reactor.turn(1)
    assert len(connection.input) == 1000
    connection.pause()
    connection.read()
    assert reactor.turn(0) == 0
    connection.resume()
    reactor.turn(1)
    assert len(connection.input) == 1000
    connection.close()


def test_write_water_marks(reactor, pair) -> None:
    """The peer takes nothing, then all: on_drained tells once it is down at write_low."""
    drained: list[int] = []
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
    connection = BufferedConnection(
        reactor, pair[0], write_low=1000, write_high=100_000, on_drained=lambda c: drained.append(len(c.output))
    )
    assert connection.write(b"small")
    changing = bytearray(99_000)
    connection.write(changing)
    changing[:] = b"x" * len(changing)
    assert not connection.write(bytes(200_000))
    assert reactor.turn(0) == 0 and drained == []
    pair[1].setblocking(False)
    got = bytearray()
    while len(got) < 5 + 299_000:
        try:
            got += pair[1].recv(50_000)
        except BlockingIOError:
            reactor.turn(1)
    assert got == b"small" + bytes(299_000)
    assert drained and all(size <= 1000 for size in drained)
    connection.close()


def test_read_timeout(reactor, pair) -> None:
    ends: list[Any] = []
    start = time.monotonic()
    connection = BufferedConnection(
        reactor, pair[0], read_timeout=0.03, on_end=lambda c, e: ends.append(e), on_data=lambda c: c.read()
    )
    reactor.after(0.02, lambda event, deadline: pair[1].send(b"x"))
    until(reactor, lambda: ends)
    assert isinstance(ends[0], TimeoutError) and "0.03" in str(ends[0])
    assert time.monotonic() - start >= 0.05, "a byte in between starts it anew"
    assert connection.closed and len(reactor.timers) == 0


def test_no_read_timeout_while_paused(reactor, pair) -> None:
    ends: list[Any] = []
    connection = BufferedConnection(reactor, pair[0], read_timeout=0.01, on_end=lambda c, e: ends.append(e))
    connection.pause()
    reactor.after(0.03, lambda event, deadline: reactor.stop())
    reactor.run()
    assert ends == []
    connection.resume()
    until(reactor, lambda: ends)
    assert isinstance(ends[0], TimeoutError)


def test_write_timeout(reactor, pair) -> None:
    ends: list[Any] = []
    connection = BufferedConnection(reactor, pair[0], write_timeout=0.02, on_end=lambda c, e: ends.append(e))
    connection.write(b"taken at once")
    reactor.after(0.04, lambda event, deadline: connection.write(bytes(5_000_000)))
    until(reactor, lambda: ends)
    assert isinstance(ends[0], TimeoutError) and "took nothing" in str(ends[0])
    assert connection.closed and len(reactor.timers) == 0


def test_rate_limits(reactor, pair) -> None:
    """20 KB at 200 KB/s, of which a burst of 4 KB goes at once: not before 80 ms; the same for reading."""
    limit = RateLimit(200_000, 4000)
    got: list[int] = []
    start = time.monotonic()
    sender = BufferedConnection(reactor, pair[0], write_limit=limit, write_timeout=5)
    reader = BufferedConnection(reactor, pair[1], on_data=lambda c: got.append(len(c.read())))
    sender.write(bytes(20_000))
    turns = reactor.turns
    until(reactor, lambda: sum(got) == 20_000)
    assert time.monotonic() - start >= 0.079
    assert reactor.turns - turns < 200, "a wake-up for each few bytes"
    got.clear()
    reader.write(bytes(20_000))
    sender.close()
    reader.close()


def test_read_limit_shared_by_two(reactor) -> None:
    limit = RateLimit(200_000, 4000)
    got: list[int] = []
    pairs = [socket.socketpair() for _ in range(2)]
    start = time.monotonic()
    connections = [
        BufferedConnection(reactor, a, read_limit=limit, on_data=lambda c: got.append(len(c.read()))) for a, _ in pairs
    ]
    for _, b in pairs:
        b.send(bytes(10_000))
    until(reactor, lambda: sum(got) == 20_000)
    assert time.monotonic() - start >= 0.079
    assert all(connection.read_bytes == 10_000 for connection in connections)
    for connection in connections:
        connection.close()
    for _, b in pairs:
        b.close()


def test_lost(reactor) -> None:
    """A reset: what came before it was told, then the error, once; the connection is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    seen: list[Any] = []
    connection = BufferedConnection(
        reactor, sock, on_data=lambda c: seen.append(c.read()), on_end=lambda c, e: seen.append(e)
    )
    peer.send(b"before")
    until(reactor, lambda: seen)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    until(reactor, lambda: len(seen) == 2)
    assert seen[0] == b"before" and isinstance(seen[1], ConnectionResetError)
    assert connection.closed and reactor.turn(0) == 0


def test_the_peer_reads_no_more(reactor, pair) -> None:
    ends: list[Any] = []
    connection = BufferedConnection(reactor, pair[0], on_end=lambda c, e: ends.append(e))
    pair[1].shutdown(socket.SHUT_RD)
    connection.write(b"x")
    until(reactor, lambda: ends)
    assert isinstance(ends[0], BrokenPipeError)


def test_a_loss_after_the_end(reactor, pair) -> None:
    """The peer shut its side, then left without reading: first the end, then the loss, each once."""
    ends: list[Any] = []
    connection = BufferedConnection(reactor, pair[0], on_end=lambda c, e: ends.append(e))
    connection.write(bytes(1_000_000))
    pair[1].shutdown(socket.SHUT_WR)
    until(reactor, lambda: ends)
    assert ends == [None] and not connection.closed and reactor.turn(0) == 0
    pair[1].close()
    until(reactor, lambda: len(ends) == 2)
    assert isinstance(ends[1], (BrokenPipeError, ConnectionResetError)) and connection.closed


def test_what_is_closed_is_gone_at_once(reactor, pair) -> None:
    """Without the garbage collector, which may not look for long."""
    gc.disable()
    try:
        connection = BufferedConnection(reactor, pair[0], on_data=lambda c: c.close(), read_timeout=9, write_timeout=9)
        connection.write(bytes(5_000_000))
        pair[1].send(b"x")
        gone = weakref.ref(connection)
        del connection
        until(reactor, lambda: gone() is None)
    finally:
        gc.enable()


def test_closed_in_a_handler(reactor, pair) -> None:
    calls: list[object] = []
    BufferedConnection(
        reactor, pair[0], on_data=lambda c: (calls.append(1), c.close()), on_end=lambda c, e: calls.append(e)
    )
    pair[1].send(b"x")
    pair[1].close()
    reactor.turn(1)
    assert reactor.turn(0) == 0 and calls == [1]


def test_wrong_arguments(reactor, pair) -> None:
    for marks in ({"read_low": 0}, {"read_low": 9, "read_high": 8}, {"write_low": 5, "write_high": 5}):
        with pytest.raises(ValueError, match="water marks"):
            BufferedConnection(reactor, pair[0], **marks)
    with pytest.raises(ValueError, match="read_timeout=0"):
        BufferedConnection(reactor, pair[0], read_timeout=0)
    for rate, burst in ((0, None), (float("inf"), None), (1, 0)):
        with pytest.raises(ValueError, match="RateLimit"):
            RateLimit(rate, burst)
    assert reactor.watches.count == 1


def test_a_flood_beside_a_hundred_quiet_ones(reactor) -> None:
    """Each quiet one is answered within two turns, however much the flooding one has to say: in a turn it gets no more
    than its budget."""
    pairs = [socket.socketpair() for _ in range(100)]
    flood, flooded = socket.socketpair()
    answered: list[int] = []
    connections = [
        BufferedConnection(reactor, a, on_data=lambda c: (answered.append(reactor.turns), c.write(c.read())))
        for a, _ in pairs
    ]
    took: list[int] = []
    connections.append(BufferedConnection(reactor, flooded, on_data=lambda c: took.append(len(c.read()))))
    flood.setblocking(False)

    def pour(event: object = None, what: object = None) -> None:
        try:
            while True:
                flood.send(bytes(1 << 16))
        except BlockingIOError:
            pass

    pouring = reactor.watch(flood, Condition.WRITE, pour, priority=0)
    for _ in range(5):
        reactor.turn(1)
    before = reactor.turns
    for _, b in pairs:
        b.send(b"?")
    until(reactor, lambda: len(answered) == 100)
    assert max(answered) - before <= 2, "the quiet ones waited for the flood"
    assert took and max(took) <= 256 << 10
    pouring.remove()
    for connection in connections:
        connection.close()
    for end in (flood, *(b for _, b in pairs)):
        end.close()


def connected_or_not(reactor: Reactor, address: Any) -> Any:
    """Connect as a reactor does. Returns the error, or None."""
    found: list[Any] = []

    def done(event: Any, what: Condition) -> None:
        event.remove()
        try:
            connect_result(sock)
            found.append(None)
        except OSError as error:
            found.append(error)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0, "the error is cleared"

    with socket.socket() as sock:
        if begin_connect(sock, address):
            connect_result(sock)
            return None
        reactor.watch(sock, Condition.WRITE, done)
        until(reactor, lambda: found)
        if found[0] is None:
            connect_result(sock)  # asking again harms nothing
    return found[0]


def test_connecting(reactor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert connected_or_not(reactor, address) is None
    error = connected_or_not(reactor, address)
    assert isinstance(error, ConnectionRefusedError)


def test_a_connect_that_goes_on() -> None:
    """A spurious report: neither connected nor failed."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        socks = []
        for _ in range(4):
            socks.append(socket.socket())
            under_way = not begin_connect(socks[-1], listener.getsockname())
        assert under_way
        time.sleep(0)
        with pytest.raises(OSError, match="connecting") as caught:
            connect_result(socks[-1])
        assert caught.value.errno == errno.EINPROGRESS
        for sock in socks:
            sock.close()


def test_no_room_at_a_unix_listener(tmp_path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        socks = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        with pytest.raises(OSError, match=path) as caught:
            for sock in socks:
                assert begin_connect(sock, path)
        assert caught.value.errno == errno.EAGAIN
        for sock in socks:
            sock.close()


def test_low_water_marks(reactor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    with a, b:
        set_low_water(b, read=10)
        set_low_water(a, unsent=16384)
        seen = []
        reactor.watch(b, Condition.READ, lambda event, what: seen.append(b.recv(100)))
        a.send(b"12345")
        assert reactor.turn(0.01) == 0
        a.send(b"67890")
        assert reactor.turn(5) == 1 and seen == [b"1234567890"]
        a.send(b"end")
        a.shutdown(socket.SHUT_WR)
        assert reactor.turn(5) == 1 and seen[-1] == b"end", "at the end, whatever is here"
        with pytest.raises(ValueError, match="at least one byte"):
            set_low_water(b, read=0)
