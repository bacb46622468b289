"""The suite is itself tested: each seeded fault turns it red, by a failed expectation and by nothing else.

Each fault runs the scenarios that must notice it in a pytest of its own. A scenario that fails anyway proves nothing:
that they are green without a fault, the suite itself shows in the same run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .faults import FAULTS

HERE = Path(__file__).parent


def files_of(expression: str) -> list[str]:
    """Where the expression's scenarios are: to collect all others each time takes longer than to run these."""
    names = re.findall(r"test_\w+", expression)
    files = [file for file in sorted(HERE.glob("test_*.py")) if file != Path(__file__)]
    return [str(file) for file in files if any(f"def {name}" in file.read_text() for name in names)]


def run(expression: str, fault: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "ANYWIRE_"))}
    environment |= {"ANYWIRE_FAULT": fault, "ANYWIRE_CONFORMANCE_DEADLINE": "4"}
    # Of the plugins only what the settings need: importing hypothesis takes as long as all the rest.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", *files_of(expression), "-x", "-q", "-k", expression, "--tb=short"]
    command += ["-p", "pytest_timeout", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_there_are_twenty() -> None:
    assert len(FAULTS) >= 20


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_turns_the_suite_red(fault: str) -> None:
    code, said = run(FAULTS[fault][0], fault)
    assert code == 1, f"{fault} went unnoticed:\n{said}"
    assert re.search(r"^\d+ failed", said, re.MULTILINE), said
    expectation = r"^E +(AssertionError|BufferError|Failed|TimeoutError|assert|conformance.*PeerFailed|anywire\.\w+)"
    noticed = re.findall(expectation, said, re.MULTILINE)
    assert noticed, f"{fault}: it failed, but not by an expectation:\n{said}"
