"""Two processes that talk: starts a server and a client on CPUs of their own and tells them what to do.

Used by `anywire bench`, `anywire bench copies` and benchmarks of this repository, on the main thread. Both children
live as long as their `Children`, so that rounds alternate without starting interpreters; they sleep while others are
measured. A child that fails or hangs raises `Failed`, with the error that it said, or its last line of standard error;
`close` never leaves one behind.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anywire.cli.certificates import NoAuthority
from anywire.cli.certificates import make as make_certificates
from anywire.cli.contenders import Contender, headline, key

PATIENCE = 30.0                     # seconds for one answer beyond what the phase itself is expected to take


class Failed(Exception):
    """A contender could not do what it was told; the text says why in one line."""


# Descriptors of the server and of the client, and what each is told as its address.
Made = tuple[tuple[int, ...], tuple[int, ...], str, str]


def _socketpair() -> Made:
    server, client = (end.detach() for end in socket.socketpair())
    return (server,), (client,), str(server), str(client)


def _pipe() -> Made:
    to_client, from_server = os.pipe()
    return (from_server,), (to_client,), str(from_server), str(to_client)


def _pipes() -> Made:
    (to_server, from_client), (to_client, from_server) = os.pipe(), os.pipe()
    server, client = f"pipe:?read={to_server}&write={from_server}", f"pipe:?read={to_client}&write={from_client}"
    return (to_server, from_server), (to_client, from_client), server, client


def _memory() -> Made:
    memory = os.memfd_create("anywire-bench")
    both = os.dup(memory)
    return (memory,), (both,), str(memory), str(both)


# What the parent makes for both.
INHERITED: dict[str, Callable[[], Made]] = {
    "socketpair": _socketpair,
    "pipe": _pipe,                  # from the server to the client
    "pipes": _pipes,                # one each way, as anywire's address for it
    "memory": _memory,              # a memory file that is still empty
}


class _Child:
    def __init__(self, command: Sequence[str], fds: Sequence[int]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self.answers = b""
        self.process = subprocess.Popen(
            command,
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

    def fileno(self) -> int:
        """Readable when it says something, or has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def heard(self) -> dict[str, Any] | None:
        """Its next answer, if that has been read."""
        line, newline, rest = self.answers.partition(b"\n")
        if not newline:
            return None
        self.answers = rest
        answer: dict[str, Any] = json.loads(line)
        return answer

    def hear(self) -> None:
        """Read what it says."""
        more = os.read(self.fileno(), 65536)
        if not more:
            raise self.failure("ended")
        self.answers += more

    def answer(self, patience: float) -> dict[str, Any]:
        """Its next answer; Failed if it ends, or says nothing for `patience` seconds."""
        return _answers([self], patience)[0]

    def failure(self, what: str) -> Failed:
        if what == "ended":
            self.process.wait(5)
        self.errors.seek(0)
        why = headline(self.errors.read().decode(errors="replace"))
        return Failed(f"{what}: {why}" if why else what)

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
            self.process.terminate()        # some remove what the kernel would keep
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def _answers(children: Sequence[_Child], patience: float) -> list[dict[str, Any]]:
    """The next answer of each. The first that fails or ends fails all: the others may wait for it for ever.

    Where several fail, that is the one which failed first: what the others say only follows from it."""
    found: dict[_Child, dict[str, Any]] = {}
    deadline = time.monotonic() + patience
    while True:
        for child in children:
            if child not in found and (answer := child.heard()) is not None:
                found[child] = answer
        missing = [child for child in children if child not in found]
        failed = [answer for answer in found.values() if "failed" in answer]
        if not missing and not failed:
            return [found[child] for child in children]
        # Who made another one fail has said so before: it is here already.
        ready = select.select(missing, [], [], 0.0 if failed else max(0.0, deadline - time.monotonic()))[0]
        if failed and not ready:
            raise Failed(f"ended: {min(failed, key=lambda answer: answer['when'])['failed']}")
        if not ready:
            raise missing[0].failure(f"no answer within {patience:.0f} s")
        for child in ready:
            child.hear()


