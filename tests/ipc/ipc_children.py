"""Python programs as real processes, for the tests of `anywire.ipc`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 30.0     # seconds until a test gives up on a process


def run(program: str, *arguments: str, user: int | None = None) -> str:
    """Run a program to its end: what it printed. What it printed on standard error, or another exit status, fails."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    if user is not None:
        # Root's capabilities go away with the change of the user.
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", *command]
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
