"""TLS of the loop: each test runs on the standard loop, and on ours over MemoryBIO and straight through libssl."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from asyncio import sslproto
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire.loop
import anywire.loop.sockets
from anywire.loop._tls import TLSProtocol
from anywire.loop._tls_engine import Engine, problem
from tests.loop.tls_peer import Peer, contexts, fresh_contexts, joined, peer_of

PATIENCE = 20.0
WAYS = ("standard", "memory", "direct")
KINDS = ("plain", "buffered", "streams")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "memory":
        monkeypatch.setattr(anywire.loop.sockets, "tls_protocol", sslproto.SSLProtocol)
    return str(request.param)


@pytest.fixture
def run(way: str) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs one coroutine; fails on anything that reaches the loop's exception handler and was not expected."""
    make = asyncio.new_event_loop if way == "standard" else anywire.loop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        told: list[dict[str, Any]] = []
        loop: Any = runner.get_loop()
        loop.told = told
        loop.set_exception_handler(lambda loop, context: told.append(context))

        async def limited(main: Awaitable[Any]) -> Any:
            return await asyncio.wait_for(main, PATIENCE)

        yield lambda main: runner.run(limited(main))
        assert told == []


def complaints() -> list[dict[str, Any]]:
    """What reached the exception handler so far; the test has seen it."""
    loop: Any = asyncio.get_running_loop()
    found = list(loop.told)
    loop.told.clear()
    return found


class Recorder(asyncio.Protocol):
    """Notes every call; `when` holds what to do in one."""

    def __init__(self, **when: Callable[..., object]) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.when = when
        self.changed = asyncio.Event()
        self.transport: Any = None

    def note(self, name: str, value: object = None) -> None:
        self.calls.append((name, value))
        self.changed.set()
        if name in self.when:
            self.when[name](self, value)

    async def until(self, condition: Callable[[Recorder], object]) -> None:
        while not condition(self):
            self.changed.clear()
            await self.changed.wait()

    def named(self, name: str) -> list[Any]:
        return [value for called, value in self.calls if called == name]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.note("data", data)

    def eof_received(self) -> None:
        self.note("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.note("lost", exc)

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    @property
    def data(self) -> bytes:
        return joined(self.calls)

    def lost(self) -> bool:
        return bool(self.named("lost"))


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same with a small buffer of its own."""

    data_received: Any = None

    def __init__(self, **when: Callable[..., object]) -> None:
        super().__init__(**when)
        self.room = bytearray(5000)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.room)                   # the standard class would slice, and so copy, a bytearray

    def buffer_updated(self, nbytes: int) -> None:
        self.note("data", bytes(self.room[:nbytes]))


@contextlib.asynccontextmanager
async def serving(server: Recorder, context: ssl.SSLContext | None = None) -> Any:
    """A TLS server with this protocol for its one connection; its address."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: server, "127.0.0.1", 0, ssl=context or contexts()[0])
    yield listener.sockets[0].getsockname()
    if server.transport is not None:
        server.transport.abort()
        await server.until(Recorder.lost)
    listener.close()
    await listener.wait_closed()


@contextlib.asynccontextmanager
async def connected(
    server: Recorder, context: ssl.SSLContext | None = None, *, client: ssl.SSLContext | None = None, **peers: Any,
) -> Any:
    """A peer that has shaken hands with a server of this protocol."""
    async with serving(server, context) as address, peer_of(address, client, **peers) as peer:
        await server.until(lambda s: s.transport is not None)
        yield peer


def recorder(kind: str, **when: Callable[..., object]) -> Recorder:
    return BufferedRecorder(**when) if kind == "buffered" else Recorder(**when)


both_kinds = pytest.mark.parametrize("kind", ["plain", "buffered"])


# ---- which way


def test_the_way_is_the_one_that_is_tested(run: Any, way: str) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server):
            assert isinstance(server.transport._ssl_protocol, TLSProtocol) == (way == "direct")
            assert isinstance(server.transport, asyncio.Transport)
    assert problem() is None
    run(main())


