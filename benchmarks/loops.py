"""The event loops that are compared, and the echo servers that run on them.

A contender is called "KIND, LOOP", for example "protocol, uvloop". Run as a program
(`python -m benchmarks.loops KIND LOOP [OPTION=NUMBER...]`) it is that server on a free port of 127.0.0.1, and says
"READY PORT". A loop
that is not installed is left out of LOOPS' users by `installed`, which says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import struct
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from benchmarks.harness import SERVER_CORE, Child, Report

# Name, and the module whose `new_event_loop()` makes one.
LOOPS = {"asyncio": "asyncio", "uvloop": "uvloop", "rloop": "rloop", "anywire": "anywire"}
PACKAGES = ("anywire", "uvloop", "rloop")
BACKLOG = 4096
PREAMBLE = struct.Struct("<8sBBHIQ")
HEADER = struct.Struct("<II")
MAGIC = b"\x89anyw\r\n\n"
KINDS = 0xFFFFFFF0


def installed(report: Report, names: Iterable[str] = tuple(LOOPS)) -> list[str]:
    """Those of the loops that are here; the report says which are not."""
    found = []
    for name in names:
        if importlib.util.find_spec(LOOPS[name]):
            found.append(name)
        else:
            report.note(f"{name}: not installed, so not compared (pip install {name})")
    return found


def run(loop: str, main: Coroutine[Any, Any, None], **options: Any) -> None:
    """Run `main` on a loop of this name; `options` are given to its `new_event_loop`."""
    make = importlib.import_module(LOOPS[loop]).new_event_loop
    with asyncio.Runner(loop_factory=lambda: make(**options)) as runner:
        runner.run(main)


def server(kind: str, loop: str, *arguments: str) -> Child:
    """A server of this kind on this loop, on the server's CPU."""
    return Child(SERVER_CORE, sys.executable, "-m", "benchmarks.loops", kind, loop, *arguments)


def port_of(child: Child) -> int:
    return int(child.line().split()[1])


# ---- the servers, each as its users write it


async def serve_stream() -> None:
    anywire = importlib.import_module("anywire")

    async def echo(stream: anywire.Stream) -> None:  # type: ignore[name-defined]
        async for chunk in stream:
            await stream.write(chunk)

    async with anywire.serve_stream(echo, "tcp://127.0.0.1:0", backlog=BACKLOG) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def serve_channel() -> None:
    anywire = importlib.import_module("anywire")

    async def echo(channel: anywire.Channel) -> None:  # type: ignore[name-defined]
        async for message in channel:
            await channel.send(message)

    async with anywire.serve(echo, "tcp://127.0.0.1:0", backlog=BACKLOG) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def announce(server: asyncio.Server) -> None:
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().create_future()        # until it is ended; rloop's servers have no serve_forever


async def serve_streams(**options: Any) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    await announce(await asyncio.start_server(echo, "127.0.0.1", 0, backlog=BACKLOG, **options))


async def serve_by_hand() -> None:
    """Messages with anywire's preamble and headers, on asyncio streams."""
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            magic, _, _, extensions, _, _ = PREAMBLE.unpack(await reader.readexactly(PREAMBLE.size))
            await reader.readexactly(extensions)
            if magic != MAGIC:
                raise ConnectionError("not anywire")
            writer.write(PREAMBLE.pack(MAGIC, 1, 0, 0, 0, 16 << 20))
            while True:
                length, _ = HEADER.unpack(await reader.readexactly(HEADER.size))
                if length >= KINDS:
                    continue
                message = await reader.readexactly(length)
                writer.write(HEADER.pack(length, 1) + message)      # this header confirms the message it echoes
                await writer.drain()
        writer.close()

    await announce(await asyncio.start_server(echo, "127.0.0.1", 0, backlog=BACKLOG))


class Echo(asyncio.Protocol):
    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve_protocol(**options: Any) -> None:
    loop = asyncio.get_running_loop()
    await announce(await loop.create_server(Echo, "127.0.0.1", 0, backlog=BACKLOG, **options))


KINDS_OF_SERVER: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "Stream": serve_stream,
    "Channel": serve_channel,
    "streams": serve_streams,
    "by hand on streams": serve_by_hand,
    "protocol": serve_protocol,
}


def main() -> None:
    kind, loop, *options = sys.argv[1:]
    run(loop, KINDS_OF_SERVER[kind](), **{name: float(value) for name, value in (one.split("=") for one in options)})


if __name__ == "__main__":
    main()
