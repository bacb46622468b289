"""The same echo on libevent, libuv and each Python event loop, from 1 to 10 000 connections; `--plot FILE` draws it.

Each connection has one message of 1 KiB under way; the client is native. The C programs are compiled here: a C epoll
server, libuv's and libevent's where their headers are installed (apt install libuv1-dev libevent-dev). Python's are
protocols. What to look at: how much of the rate is left with ten thousand connections, and the distance to C.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from anywire.cli.measure import turns
from benchmarks import loops
from benchmarks.harness import NATIVE, SERVER_CORE, Child, Report, load, native_programs, options
from benchmarks.idle_connections import raise_limit

COUNTS = (1, 10, 100, 1000, 10_000)
LIBRARIES = {"libuv": "-luv", "libevent": "-levent"}
PACKAGES = {"libuv": "libuv1-dev", "libevent": "libevent-dev"}
SIZE = 1 << 10
BASE = "C epoll"


def library_servers(report: Report, directory: Path) -> dict[str, Path]:
    """The C servers on libraries, compiled into this directory; the report says which can't be."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or "cc"
    found = {}
    for name, flag in LIBRARIES.items():
        program = directory / f"echo_{name}"
        source = NATIVE / "libraries" / f"echo_{name}.c"
        done = subprocess.run([compiler, "-O2", source, "-o", program, flag], capture_output=True, check=False)
        if done.returncode:
            report.note(f"{name}: not compiled, its headers are probably missing (apt install {PACKAGES[name]})")
        else:
            found[name] = program
    return found


def plot(report: Report, counts: list[int], file: Path) -> None:
    """A line for each server: the rate over the number of connections."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")                   # a file, never a window
    figure, axis = importlib.import_module("matplotlib.pyplot").subplots(figsize=(9, 6), layout="constrained")
    names = sorted(
        {name for cell in report.results.cells.values() for name in cell},
        key=lambda name: -(report.results.median(cell_name(counts[-1]), name, "rate") or 0),
    )
    for name in names:
        rates = [report.results.median(cell_name(count), name, "rate") for count in counts]
        known = [(count, rate / 1e3) for count, rate in zip(counts, rates, strict=True) if rate is not None]
        if known:
            style = "--" if name == BASE or name in LIBRARIES else "-"
            width = 2.5 if "anywire" in name else 1.5
            axis.plot(*zip(*known, strict=True), style, marker="o", label=name, linewidth=width)
    axis.set(xscale="log", xlabel="connections, each with a message under way", ylabel="thousand echoes a second")
    axis.set_title("An echo of 1 KiB over TCP, one CPU for the server")
    axis.set_ylim(bottom=0)
    axis.grid(True, alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=120)
    report.note(f"plot: {file}")


def main() -> None:
    parser = options(__doc__, rounds=3, seconds=0.5)
    parser.add_argument("--connections", default=",".join(map(str, COUNTS)), help="how many (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw into FILE (.png, .svg, .pdf)")
    arguments = parser.parse_args()
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'anywire[plot]'")
    counts = [int(word) for word in arguments.connections.split(",")]
    report = Report("connections: the same echo with 1 to 10 000 of them", loops.PACKAGES)
    report.begin()
    allowed = raise_limit(max(counts) + 500)
    if allowed < max(counts):
        report.note(f"the limit of open files allows {allowed} connections only (ulimit -Hn)")
    counts = sorted({min(count, allowed) for count in counts})
    here = loops.installed(report)
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {BASE: stack.enter_context(Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0"))}
        for name, program in library_servers(report, programs).items():
            servers[name] = stack.enter_context(Child(SERVER_CORE, program))
        for loop in here:
            servers[f"protocol, {loop}"] = stack.enter_context(loops.server("protocol", loop))
        ports = {name: loops.port_of(server) for name, server in servers.items()}
        for number in range(arguments.rounds):
            for count in counts:
                for name in turns(list(servers), number):
                    one = (programs, ports[name], count, SIZE, 1, arguments.seconds, "raw", servers[name].pid)
                    try:
                        report.results.add(cell_name(count), name, load(*one))
                    except RuntimeError as error:
                        report.results.add(cell_name(count), name, str(error))
    for count in counts:
        report.rates(cell_name(count), BASE, "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
    if arguments.plot is not None:
        plot(report, counts, arguments.plot)
    report.finish(arguments.json)


def cell_name(count: int) -> str:
    return f"{count} × 1 KiB"


if __name__ == "__main__":
    main()
