"""Which loop, which programs: what the tests and their fixtures share.

ANYWIRE_INTEGRATION_LOOP=module:function takes another loop than ours, for example `asyncio:new_event_loop`, to see
whether a failure is ours.
"""

from __future__ import annotations

import asyncio
import glob
import importlib
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

LOOP = os.environ.get("ANYWIRE_INTEGRATION_LOOP", "anywire:new_event_loop")
Run = Callable[[Coroutine[Any, Any, Any]], Any]
PATIENCE = 30.0


def new_event_loop() -> asyncio.AbstractEventLoop:
    module, _, function = LOOP.partition(":")
    return getattr(importlib.import_module(module), function)()


def descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:       # the one that listed them
            continue
    return found


class Server:
    """A process that was told to serve, and is ended by `close`. user: who it runs as, if this is root."""

    def __init__(self, command: list[str], directory: Path, user: str | None) -> None:
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, user=user, cwd=directory,
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until `ready()`; fails with the server's own words if it ends or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def unprivileged() -> str | None:
    """PostgreSQL refuses to run as root: `nobody` then, else whoever this is."""
    return "nobody" if os.getuid() == 0 else None


def program(name: str, *places: str) -> str:
    """A program's path, from PATH or from where distributions put it."""
    candidates = sorted((path for place in places for path in glob.glob(f"{place}/{name}")), reverse=True)
    found = shutil.which(name) or next(iter(candidates), None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def private(path: Path, content: bytes, user: str | None) -> Path:
    """A file that only the server's user may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)
    if user is not None:
        os.chown(path, pwd.getpwnam(user).pw_uid, -1)
    return path
