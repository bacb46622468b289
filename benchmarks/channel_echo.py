"""What does framing cost? An echo of messages through `anywire.serve`, beside the same bytes handled by hand.

The load generator and one of the servers are C and speak anywire's preamble and frame headers
(docs/design/interfaces.md). The peer to beat is what one writes by hand on asyncio streams: `readexactly` for the
header, `readexactly` for the message, `write`, `drain`, on the same loop, for the same bytes. To be shown: 1.2 × that;
the ratio to C is reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import struct

from anywire.cli.measure import size_name, turns
from benchmarks.harness import SERVER_CORE, Child, Report, load, module_server, native_programs, options

CELLS = ((100, 1 << 10, 1), (10, 100 << 10, 1), (1, 64, 1), (10, 64, 32))
TARGET = 1.2
BASE = "by hand on streams"
PREAMBLE = struct.Struct("<8sBBHIQ")
HEADER = struct.Struct("<II")
MAGIC = b"\x89anyw\r\n\n"
KINDS = 0xFFFFFFF0


async def serve_anywire() -> None:
    anywire = importlib.import_module("anywire")

    async def echo(channel: anywire.Channel) -> None:  # type: ignore[name-defined]
        async for message in channel:
            await channel.send(message)

    async with anywire.serve(echo, "tcp://127.0.0.1:0", backlog=1024) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def serve_by_hand() -> None:
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

    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=1024)
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def serve(name: str) -> None:
    if name == "by hand on uvloop":
        importlib.import_module("uvloop").run(serve_by_hand())
        return
    asyncio.run({"anywire Channel": serve_anywire, BASE: serve_by_hand}[name]())


def main() -> None:
    arguments = options(__doc__, rounds=5, seconds=0.8).parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    report = Report("channel_echo: messages back from a coroutine over TCP", ("anywire", "uvloop"))
    report.begin()
    names = ["anywire Channel", BASE]
    if importlib.util.find_spec("uvloop"):
        names.append("by hand on uvloop")
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(module_server("benchmarks.channel_echo", name)) for name in names}
        native = Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0", "framed")
        servers["C epoll"] = stack.enter_context(native)
        ports = {name: int(server.line().split()[1]) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for connections, size, depth in CELLS:
                for name in turns(list(servers), number):
                    pid = servers[name].pid
                    figures = load(programs, ports[name], connections, size, depth, arguments.seconds, "framed", pid)
                    report.results.add(cell_name(connections, size, depth), name, figures)
    for cell in report.results.cells:
        report.rates(cell, BASE, "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
        # One connection, one message: both sides sleep for each, which takes longer than all else and is alike for all.
        report.echo_claim(cell, "anywire Channel", BASE, None if cell.startswith("1 ×") else TARGET)
    report.finish(arguments.json)


def cell_name(connections: int, size: int, depth: int) -> str:
    return f"{connections} × {size_name(size)}" + (f", {depth} under way" if depth > 1 else "")


if __name__ == "__main__":
    main()
