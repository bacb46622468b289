"""The demo's view of its server process: start it, give it acts, kill it, know what it said.

On the main thread. What can go wrong: the server ends or says an error (`ServerFailed`, with its last line); whatever
happens, `close` leaves no process. The server goes by itself when this process is gone, because its socket ends.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

PATIENCE = 20.0             # seconds for an answer


class ServerFailed(Exception):
    """The server process could not do its act; the text says why in one line."""


class ServerProcess:
    """One server process."""

    def __init__(self, directory: str) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.rest = b""
        self.killed = False
        self.addresses: list[str] = []
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "anywire.cli.demo.server", str(theirs.fileno()), directory],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.errors,
                stderr=self.errors,
            )

    def start_act(self, name: str, address: str = "", fds: Sequence[int] = ()) -> Act:
        """Have the server begin an act; returns when it can be reached. For a server that is going to be killed."""
        order = json.dumps({"act": name, "address": address}).encode() + b"\n"
        socket.send_fds(self.sock, [order], list(fds))
        act = Act(self._answer()["address"])
        self.addresses.append(act.address)
        return act

    @contextmanager
    def act(self, name: str, address: str = "", fds: Sequence[int] = ()) -> Iterator[Act]:
        """Have the server do an act during the block. Its `cpu_ns` and `digest_ns` are there afterwards."""
        act = self.start_act(name, address, fds)
        try:
            yield act
        finally:
            self.finish(act)

    def finish(self, act: Act) -> None:
        """Tell the server to end its act, and take what it cost. Nothing to do when it was killed."""
        if self.killed:
            return
        self.sock.sendall(b'{"stop": true}\n')
        done = self._answer()
        act.cpu_ns, act.digest_ns = done["cpu_ns"], done["digest_ns"]

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self.rest:
            try:
                data = self.sock.recv(1 << 20)
            except TimeoutError:
                raise ServerFailed(f"the server process said nothing for {PATIENCE:.0f} s") from None
            if not data:
                raise ServerFailed(f"the server process ended: {self._last_words()}")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise ServerFailed(said["error"])
        return said

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"status {self.process.wait(PATIENCE)}"

    def kill(self) -> None:
        """kill -9."""
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """End it: by the end of its orders, or else by force."""
        self.sock.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Act:
    """An act that runs. `address` is the real one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.cpu_ns = 0
        self.digest_ns: list[int] = []


def memory(pid: int | str = "self") -> int:
    """Bytes of a process in memory now: proc(5), statm."""
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
