"""The test's side of its peers: start one, ask it to do something, hear what it says, kill it.

Owns: `PeerHost`, the process that forks peers (one for each test process, started at the first use), and `Peer`.
Called by world.py and the tests on the test's event loop. A peer that died answers with `PeerGone`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from . import peer as peer_module
from .peer import LENGTH


class PeerGone(Exception):
    """The peer ended before it answered."""


class PeerFailed(AssertionError):
    """What the peer was asked to do raised; the text has the peer's traceback."""


class PeerHost:
    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", peer_module.__name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def start(self, control: socket.socket, fds: list[int]) -> int:
        socket.send_fds(self.requests, [b"fork"], [control.fileno(), *fds])
        (pid,) = LENGTH.unpack(self.requests.recv(LENGTH.size))
        return int(pid)

    def stop(self) -> None:
        self.requests.close()
        self.process.wait(10)


@cache
def host() -> PeerHost:
    import atexit

    started = PeerHost()
    atexit.register(started.stop)
    return started


class Peer:
    """One peer. `call` waits for the answer, `start` gives a future; answers come in the order of the requests."""

    def __init__(self) -> None:
        self.pid = 0
        self.reports: asyncio.Queue[Any] = asyncio.Queue()
        self.last_report: Any = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    @classmethod
    async def open(cls, *, process: bool, fds: list[int] | None = None) -> Peer:
        self = cls()
        ours, theirs = socket.socketpair()
        if process:
            self.pid = host().start(theirs, fds or [])
            theirs.close()
        else:
            threading.Thread(target=peer_module.run_peer, args=(theirs, fds or []), name="peer", daemon=True).start()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._listening = asyncio.create_task(self._listen())
        return self

    async def _listen(self) -> None:
        import pickle

        try:
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                kind, *rest = pickle.loads(await self._reader.readexactly(length))
                if kind == "report":
                    self.last_report = rest[0]
                    self.reports.put_nowait(rest[0])
                    continue
                future = self._answers.pop(rest[0])
                if future.done():
                    continue
                if kind == "result":
                    future.set_result(rest[1])
                else:
                    future.set_exception(PeerFailed(rest[1]))
        except (EOFError, OSError):
            for future in self._answers.values():
                if not future.done():
                    future.set_exception(PeerGone("the peer ended"))

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> asyncio.Future[Any]:
        import pickle

        self._number += 1
        data = pickle.dumps((self._number, function, args, options))
        future = self._answers[self._number] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # a killed peer's is never awaited
        self._writer.write(LENGTH.pack(len(data)) + data)
        return future

    async def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return await self.start(function, *args, **options)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    async def until_state(self, *states: str) -> None:
        """Wait until the kernel says that the process is in one of these states (S sleeping, T stopped, …)."""
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in states:
            await asyncio.sleep(0.001)

    async def until_gone(self) -> None:
        while os.path.exists(f"/proc/{self.pid}"):
            await asyncio.sleep(0.001)

    async def freeze(self) -> None:
        """Stop the process: it reads nothing from now on, and the kernel keeps its sockets open."""
        self.signal(signal.SIGSTOP)
        await self.until_state("T")

    async def close(self) -> None:
        if self.pid:
            try:
                self.kill()
            except ProcessLookupError:
                pass
        self._writer.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
