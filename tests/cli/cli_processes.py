"""Running `anywire` commands as real processes, for the tests of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ANYWIRE = [sys.executable, "-m", "anywire"]
PATIENCE = 30.0     # seconds until a test gives up on a process


def run(*arguments: str, stdin: bytes = b"", **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    command = [*ANYWIRE, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE, check=False, **more)


@contextmanager
def started(*arguments: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs; killed at the end of the block if it still does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    process = subprocess.Popen([*ANYWIRE, *arguments], **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


@contextmanager
def listening(*arguments: str, **more: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`anywire cat --listen -v ...`, and the real address once it listens."""
    with started("cat", "--listen", "--verbose", *arguments, **more) as process:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert line.startswith("anywire: listening: "), line + process.stderr.read().decode()
        yield process, line.removeprefix("anywire: listening: ").strip()


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = b"") -> tuple[bytes, bytes]:
    """Give it the rest of its input (None: leave that open) and wait for its end: (output, errors)."""
    if stdin is None:
        assert process.stdout is not None and process.stderr is not None
        process.wait(PATIENCE)
        return process.stdout.read(), process.stderr.read()
    return process.communicate(stdin, timeout=PATIENCE)


def wait_with_memory(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process: (status, the most memory it ever had, in bytes). getrusage(2): ru_maxrss is in KiB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024
