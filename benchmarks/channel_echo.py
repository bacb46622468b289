"""What does framing cost? An echo of messages through `anywire.serve`, beside the same bytes handled by hand.

The load generator and one of the servers are C and speak anywire's preamble and frame headers
(docs/design/interfaces.md). The peer to beat is what one writes by hand on asyncio streams: `readexactly` for the
header, `readexactly` for the message, `write`, `drain`, on the same loop, for the same bytes. To be shown: 1.2 × that;
the ratio to C is reported.
"""

from __future__ import annotations

import contextlib
import importlib.util

from anywire.cli.measure import size_name, turns
from benchmarks import loops
from benchmarks.harness import SERVER_CORE, Child, Report, load, native_programs, options

CELLS = ((100, 1 << 10, 1), (10, 100 << 10, 1), (1, 64, 1), (10, 64, 32))
TARGET = 1.2
BASE = "by hand on streams"
SERVERS = {
    "anywire Channel": ("Channel", "asyncio"),
    BASE: (BASE, "asyncio"),
    "by hand on uvloop": (BASE, "uvloop"),
}


def main() -> None:
    arguments = options(__doc__, rounds=5, seconds=0.8).parse_args()
    report = Report("channel_echo: messages back from a coroutine over TCP", ("anywire", "uvloop"))
    report.begin()
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(loops.server(kind, loop))
            for name, (kind, loop) in SERVERS.items() if importlib.util.find_spec(loop)
        }
        native = Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0", "framed")
        servers["C epoll"] = stack.enter_context(native)
        ports = {name: loops.port_of(server) for name, server in servers.items()}
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
