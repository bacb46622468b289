"""How fast is a coroutine that echoes bytes? `anywire.serve_stream` beside asyncio streams, on the standard loop.

The load generator is native and has a CPU of its own. Reference lines: an asyncio protocol (callbacks, no coroutine),
a C epoll server, and uvloop's streams where uvloop is installed. To be shown: 1.25 × asyncio streams at
100 connections × 1 KiB, 3.5 × at 10 × 100 KiB.

Besides the rate, compare `server_cpu_us`: CPU time of the server for one message. It says the same thing when
something else runs on the machine. The other loops are compared by `loop_echo`.
"""

from __future__ import annotations

import contextlib
import importlib.util

from anywire.cli.measure import size_name, turns
from benchmarks import loops
from benchmarks.harness import SERVER_CORE, Child, Report, load, native_programs, options

CELLS = ((100, 1 << 10), (10, 100 << 10), (1, 64))
TARGETS = {(100, 1 << 10): 1.25, (10, 100 << 10): 3.5}
BASE = "asyncio streams"
SERVERS = {
    "anywire Stream": ("Stream", "asyncio"),
    BASE: ("streams", "asyncio"),
    "asyncio protocol": ("protocol", "asyncio"),
    "uvloop streams": ("streams", "uvloop"),
}


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.8)
    parser.add_argument("--depth", type=int, default=1, help="messages under way on each connection (%(default)s)")
    arguments = parser.parse_args()
    report = Report("stream_echo: bytes back from a coroutine over TCP", ("anywire", "uvloop"))
    report.begin()
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(loops.server(kind, loop))
            for name, (kind, loop) in SERVERS.items() if importlib.util.find_spec(loop)
        }
        servers["C epoll"] = stack.enter_context(Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0"))
        ports = {name: loops.port_of(server) for name, server in servers.items()}
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
