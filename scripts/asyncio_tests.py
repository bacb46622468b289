"""Run the interpreter's own asyncio tests with anywire's event loop in the place of the standard one.

    python scripts/asyncio_tests.py [MODULE ...] [-k PATTERN] [--standard] [--also PYTHON ...]

They are the tests that are installed with the interpreter that runs this (the package test.test_asyncio), unchanged,
each module in a process of its own, in which everything that makes an event loop makes ours: `asyncio.new_event_loop`,
the default policy, `asyncio.SelectorEventLoop` (with the demultiplexer that belongs to the selector it is given), and
with them runners and `IsolatedAsyncioTestCase`. `EXCEPTIONS` names the tests of another loop's private parts, each with
its reason. Prints a table; exit status 0: exactly those failed, for an exception that passes is no exception any more,
and each module but those of `ITS_OWN` has made loops of ours. `--standard` runs the same on the interpreter's own loop,
to compare; `--also` runs it once more with another interpreter, and its tests. Needs the package importable in each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

LIMIT = 400
"""Seconds for one module."""

# What needs no event loop at all, or Windows.
OTHERS = {"test_proactor_events", "test_protocols", "test_transports", "test_windows_events", "test_windows_utils"}
# Runs a loop of its own making only: a stand-in without a selector, or the standard one's classes taken apart.
ITS_OWN = {"test_futures", "test_pep492", "test_runners", "test_selector_events", "test_staggered"}

# "module.Class.test": why. There is none: also what looks into a loop finds what it asks for.
EXCEPTIONS: dict[str, str] = {}


def modules() -> list[str]:
    package = Path(importlib.import_module("test.test_asyncio").__file__ or "").parent
    return sorted(path.stem for path in package.glob("test_*.py") if path.stem not in OTHERS)


def install() -> type[Any]:
    """Make every way to a standard event loop lead to ours. Returns the class of which loops are made."""
    import asyncio
    import asyncio.unix_events
    import selectors

    import anywire.loop

    names: dict[Any, str] = {selectors.PollSelector: "poll", selectors.SelectSelector: "select"}

    class EventLoop(anywire.loop.Loop):
        """Ours, with the standard one's parameter."""

        made = 0

        def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
            demultiplexer = "epoll"
            if selector is not None:
                demultiplexer = names.get(type(selector), "epoll")
                selector.close()
            super().__init__(demultiplexer=demultiplexer)
            EventLoop.made += 1

    for module in (asyncio, asyncio.unix_events):
        for name in ("SelectorEventLoop", "EventLoop"):
            if hasattr(module, name):
                setattr(module, name, EventLoop)
    asyncio.DefaultEventLoopPolicy._loop_factory = EventLoop  # type: ignore[attr-defined]
    return EventLoop


def run_here(module: str, patterns: list[str], standard: bool, result: str) -> None:
    """Run one module in this process and write a JSON object of test names into the file `result`."""
    kind: Any = None if standard else install()
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{pattern}*" for pattern in patterns] or None
    passed: list[str] = []

    class Result(unittest.TextTestResult):

        def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
            super().addSuccess(test)
            passed.append(name_of(test))

    result_class: Any = Result
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=result_class)
    done = runner.run(loader.loadTestsFromName(f"test.test_asyncio.{module}"))
    failed = sorted({name_of(test) for test, _ in [*done.failures, *done.errors]})
    outcome = {
        "passed": passed, "failed": failed, "skipped": len(done.skipped) + len(done.expectedFailures),
        "loops": kind.made if kind else 0,
    }
    Path(result).write_text(json.dumps(outcome))


def name_of(test: Any) -> str:
    test = getattr(test, "test_case", test)         # a subtest counts as its test
    return f"{type(test).__name__}.{getattr(test, '_testMethodName', test)}"


def run(module: str, patterns: list[str], standard: bool) -> dict[str, Any]:
    """The outcome of one module; `errors` is what it printed, `problem` why there is no outcome."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [sys.executable, __file__, "--here", module, "--result", str(result)]
        command += [f"-k{pattern}" for pattern in patterns] + (["--standard"] if standard else [])
        with subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="backslashreplace", start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            problem = ""
            try:
                _, errors = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                problem = f"not done after {LIMIT} s"
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if problem:
                _, errors = process.communicate()
            elif not result.exists():
                problem = f"ended with status {process.returncode}"
            outcome: dict[str, Any] = {"passed": [], "failed": [], "skipped": 0, "loops": 0}
            if not problem:
                outcome = json.loads(result.read_text())
    return {**outcome, "module": module, "seconds": time.monotonic() - start, "errors": errors, "problem": problem}


def judge(outcome: dict[str, Any], standard: bool, all_tests: bool) -> list[str]:
    """What is wrong with one module: lines to print."""
    module = outcome["module"]
    if outcome["problem"]:
        return [f"{module}: {outcome['problem']}; its last words:", *outcome["errors"].splitlines()[-30:]]
    known = [] if standard else EXCEPTIONS
    unexpected = [name for name in outcome["failed"] if f"{module}.{name}" not in known]
    cured = [name for name in outcome["passed"] if f"{module}.{name}" in known]
    problems = [f"{module}.{name} failed" for name in unexpected]
    problems += [f"{module}.{name} passed: take it out of EXCEPTIONS" for name in cured]
    if all_tests and not standard and module not in ITS_OWN and not outcome["loops"]:
        problems.append(f"{module}: made no loop of ours, so it says nothing")
    return [*problems, *outcome["errors"].splitlines()] if unexpected else problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="such as test_events (all)")
    parser.add_argument("-k", action="append", default=[], metavar="PATTERN", help="only tests whose name has this")
    parser.add_argument("-j", type=int, default=2, metavar="N", help="modules at a time (2)")
    parser.add_argument("--standard", action="store_true", help="on the interpreter's own loop")
    parser.add_argument("--also", action="append", default=[], metavar="PYTHON", help="another interpreter")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        run_here(arguments.here, arguments.k, arguments.standard, arguments.result)
        return 0
    problems: list[str] = []
    total = dict.fromkeys(("passed", "failed", "skipped", "loops"), 0)
    print(f"Python {sys.version.split()[0]}\n\n| module | passed | excepted | skipped | loops |\n|---|--:|--:|--:|--:|")
    with concurrent.futures.ThreadPoolExecutor(arguments.j) as pool:
        names = arguments.modules or modules()
        for outcome in pool.map(lambda name: run(name, arguments.k, arguments.standard), names):
            problems += judge(outcome, arguments.standard, not arguments.k)
            numbers = {
                "passed": len(outcome["passed"]), "failed": len(outcome["failed"]), "skipped": outcome["skipped"],
                "loops": outcome["loops"],
            }
            total = {key: total[key] + number for key, number in numbers.items()}
            print(f"| {outcome['module']} | {' | '.join(map(str, numbers.values()))} |", flush=True)
    print(f"| all | {' | '.join(map(str, total.values()))} |")
    for name, reason in EXCEPTIONS.items() if not arguments.standard else ():
        print(f"\n- `{name}`: {reason}", end="")
    print("\n" + "\n".join(problems), end="\n" if problems else "", flush=True)
    same = [__file__, f"-j{arguments.j}", *(f"-k{pattern}" for pattern in arguments.k), *arguments.modules]
    if arguments.standard:
        same.append("--standard")
    others = [subprocess.run([python, *same], check=False).returncode for python in arguments.also]
    return 1 if problems or any(others) else 0


if __name__ == "__main__":
    raise SystemExit(main())
