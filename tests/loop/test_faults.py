"""System calls that fail or do less than asked: every byte arrives on our loop all the same.

`faults.c` is compiled and preloaded into a child, `fault_workload.py`, which says what is done and checked there. The
standard loop goes through the same, to see that the schedules are fair.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SIZE = 300                              # of most messages, as in the workload
KINDS = ("protocol", "buffered", "streams", "tls", "sockets", "channel", "datagrams")
LOOPS = {
    "ours": ("anywire:new_event_loop", KINDS),
    "asyncio": ("asyncio:new_event_loop", ("protocol", "tls", "datagrams")),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "these tests need a C compiler"
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(
        [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", HERE / "faults.c", "-o", library, "-ldl"],
        check=True,
    )
    return library


# The sanitizers replace the same functions.
@pytest.mark.no_sanitize
@pytest.mark.parametrize(
    ("loop", "kind"),
    [
        pytest.param(loop, kind, marks=[pytest.mark.slow] if loop == "asyncio" else [])
        for loop, (_, kinds) in LOOPS.items() for kind in kinds
    ],
)
def test_every_byte_arrives(loop: str, kind: str, faults: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "fault_workload.py", LOOPS[loop][0], kind],
        env={**os.environ, "LD_PRELOAD": str(faults)}, capture_output=True, text=True, check=False, timeout=55,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found.values()), found               # each fault did happen
    if kind not in ("datagrams", "tls"):            # TLS makes records of its own lengths of them
        assert found["receive cut"] >= SIZE - 1 and found["send cut"] >= SIZE - 1, found
