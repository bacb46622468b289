"""Echoes on an event loop while system calls fail: the child of test_faults.py, under LD_PRELOAD=faults.so.

    python fault_workload.py MODULE:FUNCTION KIND

Both sides run on one loop. For each schedule the same bytes go there and back, and every one is compared. Prints a JSON
object: {schedule: faults that happened}. Ends with an error when a byte is missing or wrong, when the loop complains
about something that was no error, or when nothing happens for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import importlib
import json
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

SIZE = 300
"""Of most messages. Reads and writes are cut at each length below it."""
MESSAGES = [os.urandom(SIZE) for _ in range(2 * SIZE)] + [os.urandom(20_000), os.urandom(1), os.urandom(70_000)]
PATIENCE = 40.0
library = ctypes.CDLL(None)
ALWAYS = 1 << 40


def fail(call: str, every: int, error: int, times: int = ALWAYS) -> None:
    if library.faults_begin(call.encode(), ctypes.c_long(every), error, ctypes.c_long(times)):
        raise SystemExit("no such call")


def cut(call: str, limit: int) -> None:
    library.faults_short(call.encode(), ctypes.c_long(limit))


def hits(call: str) -> int:
    return int(library.faults_hits(call.encode()))


# ---- the echoes, each as its users write it: a client's `ask(message)`, which returns the answer

Ask = Callable[[bytes], Awaitable[bytes]]


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class BufferedEcho(asyncio.BufferedProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, bytearray(1 << 16)

    def get_buffer(self, hint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, length: int) -> None:
        self.transport.writelines([self.buffer[:length // 2], self.buffer[length // 2:length]])


class Asking(asyncio.Protocol):
    """A client without streams."""

    answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport, self.got, self.wanted = transport, bytearray(), 0
        self.lost = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.got += data
        if len(self.got) >= self.wanted and self.answer is not None:
            self.answer.set_result(bytes(self.got))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error or EOFError())

    async def ask(self, message: bytes) -> bytes:
        self.answer = asyncio.get_running_loop().create_future()
        self.got.clear()
        self.wanted = len(message)
        self.transport.write(message)
        return await self.answer


async def echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


def asking(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ask:
    async def ask(message: bytes) -> bytes:
        writer.write(message)
        answer, _ = await asyncio.gather(reader.readexactly(len(message)), writer.drain())
        return answer

    return ask


@asynccontextmanager
async def protocol(factory: type[asyncio.BaseProtocol] = Echo) -> Any:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0)
    transport, client = await loop.create_connection(Asking, *server.sockets[0].getsockname())
    yield client.ask
    client.answer = None
    transport.close()
    await client.lost.wait()
    server.close()


@asynccontextmanager
async def streams(**tls: Any) -> Any:
    handlers = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())
        with contextlib.suppress(OSError):
            await echo_streams(reader, writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls.get("server"))
    host, port = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(host, port, ssl=tls.get("client"))
    yield asking(reader, writer)
    writer.close()
    with contextlib.suppress(OSError):      # what it was lost by: asked for by `ask` already
        await writer.wait_closed()
    server.close()
    await asyncio.gather(*handlers)


@asynccontextmanager
async def tls() -> Any:
    import trustme

    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)
    async with streams(server=server, client=client) as ask:
        yield ask


@asynccontextmanager
async def sockets() -> Any:
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.socket()
    for one in (listener, client):
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)       # what is accepted inherits it: tcp(7)

    async def serve() -> None:
        server, _ = await loop.sock_accept(listener)
        with server:
            while data := await loop.sock_recv(server, 65536):
                await loop.sock_sendall(server, data)

    task = asyncio.ensure_future(serve())
    await loop.sock_connect(client, listener.getsockname())

    async def ask(message: bytes) -> bytes:
        sending = asyncio.ensure_future(loop.sock_sendall(client, message))
        answer = b""
        while len(answer) < len(message):
            more = await loop.sock_recv(client, 65536)
            assert more
            answer += more
        await sending
        return answer

    yield ask
    client.close()
    await task
    listener.close()


@asynccontextmanager
async def channel() -> Any:
    import anywire

    async def echo(channel: Any) -> None:
        async for message in channel:
            await channel.send(message)

    async with anywire.serve(echo, "tcp://127.0.0.1:0") as server, anywire.connect(server.addresses[0]) as client:

        async def ask(message: bytes) -> bytes:
            await client.send(message)
            answer: bytes = await client.recv()
            return answer

        yield ask


KINDS: dict[str, Callable[[], Any]] = {
    "protocol": protocol,
    "buffered": lambda: protocol(BufferedEcho),
    "streams": streams,
    "tls": tls,
    "sockets": sockets,
    "channel": channel,
}


# ---- the schedules


async def echo(kind: str, start: Callable[[], None], messages: list[bytes]) -> None:
    start()
    async with KINDS[kind]() as ask:
        for message in messages:
            assert await ask(message) == message


def interrupted() -> None:
    for call in ("receive", "send", "accept", "poll"):
        fail(call, 2, errno.EINTR)


def again() -> None:
    for call in ("receive", "send", "accept"):
        fail(call, 2, errno.EAGAIN)


def everything() -> None:
    cut("receive", SIZE)
    cut("send", SIZE)
    for call, every in (("receive", 5), ("send", 7), ("poll", 3)):
        fail(call, every, errno.EINTR)


async def lengths(kind: str) -> dict[str, int]:
    """Reads and writes of each length, apart from each other, so that each message is cut at each of its bytes."""
    found = {}
    for call in ("receive", "send"):
        await echo(kind, lambda call=call: cut(call, SIZE - 1), MESSAGES)
        found[f"{call} cut"] = int(library.faults_lengths(call.encode()))
        library.faults_end()
    return found


async def one_byte(kind: str) -> None:
    def start() -> None:
        cut("receive", 1)
        cut("send", 1)

    await echo(kind, start, MESSAGES[:20] + MESSAGES[-2:-1])


async def no_descriptors(kind: str) -> int:
    """accept fails for want of descriptors: the client waits, and is served when there are some again."""
    await echo(kind, lambda: fail("accept", 1, errno.EMFILE, 1), MESSAGES[:3])
    return hits("accept")


async def aborted(kind: str) -> int:
    """A client that was gone before it was accepted: accept(2) says to go on."""
    await echo(kind, lambda: fail("accept", 1, errno.ECONNABORTED, 1), MESSAGES[:3])
    return hits("accept")


async def no_buffers(kind: str) -> int:
    """send fails for want of memory: the connection ends with that error, no byte is wrong, another one is served."""
    async with KINDS[kind]() as ask, KINDS[kind]() as other:
        assert await ask(MESSAGES[0]) == MESSAGES[0]
        fail("send", 1, errno.ENOBUFS, 1)
        try:
            assert await asyncio.wait_for(ask(MESSAGES[1]), PATIENCE) == MESSAGES[1]
        except (OSError, EOFError) as error:
            assert getattr(error, "errno", None) in (errno.ENOBUFS, None), error
        found = hits("send")
        library.faults_end()
        assert await other(MESSAGES[2]) == MESSAGES[2]
    return found


async def datagrams() -> dict[str, int]:
    """A datagram that the kernel has no memory for is reported and gone; interrupted ones aren't."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    errors: list[Exception] = []

    class Datagrams(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, address: Any) -> None:
            heard.put_nowait(data)

        def error_received(self, error: Exception) -> None:
            errors.append(error)

    server, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
    client, _ = await loop.create_datagram_endpoint(Datagrams, remote_addr=server.get_extra_info("sockname"))
    found = {}
    for name, error in (("EINTR", errno.EINTR), ("EAGAIN", errno.EAGAIN)):
        fail("send", 2, error)
        fail("receive", 2, error)
        for number in range(100):
            client.sendto(b"%d" % number)
            assert await heard.get() == b"%d" % number
        found[name] = min(hits("send"), hits("receive"))
        library.faults_end()
    fail("send", 1, errno.ENOBUFS, 1)
    client.sendto(b"lost")
    client.sendto(b"here")
    assert await heard.get() == b"here"
    assert [error.errno for error in errors] == [errno.ENOBUFS]     # type: ignore[attr-defined]
    found["ENOBUFS"] = hits("send")
    server.close()
    client.close()
    return found


