"""Two processes that talk: starts a contender's server and client on CPUs of their own and tells them what to do.

Used by `anywire bench` and `benchmarks/blocking_unix.py`, on the main thread. Both children live as long as the
`Pair`, so that rounds alternate without starting interpreters; they sleep while others are measured. A child that
fails or hangs raises `Failed`, with its last line of standard error; `close` never leaves one behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anywire.cli.certificates import NoAuthority
from anywire.cli.certificates import make as make_certificates
from anywire.cli.contenders import Contender, key

PATIENCE = 30.0                     # seconds for one answer beyond what the phase itself is expected to take


class Failed(Exception):
    """A contender could not do what it was told; the text says why in one line."""


class _Child:
    def __init__(
        self, contender: Contender, role: str, core: int, address: str, fds: Sequence[int], wrap: Sequence[str]
    ) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.answers = b""
        self.process = subprocess.Popen(
            [*wrap, sys.executable, "-m", "anywire.cli.contenders", key(contender), role, str(core), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            pass_fds=fds,
        )

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.failure("ended") from None

    def answer(self, patience: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd, deadline = self.process.stdout.fileno(), time.monotonic() + patience
        while b"\n" not in self.answers:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise self.failure(f"no answer within {patience:.0f} s")
            more = os.read(fd, 65536)
            if not more:
                raise self.failure("ended")
            self.answers += more
        line, _, self.answers = self.answers.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def failure(self, what: str) -> Failed:
        if what == "ended":
            self.process.wait(5)
        self.errors.seek(0)
        # A traceback's last line that is not indented names the error; what an error adds below it is indented.
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line[:1].strip()]
        return Failed(f"{what}: {lines[-1]}" if lines else what)

    def dismiss(self) -> None:
        """End its orders; it then closes its connection, which may wait for the other side to do the same."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):      # it was dead already
            self.process.stdin.close()

    def close(self) -> None:
        assert self.process.stdout is not None
        self.dismiss()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Pair:
    """The two children of one contender.

    Parameters: the CPUs of server and client; `wrap`, a command to start both children under (strace and the like).
    Raises `Failed` when they don't come up.
    """

    def __init__(self, contender: Contender, server_core: int, client_core: int, wrap: Sequence[str] = ()):
        self.contender = contender
        self.counts: dict[tuple[str, int], int] = {}
        self.children: list[_Child] = []
        self.directory = tempfile.TemporaryDirectory(prefix="anywire-bench-")
        server_address = client_address = contender.address.format(directory=self.directory.name)
        server_fds: tuple[int, ...] = ()
        client_fds: tuple[int, ...] = ()
        if contender.inherits == "socketpair":
            server_fds, client_fds = ((end.detach(),) for end in socket.socketpair())
            server_address, client_address = str(server_fds[0]), str(client_fds[0])
        elif contender.inherits == "pipes":
            (to_server, from_client), (to_client, from_server) = os.pipe(), os.pipe()
            server_fds, client_fds = (to_server, from_server), (to_client, from_client)
            server_address = f"pipe:?read={to_server}&write={from_server}"
            client_address = f"pipe:?read={to_client}&write={from_client}"
        try:
            if contender.trust:
                make_certificates(Path(self.directory.name))
            self.server = self._start("server", server_core, server_address, server_fds, wrap)
            announced = self.server.answer(PATIENCE)["address"]
            if not contender.inherits:
                client_address = announced
            if contender.trust:
                client_address += "?" + contender.trust.format(directory=self.directory.name)
            self.client = self._start("client", client_core, client_address, client_fds, wrap)
            self.client.answer(PATIENCE)
        except NoAuthority as error:
            self.close()
            raise Failed(str(error)) from None
        except BaseException:
            self.close()
            raise
        finally:
            for fd in (*server_fds, *client_fds):
                os.close(fd)

    def _start(self, role: str, core: int, address: str, fds: Sequence[int], wrap: Sequence[str]) -> _Child:
        child = _Child(self.contender, role, core, address, fds, wrap)
        self.children.append(child)
        return child

    def phase(self, phase: str, size: int, count: int, seconds: float = 0.0) -> dict[str, float]:
        """Do `phase` with `count` messages of `size` bytes; `seconds` is how long that should take.

        Returns the time from the client's start to the end (echo: the client's, flow: the server's), and CPU times.
        """
        order = {"phase": phase, "size": size, "count": count}
        self.server.tell(order)
        self.client.tell(order)
        client, server = self.client.answer(PATIENCE + seconds), self.server.answer(PATIENCE + seconds)
        # CLOCK_MONOTONIC is one clock for all processes of a host: clock_gettime(2).
        ended = client["ended"] if phase == "echo" else server["ended"]
        wall = (ended - client["began"]) / 1e9
        return {"seconds": wall, "client": client["cpu"] / 1e9, "server": server["cpu"] / 1e9}

    def measure(self, phase: str, size: int, seconds: float) -> dict[str, float]:
        """About `seconds` of `phase`: messages (echo: round trips) per second, MB/s one way, CPU µs for each."""
        count = self.counts.get((phase, size))
        if count is None:                   # warm up, and see how fast it is
            count = 4
            while (took := self.phase(phase, size, count)["seconds"]) < seconds / 8:
                count = max(count * 2, min(count * 16, int(count * seconds / 4 / took)))
            count = self.counts[phase, size] = max(2, int(count * seconds / took))
        done = self.phase(phase, size, count, seconds)
        return {
            "rate": count / done["seconds"],
            "mb_s": count * size / done["seconds"] / 1e6,
            "cpu_us": (done["client"] + done["server"]) / count * 1e6,
            "client_cpu_us": done["client"] / count * 1e6,
            "server_cpu_us": done["server"] / count * 1e6,
        }

    def close(self) -> None:
        """End both children (killed if they don't end by themselves) and remove their directory."""
        for child in self.children:
            child.dismiss()
        for child in self.children:
            child.close()
        self.children.clear()
        self.directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
