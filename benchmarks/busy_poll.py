"""What does a loop that keeps polling before it sleeps save? One message of 64 B at a time, there and back.

Over TCP: the native client and one connection, a protocol's echo on each event loop, and on anywire's with `busy_poll`.
In one cell the client sleeps as clients do, in the other it spins, so that nothing but the server is measured.
Over shared memory: two asyncio processes on anywire's loop, both polling, beside pyzmq's asyncio sockets.

To be shown: a round trip with busy_poll takes at most 0.6 × of that on each loop without; over shm:// 200 000 round
trips are made a second. Polling takes a whole CPU from whatever else runs: figures of a busy machine say nothing here.
"""

from __future__ import annotations

import contextlib

from anywire.cli.measure import turns
from anywire.cli.pair import Failed
from benchmarks import loops
from benchmarks.harness import SERVER_CORE, Child, Report, load, native_programs, options
from benchmarks.peers import Duo, peer

POLLING = "protocol, anywire, busy_poll"
MICROSECONDS = 1000
TCP = {"1 × 64 B, client sleeps": (), "1 × 64 B, client spins": ("spin",)}
SHM = "64 B over shm, one at a time"
OURS, ZMQ = "anywire shm, busy_poll", "pyzmq asyncio"
MOST, LEAST = 0.6, 0.2


def main() -> None:
    arguments = options(__doc__, rounds=5, seconds=0.5).parse_args()
    report = Report("busy_poll: one message at a time", (*loops.PACKAGES, "pyzmq"))
    report.begin()
    here = loops.installed(report)
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {"C epoll": stack.enter_context(Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0"))}
        for loop in here:
            servers[f"protocol, {loop}"] = stack.enter_context(loops.server("protocol", loop))
        if "anywire" in here:
            polling = loops.server("protocol", "anywire", f"busy_poll={MICROSECONDS}")
            servers[POLLING] = stack.enter_context(polling)
        ports = {name: loops.port_of(server) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for cell, more in TCP.items():
                for name in turns(list(servers), number):
                    one = (programs, ports[name], 1, 64, 1, arguments.seconds, "raw", servers[name].pid, *more)
                    try:
                        figures: dict[str, float] | str = with_trip(load(*one))
                    except RuntimeError as error:
                        figures = str(error)
                    report.results.add(cell, name, figures)
    for cell in TCP:
        report.rates(cell, "protocol, asyncio", "rate", ("trip_us", "p50_us", "p99_us", "server_cpu_us"))
        for loop in here if POLLING in servers else ():
            base = f"protocol, {loop}"
            ratio = report.results.ratio(cell, POLLING, base, "trip_us")
            report.claim(f"{cell}: a round trip with busy_poll, of {base}", ratio, MOST, at_most=True)
    over_shm(report, arguments.rounds, arguments.seconds)
    report.finish(arguments.json)


def with_trip(figures: dict[str, float]) -> dict[str, float]:
    return {**figures, "trip_us": 1e6 / figures["rate"] if figures["rate"] else float("inf")}


def over_shm(report: Report, rounds: int, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        duos: dict[str, Duo] = {}
        for name in (OURS, "anywire shm", ZMQ):
            one = peer(name, "asyncio")
            if one.missing:
                report.note(f"{name}: {one.needs} is not installed, so not compared")
                continue
            duos[name] = stack.enter_context(Duo(one))
        for number in range(rounds):
            for name in turns(list(duos), number):
                try:
                    report.results.add(SHM, name, duos[name].measure("echo", 64, seconds))
                except Failed as error:
                    report.results.add(SHM, name, str(error))
                    duos.pop(name).close()
    report.rates(SHM, ZMQ, "rate", ("cpu_us",))
    rate = report.results.median(SHM, OURS, "rate")
    report.claim(f"{OURS}, round trips a second", rate and rate / 1e6, LEAST, "M/s")


if __name__ == "__main__":
    main()
