"""evidence/ipc_kills.py, as far as a run of the tests has time for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["mutex", "semaphore", "sysv-undo", "mq", "sysv-queue"])
def test_kills_at_random_moments(kind: str) -> None:
    command = [sys.executable, "evidence/ipc_kills.py", "--kinds", kind, "--kills", "40"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout
