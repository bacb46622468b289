"""TLS of the loop: the end, errors, and what happens between the records. On each loop that `way` names."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

import anywire.loop
import anywire.loop.sockets
from tests.loop.tls_peer import Peer, contexts, fresh_contexts
from tests.loop.tls_recorder import (
    BufferedRecorder,
    Recorder,
    both_kinds,
    complaints,
    connected,
    recorder,
    serving,
)

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
