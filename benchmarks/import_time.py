"""How much longer does `import anywire` take than `import asyncio`? At most 60 ms is to be shown.

Fresh interpreters in turn, each timing its own import statement; a first one fills the caches and is not counted.
`import anywire` gives names lazily, so a second figure touches what every program touches: connect, serve and the
blocking front. Nothing optional may be imported by either.
"""

from __future__ import annotations

import json
import subprocess
import sys

from anywire.cli.measure import turns
from benchmarks.harness import CLIENT_CORE, Report, options

OPTIONAL = ("click", "rich", "msgspec", "numpy", "matplotlib", "zmq", "pynng", "uvloop")
STATEMENTS = {
    "asyncio": "import asyncio",
    "anywire": "import anywire",
    "anywire, used": "import anywire, anywire.sync; anywire.connect; anywire.serve; anywire.sync.connect",
}
LIMIT = 60.0

PROGRAM = """
import json, sys, time
before = time.perf_counter()
{statement}
took = time.perf_counter() - before
print(json.dumps([took * 1e3, len(sys.modules), [name for name in {optional!r} if name in sys.modules]]))
"""


def one(statement: str) -> tuple[float, int, list[str]]:
    """Milliseconds for the statement in a fresh interpreter, how many modules it has then, and the optional ones."""
    program = PROGRAM.format(statement=statement, optional=OPTIONAL)
    command = ["taskset", "-c", str(CLIENT_CORE), sys.executable, "-c", program]
    took, modules, optional = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return took, modules, optional


def main() -> None:
    arguments = options(__doc__, rounds=15, seconds=0).parse_args()
    report = Report("import_time: what importing costs", ("anywire",))
    report.begin()
    for statement in STATEMENTS.values():
        one(statement)
    optional: set[str] = set()
    for number in range(arguments.rounds):
        for name in turns(list(STATEMENTS), number):
            took, modules, extra = one(STATEMENTS[name])
            report.results.add("import", name, {"ms": took, "modules": modules})
            optional.update(extra)
    # What else the machine does only ever adds time, so the least of all rounds is the import's own (timeit docs).
    least = {
        name: min(figures["ms"] for figures in rounds if figures is not None)
        for name, rounds in report.results.cells["import"].items()
    }
    report.rates("import", "asyncio", "ms", ("modules",), unit="")
    for name in ("anywire", "anywire, used"):
        more = least[name] - least["asyncio"]
        report.claim(f"importing {name} ({least[name]:.1f} ms), beyond asyncio", more, LIMIT, "ms", at_most=True)
    report.claim(
        f"optional modules imported ({', '.join(sorted(optional)) or 'none'})",
        float(len(optional)), 0, "modules", at_most=True,
    )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
