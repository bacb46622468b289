"""udp://: datagrams whole, each peer's apart, and nothing that strangers or a slow reader could break.

The other side is a bare socket where an anywire peer would be too polite. UDP may drop even on loopback when a buffer
is full: tests that need every datagram send less than that, or count what was dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import anywire
from anywire import sync

FRONTS = ("async", "blocking")
WAIT = 20.0


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def echo(channel: Any) -> None:
    for message in channel:
        channel.send(message)


@contextlib.contextmanager
def serving(handler: Callable[[Any], Any], address: str = "udp://127.0.0.1:0", **options: Any) -> Iterator[Any]:
    """A server whose handlers are woken at the end: datagrams have no end that would let them return."""
    server = sync.serve(handler, address, close_timeout=0.1, **options)
    with server:
        yield server


class Blocking:
    """The async channel's methods over the blocking one, so that one test body serves both fronts."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.channel, name)
        if name not in ("send", "recv", "recv_into", "recv_many", "send_many", "send_eof", "close"):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            return found(*arguments, **options)

        return call


def use(front: str, address: object, body: Callable[[Any], Any], **options: Any) -> Any:
    """Run the coroutine function `body(channel)` over a channel of a front."""

    async def run() -> Any:
        if front == "async":
            async with anywire.connect(str(address), **options) as channel:
                return await body(channel)
        with sync.connect(str(address), **options) as channel:
            return await body(Blocking(channel))

    return asyncio.run(run())


def bare(family: int = socket.AF_INET) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(WAIT)
    return sock


def where(address: Any) -> tuple[str, int]:
    return address.host, address.port


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_boundaries_are_kept(front: str, host: str) -> None:
    sizes = (0, 1, 0, 100, 1472, 1473, 9000, 65507)

    async def body(channel: Any) -> None:
        for size in sizes:
            await channel.send(bytes([size % 251]) * size)
            assert await channel.recv(timeout=WAIT) == bytes([size % 251]) * size
        await channel.send_many([b"%d" % number for number in range(150)])
        got: list[bytes] = []
        while len(got) < 150:
            got += await channel.recv_many(timeout=WAIT)
        assert got == [b"%d" % number for number in range(150)]

    with serving(echo, f"udp://{host}:0") as server:
        use(front, server.addresses[0], body)


def test_a_message_over_the_limit_is_refused_with_the_limit(front: str) -> None:
    async def body(channel: Any) -> None:
        with pytest.raises(anywire.TooLarge, match="over the limit of 65,507.*send it in parts") as caught:
            await channel.send(bytes(65508))
        assert (caught.value.size, caught.value.limit) == (65508, 65507)
        with pytest.raises(anywire.TooLarge):
            await channel.send_many([b"before", bytes(70_000), b"after"])
        assert await channel.recv(timeout=WAIT) == b"before"

    with serving(echo) as server:
        use(front, server.addresses[0], body)


def test_what_is_too_large_for_the_receiver_is_not_cut(front: str) -> None:
    async def body(channel: Any) -> None:
        for message in (b"long" * 100, b"short"):
            await channel.send(message)
        with pytest.raises(anywire.TooLarge, match="over the limit of 64.*max_message="):
            await channel.recv(timeout=WAIT)
        assert await channel.recv(timeout=WAIT) == b"short"
        assert channel.stats().drops == 1

    with serving(echo) as server:
        use(front, server.addresses[0], body, max_message=64)


def test_recv_into_a_buffer_that_is_too_small_loses_nothing(front: str) -> None:
    async def body(channel: Any) -> None:
        for message in (b"0123456789" * 10, b"next"):
            await channel.send(message)
        with pytest.raises(BufferError, match="the next message has 100 bytes and the buffer 30"):
            await channel.recv_into(bytearray(30), timeout=WAIT)
        buffer = bytearray(100)
        assert await channel.recv_into(buffer, timeout=WAIT) == 100
        assert buffer == b"0123456789" * 10
        assert await channel.recv_into(buffer, timeout=WAIT) == 4
        assert buffer[:4] == b"next"

    with serving(echo) as server:
        use(front, server.addresses[0], body)


def test_an_empty_datagram_is_a_message_and_no_end(front: str) -> None:
    with bare() as peer:
        peer.bind(("127.0.0.1", 0))

        async def body(channel: Any) -> None:
            await channel.send(b"")
            data, client = peer.recvfrom(100)
            assert data == b""
            for message in (b"", b"", b"x"):
                peer.sendto(message, client)
            assert [await channel.recv(timeout=WAIT) for _ in range(3)] == [b"", b"", b"x"]

        use(front, f"udp://127.0.0.1:{peer.getsockname()[1]}", body)


