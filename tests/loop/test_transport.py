"""Stream transports, the order of their callbacks, and reading: each test runs on the standard loop and on ours."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.loop.transport_recorder import (
    LOOPS,
    Buffered,
    Recorder,
    complaints,
    connected,
    fill,
    pattern,
    receive,
    running,
)


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from running(request.param)


# ---- the order of things -------------------------------------------------------------------------------------------


def test_callbacks_come_in_order_and_once(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            assert protocol.calls == ["connection_made"]
            theirs.send(b"hello")
            await protocol.until(lambda: protocol.data == b"hello")
            theirs.shutdown(socket.SHUT_WR)
            assert await protocol.lost is None
            transport.close()
            transport.abort()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]
    run(main())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_connection_lost_is_never_inside_close(run: Any, how: str) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            getattr(transport, how)()
            assert transport.is_closing()
            assert not transport.is_reading()
            assert "connection_lost" not in protocol.calls
            assert await protocol.lost is None
            assert await receive(theirs, 1) == b""
            assert protocol.calls.count("connection_lost") == 1
    run(main())


def test_a_write_error_is_told_later(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        theirs.close()
        transport.write(b"nobody")
        assert "connection_lost" not in protocol.calls
        assert isinstance(await protocol.lost, (BrokenPipeError, type(None)))
    run(main())


def test_close_in_connection_made(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(connection_made=lambda self: self.transport.close())
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.send(b"never read")
            await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
            assert await protocol.lost is None
            assert protocol.calls == ["connection_made", "connection_lost"]
    run(main())


def test_what_was_written_before_close_arrives(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        with theirs:
            data = pattern(300_000)
            transport.write(data)
            transport.close()
            assert "connection_lost" not in protocol.calls
            assert await receive(theirs, len(data) + 1) == data
            assert await protocol.lost is None
    run(main())


def test_what_was_written_just_before_abort_is_sent(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(data_received=lambda self, data: (self.transport.write(b"bye"), self.transport.abort()))
        _, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"?")
            assert await receive(theirs, 4) == b"bye"
            await protocol.lost
    run(main())


def test_abort_drops_what_the_kernel_did_not_take(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            written = await fill(transport)
            transport.abort()
            assert transport.get_write_buffer_size() == 0
            assert await protocol.lost is None
            assert len(await receive(theirs, len(written))) < len(written)
    run(main())


def test_the_context_of_callbacks_is_that_of_the_transports_birth(run: Any) -> None:
    variable = contextvars.ContextVar("variable", default="none")

    async def main() -> None:
        seen: list[str] = []
        protocol = Recorder(
            connection_made=lambda self: seen.append(variable.get()),
            data_received=lambda self, data: seen.append(variable.get()),
            eof_received=lambda self: seen.append(variable.get()))
        variable.set("birth")
        _, theirs = await connected(protocol)
        with theirs:
            variable.set("later")
            theirs.send(b"x")
            await protocol.until(lambda: bool(protocol.data))
            theirs.shutdown(socket.SHUT_WR)
            await protocol.lost
            assert seen == ["birth"] * 3
    run(main())


# ---- reading -------------------------------------------------------------------------------------------------------


def test_pause_reading_inside_data_received(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(data_received=lambda self, data: self.transport.pause_reading())
        transport, theirs = await connected(protocol)
        with theirs:
            data = pattern(400_000)
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(theirs, data))
            while len(protocol.data) < len(data):
                await protocol.until(lambda: not transport.is_reading())
                before = len(protocol.calls)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert len(protocol.calls) == before, "called while paused"
                transport.resume_reading()
                assert transport.is_reading()
                if len(protocol.data) < len(data):
                    await protocol.until(lambda before=before: len(protocol.calls) > before)
            await sending
            assert protocol.data == data
            transport.close()
            await protocol.lost
    run(main())


def test_pausing_twice_and_resuming_what_is_not_paused(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.resume_reading()
            transport.pause_reading()
            transport.pause_reading()
            assert not transport.is_reading()
            transport.resume_reading()
            assert transport.is_reading()
            theirs.send(b"x")
            await protocol.until(lambda: protocol.data == b"x")
            transport.close()
            transport.pause_reading()
            transport.resume_reading()
            assert not transport.is_reading()
            await protocol.lost
    run(main())


def test_a_peer_that_hangs_up_while_reading_is_paused(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        transport.pause_reading()
        theirs.send(b"last")
        theirs.close()
        for _ in range(20):
            await asyncio.sleep(0)
        assert protocol.calls == ["connection_made"]
        transport.resume_reading()
        assert await protocol.lost is None
        assert protocol.data == b"last"
        assert protocol.calls[-2:] == ["eof_received", "connection_lost"]
    run(main())


def test_eof_received_may_keep_writing_open(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(eof_received=lambda self: True)
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.shutdown(socket.SHUT_WR)
            await protocol.until(lambda: "eof_received" in protocol.calls)
            assert not transport.is_closing()
            transport.write(b"answer")
            assert await receive(theirs, 6) == b"answer"
            for _ in range(5):
                await asyncio.sleep(0)
            assert protocol.calls.count("eof_received") == 1
            transport.close()
            assert await protocol.lost is None
    run(main())


@pytest.mark.parametrize("where", ["data_received", "eof_received"])
def test_what_a_protocol_raises_ends_the_connection(run: Any, where: str) -> None:
    async def main() -> None:
        def fail(self: Recorder, *args: Any) -> None:
            raise ZeroDivisionError("in the protocol")
        protocol = Recorder(**{where: fail})
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"x")
            theirs.shutdown(socket.SHUT_WR)
            assert isinstance(await protocol.lost, ZeroDivisionError)
            found = complaints()
            assert [(c["message"], c["transport"], c["protocol"]) for c in found] == [
                (f"Fatal error: protocol.{where}() call failed.", transport, protocol)]
    run(main())


def test_a_reset_is_told_as_the_error(run: Any) -> None:
    async def main() -> None:
        server = socket.create_server(("127.0.0.1", 0))
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        server.close()
        protocol = Recorder()
        await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        theirs.close()
        assert isinstance(await protocol.lost, ConnectionResetError)
        assert "eof_received" not in protocol.calls
    run(main())


# ---- buffered protocols --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_buffered_protocol(run: Any, size: int) -> None:
    async def main() -> None:
        protocol = Buffered(size)
        transport, theirs = await connected(protocol)
        with theirs:
            data = pattern(3000 if size == 1 else 500_000)
            sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(theirs, data))
            await protocol.until(lambda: len(protocol.data) == len(data))
            await sending
            assert protocol.data == data
            transport.close()
            await protocol.lost
    run(main())


@pytest.mark.parametrize("room", [b"", bytearray(), b"read-only", 7, None])
def test_bad_buffers_end_the_connection(run: Any, room: Any) -> None:
    async def main() -> None:
        protocol = Buffered(10, get_buffer=lambda self: room)
        _, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"x")
            error = await protocol.lost
            found = complaints()
            assert len(found) == 1
            assert found[0]["exception"] is error
            if room == b"read-only":
                assert found[0]["message"] == "Fatal read error on socket transport"
            else:
                assert found[0]["message"] == "Fatal error: protocol.get_buffer() call failed."
    run(main())


def test_what_buffer_updated_raises_ends_the_connection(run: Any) -> None:
    async def main() -> None:
        def fail(self: Buffered, count: int) -> None:
            raise ZeroDivisionError("in the protocol")
        protocol = Buffered(10, buffer_updated=fail)
        _, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"x")
            assert isinstance(await protocol.lost, ZeroDivisionError)
            assert [c["message"] for c in complaints()] == ["Fatal error: protocol.buffer_updated() call failed."]
    run(main())


def test_the_buffer_may_be_resized_in_buffer_updated(run: Any) -> None:
    async def main() -> None:
        protocol = Buffered(4, buffer_updated=lambda self, count: self.room.extend(b"\0" * 4))
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(pattern(100))
            await protocol.until(lambda: len(protocol.data) == 100)
            assert protocol.data == pattern(100)
            transport.close()
            await protocol.lost
    run(main())


def test_protocols_change_in_the_middle_of_reading(run: Any) -> None:
    async def main() -> None:
        buffered = Buffered(3)
        plain = Recorder()

        def to_buffered(self: Recorder, data: bytes) -> None:
            self.transport.set_protocol(buffered)
            buffered.transport = self.transport
            assert self.transport.get_protocol() is buffered

        def to_plain(self: Buffered, count: int) -> None:
            if len(self.data) >= 6:
                self.transport.set_protocol(plain)
                plain.transport = self.transport
        buffered.when["buffer_updated"] = to_plain
        first = Recorder(data_received=to_buffered)
        transport, theirs = await connected(first)
        with theirs:
            theirs.send(b"one")
            await first.until(lambda: first.data == b"one")
            theirs.send(b"twotwothree")
            await plain.until(lambda: plain.data == b"three")
            assert buffered.data == b"twotwo"
            transport.close()
            assert await plain.lost is None
            assert not first.lost.done()
    run(main())
