"""How fast is a coroutine that echoes bytes? `anywire.serve_stream` beside asyncio streams, on the standard loop.

The load generator is native and has a CPU of its own. Reference lines: an asyncio protocol (callbacks, no coroutine),
a C epoll server, and uvloop's streams where uvloop is installed. To be shown: 1.25 × asyncio streams at
100 connections × 1 KiB, 3.5 × at 10 × 100 KiB.

Besides the rate, compare `server_cpu_us`: CPU time of the server for one message. It says the same thing when
something else runs on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util

from anywire.cli.measure import size_name, turns
from benchmarks.harness import SERVER_CORE, Child, Report, load, module_server, native_programs, options

CELLS = ((100, 1 << 10), (10, 100 << 10), (1, 64))
TARGETS = {(100, 1 << 10): 1.25, (10, 100 << 10): 3.5}
BASE = "asyncio streams"


# ---- the servers, each as its users write it


async def serve_anywire() -> None:
    anywire = importlib.import_module("anywire")

    async def echo(stream: anywire.Stream) -> None:  # type: ignore[name-defined]
        async for chunk in stream:
            await stream.write(chunk)

    async with anywire.serve_stream(echo, "tcp://127.0.0.1:0", backlog=1024) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def serve_streams() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, backlog=1024)
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def serve_protocol() -> None:
    class Echo(asyncio.Protocol):
        transport: asyncio.Transport

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, backlog=1024)
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def serve(name: str) -> None:
    if name == "uvloop streams":
        importlib.import_module("uvloop").run(serve_streams())
        return
    asyncio.run({"anywire Stream": serve_anywire, BASE: serve_streams, "asyncio protocol": serve_protocol}[name]())


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.8)
    parser.add_argument("--depth", type=int, default=1, help="messages under way on each connection (%(default)s)")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    report = Report("stream_echo: bytes back from a coroutine over TCP", ("anywire", "uvloop"))
    report.begin()
    names = ["anywire Stream", BASE, "asyncio protocol"]
    if importlib.util.find_spec("uvloop"):
        names.append("uvloop streams")
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(module_server("benchmarks.stream_echo", name)) for name in names}
        servers["C epoll"] = stack.enter_context(Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0"))
        ports = {name: int(server.line().split()[1]) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for connections, size in CELLS:
                for name in turns(list(servers), number):
                    figures = load(
                        programs, ports[name], connections, size, arguments.depth, arguments.seconds, "raw",
                        servers[name].pid,
                    )
                    report.results.add(f"{connections} × {size_name(size)}", name, figures)
    for connections, size in CELLS:
        cell = f"{connections} × {size_name(size)}"
        report.rates(cell, BASE, "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
        report.echo_claim(cell, "anywire Stream", BASE, TARGETS.get((connections, size)))
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
