#!/usr/bin/env python3
"""Write README's first table, wire x guarantee, from a run of the conformance suite; or check that it is current.

    ANYWIRE_CONFORMANCE_RESULT=result.json python -m pytest tests/conformance
    python scripts/guarantee_table.py result.json            # writes the table between the markers in README.md
    python scripts/guarantee_table.py --check result.json    # exit status 1 when README.md says something else

A cell is "yes" when the wire ran that guarantee's scenarios on both fronts and all passed, "FAILED" when one failed,
and "–" when the wire's line doesn't promise it (its scenarios don't run on that wire; that such a use is refused, or
that what can't be known isn't claimed, is the last row). Counts of scenarios are left out
on purpose: the table changes when a promise does, not when a test is added.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

BEGIN, END = "<!-- guarantees:begin -->", "<!-- guarantees:end -->"
FRONTS = ("async", "blocking")

# Columns in the order in which a reader asks.
GUARANTEES = [
    "whole messages",
    "back-pressure",
    "safe cancellation",
    "clean end told from loss",
    "sees the peer's death",
    "unconfirmed is right",
    "half-close",
    "close delivers",
    "survives garbage",
    "listener",
    "who may connect",
    "refuses a forked child",
    "moves to another process",
    "leaves nothing behind",
    "stream of bytes",
    "costs per message",
    "clear about what it can't do",
]
Results = dict[str, dict[str, dict[str, dict[str, bool]]]]


def cell(wire: dict[str, dict[str, dict[str, bool]]], guarantee: str) -> str:
    passed = [ok for front in FRONTS for ok in wire.get(front, {}).get(guarantee, {}).values()]
    if not passed:
        return "–"
    return "yes" if all(passed) else "**FAILED**"


def table(results: Results, order: list[str]) -> str:
    wires = [name for name in order if name in results] + sorted(set(results) - set(order))
    unknown = {guarantee for wire in results.values() for front in wire.values() for guarantee in front} - set(
        GUARANTEES
    )
    if unknown:
        raise SystemExit(f"unknown guarantees {sorted(unknown)}: add them to GUARANTEES in {Path(__file__).name}")
    lines = ["| guarantee | " + " | ".join(wires) + " |", "|---" * (len(wires) + 1) + "|"]
    for guarantee in GUARANTEES:
        cells = [cell(results[name], guarantee) for name in wires]
        if set(cells) != {"–"}:
            lines.append(f"| {guarantee} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wire_order() -> list[str]:
    """The order of the suite's own table."""
    text = (Path(__file__).parent.parent / "tests/conformance/wires.py").read_text()
    return re.findall(r"^    Setup\(\s*\"([^\"]+)\"", text, re.MULTILINE)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="the file named by ANYWIRE_CONFORMANCE_RESULT in the run")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when README.md is stale")
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent.parent / "README.md")
    options = parser.parse_args(arguments)
    results: Results = json.loads(options.result.read_text())
    text = options.readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"{options.readme}: needs {BEGIN} and {END}, each once", file=sys.stderr)
        return 2
    before, rest = text.split(BEGIN)
    _old, after = rest.split(END)
    new = f"{before}{BEGIN}\n{table(results, wire_order())}\n{END}{after}"
    if options.check:
        if new != text:
            print(f"{options.readme}: the table is stale; run scripts/guarantee_table.py", file=sys.stderr)
            return 1
        return 0
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