async def all_schedules(kind: str) -> dict[str, int]:
    if kind == "datagrams":
        return await datagrams()
    found = {}
    for schedule in (interrupted, again, everything):
        await echo(kind, schedule, MESSAGES)
        found[schedule.__name__] = min(hits(call) for call in ("receive", "send"))
        library.faults_end()
    found |= await lengths(kind)
    await one_byte(kind)
    library.faults_end()
    if kind == "sockets":       # sock_accept raises what accept(2) does
        return found
    for accepting in (no_descriptors, aborted):
        found[accepting.__name__] = await accepting(kind)
        library.faults_end()
    if kind != "channel":
        found["no_buffers"] = await no_buffers(kind)
        library.faults_end()
    return found


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    kind = sys.argv[2]
    complaints: list[dict[str, Any]] = []

    def complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # These two are told to the program, as they should be.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOBUFS):
            return
        # asyncio accepts again a second after EMFILE, even when it did so at once, and its server was closed since.
        if isinstance(error, ValueError) and "_start_serving" in context["message"]:
            return
        complaints.append(context)

    with asyncio.Runner(loop_factory=getattr(importlib.import_module(module), function)) as runner:
        runner.get_loop().set_exception_handler(complain)
        found = runner.run(asyncio.wait_for(all_schedules(kind), PATIENCE))
    assert not complaints, complaints
    print(json.dumps(found))


if __name__ == "__main__":
    main()
