"""What the tests of semaphores, shared memory and locks share: names, programs in other processes, the C program."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "shared_objects.c"


def fresh_name(what: str = "test") -> str:
    return f"/anywire-{what}-{secrets.token_hex(6)}"


def program(text: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that runs this text; both its streams are ours. It is killed when the `with` ends."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def run(text: str, *arguments: object) -> str:
    """What a program prints; it must end well."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sleeps(thread: threading.Thread) -> bool:
    """Whether a thread is in futex(2), of x86 and others: it waits for a lock, a semaphore or a condition."""
    with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
        return file.read().startswith(FUTEX)


FUTEX = ("202 ", "98 ")
"""How /proc/PID/syscall begins while it is in futex(2): on x86, and on others."""
NOBODY = """
import os
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
"""
"""The beginning of a program that is no longer root, and has no capabilities any more."""


@pytest.fixture(scope="session")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of shared_objects, compiled."""
    path = str(tmp_path_factory.mktemp("c") / "shared_objects")
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [*shlex.split(os.environ.get("CC", "cc")), *flags, str(SOURCE), "-o", path, "-lrt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return path
