"""What does the blocking front over shared memory reach, beside a ring in C and the other ways to share memory?

Two processes on CPUs of their own. Both spin, unless the name says otherwise: there and back and one way, from 64 B to
16 MiB, with copies on both sides and in place (loans). Peers: a ring in C that checks nothing (native/shm_ring.c, the
limit), iceoryx2's Python (which never copies on the receiving side, and not at all in place), multiprocessing.Pipe, a
bare Unix socket pair, pyzmq.

To be shown: there and back 3 million a second with 64 B (0.4 × the C ring, 11 × iceoryx2) and 2 million with 1 KiB; one
way 6 million, 12 million in batches of 64; 1 and 16 MiB with copies ≥ 0.85 × the C ring; in place 16 MiB within 2 × of
64 KiB and ≥ 2 × iceoryx2. And while the receiver sleeps between messages: not slower than the better of pipe and socket
pair, without CPU time while idle.

`recv_into` is what compares with the C ring for large messages: `recv` returns new `bytes`, for which the kernel must
first find zeroed memory.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

from anywire.cli.measure import human, size_name, turns
from anywire.cli.pair import Failed
from benchmarks.aio_ipc import mega
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Distance, Report, native_programs, options
from benchmarks.peers import Duo, peer

SHM, INTO, BATCHES, LOANS = (f"anywire shm, spin{more}" for more in ("", ", recv_into", ", many", ", loans"))
ADAPTIVE, SLEEP, UNIX = "anywire shm, adaptive", "anywire shm, sleep", "anywire unix"
IOX, IOX_ZERO = "iceoryx2, spin", "iceoryx2, spin, in place"
PIPE, BARE, ZMQ = "multiprocessing.Pipe", "bare socket pair", "pyzmq"
C, C_ZERO = "C ring", "C ring, in place"
NATIVE = {C: "copy", C_ZERO: "zero"}
PHASES = {"echo": "there and back", "flow": "one way"}
SMALL, LARGE = (64, 1 << 10), (64 << 10, 1 << 20, 16 << 20)
WHO = {
    **dict.fromkeys(SMALL, (C, SHM, INTO, BATCHES, IOX, PIPE, BARE, ZMQ)),
    **dict.fromkeys(LARGE, (C, C_ZERO, SHM, INTO, LOANS, IOX, IOX_ZERO, PIPE, BARE, ZMQ)),
}
RESTING = "64 B there and back after 1 ms of sleep"
RESTERS = (ADAPTIVE, SLEEP, UNIX, PIPE, BARE, ZMQ)
IDLE = 2.0                              # seconds


def cell_name(size: int, phase: str) -> str:
    return f"{size_name(size)} {PHASES[phase]}"


def ring(programs: Path, name: str, phase: str, size: int, seconds: float) -> dict[str, float]:
    """The same by the C program."""
    command = [programs / "shm_ring", size, seconds, phase, NATIVE[name], SERVER_CORE, CLIENT_CORE]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=seconds + 60, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(
    report: Report, programs: Path, distance: Distance, duos: dict[str, Duo], rounds: int, seconds: float
) -> None:
    def take(cell: str, name: str, size: int, phase: str) -> None:
        if name not in duos and name not in NATIVE:
            return
        if name in duos and phase in PHASES and phase not in duos[name].contender.phases:
            return
        try:
            if name in NATIVE:
                figures = ring(programs, name, phase, size, seconds)
            elif phase == "pause":
                figures = duos[name].trips(size, max(20, int(seconds * 500)))
            else:
                figures = duos[name].measure(phase, size, seconds)
        except Failed as error:
            report.results.add(cell, name, str(error))
            duos.pop(name).close()
        else:
            report.results.add(cell, name, figures)

    for number in range(rounds):
        for size, names in WHO.items():
            for phase in PHASES:
                distance.look(cell_name(size, phase))
                for name in turns(names, number):
                    take(cell_name(size, phase), name, size, phase)
        distance.look(RESTING)
        for name in turns(RESTERS, number):
            take(RESTING, name, 64, "pause")


def claims(report: Report) -> None:
    results = report.results

    def ratio(size: int, phase: str, ours: str, base: str, target: float) -> None:
        cell = cell_name(size, phase)
        report.claim(f"{cell}, {ours}, of {base}", results.ratio(cell, ours, base, "rate"), target)

    def rate(size: int, phase: str, ours: str, target: float) -> None:
        cell = cell_name(size, phase)
        where = f"where the C ring does {human(results.median(cell, C, 'rate'))}"
        report.claim(f"{cell}, {ours}, {where}", mega(results.median(cell, ours, "rate")), target, "M/s")

    rate(64, "echo", SHM, 3.0)
    ratio(64, "echo", SHM, C, 0.4)
    ratio(64, "echo", SHM, IOX, 11)
    rate(1 << 10, "echo", SHM, 2.0)
    ratio(1 << 10, "echo", SHM, C, 0.48)        # 2 million where that ring did 4.19
    rate(64, "flow", SHM, 6.0)
    rate(64, "flow", BATCHES, 12.0)
    for size in LARGE[1:]:
        for phase in PHASES:
            ratio(size, phase, INTO, C, 0.85)
    for phase, way in PHASES.items():
        for size in LARGE:
            ratio(size, phase, LOANS, IOX_ZERO, 2.0)
        small, large = (results.median(cell_name(size, phase), LOANS, "rate") for size in (LARGE[0], LARGE[-1]))
        report.claim(f"{LOANS}, {way}, 16 MiB of 64 KiB", large / small if large and small else None, 0.5)
    for base in (PIPE, BARE):
        report.claim(f"{RESTING}, {ADAPTIVE}, of {base}", results.ratio(RESTING, ADAPTIVE, base, "rate"), 1.0)


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.2)
    arguments = parser.parse_args()
    report = Report("shm_blocking: shared memory, blocking front", ("anywire", "iceoryx2", "pyzmq"))
    report.begin()
    with native_programs() as programs, contextlib.ExitStack() as stack:
        duos: dict[str, Duo] = {}
        for name in dict.fromkeys((*(name for names in WHO.values() for name in names), *RESTERS)):
            if name in NATIVE:
                continue
            one = peer(name, "blocking")
            if one.missing:
                report.note(f"{name}: {one.needs} is not installed, so not compared")
                continue
            try:
                duos[name] = stack.enter_context(Duo(one))
            except Failed as error:
                report.note(f"{name} did not start: {error}")
        distance = Distance(programs)
        measure(report, programs, distance, duos, arguments.rounds, arguments.seconds)
        distance.split(report)
        for cell in report.results.cells:
            resting = cell.startswith(RESTING)
            extra = ("trip_us", "cpu_us") if resting else ("mb_s", "cpu_us")
            report.rates(cell, BARE if resting else C, "rate", extra)
        claims(report)
        print(f"\nCPU time of both processes in {IDLE:g} s without a message")
        for name in (ADAPTIVE, SLEEP, UNIX):
            if name not in duos:
                continue
            spent = duos[name].idle(IDLE) * 1e3
            report.note(f"  {name}: {human(spent)} ms")
            if name != UNIX:
                report.claim(f"{name}, CPU time while idle", spent, 5, "ms", at_most=True)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
