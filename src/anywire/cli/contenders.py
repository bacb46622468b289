"""The contenders of a two-process benchmark: anywire over each wire, and what users would otherwise pick.

Run as a program (`python -m anywire.cli.contenders NAME ROLE CORE ADDRESS [LOOP]`) it is one side of one contender. It
says `{"address": ...}` once it can be reached (the server) or is connected (the client), does the phases it is told to
on standard input, one JSON object a line, and answers each with its clock and its CPU time. `pair.Pair` is the
caller. One thread of our own; pyzmq and pynng bring theirs, which count in the CPU time.

phases   echo   the client sends a message and waits for it to come back, `count` times
         flow   the client sends `count` messages, the server takes them

Both sides know `count`, so nobody looks into messages. The last message of each phase is compared in full.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import json
import os
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from anywire.cli.loops import loop_factory
from anywire.ipc import MessageQueue, sysv

Bytes = bytes | bytearray | memoryview
Announce = Callable[[str], None]
Calls = tuple[Callable[[Any], object], Callable[[], Any]]                            # send, recv
AsyncCalls = tuple[Callable[[Any], Awaitable[object]], Callable[[], Awaitable[Any]]]
# A side gives its calls for messages of one size: some need a buffer, or have no framing and must know the size.
Side = Callable[[int], Calls]
AsyncSide = Callable[[int], AsyncCalls]

SMALL = 4096                        # bytes: below this, a bare socket needs no loop to receive
BATCH = 64                          # messages


@dataclass(frozen=True)
class Contender:
    """One way to talk. `address` may hold `{directory}` and `{name}`; `needs` is what to install, `module` its name."""

    name: str
    front: str                      # "blocking" or "asyncio"
    opener: str                     # key of BLOCKING or ASYNCIO below
    address: str = ""
    module: str = ""
    needs: str = ""
    largest: int = 1 << 62          # bytes of one message
    phases: tuple[str, ...] = ("echo", "flow")
    batched: bool = False           # its calls take and give lists
    inherits: str = ""              # "socketpair" or "pipes": descriptors made by the parent
    trust: str = ""                 # what the client adds to the server's address; certificates are made for the pair

    @property
    def missing(self) -> bool:
        return bool(self.module) and importlib.util.find_spec(self.module) is None


def _wires() -> list[Contender]:
    wires: list[dict[str, Any]] = [
        {"name": "shm", "address": "shm://{name}"},
        {"name": "unix", "address": "unix://{directory}/a.sock"},
        {"name": "unix seqpacket", "address": "unix://{directory}/b.sock?type=seqpacket", "largest": 128 << 10},
        {"name": "tcp", "address": "tcp://127.0.0.1:0"},
        {
            "name": "tls",
            "address": "tls://127.0.0.1:0?cert={directory}/cert.pem&key={directory}/key.pem",
            "trust": "ca={directory}/ca.pem",
        },
        # Datagrams may be dropped, so nobody knows how many the other side will see: no flow.
        {"name": "udp", "address": "udp://127.0.0.1:0", "largest": 60_000, "phases": ("echo",)},
        {"name": "pipe", "inherits": "pipes"},
        {"name": "fifo", "address": "fifo://{directory}/c?reply=true"},
        # Of the system's own size; few of them, for all queues of a user may have some 800 KB together (getrlimit(2)).
        {
            "name": "mq",
            "address": "mq:///{name}?reply=true&depth=6",
            "largest": MessageQueue.limits().msgsize_default,
        },
        # The key is the directory's.
        {"name": "sysv", "address": "sysv://{directory}?reply=true", "largest": max(0, sysv.limits().msgmax)},
    ]
    found = []
    for wire in wires:
        name = wire.pop("name")
        for front in ("blocking", "asyncio"):
            found.append(Contender(f"anywire {name}", front, "anywire", **wire))
    return found


def contenders() -> list[Contender]:
    """All of them, whether or not what they need is installed."""
    return [
        *_wires(),
        Contender("anywire unix recv_into", "blocking", "anywire_into", "unix://{directory}/d.sock"),
        *(
            Contender(
                "anywire unix many", front, "anywire_many", "unix://{directory}/e.sock", phases=("flow",), batched=True
            )
            for front in ("blocking", "asyncio")
        ),
        Contender("bare socket pair", "blocking", "socketpair", inherits="socketpair"),
        Contender("multiprocessing.Pipe", "blocking", "mp_pipe", inherits="socketpair"),
        Contender("pyzmq", "blocking", "zmq", "ipc://{directory}/zmq", module="zmq", needs="pyzmq"),
        Contender("pynng", "blocking", "nng", "ipc://{directory}/nng", module="pynng", needs="pynng"),
        Contender("asyncio streams unix", "asyncio", "streams", "{directory}/streams.sock"),
        Contender("asyncio streams tcp", "asyncio", "streams"),
        Contender("asyncio streams tls", "asyncio", "streams", "tls:{directory}", trust="{directory}"),
        Contender("pyzmq asyncio", "asyncio", "zmq", "ipc://{directory}/zmq", module="zmq", needs="pyzmq"),
    ]


def key(contender: Contender) -> str:
    """What a contender is called on the command line and in results: names repeat in the other front."""
    return f"{contender.name} ({contender.front})"


# ---- blocking sides: opener(role, address, announce, stack) -> Side


def anywire_channel(role: str, address: str, announce: Announce, stack: ExitStack) -> Any:
    sync = importlib.import_module("anywire.sync")
    if role == "client":
        return stack.enter_context(sync.connect(address, max_message=64 << 20))
    listener = stack.enter_context(sync.listen(address, max_message=64 << 20))
    announce(str(listener.addresses[0]))
    return stack.enter_context(listener.accept())


def open_anywire(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    channel = anywire_channel(role, address, announce, stack)
    return lambda size: (channel.send, channel.recv)


def open_anywire_into(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    channel = anywire_channel(role, address, announce, stack)

    def side(size: int) -> Calls:
        buffer = memoryview(bytearray(size))

        def recv() -> Bytes:
            channel.recv_into(buffer)
            return buffer

        return channel.send, recv

    return side


def open_anywire_many(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    channel = anywire_channel(role, address, announce, stack)
    return lambda size: (channel.send_many, channel.recv_many)


def open_socketpair(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    """No framing at all, the least that Python can do: this is the floor, not a product."""
    sock = stack.enter_context(socket.socket(fileno=int(address)))
    announce(address)

    def side(size: int) -> Calls:
        if size <= SMALL:           # written by one call and never cut by the kernel: one recv has it whole
            return sock.sendall, functools.partial(sock.recv, size)
        buffer = memoryview(bytearray(size))

        def recv() -> Bytes:
            got = sock.recv_into(buffer)
            while got < size:
                more = sock.recv_into(buffer[got:])
                if not more:
                    raise EOFError
                got += more
            return buffer

        return sock.sendall, recv

    return side


def open_mp_pipe(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    connection = stack.enter_context(Connection(int(address)))
    announce(address)
    return lambda size: (connection.send_bytes, connection.recv_bytes)


def open_zmq(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    zmq = importlib.import_module("zmq")
    context = stack.enter_context(zmq.Context())
    pair = stack.enter_context(context.socket(zmq.PAIR))
    if role == "client":
        pair.connect(address)
    else:
        pair.bind(address)
        announce(address)

    def side(size: int) -> Calls:
        if size < 64 << 10:
            return pair.send, pair.recv
        # What pyzmq recommends for large messages: no copy in either direction.
        return functools.partial(pair.send, copy=False), lambda: pair.recv(copy=False).buffer

    return side


def open_nng(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    pynng = importlib.import_module("pynng")
    pair = stack.enter_context(pynng.Pair0(recv_max_size=0, send_buffer_size=32, recv_buffer_size=32))
    if role == "client":
        pair.dial(address, block=True)
    else:
        pair.listen(address)
        announce(address)
    return lambda size: (pair.send, pair.recv)


# ---- asyncio sides: await opener(role, address, announce, stack) -> AsyncSide


async def _anywire_async(role: str, address: str, announce: Announce, stack: AsyncExitStack) -> Any:
    anywire = importlib.import_module("anywire")
    if role == "client":
        return await stack.enter_async_context(anywire.connect(address, max_message=64 << 20))
    listener = await stack.enter_async_context(anywire.listen(address, max_message=64 << 20))
    announce(str(listener.addresses[0]))
    return await stack.enter_async_context(await listener.accept())


async def open_anywire_async(role: str, address: str, announce: Announce, stack: AsyncExitStack) -> AsyncSide:
    channel = await _anywire_async(role, address, announce, stack)
    return lambda size: (channel.send, channel.recv)


async def open_anywire_many_async(role: str, address: str, announce: Announce, stack: AsyncExitStack) -> AsyncSide:
    channel = await _anywire_async(role, address, announce, stack)
    return lambda size: (channel.send_many, channel.recv_many)


async def open_streams(
    role: str, address: str, announce: Announce, stack: AsyncExitStack, drain: bool = True
) -> AsyncSide:
    """Hand-written framing over asyncio streams, as many programs have it: a length, then the message. Without `drain`
    it is faster, and safe only where something else bounds what is under way."""
    limit = 1 << 20
    tcp = not address.startswith("/")
    port, _, trust = address.partition("?")
    secure = None
    if address.startswith("tls:"):
        secure = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        directory = address.removeprefix("tls:")
        secure.load_cert_chain(f"{directory}/cert.pem", f"{directory}/key.pem")
    elif trust:
        secure = ssl.create_default_context(cafile=f"{trust}/ca.pem")
    if role == "client" and tcp:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port), limit=limit, ssl=secure)
    elif role == "client":
        reader, writer = await asyncio.open_unix_connection(address, limit=limit)
    else:
        accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        accepted = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result((reader, writer))

        if tcp:
            server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=limit, ssl=secure)
            announce(str(server.sockets[0].getsockname()[1]))
        else:
            server = await asyncio.start_unix_server(connected, address, limit=limit)
            announce(address)
        reader, writer = await accepted
        stack.callback(server.close)
    stack.callback(writer.close)

    async def send(message: bytes) -> None:
        writer.write(len(message).to_bytes(4, "little") + message)
        if drain:
            await writer.drain()

    async def recv() -> bytes:
        return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))

    return lambda size: (send, recv)


async def open_zmq_async(role: str, address: str, announce: Announce, stack: AsyncExitStack) -> AsyncSide:
    zmq = importlib.import_module("zmq.asyncio")
    context = stack.enter_context(zmq.Context())
    pair = stack.enter_context(context.socket(importlib.import_module("zmq").PAIR))
    if role == "client":
        pair.connect(address)
    else:
        pair.bind(address)
        announce(address)
    return lambda size: (pair.send, pair.recv)


BLOCKING: dict[str, Callable[[str, str, Announce, ExitStack], Side]] = {
    "anywire": open_anywire,
    "anywire_into": open_anywire_into,
    "anywire_many": open_anywire_many,
    "socketpair": open_socketpair,
    "mp_pipe": open_mp_pipe,
    "zmq": open_zmq,
    "nng": open_nng,
}
ASYNCIO: dict[str, Callable[[str, str, Announce, AsyncExitStack], Awaitable[AsyncSide]]] = {
    "anywire": open_anywire_async,
    "anywire_many": open_anywire_many_async,
    "streams": open_streams,
    "zmq": open_zmq_async,
}


# ---- the phases


def blocking_phase(role: str, phase: str, calls: Calls, message: bytes, count: int) -> Bytes:
    send, recv = calls
    last: Bytes = message
    if phase == "echo" and role == "client":
        for _ in range(count):
            send(message)
            last = recv()
    elif phase == "echo":
        for _ in range(count):
            last = recv()
            send(last)
    elif role == "client":
        for _ in range(count):
            send(message)
    else:
        for _ in range(count):
            last = recv()
    return last


async def asyncio_phase(role: str, phase: str, calls: AsyncCalls, message: bytes, count: int) -> Bytes:
    send, recv = calls
    last: Bytes = message
    if phase == "echo" and role == "client":
        for _ in range(count):
            await send(message)
            last = await recv()
    elif phase == "echo":
        for _ in range(count):
            last = await recv()
            await send(last)
    elif role == "client":
        for _ in range(count):
            await send(message)
    else:
        for _ in range(count):
            last = await recv()
    return last


def batches(message: bytes, count: int) -> Iterator[list[bytes]]:
    """Lists of BATCH messages, `count` of them in all."""
    full = [message] * BATCH
    for _ in range(count // BATCH):
        yield full
    if count % BATCH:
        yield full[: count % BATCH]


def blocking_batches(role: str, calls: Calls, message: bytes, count: int) -> Bytes:
    send_many, recv_many = calls
    if role == "client":
        for batch in batches(message, count):
            send_many(batch)
        return message
    got, last = 0, message
    while got < count:
        messages = recv_many()
        got += len(messages)
        last = messages[-1]
    return last


async def asyncio_batches(role: str, calls: AsyncCalls, message: bytes, count: int) -> Bytes:
    send_many, recv_many = calls
    if role == "client":
        for batch in batches(message, count):
            await send_many(batch)
        return message
    got, last = 0, message
    while got < count:
        messages = await recv_many()
        got += len(messages)
        last = messages[-1]
    return last


def payload(size: int) -> bytes:
    """Bytes that are not all alike."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def announce(address: str) -> None:
    say({"address": address})


