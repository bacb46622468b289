"""asyncio's own streams: each test runs on the standard loop and on ours, where readers and writers are made quick."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import anywire.loop

LOOPS = {"standard": asyncio.new_event_loop, "ours": anywire.loop.new_event_loop}
PATIENCE = 20.0


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        told: list[Any] = []
        runner.get_loop().set_exception_handler(lambda loop, context: told.append(context))

        async def limited(main: Awaitable[Any]) -> Any:
            return await asyncio.wait_for(main, PATIENCE)

        yield lambda main: runner.run(limited(main))
        assert told == []


@contextlib.asynccontextmanager
async def served(limit: int = 65536) -> Any:
    """The reader and the writer that a server's handler gets, and the client's socket."""
    got: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result((reader, writer))
        await over.wait()

    server = await asyncio.start_server(handler, "127.0.0.1", 0, limit=limit)
    with socket.socket() as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, server.sockets[0].getsockname())
        reader, writer = await got
        yield reader, writer, client
    over.set()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def waiting(reader: asyncio.StreamReader) -> None:
    while reader._waiter is None:  # type: ignore[attr-defined]
        await asyncio.sleep(0)


def test_they_are_what_they_were(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, writer, _):
            assert isinstance(reader, asyncio.StreamReader)
            assert isinstance(writer, asyncio.StreamWriter)
            assert repr(reader).startswith("<StreamReader")
            assert repr(writer).startswith("<StreamWriter transport=<")
            reads = (reader.read(1), reader.readexactly(1), reader.readuntil(), reader.readline())
            for coroutine in (*reads, writer.drain()):
                assert asyncio.iscoroutine(coroutine)
                assert "never awaited" not in repr(coroutine)
                coroutine.close()
    run(main())


def test_on_our_loop_they_are_quick() -> None:
    async def main() -> None:
        async with served() as (reader, writer, _):
            assert type(reader).__module__ == "anywire.loop._streams"
            assert type(writer).__module__ == "anywire.loop._stream_writer"
    anywire.loop.run(main())


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4, 100), (100,), (6,)])
def test_read_takes_no_more_than_it_asked_for(run: Any, sizes: tuple[int, ...]) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            reading = asyncio.ensure_future(reader.read(sizes[0]))
            await waiting(reader)
            client.send(b"abcdef")
            got = [await reading]
            assert got[0] == b"abcdef"[:sizes[0]]
            for size in sizes[1:]:
                got.append(await reader.read(size))
            assert b"".join(got) == b"abcdef"
            assert reader._buffer == b""
    run(main())


def test_reads_of_all_kinds_in_turn(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            client.send(b"line\nexact|until;rest")
            assert await reader.readline() == b"line\n"
            assert await reader.readexactly(5) == b"exact"
            assert await reader.read(1) == b"|"
            assert await reader.readuntil(b";") == b"until;"
            assert await reader.read(0) == b""
            assert await reader.read(100) == b"rest"
            late = asyncio.ensure_future(reader.readline())
            await waiting(reader)
            client.send(b"half")
            await asyncio.sleep(0.001)
            client.send(b" line\nmore")
            assert await late == b"half line\n"
            client.shutdown(socket.SHUT_WR)
            assert await reader.read(-1) == b"more"
            assert await reader.read(10) == b""
            assert await reader.read() == b""
            assert reader.at_eof()
    run(main())


SCRIPT = b"line\nexact||ends;;;rest"


async def play(reader: asyncio.StreamReader) -> list[bytes]:
    return [await reader.readline(), await reader.readexactly(5), await reader.readuntil(b"||"),
            await reader.readuntil(b";;"), await reader.readline()]


@pytest.mark.parametrize("cut", range(len(SCRIPT) + 1))
def test_every_split_gives_the_same(run: Any, cut: int) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            playing = asyncio.ensure_future(play(reader))
            await waiting(reader)
            client.send(SCRIPT[:cut])
            # The other part when this one has been taken: what is left of it stays in the buffer.
            left = cut - next((end for end in (18, 12, 10, 5) if end <= cut), 0)
            while len(reader._buffer) != left:
                await asyncio.sleep(0)
            client.send(SCRIPT[cut:])
            client.shutdown(socket.SHUT_WR)
            assert await playing == [b"line\n", b"exact", b"||", b"ends;;", b";rest"]
    run(main())


@pytest.mark.parametrize("late", [False, True], ids=["here", "while it waits"])
@pytest.mark.parametrize(("sent", "end", "read", "gives"), [
    (b"abc", True, lambda r: r.readexactly(4), (asyncio.IncompleteReadError, b"abc", 4)),
    (b"abc", True, lambda r: r.readuntil(b"z"), (asyncio.IncompleteReadError, b"abc", None)),
    (b"abc", True, lambda r: r.readline(), b"abc"),
    (b"", True, lambda r: r.readline(), b""),
    (b"", True, lambda r: r.readexactly(1), (asyncio.IncompleteReadError, b"", 1)),
    (b"0123456789z!", False, lambda r: r.readuntil(b"z"), b"0123456789z"),
    (b"0123456789az!", False, lambda r: r.readuntil(b"z"), (asyncio.LimitOverrunError, 11, b"0123456789az!")),
    (b"0123456789abc", False, lambda r: r.readuntil(b"z"), (asyncio.LimitOverrunError, 13, b"0123456789abc")),
    (b"0123456789abc", False, lambda r: r.readuntil(b"yz"), (asyncio.LimitOverrunError, 12, b"0123456789abc")),
    (b"0123456789a\n!", False, lambda r: r.readline(), (ValueError, b"!")),
    (b"0123456789abc", False, lambda r: r.readline(), (ValueError, b"")),
    (b"x" * 5000, False, lambda r: r.readexactly(5000), b"x" * 5000),
])
def test_ends_and_limits(run: Any, late: bool, sent: bytes, end: bool, read: Any, gives: Any) -> None:
    async def main() -> None:
        async with served(limit=10) as (reader, _, client):
            if late:
                reading = asyncio.ensure_future(read(reader))
                await waiting(reader)
            client.send(sent)
            if end:
                client.shutdown(socket.SHUT_WR)
            if not late:
                # Paused at twice the limit: what is beyond it comes when there is room.
                while not (reader._eof if end else len(reader._buffer) >= min(len(sent), 20)):
                    await asyncio.sleep(0)
                reading = asyncio.ensure_future(read(reader))
            if isinstance(gives, bytes):
                assert await reading == gives
                return
            with pytest.raises(gives[0]) as raised:
                await reading
            if gives[0] is asyncio.IncompleteReadError:
                assert (raised.value.partial, raised.value.expected) == gives[1:]
                assert reader._buffer == b""
            elif gives[0] is asyncio.LimitOverrunError:
                assert raised.value.consumed == gives[1]
                assert reader._buffer == gives[2]
            else:
                assert "limit" in str(raised.value)
                assert reader._buffer == gives[1]
    run(main())


@pytest.mark.parametrize("read", [lambda r: r.readexactly(10), lambda r: r.readuntil(b";"), lambda r: r.readline()])
def test_a_cancelled_read_of_more_keeps_what_came(run: Any, read: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            for part in (b"first ", b"second"):
                reading = asyncio.ensure_future(read(reader))
                await waiting(reader)
                client.send(part)
                while not reader._buffer.endswith(part):
                    await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                assert reader._waiter is None
                if part == b"first ":
                    assert await reader.read(3) == b"fir"
            assert await reader.readexactly(9) == b"st second"
    run(main())


@pytest.mark.parametrize("bad", [lambda r: r.readexactly(-1), lambda r: r.readuntil(b"")])
def test_wrong_arguments_are_told(run: Any, bad: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, _):
            with pytest.raises(ValueError, match="less than zero|at least one-byte"):
                await bad(reader)
    run(main())


def test_unusual_arguments_are_the_standard_librarys(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            client.send(b"a;b;\nc")
            assert await reader.readuntil(bytearray(b";")) == b"a;"
            assert await reader.readexactly(True) == b"b"
            assert await reader.readexactly(0) == b""
            async for line in reader:
                assert line == b";\n"
                break
    run(main())


def test_eof_wakes_who_waits(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            reading = asyncio.ensure_future(reader.read(10))
            await waiting(reader)
            client.shutdown(socket.SHUT_WR)
            assert await reading == b""
    run(main())


def test_a_cancelled_read_has_taken_nothing(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            for _ in range(3):
                reading = asyncio.ensure_future(reader.read(10))
                await waiting(reader)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                assert reader._waiter is None
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(10), 0.001)
            reading = asyncio.ensure_future(reader.read(10))
            await waiting(reader)
            client.send(b"kept")
            reading.cancel()                       # before the loop has seen the bytes
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert await reader.read(10) == b"kept"
    run(main())


def test_only_one_may_wait(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, _, client):
            first = asyncio.ensure_future(reader.read(10))
            await waiting(reader)
            for second in (reader.read(10), reader.readexactly(1), reader.readline()):
                with pytest.raises(RuntimeError, match="called while another coroutine is already waiting"):
                    await second
            client.send(b"x")
            assert await first == b"x"
            again = reader.read(1)
            client.send(b"y")
            assert await again == b"y"
            with pytest.raises(RuntimeError, match="already awaited coroutine"):
                await again
    run(main())


def test_a_reader_that_is_behind_pauses_the_transport(run: Any) -> None:
    async def main() -> None:
        async with served(limit=1000) as (reader, writer, client):
            data = bytes(i % 251 for i in range(1_000_000))
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(client, data))
            while writer.transport.is_reading():
                await asyncio.sleep(0)
            got = bytearray()
            while len(got) < len(data):
                piece = await reader.read(70_000 if len(got) % 2 else 999)
                assert piece
                got += piece
            assert got == data
            await sending
    run(main())


def test_an_exception_reaches_who_reads_and_who_drains(run: Any) -> None:
    async def main() -> None:
        async with served() as (reader, writer, _):
            reading = asyncio.ensure_future(reader.read(10))
            await waiting(reader)
            reader.set_exception(ZeroDivisionError("told"))
            with pytest.raises(ZeroDivisionError):
                await reading
            with pytest.raises(ZeroDivisionError):
                await reader.read(10)
            with pytest.raises(ZeroDivisionError):
                await writer.drain()
    run(main())


def test_drain_waits_while_writing_is_paused(run: Any) -> None:
    async def main() -> None:
        async with served() as (_, writer, client):
            written = 0
            while writer.transport.get_write_buffer_size() <= 65536:
                writer.write(b"x" * 100_000)
                written += 100_000
            draining = [asyncio.ensure_future(writer.drain()) for _ in range(3)]
            await asyncio.sleep(0)
            assert not any(one.done() for one in draining)
            draining[0].cancel()
            loop = asyncio.get_running_loop()
            while written:
                written -= len(await loop.sock_recv(client, written))
            await asyncio.gather(*draining[1:])
            assert draining[0].cancelled()
            await asyncio.create_task(writer.drain())
    run(main())


def test_drain_after_the_connection_is_lost(run: Any) -> None:
    async def main() -> None:
        async with served() as (_, writer, client):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0)
    run(main())


def test_both_ends_of_the_standard_library(run: Any) -> None:
    async def main() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)

        async def client(number: int) -> None:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for size in (1, 1000, 65536, 65537, 300_000):
                data = bytes([number]) * size
                writer.write(data)
                await writer.drain()
                assert await reader.readexactly(size) == data
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(client(i) for i in range(10)))
        server.close()
        await server.wait_closed()
    run(main())


def test_a_changed_class_is_left_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = bytearray()
    standard = asyncio.StreamReader.feed_data

    def feed_data(self: asyncio.StreamReader, data: bytes) -> None:
        fed.extend(data)
        standard(self, data)

    async def main() -> None:
        monkeypatch.setattr(asyncio.StreamReader, "feed_data", feed_data)
        async with served() as (reader, _, client):
            client.send(b"seen")
            assert await reader.read(10) == b"seen"
            assert fed == b"seen"
    run(main())


def test_a_subclass_is_left_alone(run: Any) -> None:
    class Reader(asyncio.StreamReader):
        def feed_data(self, data: bytes) -> None:
            super().feed_data(data.upper())

    async def main() -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        reader = Reader(loop=loop)
        transport, _ = await loop.create_connection(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), sock=ours)
        with theirs:
            theirs.send(b"loud")
            assert await reader.read(10) == b"LOUD"
            transport.close()
            await asyncio.sleep(0)
    run(main())
