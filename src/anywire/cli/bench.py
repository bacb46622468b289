"""`anywire bench`: this library beside what users would otherwise pick, two processes, in one run.

Owns the run (which pairs, which sizes, rounds), the tables and the plot; `contenders` says what is compared and
`pair` runs it. On the main thread. A contender that fails or is not installed gets a line saying so; the others are
measured. Ctrl-C ends all children.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
from click.core import ParameterSource
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from anywire.cli.connections import connections
from anywire.cli.contenders import Contender, contenders, key
from anywire.cli.copies import copies
from anywire.cli.measure import Results, cores, human, machine, machine_line, size_name, times, turns
from anywire.cli.pair import Failed, Pair
from anywire.cli.parameters import Names, Sizes, loop_option, plot_option
from anywire.cli.signals import Stopped, die_of, stoppable

WIRES = ("shm", "unix", "seqpacket", "tcp", "tls", "udp", "pipe", "fifo", "mq", "sysv")
FRONTS = ("blocking", "asyncio")
SIZES = (64, 1 << 10, 64 << 10, 1 << 20)
PEERS = ("anywire", "pyzmq", "pynng")
PIPE = "multiprocessing.Pipe (blocking)"
PHASES = {"echo": "there and back", "flow": "one way"}


def run(
    chosen: Sequence[Contender],
    sizes: Sequence[int] = SIZES,
    rounds: int = 3,
    seconds: float = 0.15,
    progress: Callable[[str], None] = lambda text: None,
    loop: str = "asyncio",
) -> Results:
    """Measure each contender at each size, in both phases, in alternating rounds.

    sizes: bytes of a message. seconds: of one phase in one round. progress: called with a line now and then.
    loop: that anywire's asyncio front runs on, a key of `loops.LOOPS`; peers have asyncio's own.
    Cells of the results are "echo 64", "flow 64" and so on; a failed contender has its error there.
    """
    results = Results()
    server_core, client_core = cores()
    by_name = {key(contender): contender for contender in chosen}
    with contextlib.ExitStack() as stack:
        pairs: dict[str, Pair] = {}
        for name, contender in by_name.items():
            progress(f"starting {name}")
            try:
                more = (loop,) if name.startswith("anywire") else ()
                pairs[name] = stack.enter_context(Pair(contender, server_core, client_core, more=more))
            except Failed as error:
                for size in sizes:
                    results.add(f"echo {size}", name, str(error))
        for number in range(rounds):
            for size in sizes:
                for name in turns(list(by_name), number):
                    contender = by_name[name]
                    for phase, way in PHASES.items():
                        if name not in pairs or size > contender.largest or phase not in contender.phases:
                            continue
                        progress(f"round {number + 1} of {rounds}: {name}, {size_name(size)}, {way}")
                        try:
                            results.add(f"{phase} {size}", name, pairs[name].measure(phase, size, seconds))
                        except Failed as error:
                            results.add(f"{phase} {size}", name, str(error))
                            pairs.pop(name).close()
    return results


def pick(wires: Iterable[str] = WIRES, fronts: Iterable[str] = FRONTS) -> list[Contender]:
    """The contenders of a run: anywire over these wires, and every peer, in these fronts; missing ones included.

    Peers over TLS come with ours only: they need the `openssl` command, and their rates say nothing of other wires."""
    ours = {f"anywire {'unix seqpacket' if wire == 'seqpacket' else wire}" for wire in wires}
    if "unix" in wires:
        ours.add("anywire unix many")
    found = []
    for contender in contenders():
        wanted = contender.name in ours or not contender.name.startswith("anywire")
        if wanted and contender.front in fronts and (not contender.trust or "tls" in wires):
            found.append(contender)
    return found


def tables(results: Results, sizes: Sequence[int]) -> Iterable[tuple[str, Table]]:
    """One table a size, the blocking front above asyncio: rates, ratios to multiprocessing.Pipe, CPU time."""
    for size in sizes:
        echo, flow = f"echo {size}", f"flow {size}"
        drawn = _table()
        drawn.add_column("contender", no_wrap=True)
        for title in ("trips/s", "× Pipe", "CPU µs", "one way/s", "MB/s", "× Pipe"):
            drawn.add_column(title, justify="right", no_wrap=True)
        names = list({**results.cells.get(echo, {}), **results.cells.get(flow, {})})
        names = [n for n in names if any(results.median(cell, n, "rate") is not None for cell in (echo, flow))]
        names.sort(key=lambda name: -(results.median(echo, name, "rate") or 0))
        for front in FRONTS:
            if any(name.endswith(f"({front})") for name in names):
                drawn.add_section()
                drawn.add_row(f"{front}:", style="dim")
            for name in names:
                if not name.endswith(f"({front})"):
                    continue
                drawn.add_row(
                    "  " + name.removesuffix(f" ({front})"),
                    human(results.median(echo, name, "rate")),
                    times(results.ratio(echo, name, PIPE, "rate")),
                    human(results.median(echo, name, "cpu_us")),
                    human(results.median(flow, name, "rate")),
                    human(results.median(flow, name, "mb_s")),
                    times(results.ratio(flow, name, PIPE, "rate")),
                    style="bold" if name.startswith("anywire") else None,
                )
        yield f"{size_name(size)} messages: there and back (trips), CPU time of both processes for one, one way", drawn


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def ratios(results: Results, sizes: Sequence[int]) -> Table:
    """anywire over a Unix socket against each peer of the same front: round trips, by size."""
    drawn = _table()
    drawn.add_column("peer", no_wrap=True)
    for size in sizes:
        drawn.add_column(size_name(size), justify="right", no_wrap=True)
    peers: dict[str, None] = {}
    for size in sizes:
        peers.update(dict.fromkeys(name for name in results.cells.get(f"echo {size}", {}) if "anywire" not in name))
    for peer in peers:
        ours = "anywire unix " + peer[peer.rindex("("):]
        row = [results.ratio(f"echo {size}", ours, peer, "rate") for size in sizes]
        if any(row):
            drawn.add_row(peer, *map(times, row))
    return drawn


def plot(results: Results, sizes: Sequence[int], file: Path) -> None:
    """Round trips and one-way bytes a second over message size, both axes logarithmic; the suffix is the format."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")                   # a file, never a window
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(1, 2, figsize=(15, 6), layout="constrained")
    names = list(dict.fromkeys(name for cell in results.cells.values() for name in cell))
    palette = matplotlib.colormaps["nipy_spectral"].resampled(len(names) + 1)
    colours = {name: palette(number) for number, name in enumerate(names)}
    for axis, phase, measured, label in (
        (axes[0], "echo", "rate", "round trips/s"),
        (axes[1], "flow", "mb_s", "one way, MB/s"),
    ):
        for name in names:
            points = [(size, results.median(f"{phase} {size}", name, measured)) for size in sizes]
            points = [point for point in points if point[1] is not None]
            if points:
                ours = name.startswith("anywire")
                style = {"color": colours[name], "label": name, "linewidth": 2 if ours else 1}
                axis.plot(*zip(*points, strict=True), "-o" if ours else "--s", **style)
        axis.set(xscale="log", yscale="log", xlabel="message size", ylabel=label)
        axis.set_xticks(list(sizes), [size_name(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.suptitle("Two processes: higher is better")
    figure.savefig(file, dpi=120)


@click.group(
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    epilog="""\b
Examples:
  anywire bench
  anywire bench --wires unix,tcp --sizes 64,1m --plot bench.svg
  anywire bench copies            a file from one process to another, by each way
  anywire bench connections       one echo on each event loop, with 1 to 10 000 connections
"""
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rounds; they alternate.")
@click.option("--seconds", type=click.FloatRange(0.01, 60), default=0.1, show_default=True, help="Of one measurement.")
@click.option("--sizes", type=Sizes(), default=",".join(map(str, SIZES)), show_default=True, help="Message sizes.")
@click.option("--wires", type=Names(WIRES), default=",".join(WIRES), show_default=True, help="Of anywire's wires.")
@click.option("--fronts", type=Names(FRONTS), default=",".join(FRONTS), show_default=True,
              help="Blocking calls, asyncio.")
@loop_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@plot_option
@click.pass_context
def bench(
    context: click.Context,
    rounds: int,
    seconds: float,
    sizes: tuple[int, ...],
    wires: tuple[str, ...],
    fronts: tuple[str, ...],
    loop: str,
    as_json: bool,
    plot_file: Path | None,
) -> None:
    """Measure anywire beside what you would otherwise pick.

    Two processes on CPUs of their own send messages there and back, then one way: anywire over each wire,
    multiprocessing.Pipe, a bare socket pair, asyncio streams framed by hand, pyzmq and pynng if they are installed.
    Contenders take turns; a ratio is the median of each round's ratio. Absolute figures drift, ratios hold.
    """
    if (command := context.invoked_subcommand) is not None:
        if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in context.params):
            raise click.UsageError(f"write options after the command: anywire bench {command} ...")
        return
    console, notes = Console(), Console(stderr=True)
    wanted = pick(wires, fronts)
    here = [contender for contender in wanted if not contender.missing]
    absent = dict.fromkeys(contender.needs for contender in wanted if contender.missing)
    try:
        with stoppable(), notes.status("") as status:
            results = run(here, sizes, rounds, seconds, status.update, loop)
    except Stopped as stopped:
        die_of(stopped.number)
    description = machine(PEERS)
    if as_json:
        click.echo(json.dumps({"machine": description, "loop": loop, "cells": results.as_json()}, indent=1))
    else:
        console.print(machine_line(description), highlight=False, soft_wrap=True)
        if "asyncio" in fronts:
            beside = "" if loop == "asyncio" else "; its peers on asyncio's own"
            console.print(f"asyncio: anywire on the event loop of {loop}{beside}", highlight=False, soft_wrap=True)
        for title, drawn in tables(results, sizes):
            console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
            console.print(drawn)
        drawn = ratios(results, sizes)
        if drawn.row_count:
            title = "\nanywire over unix: its round trips as a multiple of each peer's"
            console.print(title, style="bold", soft_wrap=True)
            console.print(drawn)
    if absent:
        notes.print(f"Not installed, so not compared: pip install {' '.join(absent)}", highlight=False, soft_wrap=True)
    for name, error in {name: error for (_, name), error in results.errors.items()}.items():
        notes.print(f"{name}: {error}", highlight=False, markup=False, soft_wrap=True)
    if plot_file is not None:
        plot(results, sizes, plot_file)
        notes.print(f"plot: {plot_file}", highlight=False, soft_wrap=True)
    if results.errors:
        raise SystemExit(1)


bench.add_command(copies)
bench.add_command(connections)


if __name__ == "__main__":
    bench()
