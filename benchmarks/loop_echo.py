"""How much of a C server's rate does each event loop reach? An echo over TCP, on all loops in one run.

Four ways to write it: a protocol (callbacks), asyncio's streams (a coroutine on a connection's reader and writer),
`anywire.serve_stream` and `anywire.serve` (messages, beside a C server that frames too). The load generator is native
and has a CPU of its own. To be shown, as shares of the C epoll server's rate: at 100 connections × 1 KiB the targets in
TARGETS, which are above every other loop's; at 10 × 100 KiB, where most bytes are, nearly all of it.

Many short turns: how fast memory and the way between the CPUs are changes within seconds on a virtual machine, and a
ratio is of two turns of the same round. Compare `server_cpu_us`, CPU time of the server for one message, when something
else runs on the machine.
"""

from __future__ import annotations

import contextlib

from anywire.cli.measure import size_name, turns
from benchmarks import loops
from benchmarks.harness import SERVER_CORE, Child, Report, load, native_programs, options

CELLS = ((100, 1 << 10), (10, 100 << 10))
NATIVE = {"raw": "C epoll", "framed": "C epoll, framed"}
# Which loops a way runs on: the last two belong to this library, and drive any loop that has add_reader.
WAYS = {
    "protocol": tuple(loops.LOOPS),
    "streams": tuple(loops.LOOPS),
    "Stream": ("asyncio", "uvloop", "anywire"),
    "Channel": ("asyncio", "uvloop", "anywire"),
}
# Of the C server's rate, on anywire's loop.
TARGETS = {
    "protocol": (0.92, 0.95),
    "streams": (0.75, None),
    "Stream": (0.85, 0.90),
    "Channel": (0.80, None),
}


def main() -> None:
    parser = options(__doc__, rounds=15, seconds=0.25)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of %(default)s")
    arguments = parser.parse_args()
    report = Report("loop_echo: an echo over TCP on each event loop", loops.PACKAGES)
    report.begin()
    here = loops.installed(report)
    ways = {way: [loop for loop in WAYS[way] if loop in here] for way in arguments.ways.split(",")}
    modes = {name: mode for mode, name in NATIVE.items()}
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {}
        for name, mode in modes.items():
            command = (programs / "echo_server", "127.0.0.1", "0", mode)
            servers[name] = stack.enter_context(Child(SERVER_CORE, *command))
        for way, on in ways.items():
            for loop in on:
                name = f"{way}, {loop}"
                servers[name] = stack.enter_context(loops.server(way, loop))
                modes[name] = "framed" if way == "Channel" else "raw"
        ports = {name: loops.port_of(server) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for cell in CELLS:
                for name in turns(list(servers), number):
                    one = (programs, ports[name], *cell, 1, arguments.seconds, modes[name], servers[name].pid)
                    try:
                        report.results.add(cell_name(*cell), name, load(*one))
                    except RuntimeError as error:
                        report.results.add(cell_name(*cell), name, str(error))
    for place, cell in enumerate(CELLS):
        tables(report, cell_name(*cell), place, ways)
    report.finish(arguments.json)


def tables(report: Report, cell: str, place: int, ways: dict[str, list[str]]) -> None:
    report.rates(cell, NATIVE["raw"], "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
    for way, on in ways.items():
        native, target, ours = NATIVE["framed" if way == "Channel" else "raw"], TARGETS[way][place], f"{way}, anywire"
        if "anywire" not in on:
            continue
        if target is not None:
            report.claim(f"{ours}, {cell}, of {native}", report.results.ratio(cell, ours, native, "rate"), target)
        cpu = report.results.ratio(cell, native, ours, "server_cpu_us")
        if cpu is not None:
            report.note(f"      {ours}: {cpu:.2f} × by CPU time of the server")


def cell_name(connections: int, size: int) -> str:
    return f"{connections} × {size_name(size)}"


if __name__ == "__main__":
    main()
