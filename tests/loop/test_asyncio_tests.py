"""scripts/asyncio_tests.py, as far as a run of the tests has time for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(120)
@pytest.mark.no_sanitize
def test_the_interpreters_own_tests() -> None:
    modules = ("test_base_events", "test_buffered_proto", "test_context", "test_server", "test_sock_lowlevel")
    done = subprocess.run(
        [sys.executable, "scripts/asyncio_tests.py", "-j", "1", *modules],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    assert done.returncode == 0, done.stdout
