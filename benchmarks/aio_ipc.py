"""How fast do two asyncio processes of one host exchange messages?

Two processes on CPUs of their own, plain coroutines, the standard event loop (uvloop where the name says so): one
sends, the other sends back what it receives. anywire over shared memory and over a Unix socket, pyzmq's asyncio
sockets, and a length in front of each message on asyncio's and uvloop's Unix streams.

To be shown: 64 messages of 1 KiB under way, no spinning, 1.4 million a second, ≥ 35 × pyzmq, ≥ 4.5 × uvloop streams,
at most 0.05 system calls a message; 64 B one at a time faster than each peer asleep, 400 000 a second with
`spin_us=50`; no CPU time while idle.
"""

from __future__ import annotations

import contextlib
from typing import Any

from anywire.cli.measure import human, turns
from anywire.cli.pair import Failed
from benchmarks.harness import Distance, Report, native_programs, options
from benchmarks.peers import Duo, calls_per_message, peer

OURS, SPINNING, UNIX = "anywire shm", "anywire shm, spin_us=50", "anywire unix"
ZMQ, STREAMS, UVLOOP = "pyzmq asyncio", "asyncio streams", "uvloop streams"
MANY, ONE = "1 KiB, 64 under way", "64 B, one at a time"
CELLS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    MANY: (1 << 10, {"depth": 64}, (OURS, UNIX, ZMQ, STREAMS, UVLOOP)),
    ONE: (64, {}, (OURS, SPINNING, UNIX, ZMQ, STREAMS, UVLOOP)),
}
IDLE = 2.0                              # seconds


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.5)
    parser.add_argument("--no-calls", action="store_true", help="don't count system calls")
    arguments = parser.parse_args()
    report = Report("aio_ipc: echo between two asyncio processes", ("anywire", "pyzmq", "uvloop"))
    report.begin()
    results = report.results
    with native_programs() as programs, contextlib.ExitStack() as stack:
        distance = Distance(programs)
        duos: dict[str, Duo] = {}
        for name in dict.fromkeys(name for _, _, names in CELLS.values() for name in names):
            one = peer(name, "asyncio")
            if one.missing:
                report.note(f"{name}: {one.needs} is not installed, so not compared")
                continue
            try:
                duos[name] = stack.enter_context(Duo(one))
            except Failed as error:
                report.note(f"{name} did not start: {error}")
        for number in range(arguments.rounds):
            for cell, (size, more, names) in CELLS.items():
                distance.look(cell)
                for name in turns([name for name in names if name in duos], number):
                    try:
                        results.add(cell, name, duos[name].measure("echo", size, arguments.seconds, **more))
                    except Failed as error:
                        results.add(cell, name, str(error))
                        duos.pop(name).close()
        distance.split(report)
        for cell in results.cells:
            report.rates(cell, ZMQ, "rate", ("cpu_us", "client_cpu_us", "server_cpu_us"))
        claims(report)
        print(f"\nCPU time of both processes in {IDLE:g} s without a message")
        for name, duo in duos.items():
            spent = duo.idle(IDLE) * 1e3
            report.note(f"  {name}: {human(spent)} ms")
            if name in (OURS, SPINNING):
                report.claim(f"{name}, CPU time while idle", spent, 5, "ms", at_most=True)
    if not arguments.no_calls:
        print("\nSystem calls of both processes for one message of 1 KiB, 64 under way")
        for name in (OURS, UNIX, ZMQ, STREAMS, UVLOOP):
            if name not in duos:
                continue
            calls, how = calls_per_message(peer(name, "asyncio"), 1 << 10, 64, 4000)
            report.note(f"  {name}: {human(calls)} ({how})")
            if name == OURS and calls is not None:
                report.claim("system calls a message", calls, 0.05, "calls", at_most=True)
    report.finish(arguments.json)


def claims(report: Report) -> None:
    results = report.results
    report.claim(f"{MANY}, of {ZMQ}", results.ratio(MANY, OURS, ZMQ, "rate"), 35.0)
    report.claim(f"{MANY}, of {UVLOOP}", results.ratio(MANY, OURS, UVLOOP, "rate"), 4.5)
    report.claim(f"{MANY}, messages a second", mega(results.median(MANY, OURS, "rate")), 1.4, "M/s")
    for other in (ZMQ, STREAMS, UVLOOP):
        report.claim(f"{ONE}, of {other}", results.ratio(ONE, OURS, other, "rate"), 1.0)
    report.claim(f"{ONE}, spin_us=50, messages a second", mega(results.median(ONE, SPINNING, "rate")), 0.4, "M/s")


def mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


if __name__ == "__main__":
    main()
