"""What the tests of `anywire.ipc.sysv` share: keys that nobody has, waiting for a condition of the kernel, the C
program."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

PATIENCE = 20.0

NAMESPACE = """
        import ctypes
        from pathlib import Path
        from anywire.ipc.sysv import *

        assert ctypes.CDLL(None).unshare(0x08000000) == 0           # CLONE_NEWIPC

        def limit(name, value):
            Path("/proc/sys/kernel", name).write_text(str(value))
"""
"""How a root's program begins that lowers the kernel's limits for itself alone."""


def some_key() -> int:
    """A key that nobody has, as good as certain."""
    return secrets.randbelow((1 << 31) - 1) + 1


def until(condition: Callable[[], object]) -> None:
    """Wait for what the kernel does not tell: that somebody waits, or has gone."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.001)


def blocked(pid: int, thread: int, call: str) -> bool:
    """Whether a thread sleeps in this function of the kernel; where the kernel does not show which, whether it
    sleeps."""
    base = Path(f"/proc/{pid}/task/{thread}")
    try:
        where = (base / "wchan").read_text()
    except OSError:
        where = "0"
    return call in where if where not in ("", "0") else (base / "stat").read_text().rpartition(")")[2].split()[0] == "S"


@cache
def compiled() -> str:
    """The C program's path."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler, as for building the package"
    target = Path(mkdtemp(prefix="anywire-sysv-")) / "peer"
    source = Path(__file__).with_name("sysv_peer.c")
    subprocess.run([compiler, "-Wall", "-Werror", "-O1", "-o", str(target), str(source)], check=True, timeout=PATIENCE)
    return str(target)


def c(*arguments: object) -> str:
    """Run the C program: what it printed."""
    command = [compiled(), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.rstrip("\n")
