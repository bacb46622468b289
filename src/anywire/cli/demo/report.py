"""What the demo shows at its end: the tables, the JSON object, the plot.

Pure functions of an `Outcome`; on the main thread. What can go wrong: only the plot, when matplotlib is missing or the
file can't be written.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import anywire
from anywire.cli.demo.material import Material, amount
from anywire.cli.demo.promises import Promise
from anywire.cli.demo.work import Contender
from anywire.cli.measure import human, machine
from anywire.contract.counters_page import LoopCounters

LEFT = ("processes", "descriptors", "files", "names")


@dataclass
class Outcome:
    """A whole run."""

    material: Material
    contenders: list[Contender]
    promises: list[Promise] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    loop: LoopCounters | None = None            # the server's event loop, as its page of counters shows it

    @property
    def problems(self) -> list[str]:
        """Why the exit status is not 0, a line each."""
        found = [f"{contender.name}: {contender.error}" for contender in self.contenders if contender.error]
        if not any(contender.messages and contender.place for contender in self.contenders):
            found.append("no wire took part")
        found += [f"{one.name} over {one.wire}: {one.seen}" for one in self.promises if not one.held]
        found += [f"left behind: {what}" for kind in LEFT for what in self.left.get(kind, [])]
        return found


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def wires_table(outcome: Outcome) -> Table:
    """Part 1: who took part, the fastest first, the peers among them."""
    table = _table("wire", "files", "MB/s", "msg/s", "p50 µs", "p99 µs", "CPU µs", "wire s", "digest s")
    done = [(contender, contender.figures()) for contender in outcome.contenders if contender.messages]
    for contender, figures in sorted(done, key=lambda one: -one[1]["messages_s"]):
        table.add_row(
            contender.name,
            f"{figures['messages']:,}",
            *(human(figures[name]) for name in ("mb_s", "messages_s")),
            *(f"{figures[name]:,.0f}" for name in ("p50_us", "p99_us", "cpu_us")),
            f"{figures['wire_s']:.2f}",
            f"{figures['digest_s']:.2f}",
            style="bold" if contender.place is not None else None,
        )
    return table


def notes(outcome: Outcome) -> Iterable[Text]:
    """What there is to say of a contender beside its figures."""
    for contender in outcome.contenders:
        if contender.error:
            yield Text.assemble((f"  {contender.name} failed: ", "bold red"), contender.error)
        elif contender.reason:
            yield Text.assemble((f"  {contender.name} takes no part: ", "yellow"), contender.reason)
        elif contender.note:
            yield Text(f"  {contender.name}: {contender.note}", style="dim")


def loop_line(outcome: Outcome) -> Iterable[Text]:
    """Whose event loop it was; the server's own page of counters says so."""
    if outcome.loop is not None:
        turns, busy = outcome.loop.turns, outcome.loop.utilisation
        server = f"the server's took {turns:,} turns and was busy {busy:.0%} of the time"
        yield Text(f"  Both sides run on anywire's event loop; {server}", style="dim")