def headline(report: str) -> str:
    """What names the error at the end of a traceback: its last line that is not indented; "" if there is none."""
    return next((line for line in reversed(report.splitlines()) if line[:1].strip()), "")


@contextmanager
def telling_why() -> Iterator[None]:
    """Say why this side fails, and when, before anything of it is closed: a cause is said before what follows of it."""
    try:
        yield
    except Exception as error:
        why = headline("".join(traceback.format_exception_only(error)))
        with suppress(OSError):          # nobody listens any more
            say({"failed": why, "when": time.monotonic_ns()})
        raise


def _answer(began: int, cpu: int, last: Bytes, message: bytes) -> None:
    ended, spent = time.monotonic_ns(), time.process_time_ns() - cpu
    if last != message:
        raise ValueError("the last message is not what was sent")
    say({"began": began, "ended": ended, "cpu": spent})


def run_blocking(contender: Contender, role: str, address: str) -> None:
    with ExitStack() as stack, telling_why():
        side = BLOCKING[contender.opener](role, address, announce, stack)
        if role == "client" and contender.inherits != "socketpair":
            announce(address)
        while line := sys.stdin.readline():
            order = json.loads(line)
            message, calls = payload(order["size"]), side(order["size"])
            cpu, began = time.process_time_ns(), time.monotonic_ns()
            if contender.batched:
                last = blocking_batches(role, calls, message, order["count"])
            else:
                last = blocking_phase(role, order["phase"], calls, message, order["count"])
            _answer(began, cpu, last, message)


async def run_asyncio(contender: Contender, role: str, address: str) -> None:
    async with AsyncExitStack() as stack:
        with telling_why():
            side = await ASYNCIO[contender.opener](role, address, announce, stack)
            if role == "client":
                announce(address)
            # Orders are read by a thread: a peer may still have bytes in its transport, which need the loop to go out.
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                order = json.loads(line)
                message, calls = payload(order["size"]), side(order["size"])
                cpu, began = time.process_time_ns(), time.monotonic_ns()
                if contender.batched:
                    last = await asyncio_batches(role, calls, message, order["count"])
                else:
                    last = await asyncio_phase(role, order["phase"], calls, message, order["count"])
                _answer(began, cpu, last, message)


def main() -> None:
    name, role, core, address, *loop = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    contender = next(c for c in contenders() if key(c) == name)
    if contender.front == "blocking":
        run_blocking(contender, role, address)
    else:
        with asyncio.Runner(loop_factory=loop_factory(*loop)) as runner:
            runner.run(run_asyncio(contender, role, address))


if __name__ == "__main__":
    main()