def test_try_send(front: str) -> None:
    async def body(channel: Any) -> None:
        assert channel.try_send(b"now") is True
        assert await channel.recv(timeout=WAIT) == b"now"
        with pytest.raises(anywire.TooLarge):
            channel.try_send(bytes(100_000))
        assert channel.unconfirmed == 1, "nothing confirms a datagram"

    with serving(echo) as server:
        use(front, server.addresses[0], body)


def test_a_cancelled_receive_takes_nothing() -> None:
    async def main() -> None:
        with serving(echo) as server:
            async with anywire.connect(server.addresses[0]) as channel:
                for number in range(100):
                    receiving = asyncio.ensure_future(channel.recv())
                    await asyncio.sleep(0)
                    await channel.send(b"%d" % number)
                    for _ in range(number % 5):
                        await asyncio.sleep(0)
                    receiving.cancel()
                    try:
                        message = await receiving
                    except asyncio.CancelledError:
                        message = await channel.recv(timeout=WAIT)
                    assert message == b"%d" % number

    asyncio.run(main())


def test_a_close_wakes_a_thread_that_receives() -> None:
    """shutdown(2) wakes recvmsg(2) with 0 bytes: that is no empty message."""
    with serving(echo) as server:
        channel = sync.connect(server.addresses[0])
        ended: list[BaseException | bytes] = []
        started = threading.Event()

        def receive() -> None:
            started.set()
            try:
                ended.append(channel.recv())
            except anywire.AnywireError as error:
                ended.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        started.wait(WAIT)
        channel.abort()
        thread.join(WAIT)
        assert not thread.is_alive()
        assert isinstance(ended[0], anywire.ChannelClosed)


def test_what_datagrams_can_not_do_is_refused(front: str) -> None:
    async def body(channel: Any) -> None:
        with pytest.raises(anywire.Unsupported, match="half-close"):
            await channel.send_eof()
        with pytest.raises(anywire.Unsupported, match="detach"):
            channel.detach()
        await channel.send(b"still here")
        assert await channel.recv(timeout=WAIT) == b"still here"

    with serving(echo) as server:
        use(front, server.addresses[0], body)
        connect_stream = anywire.connect_stream if front == "async" else sync.connect_stream
        with pytest.raises(anywire.Unsupported, match="udp carries messages"):
            connect_stream(server.addresses[0])


# -- peers -----------------------------------------------------------------------------------------------------------


