"""Run the interpreter's own multiprocessing tests with anywire.multiprocessing in the standard library's place.

    python scripts/standard_tests.py [fork] [spawn] [forkserver]

They are the tests that are installed with the interpreter that runs this (test._test_multiprocessing), unchanged; for
each start method in a process of its own. `EXCEPTIONS` names what differs on purpose, with the reason. Exit status 0:
exactly those failed, for an exception that passes is no exception any longer. Needs the package importable.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITE = "standard_suite"
METHODS = ("fork", "spawn", "forkserver")
LIMIT = 400
"""Seconds for one start method."""

EXCEPTIONS: dict[str, str] = {
    "WithProcessesTestQueue.test_queue_feeder_donot_stop_onexc":
        "put() of an object that cannot be pickled raises; the standard one prints a traceback and drops the object",
}


def run_here(patterns: list[str]) -> None:
    """Run the suite in this process; the last line on standard output is a JSON object of test names."""
    sys.path.insert(0, str(ROOT / "tests" / "multiprocessing"))
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{pattern}*" for pattern in patterns] or None

    passed: list[str] = []

    class Result(unittest.TextTestResult):

        def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802 - unittest's name
            super().addSuccess(test)
            passed.append(name_of(test))

    kind: Any = Result
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=2, resultclass=kind)
    result = runner.run(loader.loadTestsFromName(SUITE))
    failed = [name_of(test) for test, _ in [*result.failures, *result.errors]]
    outcome = {"passed": passed, "failed": failed, "skipped": len(result.skipped)}
    print(json.dumps(outcome), flush=True)


def name_of(test: Any) -> str:
    return f"{type(test).__name__}.{getattr(test, '_testMethodName', test)}"


def run(method: str, patterns: list[str], shown: bool) -> list[str]:
    """What is wrong with one start method: lines to print."""
    start = time.monotonic()
    environment = {**os.environ, "ANYWIRE_START_METHOD": method}
    command = [sys.executable, __file__, "--here", *patterns]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=None if shown else subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            return [f"{method}: not done after {LIMIT} s; its last words:", *(errors or "").splitlines()[-5:]]
    lines = output.splitlines()
    if not lines or not lines[-1].startswith("{"):
        return [f"{method}: ended with status {process.returncode}:", *(errors or "").splitlines()[-30:]]
    outcome = json.loads(lines[-1])
    seconds = time.monotonic() - start
    print(
        f"{method:10} {len(outcome['passed'])} passed, {len(outcome['failed'])} failed, {outcome['skipped']} skipped, "
        f"{seconds:.0f} s", flush=True,
    )
    unexpected = [name for name in outcome["failed"] if name not in EXCEPTIONS]
    cured = [name for name in outcome["passed"] if name in EXCEPTIONS]
    problems = [f"{method}: {name} failed" for name in unexpected]
    problems += [f"{method}: {name} passed: take it out of EXCEPTIONS" for name in cured]
    return [*problems, *(errors or "").splitlines()] if unexpected else problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("-k", action="append", default=[], metavar="PATTERN", help="only tests whose name has this")
    parser.add_argument("-v", action="store_true", help="show the tests' own output")
    parser.add_argument("--here", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here is not None:
        run_here(arguments.here)
        return 0
    problems = []
    for method in arguments.methods or METHODS:
        problems += run(method, arguments.k, arguments.v)
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
