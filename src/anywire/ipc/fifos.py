"""`Fifo`: a pipe with a file name, and its opening rules as errors that say what to do (fifo(7)).

    >>> import os, tempfile
    >>> from anywire.ipc import Fifo
    >>> with tempfile.TemporaryDirectory() as directory, Fifo.create(directory + "/in") as fifo:
    ...     with fifo.open_reader() as reader, fifo.open_writer() as writer:
    ...         writer.write(b"hello")
    ...         reader.read()
    ...     fifo.unlink()
    b'hello'

A `Fifo` is the name; what is opened by it are ends of a pipe. Any thread. `fork` shares nothing of it but the name, and
`pickle` carries the name. What `anywire.ipc.fifo` has below is for wires: functions on bare descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from anywire.ipc import _calls, fifo, helpers
from anywire.ipc._interrupt import Interrupt
from anywire.ipc.owned import deadline_of, late, left
from anywire.ipc.pipes import PipeReader, PipeWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer

LOOK = 1.0
"""Seconds after which who waits in open(2) for a reader looks whether the name is still that FIFO's."""
NOBODY = "nobody has the FIFO open for reading"


class FifoReader(PipeReader):
    """The read end of a FIFO. Until the first writer came, reading waits for it, where read(2) would report an end."""

    def __init__(self, fd: int, name: str = "", keep: int = -1) -> None:
        super().__init__(fd, name)
        self._keep = keep

    def _take(self, fd: int, limit: int) -> bytes:
        data = os.read(fd, limit)
        if not data and limit and not fifo.hung_up(fd):
            raise BlockingIOError(errno.EAGAIN, "nobody has written yet", self.name)
        return data

    def _take_into(self, fd: int, buffer: Buffer) -> int:
        count = os.readv(fd, [buffer])
        if not count and memoryview(buffer).nbytes and not fifo.hung_up(fd):
            raise BlockingIOError(errno.EAGAIN, "nobody has written yet", self.name)
        return count

    def close(self) -> None:
        """Close it."""
        keep, self._keep = self._keep, -1
        if keep >= 0:
            os.close(keep)
        super().close()

    def _state(self) -> tuple[Any, ...]:
        if self._keep >= 0:
            raise TypeError("a FifoReader that is lasting doesn't pickle: pickle the Fifo, and open it there")
        return (self.name,)


class Fifo:
    """A FIFO by its path. Constructing opens nothing: with os.O_CREAT in `flags` it makes the file, with os.O_EXCL only
    a new one; otherwise it looks whether the file is there and a FIFO.

    Parameters: `mode`, the new file's, exactly, whatever the umask. `owner`: closing unlinks it.
    Raises FileExistsError, FileNotFoundError, PermissionError; OSError (EINVAL) for a file of another kind.
    """

    def __init__(
        self, path: str | os.PathLike[str], flags: int = 0, mode: int = 0o600, *, owner: bool = False
    ) -> None:
        self.path = os.fspath(path)
        self.owner = owner
        while True:
            try:
                found = os.stat(self.path)
            except FileNotFoundError:
                if not flags & os.O_CREAT:
                    raise
                with contextlib.suppress(FileExistsError):
                    os.close(fifo.make(self.path, mode))
                    return
                if flags & os.O_EXCL:
                    raise
            else:
                if flags & os.O_CREAT and flags & os.O_EXCL:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.path)
                if not stat.S_ISFIFO(found.st_mode):
                    raise OSError(errno.EINVAL, "the file is no FIFO", self.path)
                return

    @classmethod
    def create(cls, path: str | os.PathLike[str], mode: int = 0o600, *, owner: bool = False) -> Fifo:
        """Make a new one. FileExistsError: something has this name."""
        return cls(path, os.O_CREAT | os.O_EXCL, mode, owner=owner)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, owner: bool = False) -> Fifo:
        """One that exists, else FileNotFoundError."""
        return cls(path, owner=owner)

    @classmethod
    def create_or_open(cls, path: str | os.PathLike[str], mode: int = 0o600, *, owner: bool = False) -> Fifo:
        """One that exists, else a new one with this mode."""
        return cls(path, os.O_CREAT, mode, owner=owner)

    def open_reader(self, *, lasting: bool = False) -> FifoReader:
        """Open the read end; it never waits, and writers find a reader from now on. Reads wait for the first
        writer, and end when the last one left. `lasting`: they never end, writers may come and go.

        Raises PermissionError, and FileNotFoundError when the name is gone.
        """
        fd = fifo.open_reader(self.path)
        try:
            return FifoReader(fd, self.path, fifo.keep_open(fd) if lasting else -1)
        except BaseException:
            os.close(fd)
            raise

    def try_open_writer(self) -> PipeWriter:
        """Open the write end if somebody reads; OSError (ENXIO) if nobody does."""
        try:
            return PipeWriter(fifo.open_writer(self.path), self.path)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise OSError(
                    errno.ENXIO, f"{NOBODY}: start the reader first, or wait for it with open_writer(timeout=SECONDS)",
                    self.path,
                ) from None
            raise

    def open_writer(self, *, timeout: float | None = None) -> PipeWriter:
        """Open the write end as soon as somebody reads. TimeoutError: nobody did within `timeout` seconds; also
        FileNotFoundError, when the name goes away meanwhile, and PermissionError.

        It waits in open(2), and looks each second whether the name is still that FIFO's.
        """
        deadline = deadline_of(timeout)
        return self._writer_or_none() or self._wait_for_reader(deadline, timeout, Interrupt())

    async def open_writer_async(self, *, timeout: float | None = None) -> PipeWriter:
        """`open_writer` for an event loop; while it waits, a thread does. Cancelled, it has opened nothing."""
        deadline = deadline_of(timeout)
        if (writer := self._writer_or_none()) is not None:
            return writer
        if timeout == 0:
            raise late(self.path, NOBODY, timeout)
        return await helpers.on_thread(
            helpers.claim(), lambda interrupt: self._wait_for_reader(deadline, timeout, interrupt), PipeWriter.close
        )

    def _wait_for_reader(self, deadline: float | None, timeout: float | None, interrupt: Interrupt) -> PipeWriter:
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
        while True:
            rest = left(deadline)
            if rest == 0:
                raise late(self.path, NOBODY, timeout)
            self._still_a_fifo()
            fd = _calls.open_waiting(self.path, flags, LOOK if rest is None else min(LOOK, rest), interrupt)
            if fd >= 0:
                return PipeWriter(fd, self.path)
            if (writer := self._writer_or_none()) is not None:
                return writer

    def _writer_or_none(self) -> PipeWriter | None:
        try:
            return PipeWriter(fifo.open_writer(self.path), self.path)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def _still_a_fifo(self) -> None:
        if not stat.S_ISFIFO(os.stat(self.path).st_mode):
            raise OSError(errno.EINVAL, "the file is no FIFO", self.path)

    def unlink(self: Fifo | str | os.PathLike[str]) -> None:
        """Remove the name; ends that are open go on. Also `Fifo.unlink(path)`. FileNotFoundError: it is gone."""
        os.unlink(self.path if isinstance(self, Fifo) else self)

    def close(self) -> None:
        """With `owner`, unlink it, once."""
        owner, self.owner = self.owner, False
        if owner:
            with contextlib.suppress(FileNotFoundError):
                self.unlink()

    def __enter__(self) -> Fifo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Fifo, (self.path,)

    def __repr__(self) -> str:
        return f"<anywire.ipc.Fifo {self.path}>"