def promises_table(outcome: Outcome) -> Table:
    """Part 2."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("promise", no_wrap=True)
    table.add_column("wire", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was seen")
    for one in outcome.promises:
        table.add_row(one.name, one.wire, Text("kept", "green") if one.held else Text("BROKEN", "bold red"), one.seen)
    return table


def left_line(outcome: Outcome) -> Text:
    """Part 3."""
    counts = ", ".join(f"{len(outcome.left[kind])} {kind}" for kind in LEFT)
    if any(outcome.left[kind] for kind in LEFT):
        return Text(f"Left behind: {counts}", style="bold red")
    return Text.assemble(f"Left behind: {counts}: ", ("nothing", "green"))


def material_line(material: Material) -> str:
    """Which files travelled."""
    chosen, usable = len(material.items), material.found - material.left_out
    which = f"{chosen:,} files" if chosen == usable else f"{chosen:,} of {usable:,} files"
    over = f"; {material.left_out:,} over {amount(material.limit)} left out" if material.left_out else ""
    return f"{which}, {material.total / 1e6:.1f} MB, of {material.root}{over}"


def whole(outcome: Outcome) -> RenderableType:
    """Everything, for a terminal or a file."""
    parts: list[RenderableType] = [
        Text("1. Files as messages, each answered with its digest", "bold"),
        Text(f"   {material_line(outcome.material)}"),
        wires_table(outcome),
        Text("  p50, p99: round trips; CPU: of both processes. Digests are in none of these.", "dim"),
        *notes(outcome),
        *loop_line(outcome),
        Text("\n2. The promises", "bold"),
        promises_table(outcome) if outcome.promises else Text("   These wires promise neither delivery nor an end.\n"),
        Text.assemble(("3. ", "bold"), left_line(outcome)),
    ]
    problems = outcome.problems
    if problems:
        parts.append(Text("\nNot as promised:", "bold red"))
        parts += [Text(f"  {problem}", "red") for problem in problems]
    else:
        took = sum(bool(contender.messages) for contender in outcome.contenders if contender.place)
        over = "1 wire" if took == 1 else f"{took} wires"
        held = "every promise held" if outcome.promises else "no promise was to be shown"
        parts.append(Text(f"\nEvery digest matched over {over}, {held} ({outcome.seconds:.1f} s).", "bold green"))
    return Group(*parts)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The object of --json: docs/reference/demo.md says what is in it."""
    material, loop = outcome.material, outcome.loop
    return {
        "anywire": anywire.__version__,
        "machine": machine(),
        "loop": loop and {"turns": loop.turns, "utilisation": loop.utilisation},
        "passed": not outcome.problems,
        "problems": outcome.problems,
        "seconds": round(outcome.seconds, 3),
        "material": {
            "root": str(material.root),
            "files": len(material.items),
            "bytes": material.total,
            "largest": material.largest,
            "found": material.found,
            "left_out": material.left_out,
        },
        "wires": [
            {
                "name": contender.name,
                "ours": contender.place is not None,
                "took_part": bool(contender.messages) and not contender.error,
                "reason": contender.reason,
                "error": contender.error,
                **(contender.figures() if contender.messages else {}),
            }
            for contender in outcome.contenders
        ],
        "promises": [
            {"promise": one.name, "wire": one.wire, "held": one.held, "seen": one.seen, **one.figures}
            for one in outcome.promises
        ],
        "left": outcome.left,
    }


def plot(outcome: Outcome, file: Path) -> None:
    """Messages a second and round trips (median, with a line to the 99th percentile); the suffix is the format."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")                   # a file, never a window
    done = [(contender, contender.figures()) for contender in outcome.contenders if contender.messages]
    done.sort(key=lambda one: one[1]["messages_s"])
    names = [contender.name for contender, _ in done]
    colours = ["tab:blue" if contender.place is not None else "tab:gray" for contender, _ in done]
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(
        1, 2, figsize=(12, 1.5 + 0.4 * len(names)), sharey=True, layout="constrained"
    )
    axes[0].barh(names, [figures["messages_s"] for _, figures in done], color=colours)
    axes[0].set(xlabel="messages/s (a file there, its digest back)")
    for row, (_, figures) in enumerate(done):
        axes[1].plot([figures["p50_us"], figures["p99_us"]], [row, row], color=colours[row], linewidth=2)
        axes[1].plot(figures["p50_us"], row, "o", color=colours[row])
    axes[1].set(xscale="log", xlabel="round trip, µs: median, line to the 99th percentile")
    for axis in axes:
        axis.grid(True, axis="x", alpha=0.3)
    figure.suptitle(material_line(outcome.material))
    figure.savefig(file, dpi=120)


def show(outcome: Outcome, console: Console) -> None:
    """Print it."""
    console.print(whole(outcome), highlight=False)
