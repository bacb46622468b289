"""`popen`: another program at the other end of a pipe (popen(3)), without a shell unless one is asked for.

    >>> from anywire.ipc import popen
    >>> with popen(["echo", "hello"]) as command:
    ...     command.read_all()
    b'hello\\n'
    >>> command.status
    0

Like subprocess.Popen, on which it stands, but with our pipe ends: time-outs on every call, and awaitable. Any thread.
A forked child may use the pipes, but only the parent is told the exit status. It does not pickle.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from anywire.ipc.pipes import PipeReader, PipeWriter
from anywire.ipc.process import Process

if TYPE_CHECKING:
    from typing_extensions import Buffer

MODES = ("r", "w", "rw")


class Command:
    """A program that runs; `popen` makes it. A context manager: its end closes the pipes and waits for the program, or
    kills it when an exception ends the block."""

    def __init__(
        self, child: subprocess.Popen[bytes], process: Process, reader: PipeReader | None, writer: PipeWriter | None
    ) -> None:
        self._child = child
        self.process = process
        """Its pidfd, for signals and for waiting."""
        self.reader = reader
        """The program's standard output; None without "r" in the mode."""
        self.writer = writer
        """The program's standard input; None without "w" in the mode."""
        self.status: int | None = None
        """Its exit status once it was waited for, or minus the signal that ended it."""

    @property
    def pid(self) -> int:
        """The program's process number."""
        return self.process.pid

    def _to_read(self) -> PipeReader:
        if self.reader is None:
            raise ValueError('the program was not started for reading: popen(..., "r") or "rw"')
        return self.reader

    def _to_write(self) -> PipeWriter:
        if self.writer is None:
            raise ValueError('the program was not started for writing: popen(..., "w") or "rw"')
        return self.writer

    def read(self, limit: int = 64 << 10, *, timeout: float | None = None) -> bytes:
        """What it printed, as `PipeReader.read`; b"" when it has closed its output."""
        return self._to_read().read(limit, timeout=timeout)

    async def read_async(self, limit: int = 64 << 10, *, timeout: float | None = None) -> bytes:
        """`read` for an event loop."""
        return await self._to_read().read_async(limit, timeout=timeout)

    def read_all(self, *, timeout: float | None = None) -> bytes:
        """All that it prints until it closes its output."""
        return self._to_read().read_all(timeout=timeout)

    async def read_all_async(self, *, timeout: float | None = None) -> bytes:
        """`read_all` for an event loop."""
        return await self._to_read().read_all_async(timeout=timeout)

    def write(self, data: Buffer, *, timeout: float | None = None) -> None:
        """Give it input, as `PipeWriter.write`. BrokenPipeError: it reads no more."""
        self._to_write().write(data, timeout=timeout)

    async def write_async(self, data: Buffer, *, timeout: float | None = None) -> None:
        """`write` for an event loop."""
        await self._to_write().write_async(data, timeout=timeout)

    def wait(self, *, timeout: float | None = None) -> int:
        """Wait for its end: its exit status, or minus the signal that ended it. The pipes stay as they are: one that
        waits for the end of its input, or for room in a pipe that nobody reads, does not end. TimeoutError.
        """
        if self.status is None:
            self.process.wait(timeout=timeout)
            self._note()
        assert self.status is not None
        return self.status

    async def wait_async(self, *, timeout: float | None = None) -> int:
        """`wait` for an event loop."""
        if self.status is None:
            await self.process.wait_async(timeout=timeout)
            self._note()
        assert self.status is not None
        return self.status

    def _note(self) -> None:
        # Told to subprocess too, which would ask the system for a process that is gone when it is collected.
        if self._child.returncode is None:
            self._child.returncode = self.process.status
        if self._child.returncode is None:
            self._child.wait()
        self.status = self._child.returncode

    def _close_pipes(self) -> None:
        for end in (self.writer, self.reader):
            if end is not None:
                end.close()

    def close(self, *, timeout: float | None = None) -> int:
        """Close the pipes, so that it reads the end of its input, and wait for it: its exit status, as pclose(3).

        Raises TimeoutError when it still runs after `timeout` seconds: wait again, or `process.kill()`.
        """
        self._close_pipes()
        status = self.wait(timeout=timeout)
        self.process.close()
        return status

    async def close_async(self, *, timeout: float | None = None) -> int:
        """`close` for an event loop."""
        self._close_pipes()
        status = await self.wait_async(timeout=timeout)
        self.process.close()
        return status

    def kill(self) -> None:
        """Send it SIGKILL, unless its end is known."""
        if self.status is None and self.process.alive:
            self.process.kill()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.close()

    async def __aenter__(self) -> Command:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.kill()
        await self.close_async()

    def __reduce__(self) -> tuple[type[Command], tuple[object, ...]]:
        raise TypeError("a Command does not pickle: only the process that started the program is told how it ends")

    def __repr__(self) -> str:
        return f"<anywire.ipc.Command {self._child.args!r} pid={self.pid} status={self.status}>"


def popen(
    arguments: Sequence[str | os.PathLike[str]] | str,
    mode: str = "r",
    *,
    shell: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Command:
    """Start a program with a pipe to or from it.

    Parameters: `arguments`, the program and its arguments as a list; with `shell=True` a line for /bin/sh, whose
    meaning depends on every character of it. `mode`: "r" reads its standard output, "w" writes its standard input, "rw"
    both; what is not asked for stays this process's own.
    Raises FileNotFoundError and PermissionError for the program, TypeError for a line without `shell=True`.
    """
    if mode not in MODES:
        raise ValueError(f"the mode is one of {', '.join(map(repr, MODES))}; not {mode!r}")
    if isinstance(arguments, str) != shell:
        raise TypeError(
            'with shell=True the command is one line of text, otherwise a list: ["ls", "-l"]; '
            f"got {type(arguments).__name__} with shell={shell}"
        )
    # The program's ends are blocking, as programs expect them; ours become non-blocking, which are other descriptions.
    fds: list[int] = []
    try:
        for wanted in "rw":
            fds += os.pipe2(os.O_CLOEXEC) if wanted in mode else (-1, -1)
        child = subprocess.Popen(
            arguments, shell=shell, cwd=cwd, env=env,
            stdout=fds[1] if fds[1] >= 0 else None, stdin=fds[2] if fds[2] >= 0 else None,
        )
        try:
            process = Process(child.pid)
        except BaseException:
            child.kill()
            child.wait()
            raise
    except BaseException:
        _close(fds)
        raise
    _close([fds[1], fds[2]])
    name = child.args if isinstance(child.args, str) else str(arguments[0])
    return Command(
        child, process,
        PipeReader(fds[0], f"output of {name}") if fds[0] >= 0 else None,
        PipeWriter(fds[3], f"input of {name}") if fds[3] >= 0 else None,
    )


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
