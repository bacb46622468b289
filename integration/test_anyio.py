"""A short part of anyio's own tests on our loop; all of them: `scripts/anyio_tests.py`, an evidence job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import LOOP

pytest.importorskip("anyio")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(120)
def test_sockets_tls_subprocesses_and_signals() -> None:
    command = [sys.executable, "scripts/anyio_tests.py", "--loop", LOOP]
    wanted = "test_sockets and ipv4 or test_tls or test_subprocesses or test_signals"
    done = subprocess.run(
        [*command, "-k", wanted], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout
