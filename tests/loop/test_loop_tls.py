"""TLS of the loop: which way it goes, bytes and water marks. On each loop that `way` names."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import subprocess
import sys
from typing import Any

import pytest

import anywire.loop
import anywire.loop.sockets
from anywire.loop._tls import TLSProtocol
from anywire.loop._tls_engine import Engine, problem
from tests.loop.tls_peer import contexts, fresh_contexts, peer_of
from tests.loop.tls_recorder import (
    KINDS,
    Recorder,
    both_kinds,
    connected,
    recorder,
)

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
