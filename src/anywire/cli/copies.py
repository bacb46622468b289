"""`anywire bench copies`: a file from a server process to a client process, by each way that the system offers.

Owns the run (which ways, files and rounds), the tables and the plot; `ways` says what is compared and how often each
byte is copied. On the main thread. What arrived is compared with the file outside the timed part; a way that fails gets
a line saying so, the others are measured. Ctrl-C ends all children.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from anywire.cli.calls import calls_more, strace
from anywire.cli.measure import Results, cores, human, machine, machine_line, size_name, table, times, turns
from anywire.cli.pair import PATIENCE, Children, Failed
from anywire.cli.parameters import Names, Size, Sizes, plot_option
from anywire.cli.signals import Stopped, die_of, stoppable
from anywire.cli.ways import AT_ONCE, WAYS, Way, digest, ways

BASE = "pipe"
CHUNK = 64 << 10
AT_LEAST = 64 << 20                 # bytes in one measurement: smaller files go several times,
MOST_TIMES = 1000                   # but not more often than that
SLOWEST = 10e6                      # bytes a second: a way that is slower than this has failed
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Source:
    """The file that is copied: its path, its size in bytes and its digest."""

    path: str
    size: int
    digest: str

    @property
    def times(self) -> int:
        return max(1, min(AT_LEAST // self.size, MOST_TIMES))


class Transfer(Children):
    """The two processes of one way."""

    def __init__(self, way: Way, chunk: int, server_core: int, client_core: int, wrap: Sequence[str] = ()) -> None:
        super().__init__(
            "anywire.cli.ways", way.name, way.address, server_core, client_core,
            inherits=way.inherits, more=[str(chunk)], wrap=wrap,
        )

    def copy(self, source: Source, times: int) -> dict[str, float]:
        """Do it, look at what came, and return the figures: for MB 10^6 bytes, for MiB and GiB powers of two."""
        order = {"file": source.path, "size": source.size, "times": times}
        # The client is told first, so that it waits already: the clock runs from the server's start to its end.
        self.client.tell(order)
        self.client.answer(PATIENCE)
        self.server.tell(order)
        size = source.size * times
        server, client = self.answers(PATIENCE + size / SLOWEST)
        if client["digest"] != source.digest:
            raise Failed("what arrived is not what the file holds (or did the file change?)")
        return {
            "mb_s": size / (client["ended"] - server["began"]) * 1e3,
            "cpu_s_gib": sum(side[kind] for side in (server, client) for kind in ("user", "system")) / size * GIB,
            "system_s_gib": (server["system"] + client["system"]) / size * GIB,
            "sleeps_mib": (server["sleeps"] + client["sleeps"]) / size * MIB,
        }


def source_of(path: Path) -> Source:
    """A user's file. Reading it brings it into the page cache. OSError, and ClickException for what can't be copied."""
    if not path.is_file():              # before it is opened: for a FIFO that would wait
        raise click.ClickException(f"{path}: is no regular file; copy what it gives into one first")
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise click.ClickException(f"{path}: is empty, there is nothing to copy")
        return Source(str(path.resolve()), size, digest(file.fileno(), size))


@contextlib.contextmanager
def sources_of(sizes: Iterable[int]) -> Iterator[list[Source]]:
    """Files of random bytes, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="anywire-bench-") as directory:
        found = []
        for size in sizes:
            path = Path(directory, str(size))
            with path.open("wb") as file:
                for offset in range(0, size, AT_ONCE):
                    file.write(os.urandom(min(AT_ONCE, size - offset)))
            found.append(source_of(path))
        yield found


