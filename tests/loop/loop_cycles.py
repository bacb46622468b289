"""One process that does the same things on a loop thousands of times, and prints what it holds before and after.

    python loop_cycles.py MODULE:FUNCTION CYCLES [WAY ...]

Like tests/native/leak_cycles.py, whose looks it takes, but of the loop's own parts: connections by protocols and
streams, TLS handshakes, timers, threads' calls, and those that end in an abort, a cancellation or an error. Prints one
JSON object: {way: [held before, held after]}. Run by test_loop_leaks.py, alone in its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))

from leak_cycles import held

WARM_UP = 100
"""Cycles before the first look: imports, free lists and pools fill up in these."""
AT_ONCE = 20
LARGE = bytes(300_000)
"""More than the kernel takes at once, so that some of it is buffered."""
Way = Callable[[int], Awaitable[None]]


class Alive:
    """How many servers' connections there are; a look waits until there are none."""

    def __init__(self) -> None:
        self.count, self.none = 0, asyncio.Event()

    def more(self) -> None:
        self.count += 1
        self.none.clear()

    def less(self) -> None:
        self.count -= 1
        if not self.count:
            self.none.set()


alive: Alive


class Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        alive.more()

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        alive.less()


class Waiting(asyncio.Protocol):
    """Until so many bytes have come, or the connection is lost."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.lost = wanted, asyncio.get_running_loop().create_future()
        self.enough = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.wanted -= len(data)
        if self.wanted <= 0 and not self.enough.done():
            self.enough.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(None)


async def beside(count: int, one: Callable[[], Awaitable[None]]) -> None:
    """`one` so many times, some at once."""
    for start in range(0, count, AT_ONCE):
        await asyncio.gather(*(one() for _ in range(min(AT_ONCE, count - start))))


@contextlib.asynccontextmanager
async def echoing(**options: Any) -> Any:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, **options)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await server.wait_closed()


async def connections(count: int, end: str = "close", message: bytes = b"hello", **tls: Any) -> None:
    loop = asyncio.get_running_loop()
    async with echoing(ssl=tls.get("server")) as address:

        async def one() -> None:
            transport, protocol = await loop.create_connection(
                lambda: Waiting(len(message)), *address, ssl=tls.get("client"),
            )
            transport.write(message)
            await protocol.enough
            if end == "abort":
                transport.write(LARGE)          # some of it is still here
                transport.abort()
            else:
                transport.close()
            await protocol.lost

        await beside(count, one)


async def streams(count: int) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        alive.more()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        await writer.wait_closed()
        alive.less()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)

    async def one() -> None:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello")
        await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()

    await beside(count, one)
    server.close()
    await server.wait_closed()


async def handshakes(count: int) -> None:
    await connections(count, **contexts())


def contexts() -> dict[str, ssl.SSLContext]:
    if not made:
        import trustme

        authority = trustme.CA()
        server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
        authority.issue_cert("127.0.0.1").configure_cert(server)
        authority.configure_trust(client)
        made.update(server=server, client=client)
    return made


made: dict[str, ssl.SSLContext] = {}


async def refused_handshakes(count: int) -> None:
    """The client doesn't know the authority."""
    loop = asyncio.get_running_loop()
    stranger = ssl.create_default_context()
    async with echoing(ssl=contexts()["server"]) as address:

        async def one() -> None:
            with contextlib.suppress(ssl.SSLError):
                await loop.create_connection(lambda: Waiting(1), *address, ssl=stranger)

        await beside(count, one)


async def refused_connections(count: int) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as nobody:             # bound, not listening
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()

        async def one() -> None:
            with contextlib.suppress(ConnectionRefusedError):
                await loop.create_connection(lambda: Waiting(1), *address)

        await beside(count, one)


async def cancelled_receives(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        here, there = socket.socketpair()
        here.setblocking(False)
        task = asyncio.ensure_future(loop.sock_recv(here, 100))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        here.close()
        there.close()


async def timers(count: int) -> None:
    loop = asyncio.get_running_loop()
    fired: asyncio.Queue[int] = asyncio.Queue()
    for number in range(count):
        loop.call_later(3600 + number, fired.put_nowait, number).cancel()
        loop.call_later(number % 7 / 1000, fired.put_nowait, number)
    for _ in range(count):
        await fired.get()
    for number in range(count):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(0 if number % 2 else 0.0005), 0.0001)


async def calls_of_threads(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        await loop.run_in_executor(None, lambda: None)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop)
    await asyncio.sleep(0.01)


async def datagrams(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        heard = loop.create_future()

        class Hearing(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, address: Any, heard: Any = heard) -> None:
                heard.set_result(data)

        server, _ = await loop.create_datagram_endpoint(Hearing, local_addr=("127.0.0.1", 0))
        client, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, remote_addr=server.get_extra_info("sockname"),
        )
        client.sendto(b"hello")
        await heard
        client.close()
        server.close()
        await asyncio.sleep(0)


async def errors(count: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        loop.call_soon(int, "no number")
        await asyncio.sleep(0)


# A way, and how many of the cycles it makes: handshakes take most time.
WAYS: dict[str, tuple[Way, float]] = {
    "connections": (connections, 1),
    "large writes": (lambda count: connections(count, message=LARGE), 0.1),
    "aborts": (lambda count: connections(count, end="abort"), 0.5),
    "streams": (streams, 0.5),
    "TLS handshakes": (handshakes, 1),
    "refused handshakes": (refused_handshakes, 0.2),
    "refused connections": (refused_connections, 0.5),
    "cancelled receives": (cancelled_receives, 0.5),
    "timers": (timers, 1),
    "calls of threads": (calls_of_threads, 0.5),
    "datagrams": (datagrams, 0.3),
    "errors": (errors, 0.5),
}


def complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of errors that nobody made on purpose: those are in `errors` and, as OSError, in refused handshakes."""
    if not isinstance(context.get("exception"), OSError | ValueError):
        loop.default_exception_handler(context)


async def settled() -> None:
    while alive.count:
        await alive.none.wait()
    for _ in range(5):                          # what closes in a later turn
        await asyncio.sleep(0.002)


async def main(cycles: int, wanted: list[str]) -> None:
    global alive
    alive, looks = Alive(), {}
    asyncio.get_running_loop().set_exception_handler(complain)
    asyncio.get_running_loop().slow_callback_duration = 30.0        # a look takes long, which debug mode would tell
    for name in wanted or WAYS:
        way, share = WAYS[name]
        count = max(AT_ONCE, int(cycles * share))
        await way(max(min(WARM_UP, count), count // 4))
        await settled()
        before = held()
        await way(count)
        await settled()
        looks[name] = [before, held()]
    print(json.dumps(looks))


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    with asyncio.Runner(loop_factory=getattr(importlib.import_module(module), function)) as runner:
        runner.run(main(int(sys.argv[2]), sys.argv[3:]))