def test_each_peer_has_its_channel_and_no_datagram_goes_astray(front: str) -> None:
    """Forty peers write at once, while the listener makes their sockets one after the other: between bind(2) and
    connect(2) of one the others' datagrams go there, and must find their way."""
    peers, each = 40, 15
    heard: dict[str, list[bytes]] = {}
    done = threading.Event()

    def note(address: str, message: bytes) -> None:
        heard.setdefault(address, []).append(message)
        if sum(map(len, heard.values())) == peers * each:
            done.set()

    def handle(channel: Any) -> None:
        for message in channel:
            note(channel.peer.address, message)

    async def handle_async(channel: Any) -> None:
        async for message in channel:
            note(channel.peer.address, message)

    def write(address: Any) -> dict[str, int]:
        socks = [bare() for _ in range(peers)]
        names = {}
        for sock in socks:
            sock.connect(where(address))
            names[f"udp://127.0.0.1:{sock.getsockname()[1]}"] = sock.getsockname()[1]
        threads = [threading.Thread(target=write_from, args=(socks[start::4],)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sock in socks:
            sock.close()
        return names

    def write_from(socks: list[socket.socket]) -> None:
        for number in range(each):
            for sock in socks:
                sock.send(b"%d %d" % (sock.getsockname()[1], number))

    async def main() -> tuple[dict[str, int], int]:
        async with anywire.serve(handle_async, "udp://127.0.0.1:0", rcvbuf=1 << 20, close_timeout=0.1) as server:
            names = await asyncio.to_thread(write, server.addresses[0])
            await asyncio.to_thread(done.wait, WAIT)
        return names, 0

    if front == "async":
        names, _ = asyncio.run(main())
    else:
        with serving(handle, rcvbuf=1 << 20) as server:
            names = write(server.addresses[0])
            done.wait(WAIT)
    assert set(heard) == set(names)
    for address, port in names.items():
        assert sorted(heard[address]) == sorted(b"%d %d" % (port, number) for number in range(each))


def test_a_listener_on_all_addresses_answers_from_the_one_that_was_asked(front: str) -> None:
    """A client drops answers that come from elsewhere (a connected socket does, RFC 1123 4.1.3.5)."""

    async def body(channel: Any) -> None:
        await channel.send(b"hello")
        assert await channel.recv(timeout=WAIT) == b"hello"

    for address, hosts in (("udp://0.0.0.0:0", ["127.0.0.1", "127.0.0.2"]), ("udp://:0", ["127.0.0.3", "[::1]"])):
        with serving(echo, address) as server:
            for host in hosts:
                use(front, f"udp://{host}:{server.addresses[0].port}", body)


def test_the_peers_address(front: str) -> None:
    seen: list[anywire.Peer] = []

    def handle(channel: Any) -> None:
        seen.append(channel.peer)
        echo(channel)

    async def body(channel: Any) -> anywire.Peer:
        await channel.send(b"x")
        await channel.recv(timeout=WAIT)
        return channel.peer  # type: ignore[no-any-return]

    with serving(handle, "udp://:0") as server:
        address = f"udp://127.0.0.1:{server.addresses[0].port}"
        assert use(front, address, body).address == address
    assert seen[0].wire == "udp"
    assert seen[0].address.startswith("udp://127.0.0.1:")


def test_authorize_is_asked(front: str) -> None:
    with (
        serving(echo, authorize=lambda peer: "go away") as server,
        bare() as client,
    ):
        client.sendto(b"x", where(server.addresses[0]))
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_a_port_has_one_listener_and_is_free_after_it(front: str) -> None:
    listen = anywire.listen if front == "async" else sync.listen
    with serving(echo) as server, bare() as client:
        address = server.addresses[0]
        client.connect(where(address))
        client.send(b"x")
        assert client.recv(100) == b"x"
        with pytest.raises(OSError, match=rf"listen {address}: Address already in use"):
            listen(address)
    # A peer's socket that outlives its listener does not keep the port from the next one.
    first = sync.listen("udp://127.0.0.1:0")
    with bare() as client:
        client.connect(where(first.addresses[0]))
        client.send(b"one")
        channel = first.accept(timeout=WAIT)
        address = first.addresses[0]
        first.close()
        second = listen(address)
        with pytest.raises(OSError, match="already in use"):
            listen(address)
        client.send(b"two")
        assert [channel.recv(timeout=WAIT), channel.recv(timeout=WAIT)] == [b"one", b"two"]
        channel.close()
        second.close()


def test_an_address_that_can_not_be_bound_says_which(front: str) -> None:
    listen = anywire.listen if front == "async" else sync.listen
    with pytest.raises(OSError, match=r"listen udp://192\.0\.2\.1:7: Cannot assign"):
        listen("udp://192.0.2.1:7")


# -- silence and refusal ---------------------------------------------------------------------------------------------


def test_nobody_listens(front: str) -> None:
    """ICMP says so, and the channel goes on: somebody may listen later."""
    with bare() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"udp://127.0.0.1:{port}"

    async def body(channel: Any) -> None:
        await channel.send(b"anybody?")
        with pytest.raises(anywire.Refused, match=rf"recv {address}: refused: .*ICMP port unreachable"):
            await channel.recv(timeout=WAIT)
        await channel.send(b"anybody?")
        with pytest.raises(anywire.Refused, match=rf"send(_many)? {address}: refused: .*ICMP port unreachable"):
            await channel.send_many([b"not sent"] * 3)
        with serving(echo, address):
            await channel.send(b"there you are")
            assert await channel.recv(timeout=WAIT) == b"there you are"

    use(front, address, body)


def test_a_peer_that_went_away_ends_its_channel(front: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "anywire")
    lost: list[anywire.PeerLost] = []
    over = threading.Event()

    def answer(channel: Any) -> None:
        channel.recv()
        client.close()
        try:
            channel.send(b"too late")
            channel.recv(timeout=WAIT)
        except anywire.PeerLost as error:
            lost.append(error)
            over.set()
            raise

    async def answer_async(channel: Any) -> None:
        await channel.recv()
        client.close()
        try:
            await channel.send(b"too late")
            await channel.recv(timeout=WAIT)
        except anywire.PeerLost as error:
            lost.append(error)
            over.set()
            raise

    async def main() -> None:
        async with anywire.serve(answer_async, "udp://127.0.0.1:0") as server:
            client.sendto(b"x", where(server.addresses[0]))
            await asyncio.to_thread(over.wait, WAIT)

    client = bare()
    if front == "async":
        asyncio.run(main())
    else:
        with serving(answer) as server:
            client.sendto(b"x", where(server.addresses[0]))
            over.wait(WAIT)
    assert "ICMP port unreachable" in str(lost[0])
    assert lost[0].unconfirmed == 1


def test_a_silent_peer_is_forgotten_and_may_come_again(front: str) -> None:
    ends: list[BaseException] = []
    counted = threading.Semaphore(0)

    def handle(channel: Any) -> None:
        channel.send(channel.recv())
        try:
            while True:
                channel.recv()      # the same once more, if the answer was slow
        except anywire.EndOfChannel as error:
            ends.append(error)
            counted.release()

    async def handle_async(channel: Any) -> None:
        await channel.send(await channel.recv())
        try:
            while True:
                await channel.recv()
        except anywire.EndOfChannel as error:
            ends.append(error)
            counted.release()

    def come_and_go(address: Any) -> None:
        with bare() as client:
            client.connect(where(address))
            client.settimeout(0.2)
            for message in (b"first", b"again"):
                for _ in range(100):
                    client.send(message)     # repeated, for it may meet the channel that is just being closed
                    with contextlib.suppress(TimeoutError):
                        assert client.recv(100) == message
                        break
                assert counted.acquire(timeout=WAIT)

    async def main() -> None:
        async with anywire.serve(handle_async, "udp://127.0.0.1:0", idle_timeout=0.1) as server:
            await asyncio.to_thread(come_and_go, server.addresses[0])

    if front == "async":
        asyncio.run(main())
    else:
        with serving(handle, idle_timeout=0.1) as server:
            come_and_go(server.addresses[0])
    assert len(ends) >= 2
    assert "nothing came for 0.1 s (idle_timeout=)" in str(ends[0])


def test_a_timeout_shorter_than_the_idle_time_is_a_timeout(front: str) -> None:
    raised: list[BaseException] = []
    over = threading.Event()

    def handle(channel: Any) -> None:
        channel.recv()
        for timeout in (0.05, 10):
            try:
                channel.recv(timeout=timeout)
            except anywire.AnywireError as error:
                raised.append(error)
        over.set()

    async def handle_async(channel: Any) -> None:
        await channel.recv()
        for timeout in (0.05, 10):
            try:
                await channel.recv(timeout=timeout)
            except anywire.AnywireError as error:
                raised.append(error)
        over.set()

    async def main() -> None:
        async with anywire.serve(handle_async, "udp://127.0.0.1:0", idle_timeout=0.3) as server:
            client.sendto(b"x", where(server.addresses[0]))
            await asyncio.to_thread(over.wait, WAIT)

    with bare() as client:
        if front == "async":
            asyncio.run(main())
        else:
            with serving(handle, idle_timeout=0.3) as server:
                client.sendto(b"x", where(server.addresses[0]))
                over.wait(WAIT)
    assert [type(error) for error in raised] == [anywire.TimedOut, anywire.EndOfChannel]


# -- too much --------------------------------------------------------------------------------------------------------


def test_what_a_slow_reader_misses_is_counted(front: str) -> None:
    with bare() as peer:
        peer.bind(("127.0.0.1", 0))

        async def body(channel: Any) -> None:
            await channel.send(b"begin")
            _, client = peer.recvfrom(100)
            for number in range(3000):
                peer.sendto(number.to_bytes(4, "big") * 100, client)
            numbers = []
            with contextlib.suppress(anywire.TimedOut):
                while True:
                    numbers.append(int.from_bytes((await channel.recv(timeout=0.2))[:4], "big"))
            peer.sendto(b"\xff\xff\xff\xff", client)     # its count comes with the next datagram that is taken
            await channel.recv(timeout=WAIT)
            stats = channel.stats()
            assert 0 < len(numbers) < 3000
            assert numbers == sorted(numbers)
            assert stats.drops == 3000 - len(numbers)

        use(front, f"udp://127.0.0.1:{peer.getsockname()[1]}", body, rcvbuf=65536)


def test_a_flood_of_strangers_costs_at_most_what_was_allowed(front: str) -> None:
    """`max_peers` sockets and a bounded queue; the rest is dropped and counted; a seat that is left is given again."""

    async def main() -> None:
        listener = anywire.listen("udp://127.0.0.1:0", max_peers=3, rcvbuf=4 << 20)
        strangers = [bare() for _ in range(100)]
        try:
            for round_ in range(3):
                for stranger in strangers:
                    stranger.sendto(bytes(20_000), where(listener.addresses[0]))
                acceptor = listener._acceptors[0]
                channels = [await listener.accept(timeout=WAIT) for _ in range(3)]
                with pytest.raises(anywire.TimedOut):
                    await listener.accept(timeout=0.1)
                assert acceptor.held_bytes == 0
                assert len(acceptor.peers) == 3
                assert listener._slot.stats().drops == 97 * (round_ + 1)
                assert [await channel.recv(timeout=WAIT) for channel in channels] == [bytes(20_000)] * 3
                for channel in channels:
                    await channel.close()
                assert not acceptor.peers
        finally:
            listener.close()
            for stranger in strangers:
                stranger.close()

    def blocking() -> None:
        with sync.listen("udp://127.0.0.1:0", max_peers=3, rcvbuf=4 << 20) as listener, contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(bare()) for _ in range(100)]
            for stranger in strangers:
                stranger.sendto(bytes(20_000), where(listener.addresses[0]))
            channels = [listener.accept(timeout=WAIT) for _ in range(3)]
            with pytest.raises(anywire.TimedOut):
                listener.accept(timeout=0.1)
            assert listener._slot.stats().drops == 97
            for channel in channels:
                channel.close()

    if front == "async":
        asyncio.run(main())
    else:
        blocking()


def test_peers_go_on_while_the_server_is_at_its_limit_or_closing(front: str) -> None:
    """Nobody accepts then, so nobody reads the listening socket: each peer must have one of its own."""

    def talk(address: Any, finish: Callable[[], Any]) -> None:
        with bare() as first, bare() as second:
            for sock in (first, second):
                sock.connect(where(address))
            first.send(b"one")
            assert first.recv(100) == b"one"
            second.send(b"waits")
            for number in range(50):
                first.send(b"%d" % number)
                assert first.recv(100) == b"%d" % number
            first.send(b"leave")                # then there is room for the second
            assert second.recv(100) == b"waits"
            finish()
            second.send(b"leave")
            assert second.recv(100) == b"leave"

    def handle(channel: Any) -> None:
        for message in channel:
            channel.send(message)
            if message == b"leave":
                return

    async def handle_async(channel: Any) -> None:
        async for message in channel:
            await channel.send(message)
            if message == b"leave":
                return

    async def main() -> None:
        async with anywire.serve(handle_async, "udp://127.0.0.1:0", limit=1, close_timeout=WAIT) as server:
            loop = asyncio.get_running_loop()
            closing: list[Any] = []

            def finish() -> None:
                closing.append(asyncio.run_coroutine_threadsafe(server.close(), loop))

            await asyncio.to_thread(talk, server.addresses[0], finish)
            await asyncio.wrap_future(closing[0])

    if front == "async":
        asyncio.run(main())
    else:
        with sync.serve(handle, "udp://127.0.0.1:0", limit=1, close_timeout=WAIT) as server:
            closing = threading.Thread(target=server.close)
            talk(server.addresses[0], closing.start)
            closing.join(WAIT)
            assert not closing.is_alive()


def test_without_descriptors_a_new_peer_waits_and_is_not_lost(front: str) -> None:
    async def main() -> None:
        listener = (anywire.listen if front == "async" else sync.listen)("udp://127.0.0.1:0")
        if front == "async":
            accepting = asyncio.ensure_future(listener.accept(timeout=WAIT))
            await asyncio.sleep(0)
        else:
            accepting = asyncio.ensure_future(asyncio.to_thread(listener.accept, timeout=WAIT))
            while not listener._leading:                # it has opened what it waits with
                await asyncio.sleep(0.001)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with bare() as client:
            # No number is left but those of stdin, stdout and stderr, whichever others have just been closed.
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                client.sendto(b"patience", where(listener.addresses[0]))
                while not listener._slot.stats().accept_errors:
                    await asyncio.sleep(0.001)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            channel = await accepting
            message = channel.recv(timeout=WAIT)
            assert (await message if front == "async" else message) == b"patience"
            channel.abort()
        listener.close()

    asyncio.run(main())


def test_several_threads_accept_each_peer_once() -> None:
    peers = 200
    came: list[str] = []
    wrong: list[BaseException] = []
    with sync.listen("udp://127.0.0.1:0") as listener:
        channels = []

        def accept() -> None:
            try:
                while True:
                    channel = listener.accept()
                    channels.append(channel)
                    came.append(channel.peer.address)
            except anywire.ChannelClosed:
                pass
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=accept) for _ in range(4)]
        for thread in threads:
            thread.start()
        socks = [bare() for _ in range(peers)]
        for sock in socks:
            sock.sendto(b"x", where(listener.addresses[0]))
        deadline = time.monotonic() + 20
        while len(came) < peers and not wrong and time.monotonic() < deadline:
            time.sleep(0.01)
        listener.close()
        for thread in threads:
            thread.join(20)
    for closed in [*channels]:
        closed.abort()
    for sock in socks:
        sock.close()
    assert not wrong
    assert len(came) == len(set(came)) == peers
