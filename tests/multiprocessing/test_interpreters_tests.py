"""scripts/standard_tests.py and evidence/queue_kills.py, as far as a run of the tests has time for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(240)
@pytest.mark.no_sanitize
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_interpreters_own_tests(method: str) -> None:
    # The other cases of the suite take minutes: scripts/standard_tests.py without -k.
    cases = ("TestQueue", "SimpleQueue", "TestConnection", "TestPoll", "PicklingConnections", "TestWait")
    run("scripts/standard_tests.py", method, *(f"-k{case}" for case in cases))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["Queue", "bounded", "SimpleQueue", "JoinableQueue", "Pipe"])
def test_kills_at_random_moments(kind: str) -> None:
    run("evidence/queue_kills.py", "--kinds", kind, "--kills", "120")
