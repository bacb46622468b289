"""Python programs as real processes, for the tests of `anywire.ipc`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

# Root's capabilities go away with the change of the user. It is done by the program itself, once it has imported what
# another user might not be allowed to read; then its own /proc/self is made readable again: prctl(2), PR_SET_DUMPABLE.
BECOME = """
import asyncio, ctypes, encodings.ascii, multiprocessing, os, pathlib, resource, signal, subprocess
import anywire.ipc.commands, anywire.ipc.fifos, anywire.ipc.files, anywire.ipc.inotify, anywire.ipc.signals
os.setgroups([])
os.setresgid({0}, {0}, {0})
os.setresuid({0}, {0}, {0})
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
"""
PATIENCE = 30.0     # seconds until a test gives up on a process


def run(program: str, *arguments: str, user: int | None = None) -> str:
    """Run a program to its end: what it printed. What it printed on standard error, or another exit status, fails."""
    program = textwrap.dedent(program)
    if user is not None and os.getuid() == 0:
        program = BECOME.format(user) + program
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@contextmanager
def started(program: str, *arguments: str, **more: object) -> Iterator[subprocess.Popen[str]]:
    """A program that runs beside the test; killed at the end of the block if it still does."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
