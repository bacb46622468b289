"""Figures side by side: what a round gave, medians over rounds, ratios, and the machine they are from.

Used by `anywire bench` and by the scripts in `benchmarks/`; on the main thread; nothing here does I/O beyond reading
`/proc/cpuinfo`. What can go wrong is a contender that fails: its error takes the place of its figures, the others
go on.

Why ratios: absolute figures drift with the machine, its neighbours and the minute. So contenders take turns within a
round, the order turns round with every round, and a ratio is the median of each round's own ratio: both sides of it
saw the same minute.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Figures = Mapping[str, float]


class Results:
    """What each contender did in each round of each cell (a cell is one workload, for example a message size)."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, list[Figures | None]]] = {}
        self.errors: dict[tuple[str, str], str] = {}

    def add(self, cell: str, contender: str, figures: Figures | str) -> None:
        """Add one round's figures, or the text of the error that came instead."""
        rounds = self.cells.setdefault(cell, {}).setdefault(contender, [])
        if isinstance(figures, str):
            self.errors[cell, contender] = figures
            rounds.append(None)
        else:
            rounds.append(figures)

    def median(self, cell: str, contender: str, figure: str) -> float | None:
        """The median over the rounds that gave this figure; None when none did."""
        rounds = self.cells.get(cell, {}).get(contender, [])
        seen = [r[figure] for r in rounds if r is not None and figure in r]
        return statistics.median(seen) if seen else None

    def ratio(self, cell: str, contender: str, base: str, figure: str) -> float | None:
        """The median of each round's `contender / base`; None without a round in which both gave the figure."""
        cells = self.cells.get(cell, {})
        ratios = [
            one[figure] / other[figure]
            for one, other in zip(cells.get(contender, []), cells.get(base, []), strict=False)
            if one is not None and other is not None and one.get(figure) is not None and other.get(figure)
        ]
        return statistics.median(ratios) if ratios else None

    def as_json(self) -> dict[str, Any]:
        """Medians and every round's figures, by cell and contender."""
        return {
            cell: {
                name: {
                    "median": {f: self.median(cell, name, f) for r in rounds if r is not None for f in r},
                    "rounds": [dict(r) if r is not None else None for r in rounds],
                    "error": self.errors.get((cell, name)),
                }
                for name, rounds in contenders.items()
            }
            for cell, contenders in self.cells.items()
        }


def turns(contenders: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: forwards and backwards in turn, so that nobody always follows the same neighbour."""
    return list(contenders) if number % 2 == 0 else list(reversed(contenders))


def cores() -> tuple[int, int]:
    """Two different CPUs for server and client, of those this process may use; the same one twice if there is one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """What the figures depend on: CPU, cores, kernel, Python, versions of `packages` (None: not installed), date."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:        # or imported from a checkout
            versions[name] = getattr(sys.modules.get(name), "__version__", None)
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def machine_line(description: Mapping[str, Any]) -> str:
    """The same in a line or two of text."""
    peers = ", ".join(f"{name} {number or 'missing'}" for name, number in description["packages"].items())
    first = "{cpu} · {cores} cores · Linux {kernel} · {python} · {date}".format(**description)
    return f"{first}\npeers: {peers}" if peers else first


def human(value: float | None) -> str:
    """Three digits and a prefix: 12.3 k."""
    if value is None:
        return "–"
    for limit, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{prefix}"
    return f"{value:.3g}"


def times(ratio: float | None) -> str:
    """A ratio as people write it: 1.25 ×."""
    return "–" if ratio is None else f"{ratio:.2f} ×"


def size_name(size: int) -> str:
    """64 B, 1 KiB, 16 MiB."""
    for limit, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= limit and size % limit == 0:
            return f"{size // limit} {unit}"
    return f"{size} B"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text columns, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    drawn = [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([drawn[0].rstrip(), "─" * len(drawn[0]), *(line.rstrip() for line in drawn[1:])])
