"""Stream transports: each test runs on the standard loop and on ours, with the same expectations."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import socket
import sys
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import anywire.loop
from anywire.loop._transport import StreamTransport

LOOPS = {"standard": asyncio.new_event_loop, "ours": anywire.loop.new_event_loop}
PATIENCE = 20.0


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs one coroutine; fails on anything that reaches the loop's exception handler and was not expected."""
    loop = LOOPS[request.param]()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    loop.complaints = complaints  # type: ignore[attr-defined]

    def go(main: Awaitable[Any]) -> Any:
        return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))

    asyncio.set_event_loop(loop)
    yield go
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    asyncio.set_event_loop(None)
    if request.param == "standard":                # it leaves connections behind in some tests: not into the next ones
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        sys.unraisablehook = hook
    assert not loop.complaints  # type: ignore[attr-defined]


def complaints() -> list[dict[str, Any]]:
    """What reached the exception handler so far; the test has seen it."""
    found = list(asyncio.get_running_loop().complaints)  # type: ignore[attr-defined]
    asyncio.get_running_loop().complaints.clear()  # type: ignore[attr-defined]
    return found


class Recorder(asyncio.Protocol):
    """Notes every call; `when` holds what to do in one."""

    def __init__(self, **when: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.when = when
        self.transport: Any = None
        self.error: BaseException | None = None
        self.changed = asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()

    def note(self, name: str, *args: Any) -> Any:
        self.calls.append(name)
        self.changed.set()
        return self.when[name](self, *args) if name in self.when else None

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("connection_made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.data += data
        self.note("data_received", data)

    def eof_received(self) -> Any:
        return self.note("eof_received")

    def pause_writing(self) -> None:
        self.note("pause_writing")

    def resume_writing(self) -> None:
        self.note("resume_writing")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        if not self.lost.done():
            self.lost.set_result(exc)
        self.note("connection_lost", exc)


class Buffered(asyncio.BufferedProtocol):
    """A buffered protocol with room of `size` bytes."""

    def __init__(self, size: int, **when: Callable[..., Any]) -> None:
        self.room = bytearray(size)
        self.data = bytearray()
        self.when = when
        self.calls: list[str] = []
        self.changed = asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()

    until = Recorder.until

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, hint: int) -> Any:
        return self.when["get_buffer"](self) if "get_buffer" in self.when else self.room

    def buffer_updated(self, count: int) -> None:
        self.data += self.room[:count]
        self.calls.append("buffer_updated")
        self.changed.set()
        if "buffer_updated" in self.when:
            self.when["buffer_updated"](self, count)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")
        self.changed.set()
        self.lost.set_result(exc)


async def connected(protocol: asyncio.BaseProtocol, *, small: bool = False) -> tuple[Any, socket.socket]:
    """A transport of `protocol` over one end of a socket pair, and the other end, non-blocking."""
    ours, theirs = socket.socketpair()
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
    return transport, theirs


async def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes, or less at the end."""
    loop = asyncio.get_running_loop()
    got = bytearray()
    while len(got) < count:
        piece = await loop.sock_recv(sock, count - len(got))
        if not piece:
            break
        got += piece
    return bytes(got)


def collecting(accepted: list[Recorder]) -> Callable[[], Recorder]:
    """A factory of protocols that puts them into a list."""
    def factory() -> Recorder:
        accepted.append(Recorder())
        return accepted[-1]
    return factory


def pattern(count: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(count))


async def fill(transport: Any) -> bytes:
    """Write until the kernel takes no more and bytes wait; returns what was written."""
    written = bytearray()
    while transport.get_write_buffer_size() == 0:
        transport.write(b"x" * 65536)
        written += b"x" * 65536
    return bytes(written)


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


# ---- writing -------------------------------------------------------------------------------------------------------


def test_writes_of_all_shapes_arrive_in_order(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            whole = pattern(1000)
            transport.write(b"")
            transport.write(whole[:10])
            transport.write(bytearray(whole[10:20]))
            transport.write(memoryview(whole)[20:30])
            transport.write(memoryview(bytearray(whole))[30:40])
            transport.writelines([whole[40:50], b"", bytearray(whole[50:60]), memoryview(whole)[60:70]])
            transport.writelines([])
            transport.writelines(iter([whole[70:80]]))
            assert await receive(theirs, 80) == whole[:80]
            transport.close()
            await protocol.lost
    run(main())


def test_mutable_buffers_may_change_after_write(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            before = len(await fill(transport))
            changing = bytearray(b"first")
            transport.write(bytes(changing))
            if isinstance(transport, StreamTransport):   # the standard loop keeps the caller's buffer
                transport.write(changing)
                transport.write(memoryview(changing)[1:3])
                transport.writelines([changing])
                changing[:] = b"XXXXX"
                changing.extend(b"resized")
            else:
                transport.writelines([b"first", b"ir", b"first"])
            assert (await receive(theirs, before + 17))[before:] == b"firstfirstirfirst"
            transport.abort()
            await protocol.lost
    run(main())


def test_a_released_view_was_copied(run: Any) -> None:
    async def main() -> None:
        def answer(self: Recorder, data: bytes) -> None:
            room = bytearray(data)
            view = memoryview(room)
            self.transport.write(view)
            view.release()
            room.clear()
        protocol = Recorder(data_received=answer)
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"echo")
            assert await receive(theirs, 4) == b"echo"
            transport.close()
            await protocol.lost
    run(main())


def test_more_pieces_than_one_system_call_takes(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        with theirs:
            pieces = [bytes([i % 251]) * (i % 5) for i in range(5000)]
            transport.writelines(pieces)
            for piece in pieces:
                transport.write(piece)
            whole = b"".join(pieces) * 2
            assert await receive(theirs, len(whole)) == whole
            transport.close()
            await protocol.lost
    run(main())


def test_every_split_of_a_queue(run: Any) -> None:
    """The peer takes what it wants while pieces of odd sizes wait: partial writes end at many different bytes."""
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        loop = asyncio.get_running_loop()
        with theirs:
            sent = bytearray()
            got = bytearray()
            for step in range(1, 400):
                piece = pattern(step * 37 % 1009)
                sent += piece
                transport.write(piece)
                if step % 3 == 0:
                    transport.writelines([piece[:1], piece[1:]])
                    sent += piece
                got += await loop.sock_recv(theirs, step) if len(got) < len(sent) else b""
            got += await receive(theirs, len(sent) - len(got))
            assert got == sent
            transport.close()
            await protocol.lost
    run(main())


@pytest.mark.parametrize("bad", ["text", 7, None, [b"x"]])
def test_what_is_no_buffer_is_refused(run: Any, bad: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            with pytest.raises(TypeError):
                transport.write(bad)
            transport.close()
            await protocol.lost
    run(main())


def test_writing_after_the_end(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.write_eof()
            transport.write_eof()
            with pytest.raises(RuntimeError, match=r"write\(\) after write_eof"):
                transport.write(b"late")
            with pytest.raises(RuntimeError, match=r"after write_eof"):
                transport.writelines([b"late"])
            assert await receive(theirs, 1) == b""
            theirs.send(b"still here")
            await protocol.until(lambda: protocol.data == b"still here")
            transport.close()
            await protocol.lost
            assert transport.can_write_eof()
            transport.write_eof()
    run(main())


def test_writing_after_the_loss_only_warns(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.close()
            await protocol.lost
            for _ in range(6):
                transport.write(b"late")
            assert [record.message for record in caplog.records].count("socket.send() raised exception.") in (1, 2)
    run(main())


def test_write_eof_waits_for_what_was_written(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol, small=True)
        with theirs:
            data = pattern(200_000)
            transport.write(data)
            transport.write_eof()
            assert await receive(theirs, len(data) + 1) == data
            transport.close()
            await protocol.lost
    run(main())


def test_writes_of_one_callback_leave_together_before_the_loop_sleeps(run: Any) -> None:
    async def main() -> None:
        def answer(self: Recorder, data: bytes) -> None:
            for piece in (b"head", b" ", b"body"):
                self.transport.write(piece)
        protocol = Recorder(data_received=answer)
        transport, theirs = await connected(protocol)
        with theirs:
            theirs.send(b"?")
            assert await receive(theirs, 9) == b"head body"
            transport.close()
            await protocol.lost
    run(main())


def test_what_is_written_last_is_sent_though_the_loop_stops(run: Any) -> None:
    kept: list[Any] = []

    async def main() -> None:
        protocol = Recorder()
        kept.extend(await connected(protocol))
        asyncio.get_running_loop().call_soon(lambda: None)
        kept[0].write(b"last words")
    run(main())
    assert kept[1].recv(100) == b"last words"
    kept[0].write(b"and more")                     # the loop doesn't run
    assert kept[1].recv(100) == b"and more"

    async def end() -> None:
        kept[0].abort()
        await kept[0].get_protocol().lost
    run(end())
    kept[1].close()


def test_an_interrupt_in_one_flush_keeps_no_other_from_its_own() -> None:
    class Interrupting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    loop = anywire.loop.new_event_loop()
    loop.set_debug(True)                           # then a failed write is logged, within the flush
    told = Interrupting()
    log = logging.getLogger("asyncio")
    level = log.level
    kept: list[Any] = []

    async def main() -> None:
        for _ in range(3):
            kept.append(await connected(Recorder()))
        log.setLevel(logging.DEBUG)
        log.addHandler(told)
        kept[1][1].close()
        loop.call_soon(lambda: None)               # so that writes wait for the end of the turn
        for transport, _ in kept:
            transport.write(b"on its way")

    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(main())
    finally:
        log.removeHandler(told)
        log.setLevel(level)
    loop.run_forever()                             # what was ready stayed so: the end of main() stops this run
    for _, theirs in (kept[0], kept[2]):
        assert theirs.recv(100) == b"on its way"
        theirs.close()

    async def end() -> None:
        for transport, _ in kept:
            transport.abort()
    loop.run_until_complete(end())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


# ---- flow control --------------------------------------------------------------------------------------------------


def test_pause_and_resume_writing(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=100_000, low=1000)
            assert transport.get_write_buffer_limits() == (1000, 100_000)
            total = 0
            while "pause_writing" not in protocol.calls:
                transport.write(b"x" * 50_000)
                total += 50_000
            assert transport.get_write_buffer_size() > 100_000
            assert protocol.calls.count("pause_writing") == 1
            transport.write(b"y")
            assert protocol.calls.count("pause_writing") == 1
            await receive(theirs, total + 1)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            assert transport.get_write_buffer_size() <= 1000
            transport.close()
            await protocol.lost
    run(main())


def test_a_small_write_does_not_pause_at_limit_zero(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder(data_received=lambda self, data: self.transport.write(data))
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=0)
            theirs.send(b"echo")
            assert await receive(theirs, 4) == b"echo"
            assert "pause_writing" not in protocol.calls
            written = await fill(transport)
            assert protocol.calls.count("pause_writing") == 1
            assert len(await receive(theirs, len(written))) == len(written)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            transport.close()
            await protocol.lost
    run(main())


def test_limits_changed_while_over(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.set_write_buffer_limits(high=10_000_000)
            await fill(transport)
            assert protocol.calls == ["connection_made"]
            transport.set_write_buffer_limits(high=1)
            assert protocol.calls == ["connection_made", "pause_writing"]
            for high, low in ((1, 2), (-1, None), (0, -1)):
                with pytest.raises(ValueError, match="must be >="):
                    transport.set_write_buffer_limits(high=high, low=low)
            transport.set_write_buffer_limits(low=3)
            assert transport.get_write_buffer_limits() == (3, 12)
            transport.set_write_buffer_limits()
            assert transport.get_write_buffer_limits() == (16384, 65536)
            transport.abort()
            await protocol.lost
    run(main())


def test_writing_from_resume_and_pause(run: Any) -> None:
    async def main() -> None:
        rounds = []

        def resumed(self: Recorder) -> None:
            if len(rounds) < 3:
                rounds.append(1)
                self.transport.write(b"r" * 400_000)

        def paused(self: Recorder) -> None:
            self.transport.write(b"p")
        protocol = Recorder(resume_writing=resumed, pause_writing=paused)
        transport, theirs = await connected(protocol)
        with theirs:
            transport.write(b"a" * 400_000)
            expected = 4 * 400_000 + 4
            got = await receive(theirs, expected)
            assert got == b"a" * 400_000 + b"p" + (b"r" * 400_000 + b"p") * 3
            await protocol.until(lambda: protocol.calls.count("resume_writing") == 4)
            transport.close()
            await protocol.lost
    run(main())


def test_what_pause_writing_raises_is_told(run: Any) -> None:
    async def main() -> None:
        def fail(self: Recorder) -> None:
            raise ZeroDivisionError("in the protocol")
        protocol = Recorder(pause_writing=fail, resume_writing=fail)
        transport, theirs = await connected(protocol)
        with theirs:
            written = await fill(transport)
            transport.write(b"x" * 100_000)
            assert [(c["message"], type(c["exception"])) for c in complaints()] == [
                ("protocol.pause_writing() failed", ZeroDivisionError)]
            await receive(theirs, len(written) + 100_000)
            await protocol.until(lambda: "resume_writing" in protocol.calls)
            assert [c["message"] for c in complaints()] == ["protocol.resume_writing() failed"]
            transport.close()
            await protocol.lost
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


# ---- who owns the descriptor ---------------------------------------------------------------------------------------


def test_extra_info(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder())
            return accepted[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        protocol = Recorder()
        transport, _ = await loop.create_connection(lambda: protocol, *address)
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0)
        theirs = accepted[0].transport
        assert transport.get_extra_info("peername") == theirs.get_extra_info("sockname") == address
        assert transport.get_extra_info("sockname") == theirs.get_extra_info("peername")
        for end in (transport, theirs):
            sock = end.get_extra_info("socket")
            assert type(sock) is asyncio.trsock.TransportSocket
            assert sock is end.get_extra_info("socket")
            assert sock.family == socket.AF_INET
            assert sock.type == socket.SOCK_STREAM
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockname() == end.get_extra_info("sockname")
            assert end.get_extra_info("nothing") is None
            assert end.get_extra_info("nothing", 5) == 5
            assert isinstance(end, asyncio.Transport)
            assert isinstance(end, asyncio.transports._FlowControlMixin)
        transport.close()
        await protocol.lost
        await accepted[0].lost
        assert theirs.get_extra_info("peername") == transport.get_extra_info("sockname")
        assert theirs.get_extra_info("sockname") == address
        server.close()
        await server.wait_closed()
    run(main())


@pytest.mark.parametrize("host", ["::1"])
def test_extra_info_of_ipv6(run: Any, host: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), host, 0)
        address = server.sockets[0].getsockname()
        with socket.socket(socket.AF_INET6) as client:
            client.setblocking(False)
            await loop.sock_connect(client, address)
            while not (accepted and accepted[0].transport):
                await asyncio.sleep(0)
            assert accepted[0].transport.get_extra_info("peername") == client.getsockname()
            assert accepted[0].transport.get_extra_info("sockname") == address
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())


def test_extra_info_of_unix_sockets(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        path = str(tmp_path / "s")
        server = await loop.create_unix_server(collecting(accepted), path)
        protocol = Recorder()
        transport, _ = await loop.create_unix_connection(lambda: protocol, path)
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0)
        assert transport.get_extra_info("peername") == path
        assert transport.get_extra_info("sockname") == ""
        assert accepted[0].transport.get_extra_info("peername") == ""
        assert accepted[0].transport.get_extra_info("sockname") == path
        transport.close()
        await protocol.lost
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())


def test_a_socket_closed_under_its_transport(run: Any) -> None:
    """And its number given to a file: nothing may be written there."""
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            protocol = Recorder()
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
            number = ours.fileno()
            ours.close()
            read, write = os.pipe()
            taken = read if read == number else write
            assert taken == number
            transport.write(b"to nobody")
            assert isinstance(await protocol.lost, OSError)
            os.fstat(number)
            other = write if taken == read else read
            os.close(other)
            os.close(taken)
    run(main())


def test_add_reader_of_a_transports_descriptor_is_refused(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            sock = transport.get_extra_info("socket")
            for call in (loop.add_reader, loop.add_writer):
                with pytest.raises(RuntimeError, match="is used by transport"):
                    call(sock.fileno(), lambda: None)
            for remove in (loop.remove_reader, loop.remove_writer):
                with pytest.raises(RuntimeError, match="is used by transport"):
                    remove(sock.fileno())
            transport.close()
            await protocol.lost
    run(main())


def test_a_descriptor_used_again_at_once(run: Any) -> None:
    """Close and reopen under the same number, many times, with events on the way: none reaches the next owner."""
    async def main() -> None:
        for i in range(100):
            protocol = Recorder()
            transport, theirs = await connected(protocol)
            theirs.send(b"%d" % i)
            if i % 2:
                transport.abort()
                await protocol.lost
                assert protocol.data in (b"", b"%d" % i)
            else:
                await protocol.until(lambda p=protocol, i=i: p.data == b"%d" % i)
                transport.close()
                await protocol.lost
            theirs.close()
    run(main())


def test_an_abandoned_transport_warns_and_closes(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.pause_reading()
            theirs.send(b"ends the watch")
            await asyncio.sleep(0.001)             # long enough for the loop to look at its descriptors
            gone = weakref.ref(transport)
            protocol.transport = None
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                del transport, protocol
                gc.collect()
            assert any("unclosed transport" in str(one.message) for one in seen)
            del seen                               # it has the transport
            gc.collect()
            assert gone() is None
            with contextlib.suppress(ConnectionResetError):        # what the peer sent was never read
                assert await receive(theirs, 1) == b""
    run(main())


def test_transports_and_protocols_are_freed(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        gone = weakref.ref(transport), weakref.ref(protocol)
        transport.write(b"x")
        theirs.close()
        await protocol.lost
        await asyncio.sleep(0)
        assert transport.get_protocol() is None
        del transport, protocol
        gc.collect()
        assert gone[0]() is None
        assert gone[1]() is None
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


def test_sendfile(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        content = pattern(700_000)
        (tmp_path / "f").write_bytes(content)
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs, (tmp_path / "f").open("rb") as file:
            transport.write(b"before")
            receiving = asyncio.ensure_future(receive(theirs, 6 + len(content) + 5))
            sending = asyncio.ensure_future(loop.sendfile(transport, file))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                transport.write(b"not now")
            assert await sending == len(content)
            transport.write(b"after")
            assert await receiving == b"before" + content + b"after"
            theirs.send(b"x")
            await protocol.until(lambda: protocol.data == b"x")
            transport.close()
            await protocol.lost
    run(main())


# ---- servers -------------------------------------------------------------------------------------------------------


def test_server_counts_its_connections(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), "127.0.0.1", 0)
        clients = []
        for _ in range(5):
            protocol = Recorder()
            await loop.create_connection(lambda p=protocol: p, *server.sockets[0].getsockname())
            clients.append(protocol)
        while len(accepted) < 5 or not all(one.transport for one in accepted):
            await asyncio.sleep(0)
        server.close()
        if sys.version_info >= (3, 12):
            closing = asyncio.ensure_future(server.wait_closed())
            await asyncio.sleep(0)
            assert not closing.done()
            if sys.version_info >= (3, 13):
                server.abort_clients()
            else:
                for one in accepted:
                    one.transport.abort()
            await closing
        else:
            for one in accepted:
                one.transport.abort()
        for one in [*clients, *accepted]:
            await one.lost
    run(main())


def test_the_name_of_a_closed_unix_server(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        server = await asyncio.get_running_loop().create_unix_server(Recorder, path)
        assert path.is_socket()
        server.close()
        await server.wait_closed()
        assert path.exists() == (sys.version_info < (3, 13))
    run(main())


def test_a_factory_that_raises_closes_only_that_connection(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder())
            if len(accepted) == 1:
                raise ZeroDivisionError("in the factory")
            return accepted[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        first, second = Recorder(), Recorder()
        await loop.create_connection(lambda: first, *server.sockets[0].getsockname())
        gc.collect()
        await first.lost
        await loop.create_connection(lambda: second, *server.sockets[0].getsockname())
        await accepted[1].until(lambda: accepted[1].transport is not None) if len(accepted) > 1 else None
        second.transport.write(b"hello")
        while len(accepted) < 2:
            await asyncio.sleep(0)
        await accepted[1].until(lambda: accepted[1].data == b"hello")
        second.transport.close()
        await accepted[1].lost
        server.close()
        await server.wait_closed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())


def test_a_server_closed_by_its_factory(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        made: list[Recorder] = []

        def factory() -> Recorder:
            made.append(Recorder())
            server.close()
            return made[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        clients = []
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
            clients.append(sock)
        while not made:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not server.is_serving()
        for sock in clients:
            sock.close()
        for one in made:
            if one.transport:
                one.transport.abort()
                await one.lost
        complaints()
    run(main())


@pytest.mark.parametrize("run", ["ours"], indirect=True)
def test_out_of_descriptors_while_accepting(run: Any) -> None:
    """The listener backs off, says so once, and serves who waited as soon as there are descriptors again.

    The standard loop tries many times over, and goes on after the server is closed: no model here.
    """
    async def main() -> None:
        import resource

        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), "127.0.0.1", 0)
        client = socket.socket()
        client.setblocking(False)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        gc.disable()                               # what the standard loop left behind would give descriptors back
        spare = os.dup(0)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        told: list[dict[str, Any]] = []
        try:
            with contextlib.suppress(BlockingIOError):
                client.connect(server.sockets[0].getsockname())
            while not told:
                await asyncio.sleep(0.01)
                told = complaints()
            assert len(told) == 1
            assert told[0]["message"] == "socket.accept() out of system resource"
            assert told[0]["socket"].fileno() == server.sockets[0].fileno()
            assert accepted == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            gc.enable()
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0.01)
        client.close()
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())