def test_only_an_sslobject_of_its_own_context_is_taken() -> None:
    context, other = contexts()[0], fresh_contexts()[0]
    tls = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    with pytest.raises(LookupError):
        Engine(tls, other)
    here, there = socket.socketpair()
    with there, context.wrap_socket(here, server_side=True, do_handshake_on_connect=False) as wrapped:
        for stranger in (wrapped, object(), None):
            with pytest.raises(LookupError):
                Engine(stranger, context)  # type: ignore[arg-type]
    Engine(tls, context)


def test_the_environment_can_forbid_it() -> None:
    program = "from anywire.loop._tls_engine import problem; print(problem())"
    environment = {**os.environ, "ANYWIRE_TLS": "memorybio", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ANYWIRE_TLS=memorybio"


@pytest.mark.parametrize("what", ["an SSLObject of one's own", "a message callback"])
def test_what_python_must_see_goes_its_way(what: str) -> None:
    seen: list[Any] = []

    class Watched(ssl.SSLObject):
        def read(self, *arguments: Any) -> Any:
            seen.append("read")
            return super().read(*arguments)

    async def main() -> None:
        context = fresh_contexts()[0]
        if what == "a message callback":
            context._msg_callback = lambda *arguments: seen.append(arguments[1])  # type: ignore[attr-defined]
        else:
            context.sslobject_class = Watched
        server = Recorder(data=lambda self, data: self.transport.write(data))
        async with connected(server, context) as peer:
            del seen[:]
            await peer.write(b"hello")
            assert await peer.read(5) == b"hello"
            assert seen
    anywire.loop.run(main())


# ---- bytes


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_come_back_as_they_were(run: Any, kind: str) -> None:
    sizes = (1, 2, 1000, 16383, 16384, 16385, 32768, 70000, 300001)

    async def main() -> None:
        if kind == "streams":
            over = asyncio.Event()

            async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
                writer.close()
                await writer.wait_closed()
                over.set()

            server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=contexts()[0])
            async with peer_of(server.sockets[0].getsockname()) as peer:
                await beside(peer)
                await peer.say_goodbye()
                await over.wait()
            server.close()
            await server.wait_closed()
        else:
            async with connected(recorder(kind, data=lambda self, data: self.transport.write(data))) as peer:
                await beside(peer)

    async def beside(peer: Any) -> None:
        for size in sizes:
            data = os.urandom(size)
            sender = asyncio.ensure_future(peer.write(data))
            assert await peer.read(size) == data
            await sender

    run(main())


def test_both_sides_are_ours(run: Any) -> None:
    """A client of the loop itself: `open_connection`, with its certificate's check, and all of asyncio's reads."""
    async def main() -> None:
        server_context, client_context = contexts()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = await reader.readline()
            body = await reader.readexactly(100_000)
            writer.writelines([line, b"", body])
            writer.write(memoryview(body)[10:])
            writer.write(bytearray(b"end"))
            await writer.drain()
            await reader.read()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context)
        reader, writer = await asyncio.open_connection(
            *server.sockets[0].getsockname()[:2], ssl=client_context, server_hostname="localhost")
        body = os.urandom(100_000)
        writer.write(b"a line\n" + body)
        assert await reader.readuntil(b"\n") == b"a line\n"
        assert await reader.readexactly(100_000) == body
        assert await reader.readexactly(99_990) == body[10:]
        assert await reader.readexactly(3) == b"end"
        assert writer.get_extra_info("cipher")[0] == writer.get_extra_info("ssl_object").cipher()[0]
        assert writer.get_extra_info("peercert")["subjectAltName"]
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
    run(main())


@both_kinds
def test_records_may_come_in_any_pieces(run: Any, kind: str) -> None:
    """Byte by byte, so that each header and each record is split everywhere; and then many in one piece."""
    async def main() -> None:
        server = recorder(kind)
        async with connected(server) as peer:
            pieces = [b"a" * 3, b"b" * 40, b"c"]
            sealed = peer.sealed(*pieces)
            for i in range(len(sealed)):
                await peer.send(sealed[i:i + 1])
                expected = len(server.data)
                await asyncio.sleep(0)
                assert len(server.data) >= expected
            await server.until(lambda s: len(s.data) == 44)
            assert server.data == b"".join(pieces)
            await peer.send(peer.sealed(*(bytes([i]) * 100 for i in range(200))))
            await server.until(lambda s: len(s.data) == 44 + 20_000)
            assert server.data[44:] == b"".join(bytes([i]) * 100 for i in range(200))
    run(main())


