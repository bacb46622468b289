"""Run anyio's own tests on anywire's event loop.

    python scripts/anyio_tests.py [-k PATTERN] [--loop module:function]

The tests are those of the installed version's source distribution, which pip fetches from PyPI (or take --source
DIRECTORY). Unchanged but for one line: where anyio's conftest.py lists the loops, ours takes uvloop's place; only the
tests on that backend are run. `EXCEPTIONS` names those that don't pass, with the reason. Exit status 0: exactly those
failed, for an exception that passes is no exception any longer; what fails on the standard loop too, run right after
it on the same machine, is counted and doesn't matter. Needs anyio's test dependencies, which are in the
dependency group `integration`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

LIMIT = 900
"""Seconds for all tests."""
# What is replaced in anyio's tests/conftest.py.
OTHERS = '{"debug": True, "loop_factory": uvloop.new_event_loop}'
MARKS = "        marks=uvloop_marks,\n"
NAME = re.compile(r'id=f"asyncio\+\{uvloop_name\}"')

# Test (`tests/test_x.py::TestY::test_z`), and why it fails on our loop.
EXCEPTIONS: dict[str, str] = {}


def fetched(into: Path) -> Path:
    """The source distribution of the installed anyio, unpacked into this directory."""
    version = importlib.metadata.version("anyio")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", "anyio", f"anyio=={version}"]
    done = subprocess.run([*command, "-d", str(into)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"anyio {version} could not be fetched from PyPI; use --source:\n{done.stderr[-1000:]}")
    with tarfile.open(into / f"anyio-{version}.tar.gz") as archive:
        archive.extractall(into, filter="data")
    return into / f"anyio-{version}"


def with_loop(source: Path, loop: str) -> None:
    """Put a loop where the conftest has uvloop's."""
    module, _, function = loop.partition(":")
    path = source / "tests" / "conftest.py"
    original = path.with_name("conftest.original")
    if not original.exists():
        original.write_bytes(path.read_bytes())
    text = original.read_text()
    if OTHERS not in text or NAME.search(text) is None or MARKS not in text:
        raise SystemExit(f"{path}: lists its loops in another way than this script knows; bring it up to date")
    text = NAME.sub('id="asyncio+ours"', text).replace(MARKS, "")
    path.write_text(text.replace(OTHERS, OTHERS.replace("uvloop.new_event_loop", f'__import__("{module}").{function}')))


Outcome = tuple[set[str], set[str], int, str]


def outcome(source: Path, loop: str, *arguments: str) -> Outcome:
    """Run some tests on a loop: which passed, which failed, how many were skipped, and what pytest printed."""
    with_loop(source, loop)
    report = source / "report.xml"
    report.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    paths = [str(Path(path).resolve()) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments],
        cwd=source, env=environment, text=True, check=False, timeout=LIMIT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    if not report.exists():
        raise SystemExit(f"pytest ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    passed, failed, skipped = set(), set(), 0
    for case in ElementTree.parse(report).iter("testcase"):
        name = node(source, case.get("classname", ""), case.get("name", ""))
        kinds = {child.tag for child in case}
        if "failure" in kinds or "error" in kinds:
            failed.add(name)
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed.add(name)
    return passed - failed, failed, skipped, done.stdout


def node(source: Path, place: str, name: str) -> str:
    """pytest's name of a test: the report has the modules and classes as one dotted word."""
    words = place.split(".")
    for count in range(len(words), 0, -1):
        file = Path(*words[:count]).with_suffix(".py")
        if (source / file).exists():
            return "::".join([str(file), *words[count:], name])
    raise SystemExit(f"{place}: of no file in {source}")


def has_ipv6() -> bool:
    try:
        return bool(socket.getaddrinfo("localhost", 0, socket.AF_INET6))
    except socket.gaierror:
        return False


def run(source: Path, patterns: list[str], loop: str) -> int:
    """Run them, and compare with EXCEPTIONS and with the standard loop; the exit status."""
    start = time.monotonic()
    wanted = " and ".join(["ours", *(f"({pattern})" for pattern in patterns)])
    if not has_ipv6():
        # They would fail, and what they leave would fail others.
        print("this machine has no IPv6 address for localhost: tests with ipv6 in their name are left out")
        wanted += " and not ipv6"
    passed, failed, skipped, said = outcome(source, loop, "-k", wanted, "tests")
    excepted = {name for name in failed if name.partition("[")[0] in EXCEPTIONS}
    unexpected, here = sorted(failed - excepted), set[str]()
    if unexpected:
        # What the standard loop can't do here either says nothing of ours.
        here = outcome(source, "asyncio:new_event_loop", *unexpected)[1]
        unexpected = [name for name in unexpected if name not in here]
    cured = [name for name in EXCEPTIONS if any(one.partition("[")[0] == name for one in passed)]
    cured = [name for name in cured if not any(one.partition("[")[0] == name for one in failed)]
    print(
        f"anyio {importlib.metadata.version('anyio')} on {loop}: {len(passed)} passed, {skipped} skipped, "
        f"{len(unexpected)} failed, {len(excepted)} are exceptions, {len(here)} fail on the standard loop here too; "
        f"{time.monotonic() - start:.0f} s"
    )
    for name in sorted(here):
        print(f"  {name}: fails on the standard loop here too")
    for name in sorted({name.partition("[")[0] for name in excepted}):
        print(f"  {name}: {EXCEPTIONS[name]}")
    if unexpected:
        print(said[-12000:])
    problems = [f"{name} failed" for name in unexpected]
    problems += [f"{name} passed: take it out of EXCEPTIONS" for name in cured]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems or not passed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", action="append", default=[], metavar="PATTERN", help="only tests whose name has this")
    parser.add_argument("--loop", default="anywire:new_event_loop", help="what makes a loop (%(default)s)")
    parser.add_argument("--source", type=Path, metavar="DIRECTORY", help="anyio's sources; its conftest.py is changed")
    arguments = parser.parse_args()
    if arguments.source is not None:
        return run(arguments.source, arguments.k, arguments.loop)
    with tempfile.TemporaryDirectory(prefix="anywire-anyio-") as directory:
        return run(fetched(Path(directory)), arguments.k, arguments.loop)


if __name__ == "__main__":
    sys.exit(main())
