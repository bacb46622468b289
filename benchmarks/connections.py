"""The same echo on libevent, libuv and each Python event loop, from 1 to 10 000 connections; `--plot FILE` draws it.

This is `anywire bench connections` with the report that all benchmarks have. Each connection has one message of 1 KiB
under way; the client is native. What to look at: how much of the rate is left with ten thousand connections, and the
distance to C.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from anywire.cli.echoes import BASE, COUNTS, SPARE, cell_name, raise_limit, run
from benchmarks import loops
from benchmarks.harness import Report, options


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
    allowed = raise_limit(max(counts) + SPARE)
    if allowed < max(counts):
        report.note(f"the limit of open files allows {allowed} connections only (ulimit -Hn)")
    counts = sorted({min(count, allowed) for count in counts})
    report.results = run(counts, rounds=arguments.rounds, seconds=arguments.seconds, note=report.note)
    for count in counts:
        report.rates(cell_name(count), BASE, "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
    if arguments.plot is not None:
        importlib.import_module("anywire.cli.connections").plot(report.results, counts, arguments.plot)
        report.note(f"plot: {arguments.plot}")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