def run(
    chosen: Sequence[Way],
    sources: Sequence[Source],
    chunk: int = CHUNK,
    rounds: int = 5,
    count: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Results:
    """Copy each file by each way, in alternating rounds, after one that warms up.

    chunk: bytes handed over at a time. count: system calls too, in runs of their own. progress: called with a line now
    and then. Cells of the results are named by the files' sizes in bytes; a failed way has its error there.
    """
    results = Results()
    on = cores()
    by_name = {way.name: way for way in chosen}
    with contextlib.ExitStack() as stack:
        transfers: dict[str, Transfer] = {}
        for name, way in by_name.items():
            progress(f"starting {name}")
            try:
                transfers[name] = stack.enter_context(Transfer(way, chunk, *on))
            except Failed as error:
                for source in sources:
                    results.add(str(source.size), name, str(error))
        for number in range(-1, rounds):
            for source in sources:
                for name in turns(list(by_name), number):
                    if name not in transfers:
                        continue
                    progress(f"round {number + 1} of {rounds}: {name}, {size_name(source.size)}")
                    try:
                        figures = transfers[name].copy(source, source.times if number >= 0 else 1)
                    except Failed as error:
                        results.add(str(source.size), name, str(error))
                        transfers.pop(name).close()
                    else:
                        if number >= 0:
                            results.add(str(source.size), name, figures)
        for source in sources if count else []:
            for name in list(transfers):
                progress(f"counting system calls: {name}, {size_name(source.size)}")
                try:
                    found = calls_more(
                        lambda wrap, way=by_name[name]: Transfer(way, chunk, *on, wrap),    # type: ignore[misc]
                        lambda transfer, times, source=source: transfer.copy(source, times),  # type: ignore[misc]
                        1, 1 + max(2, min(4 * MIB // source.size, 64)),
                    )
                except Failed as error:
                    results.errors[str(source.size), name] = f"system calls were not counted: {error}"
                else:
                    results.add(str(source.size), name, {"calls_mib": sum(found.values()) / source.size * MIB})
    return results


def lines(results: Results, cell: str) -> str:
    """The table of one file: speed, its ratio to the pipe, CPU time of both processes, and how often they slept."""
    counted = any("calls_mib" in (figures or {}) for rounds in results.cells[cell].values() for figures in rounds)
    rows = []
    for way in WAYS:
        if results.median(cell, way.name, "mb_s") is None:
            continue
        row = [
            way.name,
            str(way.copies),
            human(results.median(cell, way.name, "mb_s")),
            times(results.ratio(cell, way.name, BASE, "mb_s")),
            human(results.median(cell, way.name, "cpu_s_gib")),
            times(results.ratio(cell, way.name, BASE, "cpu_s_gib")),
            human(results.median(cell, way.name, "sleeps_mib")),
        ]
        if counted:
            row.append(human(results.median(cell, way.name, "calls_mib")))
        rows.append(row)
    header = ["way", "copies", "MB/s", f"× {BASE}", "CPU s/GiB", f"× {BASE}", "sleeps/MiB"]
    return table([*header, "calls/MiB"] if counted else header, rows)


def plot(results: Results, chosen: Sequence[Way], sizes: Sequence[int], file: Path) -> None:
    """Bars of MB/s and of CPU seconds a GiB, a group for each way and a bar for each file; the suffix is the format."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")                   # a file, never a window
    height = 1.5 + 0.5 * len(chosen)
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(
        1, 2, figsize=(13, height), sharey=True, layout="constrained"
    )
    thick = 0.8 / len(sizes)
    for axis, measured, label in (
        (axes[0], "mb_s", "MB/s: more is better"),
        (axes[1], "cpu_s_gib", "CPU seconds per GiB, both processes: less is better"),
    ):
        for number, size in enumerate(sizes):
            values = [results.median(str(size), way.name, measured) or 0 for way in chosen]
            places = [place + (number - (len(sizes) - 1) / 2) * thick for place in range(len(chosen))]
            bars = axis.barh(places, values, thick, label=size_name(size))
            axis.bar_label(bars, [human(value or None) for value in values], padding=3, fontsize="small")
        axis.set(xlabel=label)
        axis.margins(x=0.12)
        axis.grid(True, axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(chosen)), [f"{way.name}\n{way.copies} copies" for way in chosen])
    axes[0].invert_yaxis()
    axes[1].legend()
    figure.suptitle("A file from one process to another")
    figure.savefig(file, dpi=120)


@click.command(
    epilog="""\b
Examples:
  anywire bench copies
  anywire bench copies big.iso --chunk 1m
  anywire bench copies --sizes 1m,64m --rounds 9 --plot copies.svg
"""
)
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option("--sizes", type=Sizes("4g", "1m,64m"), default="64m", show_default=True,
              help="Of the files to copy, if no FILE is given.")
@click.option("--chunk", type=Size("16m", "64k"), default=str(CHUNK), show_default="64k",
              help="Bytes handed over at a time.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds; they alternate.")
@click.option("--ways", "wanted", type=Names([way.name for way in ways()]), metavar="WAY,...",
              help="Some of the ways: " + ", ".join(way.name for way in ways()) + ".")
@click.option("--calls", "count", is_flag=True, help="Count system calls too (needs strace; not while the clock runs).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@plot_option
@click.pass_context
def copies(
    context: click.Context,
    file: Path | None,
    sizes: tuple[int, ...],
    chunk: int,
    rounds: int,
    wanted: tuple[str, ...] | None,
    count: bool,
    as_json: bool,
    plot_file: Path | None,
) -> None:
    """Measure a FILE's way from one process to another.

    A server reads the file, a client writes it into another one, both in memory. Through pipes, FIFOs and sockets each
    byte is copied four times; where both see the same memory, twice. Ways take turns; a ratio is the median of each
    round's ratio. CPU time is of both processes, user and system.
    """
    if file is not None and context.get_parameter_source("sizes") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--sizes is for files that are made; leave it out, or FILE")
    if count and strace() is None:
        raise click.ClickException("--calls needs strace: install it, or leave --calls out")
    notes = Console(stderr=True)
    chosen = [way for way in ways() if wanted is None or way.name in wanted]
    try:
        with stoppable(), contextlib.ExitStack() as stack:
            given = [source_of(file)] if file is not None else stack.enter_context(sources_of(sizes))
            with notes.status("") as status:
                results = run(chosen, given, chunk, rounds, count, status.update)
    except Stopped as stopped:
        die_of(stopped.number)
    description = machine(("anywire",))
    if as_json:
        about = {way.name: {"copies": way.copies, "why": way.why} for way in chosen}
        outcome = {"machine": description, "chunk": chunk, "ways": about, "cells": results.as_json()}
        click.echo(json.dumps(outcome, indent=1))
    else:
        click.echo(machine_line(description))
        for source in given:
            click.echo(f"\n{size_name(source.size)}, {size_name(chunk)} at a time\n{lines(results, str(source.size))}")
        click.echo("\nWhat copies each byte:")
        for way in chosen:
            click.echo(f"  {way.name:{max(len(way.name) for way in chosen)}}  {way.copies}  {way.why}")
    for name, error in {name: error for (_, name), error in results.errors.items()}.items():
        notes.print(f"{name}: {error}", highlight=False, markup=False, soft_wrap=True)
    if plot_file is not None:
        plot(results, chosen, [source.size for source in given], plot_file)
        notes.print(f"plot: {plot_file}", highlight=False, soft_wrap=True)
    if results.errors:
        raise SystemExit(1)
