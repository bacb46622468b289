"""scripts/standard_tests.py and evidence/queue_kills.py, as far as a run of the tests has time for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["fork", "spawn", "forkserver"]
QUICK = METHODS[(sys.version_info.minor - 11) % 3]
"""Each takes 20 s, so every version of Python has its own in `make test`, and the others in .ci/run."""
OTHERS = [pytest.param(method, marks=pytest.mark.slow) for method in METHODS if method != QUICK]


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(240)
@pytest.mark.no_sanitize
@pytest.mark.parametrize("method", [QUICK, *OTHERS])
def test_the_interpreters_own_tests(method: str) -> None:
    # The other cases of the suite take minutes: scripts/standard_tests.py without -k.
    cases = ("TestQueue", "SimpleQueue", "TestConnection", "TestPoll", "PicklingConnections", "TestWait")
    run("scripts/standard_tests.py", method, *(f"-k{case}" for case in cases))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["Queue", "bounded", "SimpleQueue", "JoinableQueue", "Pipe"])
def test_kills_at_random_moments(kind: str) -> None:
    run("evidence/queue_kills.py", "--kinds", kind, "--kills", "40")
