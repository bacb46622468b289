"""The suite is itself tested: each seeded fault turns it red, by a failed expectation and by nothing else.

Each fault runs the scenarios that must notice it in a pytest of its own. First those scenarios run without any fault: a
scenario that fails anyway proves nothing.
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


def run(expression: str, fault: str = "") -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "ANYWIRE_"))}
    if fault:
        environment["ANYWIRE_FAULT"] = fault
    environment["ANYWIRE_CONFORMANCE_DEADLINE"] = "4" if fault else "40"
    command = [sys.executable, "-m", "pytest", str(HERE), "-x", "-q", "-k", expression, "-p", "no:cacheprovider"]
    command += ["--ignore", __file__, "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_there_are_twenty() -> None:
    assert len(FAULTS) >= 20


@pytest.mark.faults
def test_without_a_fault_the_same_scenarios_are_green() -> None:
    expressions = sorted({expression for expression, _install in FAULTS.values()})
    code, said = run(" or ".join(f"({expression})" for expression in expressions))
    assert code == 0, said
    assert re.search(r"\d+ passed", said), said


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_turns_the_suite_red(fault: str) -> None:
    code, said = run(FAULTS[fault][0], fault)
    assert code == 1, f"{fault} went unnoticed:\n{said}"
    assert re.search(r"^\d+ failed", said, re.MULTILINE), said
    expectation = r"^E +(AssertionError|BufferError|Failed|TimeoutError|assert|conformance.*PeerFailed|anywire\.\w+)"
    noticed = re.findall(expectation, said, re.MULTILINE)
    assert noticed, f"{fault}: it failed, but not by an expectation:\n{said}"