class Children:
    """A server and a client, each `python -m PROGRAM NAME ROLE CORE ADDRESS *more`.

    Each says `{"address": ...}` on standard output once it is ready, the server first, and is then told orders.
    Parameters: `address` may hold `{directory}` (theirs alone, removed at the end) and `{name}` (that directory's);
    `inherits`, a key of INHERITED, takes its place; `trust` is what the client adds to the server's address;
    `wrap`, a command to start both children under (strace and the like). Raises `Failed` when they don't come up.
    """

    def __init__(
        self,
        program: str,
        name: str,
        address: str,
        server_core: int,
        client_core: int,
        *,
        inherits: str = "",
        trust: str = "",
        more: Sequence[str] = (),
        wrap: Sequence[str] = (),
    ) -> None:
        self.children: list[_Child] = []
        self.directory = tempfile.TemporaryDirectory(prefix="anywire-bench-")
        directory = Path(self.directory.name)
        server_address = client_address = address.format(directory=directory, name=directory.name)
        server_fds: tuple[int, ...] = ()
        client_fds: tuple[int, ...] = ()
        if inherits:
            server_fds, client_fds, server_address, client_address = INHERITED[inherits]()

        def start(role: str, core: int, address: str, fds: Sequence[int]) -> _Child:
            command = [*wrap, sys.executable, "-m", program, name, role, str(core), address, *more]
            self.children.append(_Child(command, fds))
            return self.children[-1]

        try:
            if trust:
                make_certificates(directory)
            self.server = start("server", server_core, server_address, server_fds)
            announced = self.server.answer(PATIENCE)["address"]
            if not inherits:
                client_address = announced
            if trust:
                client_address += "?" + trust.format(directory=directory)
            self.client = start("client", client_core, client_address, client_fds)
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

    def answers(self, patience: float) -> list[dict[str, Any]]:
        """The next answer of the server and of the client; `patience` in seconds. Failed as soon as one has ended."""
        return _answers([self.server, self.client], patience)

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


class Pair(Children):
    """The two children of one contender; the parameters are those of `Children`."""

    program = "anywire.cli.contenders"

    def __init__(
        self, contender: Contender, server_core: int, client_core: int, wrap: Sequence[str] = (),
        more: Sequence[str] = (),
    ) -> None:
        self.contender = contender
        self.counts: dict[Any, int] = {}
        super().__init__(
            self.program, key(contender), contender.address, server_core, client_core,
            inherits=contender.inherits, trust=contender.trust, more=more, wrap=wrap,
        )

    def phase(self, phase: str, size: int, count: int, seconds: float = 0.0, **more: Any) -> dict[str, float]:
        """Do `phase` with `count` messages of `size` bytes; `seconds` is how long that should take. `more` is told too.

        Returns the time from the client's start to the end (flow: the server's, else the client's), and CPU times.
        """
        order = {"phase": phase, "size": size, "count": count, **more}
        self.server.tell(order)
        self.client.tell(order)
        server, client = self.answers(PATIENCE + seconds)
        # CLOCK_MONOTONIC is one clock for all processes of a host: clock_gettime(2).
        ended = server["ended"] if phase == "flow" else client["ended"]
        wall = (ended - client["began"]) / 1e9
        return {"seconds": wall, "client": client["cpu"] / 1e9, "server": server["cpu"] / 1e9}

    def measure(self, phase: str, size: int, seconds: float, **more: Any) -> dict[str, float]:
        """About `seconds` of `phase`: messages (echo: round trips) per second, MB/s one way, CPU µs for each."""
        what = (phase, size, *more.items())
        count = self.counts.get(what)
        if count is None:                   # warm up, and see how fast it is
            self.phase(phase, size, 8, **more)      # the first messages find their memory
            count = 4
            while (took := self.phase(phase, size, count, **more)["seconds"]) < seconds / 8:
                count = max(count * 2, min(count * 16, int(count * seconds / 4 / took)))
            count = self.counts[what] = max(2, int(count * seconds / took))
        done = self.phase(phase, size, count, seconds, **more)
        return {
            "rate": count / done["seconds"],
            "mb_s": count * size / done["seconds"] / 1e6,
            "cpu_us": (done["client"] + done["server"]) / count * 1e6,
            "client_cpu_us": done["client"] / count * 1e6,
            "server_cpu_us": done["server"] / count * 1e6,
        }