@both_kinds
def test_a_large_record_in_two_pieces(run: Any, kind: str) -> None:
    """The first leaves libssl in the middle of a record, so the second decrypts to more than its own length."""
    async def main() -> None:
        server = recorder(kind)
        async with connected(server) as peer:
            data = os.urandom(48 * 1024)
            sealed = peer.sealed(data)
            total = 0
            for cut in (16_000, 10, 16_400, 300, 5):
                await peer.send(sealed[total:total + cut])
                total += cut
                for _ in range(5):
                    await asyncio.sleep(0)
            await peer.send(sealed[total:])
            await server.until(lambda s: len(s.data) == len(data))
            assert server.data == data
    run(main())


def test_what_is_written_may_change_afterwards(run: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            data = bytearray(b"before" * 5000)
            server.transport.write(data)
            data[:] = b"after!" * 5000
            assert await peer.read(30_000) == b"before" * 5000
    run(main())


@pytest.mark.parametrize("wrong", ["text", 5, None])
def test_only_bytes_are_written(run: Any, wrong: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            with pytest.raises(TypeError):
                server.transport.write(wrong)
            server.transport.write(b"")
            server.transport.write(b"still")
            assert await peer.read(5) == b"still"
    run(main())


def test_writes_in_the_first_callback(run: Any) -> None:
    async def main() -> None:
        server = Recorder(made=lambda self, _: self.transport.write(b"welcome"))
        async with connected(server) as peer:
            assert await peer.read(7) == b"welcome"
    run(main())


# ---- water marks


@both_kinds
def test_reading_pauses_and_resumes(run: Any, kind: str) -> None:
    async def main() -> None:
        server = recorder(kind, data=lambda self, _: self.transport.pause_reading())
        async with connected(server) as peer:
            await peer.write(b"first")
            await server.until(lambda s: s.data)
            assert not server.transport.is_reading()
            sender = asyncio.ensure_future(peer.write(b"x" * 1_000_000))      # more than is taken while it is paused
            for _ in range(50):
                await asyncio.sleep(0)
            assert server.data == b"first"
            server.when.clear()
            server.transport.resume_reading()
            await server.until(lambda s: len(s.data) == 1_000_005)
            await sender
            assert server.transport.is_reading()
    run(main())


def test_a_slow_reader_pauses_the_writer(run: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            data = os.urandom(1 << 20)
            digest, pieces = hashlib.sha256(), 0
            while not server.named("pause"):
                server.transport.write(data)
                digest.update(data)
                pieces += 1
            server.transport.write(b"and more")
            digest.update(b"and more")
            assert server.transport.get_write_buffer_size() > 0
            assert not server.named("resume")
            got = await peer.read(pieces * len(data) + 8)
            assert hashlib.sha256(got).digest() == digest.digest()
            await server.until(lambda s: s.named("resume"))
            assert server.transport.get_write_buffer_size() == 0
    run(main())


def test_drain_waits_for_a_slow_reader(run: Any, way: str) -> None:
    async def main() -> None:
        data = os.urandom(1 << 20)
        written: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert (type(writer) is asyncio.StreamWriter) == (way != "direct")
            pieces = 0
            while True:
                writer.write(data)
                pieces += 1
                drain = asyncio.ensure_future(writer.drain())
                await asyncio.sleep(0)
                if not drain.done():
                    break
            written.set_result(pieces)
            await drain
            writer.close()
            with pytest.raises(ConnectionError):
                await writer.wait_closed()
                await writer.drain()                  # nobody is there any more
            over.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts()[0])
        async with peer_of(server.sockets[0].getsockname()) as peer:
            pieces = await written
            assert await peer.read(pieces << 20) == data * pieces
            await peer.say_goodbye()
            await over.wait()
        server.close()
        await server.wait_closed()
    run(main())


def test_no_water_at_all(run: Any) -> None:
    """A high-water mark of 0 pauses at each write, and the next event resumes."""
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            server.transport.set_write_buffer_limits(high=0)
            server.transport.write(b"one")
            assert len(server.named("pause")) >= 1
            assert await peer.read(3) == b"one"
            await peer.write(b"answer")
            await server.until(lambda s: s.data == b"answer")
            await server.until(lambda s: s.named("resume"))
    run(main())


# ---- the end


@both_kinds
def test_close_notify(run: Any, kind: str) -> None:
    async def main() -> None:
        server = recorder(kind)
        async with connected(server) as peer:
            sealed = peer.sealed(b"last words")
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.unwrap()
            await peer.send(sealed + peer.outgoing.read())              # both in one piece
            await server.until(Recorder.lost)
            assert [name for name, _ in server.calls] == ["made", "data", "eof", "lost"]
            assert server.data == b"last words"
            assert server.named("lost") == [None]
            assert await peer.read(1) == b""                             # close_notify of the other side
    run(main())


def test_the_end_without_close_notify(run: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            await peer.write(b"cut")
            await server.until(lambda s: s.data)
            peer.sock.shutdown(socket.SHUT_WR)
            await server.until(Recorder.lost)
            assert server.data == b"cut"
            assert server.named("eof") == [None]
    run(main())


def test_close_sends_all_first(run: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            data = os.urandom(3 << 20)
            server.transport.write(data)
            server.transport.close()
            server.transport.write(b"too late")
            assert await peer.read(len(data) + 100) == data
            assert peer.tls.read(1) == b""
            await peer.say_goodbye()
            await server.until(Recorder.lost)
            assert server.named("lost") == [None]
    run(main())


def test_closing_in_a_callback(run: Any) -> None:
    async def main() -> None:
        def answer(self: Recorder, data: object) -> None:
            self.transport.write(b"bye")
            self.transport.close()

        server = Recorder(data=answer)
        async with connected(server) as peer:
            await peer.write(b"go")
            assert await peer.read(100) == b"bye"
            await peer.say_goodbye()
            await server.until(Recorder.lost)
            assert server.named("lost") == [None]
    run(main())


@pytest.mark.parametrize("where", ["a task", "a callback"])
def test_abort(run: Any, where: str) -> None:
    """What was written before it, and fits into the kernel, is sent; no close_notify."""
    async def main() -> None:
        def end(self: Recorder, data: object) -> None:
            self.transport.write(b"almost")
            self.transport.abort()

        server = Recorder(**({"data": end} if where == "a callback" else {}))
        async with connected(server) as peer:
            await peer.write(b"go")
            await server.until(lambda s: s.data)
            if where == "a task":
                end(server, None)
            await server.until(Recorder.lost)
            assert server.named("lost") == [None]
            assert await peer.read(100) in (b"almost", b"")
            server.transport.write(b"nobody hears")
    run(main())


def test_what_was_held_back_leaves_before_an_abort() -> None:
    async def main() -> None:
        def end(self: Recorder, data: object) -> None:
            self.transport.write(b"almost")
            self.transport.abort()

        server = Recorder(data=end)
        async with connected(server) as peer:
            await peer.write(b"go")
            assert await peer.read(100) == b"almost"
    anywire.loop.run(main())


def test_a_protocol_that_raises(run: Any) -> None:
    async def main() -> None:
        def fail(self: Recorder, data: object) -> None:
            raise ZeroDivisionError("of the test")

        server = Recorder(data=fail)
        async with connected(server) as peer:
            await peer.write(b"go")
            await server.until(Recorder.lost)
            assert isinstance(server.named("lost")[0], ZeroDivisionError)
            assert [type(context["exception"]) for context in complaints()] == [ZeroDivisionError]
    run(main())


def test_an_empty_buffer_ends_the_connection() -> None:
    async def main() -> None:
        server = BufferedRecorder()
        async with connected(server) as peer:
            server.room = bytearray()
            await peer.write(b"go")
            await server.until(Recorder.lost)
            assert "empty buffer" in str(server.named("lost")[0])
            assert len(complaints_of_run) == 1
    complaints_of_run: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints_of_run.append(context))
        await main()
    anywire.loop.run(watched())


# ---- errors of TLS


def damaged(sealed: bytes) -> bytes:
    return sealed[:-1] + bytes([sealed[-1] ^ 1])


@both_kinds
@pytest.mark.parametrize(("damage", "reason"), [
    (damaged, "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"),
    (lambda sealed: b"GET / HTTP/1.1\r\n\r\n", "WRONG_VERSION_NUMBER"),
    (lambda sealed: b"\x17\x03\x03\xff\xff" + sealed, "PACKET_LENGTH_TOO_LONG"),
])
def test_an_error_says_what_pythons_says(run: Any, kind: str, damage: Any, reason: str) -> None:
    async def main() -> None:
        server = recorder(kind)
        async with connected(server) as peer:
            await peer.send(damage(peer.sealed(b"hello")))
            await server.until(Recorder.lost)
            error = server.named("lost")[0]
            assert type(error) is ssl.SSLError
            assert (error.library, error.reason) == ("SSL", reason)
            assert reason.replace("_", " ").lower() in str(error)
            assert server.data == b""
    run(main())


def test_what_came_before_an_error_is_delivered() -> None:
    """The standard class drops it if both came in one piece; what was decrypted is as good as ever."""
    async def main() -> None:
        server = Recorder()
        async with connected(server) as peer:
            await peer.send(peer.sealed(b"good") + damaged(peer.sealed(b"bad")))
            await server.until(Recorder.lost)
            assert server.data == b"good"
            assert isinstance(server.named("lost")[0], ssl.SSLError)
    anywire.loop.run(main())


def test_an_error_of_somebody_else_is_not_ours(run: Any) -> None:
    """libssl's queue of errors is the thread's: others leave theirs there."""
    async def main() -> None:
        def fail_elsewhere(self: Recorder, data: object) -> None:
            with contextlib.suppress(ssl.SSLError):
                ssl.create_default_context(cadata=b"\x30\x00nonsense")
            self.transport.write(b"fine")

        server = Recorder(data=fail_elsewhere)
        async with connected(server) as peer:
            for _ in range(2):
                await peer.write(b"go")
                assert await peer.read(4) == b"fine"
    run(main())


def test_a_refused_handshake(run: Any) -> None:
    async def main() -> None:
        server = Recorder()
        async with serving(server) as address:
            stranger = ssl.create_default_context()
            with pytest.raises(ssl.SSLCertVerificationError) as caught:
                await asyncio.open_connection(*address, ssl=stranger, server_hostname="localhost")
            assert caught.value.verify_code
            assert server.calls == []
    run(main())


# ---- what happens between the records


def test_a_key_update_is_answered(run: Any) -> None:
    async def main() -> None:
        server = Recorder(data=lambda self, data: self.transport.write(data))
        async with connected(server) as peer:
            for request in (0, 1, 1):                     # SSL_KEY_UPDATE_NOT_REQUESTED, _REQUESTED
                assert peer.call("SSL_key_update", request) == 1
                await peer.write(b"with new keys")
                assert await peer.read(13) == b"with new keys"
    run(main())


def test_renegotiation_is_refused(run: Any) -> None:
    async def main() -> None:
        context, client = fresh_contexts()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        server = Recorder(data=lambda self, data: self.transport.write(data))
        async with connected(server, context, client=client) as peer:
            await peer.write(b"before")
            assert await peer.read(6) == b"before"
            assert peer.call("SSL_renegotiate") == 1
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.do_handshake()
            await peer.flush()
            with pytest.raises(ssl.SSLError) as caught:
                await peer.read(1)
            assert caught.value.reason == "NO_RENEGOTIATION"
            assert server.data == b"before"
    run(main())


def test_a_session_is_resumed(run: Any) -> None:
    async def main() -> None:
        client = contexts()[1]
        session = None
        for resumed in (False, True):
            server = Recorder(data=lambda self, data: self.transport.write(data))
            async with connected(server, client=client, session=session) as peer:
                await peer.write(b"hello")
                assert await peer.read(5) == b"hello"     # the ticket came before it
                assert peer.tls.session_reused == resumed
                session = peer.tls.session
    run(main())


def test_a_name_chooses_the_context(run: Any) -> None:
    async def main() -> None:
        first, second = fresh_contexts()[0], fresh_contexts()[0]
        asked: list[str | None] = []

        def choose(tls: Any, name: str | None, context: ssl.SSLContext) -> None:
            asked.append(name)
            tls.context = second

        first.sni_callback = choose  # type: ignore[assignment]
        server = Recorder(data=lambda self, data: self.transport.write(data))
        async with connected(server, first) as peer:
            await peer.write(b"hello")
            assert await peer.read(5) == b"hello"
            assert asked == ["localhost"]
            assert server.transport.get_extra_info("ssl_object").context is second
    run(main())


def test_keys_are_logged(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        context = fresh_contexts()[0]
        context.keylog_filename = str(tmp_path / "keys")
        server = Recorder(data=lambda self, data: self.transport.write(data))
        async with connected(server, context) as peer:
            await peer.write(b"hello")
            assert await peer.read(5) == b"hello"
            assert "SERVER_TRAFFIC_SECRET_0" in (tmp_path / "keys").read_text()
    run(main())


def test_start_tls_in_the_middle(run: Any) -> None:
    """A plain connection, some lines, then TLS on both sides, then more lines."""
    async def main() -> None:
        server_context, client_context = contexts()
        over = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"OK\n")
            transport: Any = writer.transport
            protocol: Any = transport.get_protocol()
            made = await loop.start_tls(transport, protocol, server_context, server_side=True)
            protocol._transport, writer._transport, reader._transport = made, made, made  # type: ignore[attr-defined]
            while line := await reader.readline():
                writer.write(line.upper())
                await writer.drain()
            writer.close()
            over.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, server.sockets[0].getsockname())
            await loop.sock_sendall(sock, b"STARTTLS\n")
            assert await loop.sock_recv(sock, 3) == b"OK\n"
            peer = Peer(client_context, sock)
            await peer.handshake()
            for line in (b"one\n", b"two\n"):
                await peer.write(line)
                assert await peer.read(4) == line.upper()
            await peer.say_goodbye()
            await over.wait()
        server.close()
        await server.wait_closed()
    run(main())


def test_tls_within_tls(run: Any) -> None:
    async def main() -> None:
        server_context, client_context = contexts()
        loop = asyncio.get_running_loop()
        tasks = []

        inner = Recorder(data=lambda self, data: self.transport.write(data))

        def begin(self: Recorder, _: object) -> None:
            tasks.append(loop.create_task(upgrade(self)))

        async def upgrade(outer: Recorder) -> None:
            transport: Any = await loop.start_tls(outer.transport, inner, server_context, server_side=True)
            inner.connection_made(transport)
            transport.write(b"!")

        outer = Recorder(made=begin)
        client_outer, client_inner = Recorder(), Recorder()
        async with serving(outer) as address:
            await loop.create_connection(
                lambda: client_outer, *address, ssl=client_context, server_hostname="localhost")
            made: Any = await loop.start_tls(
                client_outer.transport, client_inner, client_context, server_hostname="localhost")
            await client_inner.until(lambda s: s.data == b"!")
            data = os.urandom(200_000)
            made.write(data)
            await client_inner.until(lambda s: len(s.data) == 1 + len(data))
            assert client_inner.data[1:] == data
            made.close()
            await asyncio.gather(*tasks)
            inner.transport.abort()
            client_outer.transport.abort()
            outer.when.clear()
            outer.calls.append(("lost", None))            # its callbacks went to the inner one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())


# ---- what outlives what


def test_the_sslobject_outlives_its_connection(run: Any) -> None:
    async def main() -> Any:
        server = Recorder()
        async with connected(server) as peer:
            await peer.write(b"hello")
            await server.until(lambda s: s.data)
            return server.transport.get_extra_info("ssl_object")

    tls = run(main())
    assert tls.version() == "TLSv1.3"
    assert tls.pending() == 0
    with pytest.raises(ssl.SSLError):
        tls.read(1)


def test_loops_of_several_threads() -> None:
    """Their rooms are not mixed up, though protocols run Python code in the middle of a report."""
    problems: list[BaseException] = []

    async def one() -> None:
        def slow(self: Recorder, data: object) -> None:
            for _ in range(100):
                hashlib.sha256(bytes(3000)).digest()      # gives up the GIL: more than 2047 bytes
            self.transport.write(data)

        async with connected(BufferedRecorder(data=slow)) as peer:
            for size in (100, 20_000, 100_000):
                data = os.urandom(size)
                sender = asyncio.ensure_future(peer.write(data))
                assert await peer.read(size) == data
                await sender

    def thread() -> None:
        try:
            anywire.loop.run(one())
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not problems
