"""`anywire bench connections`: the same echo on each event loop, from one to ten thousand connections.

Owns the command, the table and the plot; `echoes` runs it. On the main thread. Ctrl-C ends all children.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from anywire.cli.echoes import BASE, COUNTS, LIBRARIES, SERVERS, SPARE, NoCompiler, cell_name, raise_limit, run
from anywire.cli.loops import LOOPS
from anywire.cli.measure import Results, human, machine, machine_line, table, times
from anywire.cli.parameters import Names, Numbers, plot_option
from anywire.cli.signals import Stopped, die_of, stoppable


def lines(results: Results, counts: Sequence[int]) -> str:
    """A row for each server: echoes a second with so many connections; with the most, its ratio to C and CPU time."""
    most = cell_name(counts[-1])
    rows = []
    for name in by_rate(results, counts):
        rates = [human(results.median(cell_name(count), name, "rate")) for count in counts]
        cpu = human(results.median(most, name, "server_cpu_us"))
        rows.append([name, *rates, times(results.ratio(most, name, BASE, "rate")), cpu])
    return table(["echoes/s, connections:", *(f"{count:,}" for count in counts), f"× {BASE}", "CPU µs"], rows)


def by_rate(results: Results, counts: Sequence[int]) -> list[str]:
    """The servers that have figures, the fastest with the most connections first."""
    names = {name: None for count in counts for name in results.cells.get(cell_name(count), {})}
    found = [name for name in names if any(results.median(cell_name(count), name, "rate") for count in counts)]
    return sorted(found, key=lambda name: -(results.median(cell_name(counts[-1]), name, "rate") or 0))


def plot(results: Results, counts: Sequence[int], file: Path) -> None:
    """A line for each server: the rate over the number of connections. The suffix is the format."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")                   # a file, never a window
    figure, axis = importlib.import_module("matplotlib.pyplot").subplots(figsize=(9, 6), layout="constrained")
    for name in by_rate(results, counts):
        rates = [(count, results.median(cell_name(count), name, "rate")) for count in counts]
        known = [(count, rate / 1e3) for count, rate in rates if rate is not None]
        if not known:
            continue
        style: dict[str, Any] = {"marker": "o", "label": name, "linewidth": 2.5 if name == "anywire" else 1.5}
        axis.plot(*zip(*known, strict=True), "--" if name == BASE or name in LIBRARIES else "-", **style)
    axis.set(xscale="log", xlabel="connections, each with a message under way", ylabel="thousand echoes a second")
    axis.set_title("An echo of 1 KiB over TCP, one CPU for the server")
    axis.set_ylim(bottom=0)
    axis.grid(True, alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=120)


@click.command(
    epilog="""\b
Examples:
  anywire bench connections
  anywire bench connections --plot connections.svg
  anywire bench connections --servers anywire,uvloop,asyncio --counts 100,1000
"""
)
@click.option("--counts", type=Numbers(100_000), default=",".join(map(str, COUNTS)), show_default=True,
              help="Numbers of connections.")
@click.option("--servers", type=Names(SERVERS), default=",".join(SERVERS), help="Some of: " + ", ".join(SERVERS) + ".")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rounds; they alternate.")
@click.option("--seconds", type=click.FloatRange(0.01, 60), default=0.5, show_default=True, help="Of one measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@plot_option
def connections(
    counts: tuple[int, ...], servers: tuple[str, ...], rounds: int, seconds: float, as_json: bool,
    plot_file: Path | None,
) -> None:
    """Measure one echo on each event loop, with 1 to 10 000 connections.

    Each connection has one message of 1 KiB under way. Server and client have a CPU each; the client is a C program,
    and so are the servers on bare epoll, libuv and libevent: a C compiler is needed. What to look at: how much of the
    rate is left with many connections, and the distance to C.
    """
    notes = Console(stderr=True)

    def note(text: str) -> None:
        notes.print(text, highlight=False, markup=False, soft_wrap=True)

    allowed = raise_limit(max(counts) + SPARE)
    if allowed < max(counts):
        note(f"the limit of open files allows {allowed} connections only (ulimit -Hn)")
    counts = tuple(sorted({min(count, allowed) for count in counts}))
    began = time.monotonic()
    try:
        with stoppable(), notes.status("") as status:
            results = run(counts, servers, rounds, seconds, status.update, note)
    except Stopped as stopped:
        die_of(stopped.number)
    except NoCompiler as error:
        raise click.ClickException(str(error)) from None
    description = machine(name for name in LOOPS if name != "asyncio")
    if as_json:
        outcome = {"machine": description, "counts": counts, "cells": results.as_json()}
        click.echo(json.dumps(outcome, indent=1))
    else:
        click.echo(f"{machine_line(description)}\n\n{lines(results, counts)}")
        click.echo(f"\n1 KiB each, one under way on each connection; {time.monotonic() - began:.0f} s")
    for (cell, name), complaint in results.errors.items():
        note(f"{name}, {cell}: {complaint}")
    if plot_file is not None:
        plot(results, counts, plot_file)
        note(f"plot: {plot_file}")
    if results.errors:
        raise SystemExit(1)
