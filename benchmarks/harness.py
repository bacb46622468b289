"""What the benchmarks share: pinned children, the native programs, options, claims with their target, JSON.

Used by the files beside it, on the main thread. A benchmark measures its contenders in alternating rounds (see
`anywire.cli.measure`, which `anywire bench` uses too), prints its table and then its claims: a ratio, its target, and
PASS or FAIL. Children are ended by `Child.close`; a benchmark that dies takes them with it, because they end when
their standard input does.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anywire.cli import echoes
from anywire.cli.measure import Results, cores, human, machine, machine_line, table, times

NATIVE = Path(__file__).parent / "native"
SHARED = echoes.NATIVE
ROOT = Path(__file__).parent.parent
SERVER_CORE, CLIENT_CORE = cores()
BUSY = 0.85                         # below this share of a CPU, something else was running on it
MANY = 8                            # connections under which a server always has work to do, if its client has none
ATTEMPTS = 4


@dataclass
class Claim:
    """What must be shown, and what this run shows. `limit` is a floor, or a ceiling if `at_most`."""

    text: str
    value: float | None
    limit: float
    unit: str = "×"
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value is not None and (self.value <= self.limit if self.at_most else self.value >= self.limit)

    def __str__(self) -> str:
        value = "no figure" if self.value is None else f"{self.value:.2f} {self.unit}"
        sign = "≤" if self.at_most else "≥"
        return f"{'PASS' if self.holds else 'FAIL'}  {self.text}: {value} (target {sign} {self.limit:g} {self.unit})"


@dataclass
class Report:
    """One benchmark's outcome: prints as it grows, and goes to `--json FILE`."""

    name: str
    packages: Sequence[str] = ()
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: Results = field(default_factory=Results)

    def begin(self) -> None:
        print(f"# {self.name}\n{machine_line(machine(self.packages))}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def claim(self, *claim: Any, **more: Any) -> None:
        self.claims.append(Claim(*claim, **more))
        print(self.claims[-1], flush=True)

    def rates(self, cell: str, base: str, figure: str, extra: Sequence[str] = (), unit: str = "/s") -> None:
        """Print a cell's table: each contender's median, its ratio to `base`, and more figures."""
        names = sorted(self.results.cells.get(cell, {}), key=lambda n: -(self.results.median(cell, n, figure) or 0))
        rows = [
            [
                name,
                self.results.errors.get((cell, name), human(self.results.median(cell, name, figure))),
                times(self.results.ratio(cell, name, base, figure)),
                *(human(self.results.median(cell, name, other)) for other in extra),
            ]
            for name in names
        ]
        print(f"\n{table([cell, f'{figure} {unit}'.strip(), f'× {base}', *extra], rows)}\n", flush=True)

    def echo_claim(self, cell: str, ours: str, base: str, target: float | None) -> None:
        """A claim on the rates of two servers under the load generator (none: a note), and what CPU time says."""
        rate, cpu = self.results.ratio(cell, ours, base, "rate"), self.results.ratio(cell, base, ours, "server_cpu_us")
        if target is not None:
            self.claim(f"{ours}, {cell}, of {base}", rate, target)
        else:
            self.note(f"{ours}, {cell}, of {base}: {times(rate)}")
        self.note(f"      the same by CPU time of the server: {times(cpu)}; of the C server's rate: "
                  f"{times(self.results.ratio(cell, ours, 'C epoll', 'rate'))}")
        idle = [name for name in (ours, base) if (self.results.median(cell, name, "busy") or 1) < BUSY]
        if idle and not cell.startswith("1 ×"):
            self.note(f"      disturbed: with {' and '.join(idle)} neither server nor client had its CPU to itself")

    def finish(self, file: Path | None) -> None:
        if file is not None:
            outcome = {
                "benchmark": self.name,
                "machine": machine(self.packages),
                "claims": [{**asdict(claim), "holds": claim.holds} for claim in self.claims],
                "notes": self.notes,
                "cells": self.results.as_json(),
            }
            file.write_text(json.dumps(outcome, indent=1) + "\n")


def options(description: str | None, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="alternating rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="of one measurement (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and claims there")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)      # how it starts its own servers
    return parser


class Child:
    """A process on one CPU that says READY (and more) on a line of its own, and ends when its input does.

    `core` None: it goes to its CPU itself.
    """

    def __init__(self, core: int | None, *command: str | Path, fds: Sequence[int] = ()):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.process = subprocess.Popen(
            [*(() if core is None else ("taskset", "-c", str(core))), *map(str, command)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, pass_fds=fds,
        )
        self.pid = self.process.pid
        self.lines = b""

    def line(self, patience: float = 30.0) -> str:
        """Its next line; RuntimeError with its complaint when it ends or says nothing for `patience` seconds."""
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + patience
        while b"\n" not in self.lines:
            ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
            more = os.read(fd, 65536) if ready else b""
            if not more:
                raise RuntimeError(self.complaint() or ("ended without a word" if ready else "said nothing"))
            self.lines += more
        line, _, self.lines = self.lines.partition(b"\n")
        return line.decode()

    def tell(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def complaint(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def module_server(module: str, name: str, *arguments: str) -> Child:
    """This benchmark's own server `name`, in an interpreter of its own, on the server's CPU."""
    return Child(SERVER_CORE, sys.executable, "-m", module, "--serve", name, *arguments)


@contextmanager
def native_programs() -> Iterator[Path]:
    """Compile benchmarks/native, and the echo programs of the command line, into a temporary directory."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("this benchmark needs a C compiler (cc) for its load generator")
    with tempfile.TemporaryDirectory(prefix="anywire-native-") as directory:
        for source in (*sorted(NATIVE.glob("*.c")), SHARED / "echo_client.c", SHARED / "echo_server.c"):
            program = Path(directory) / source.stem
            subprocess.run([compiler, "-O2", f"-I{SHARED}", source, "-o", program, "-ldl"], check=True)
        yield Path(directory)


class Distance:
    """How far the two CPUs are from each other, asked of the C ring beside each round of each cell.

    A virtual machine's CPUs may share a cache in one minute and none in the next. All that goes from one to the other
    is then up to four times slower, whoever sends it; a median over both says nothing. So rounds in which the ring did
    less than half of its best are reported as a cell of their own, if they are not all that the cell has.
    """

    FAR = ", CPUs far apart"

    def __init__(self, programs: Path) -> None:
        self.command = [str(programs / "shm_ring"), "64", "0.03", "echo", "copy", str(SERVER_CORE), str(CLIENT_CORE)]
        self.looks: dict[str, list[float]] = {}

    def look(self, cell: str) -> None:
        """Ask, once a round, before its contenders take their turns."""
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=60, check=True)
        self.looks.setdefault(cell, []).append(json.loads(done.stdout)["rate"])

    def split(self, report: Report) -> None:
        """At the end: take the far rounds apart, and say how it was."""
        rates = [rate for looks in self.looks.values() for rate in looks]
        if not rates:
            return
        half, cells = max(rates) / 2, report.results.cells
        for cell, looks in self.looks.items():
            far = [rate < half for rate in looks]
            if all(far) or not any(far):
                continue
            for name, rounds in list(cells.get(cell, {}).items()):
                marked = list(zip(rounds, far, strict=False))
                cells[cell][name] = [figures for figures, apart in marked if not apart]
                cells.setdefault(cell + self.FAR, {})[name] = [figures for figures, apart in marked if apart]
        share = sum(rate < half for rate in rates)
        report.note(f"C ring, 64 B there and back, beside the rounds: {human(min(rates))}/s to {human(max(rates))}/s" +
                    (f"; the CPUs were far apart in {share} of {len(rates)} cells' rounds" if share else ""))


def load(
    programs: Path, port: int, conns: int, size: int, depth: int, seconds: float, mode: str, pid: int, *more: object
) -> dict[str, float]:
    """One run of the load generator against a server on 127.0.0.1: its JSON. more: "rotate" and a number, or "spin"."""
    command = (programs / "echo_client", "127.0.0.1", port, conns, size, depth, seconds, mode, pid, *more)
    return generate(seconds, *command) if conns < MANY or more else undisturbed(seconds, *command)


def load_tls(programs: Path, port: int, conns: int, size: int, seconds: float, pid: int) -> dict[str, float]:
    """The same over TLS, with one message under way on each connection."""
    return undisturbed(seconds, programs / "tls_client", "127.0.0.1", port, conns, size, seconds, pid)


def undisturbed(seconds: float, *command: object) -> dict[str, float]:
    """A run under many connections, made again when neither side was busy: then others had the CPUs of this virtual
    machine, and the run says nothing of any server. Of ATTEMPTS the busiest."""
    runs = []
    for _ in range(ATTEMPTS):
        runs.append(generate(seconds, *command))
        if runs[-1]["busy"] >= BUSY:
            break
    return max(runs, key=lambda run: run["busy"])


def generate(seconds: float, *command: object) -> dict[str, float]:
    done = subprocess.run(
        ["taskset", "-c", str(CLIENT_CORE), *map(str, command)],
        capture_output=True, text=True, timeout=seconds + 60, check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"the load generator ended with status {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout)
    # Under many connections one of the two always has work to do.
    figures["busy"] = max(figures["client_load"], figures["rate"] * figures["server_cpu_us"] / 1e6)
    return figures
