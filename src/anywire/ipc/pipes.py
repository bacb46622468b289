"""Pipes, bare: their two ends, sizes, atomic writes (pipe(7)).

    >>> from anywire.ipc import pipe
    >>> with pipe() as (reader, writer):
    ...     writer.write(b"hello")
    ...     writer.close()
    ...     reader.read(), reader.read()
    (b'hello', b'')

What a pipe promises: up to PIPE_BUF (4096) bytes go whole, beside those of other writers, or not at all. More may be
mixed with what others write, and a time-out or a cancelled wait may leave a part of it written. The end is told when
the last copy of the write end is closed, whoever has it: a forked child, too.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import select
import termios
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from anywire.ipc.owned import Owned, deadline_of, left

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK = 64 << 10
PIPE_BUF = select.PIPE_BUF
"""Bytes that a pipe takes whole or not at all."""


class PipeEnd(Owned):
    """What both ends share. An `fd` given to it becomes non-blocking, for all who have the same open description."""

    def __init__(self, fd: int, name: str = "") -> None:
        os.set_blocking(fd, False)
        super().__init__(fd, name or os.readlink(f"/proc/self/fd/{fd}"))

    @property
    def size(self) -> int:
        """How many bytes the pipe holds (F_GETPIPE_SZ); both ends say the same. Settable: `resize`."""
        return fcntl.fcntl(self.fileno(), fcntl.F_GETPIPE_SZ)

    @size.setter
    def size(self, size: int) -> None:
        self.resize(size)

    def resize(self, size: int) -> int:
        """Make the pipe hold at least `size` bytes (F_SETPIPE_SZ); how many it holds then: the kernel rounds up to a
        power of two of pages.

        Raises PermissionError above the limit for this user, which it names, and OSError (EBUSY) when more than that
        waits in the pipe.
        """
        if size < 1:
            raise ValueError(f"a pipe holds at least 1 byte, not {size}")
        try:
            return fcntl.fcntl(self.fileno(), fcntl.F_SETPIPE_SZ, size)
        except OverflowError:
            raise OSError(errno.EINVAL, f"no pipe can hold {size} bytes", self.name) from None
        except OSError as error:
            raise OSError(error.errno, self._why(error, size), self.name) from None

    def _why(self, error: OSError, size: int) -> str:
        text = error.strerror or ""
        if error.errno == errno.EBUSY:
            return f"{text}: more than {size} bytes wait in the pipe; read them first"
        if error.errno == errno.EPERM:
            most = limit("pipe-max-size")
            if size > most:
                return (
                    f"{text}: {size} bytes, and without CAP_SYS_RESOURCE the limit is {most}: "
                    "sysctl fs.pipe-max-size=BYTES raises it"
                )
            return (
                f"{text}: the pipes of this user hold as many pages as they may "
                f"({limit('pipe-user-pages-soft')}): sysctl fs.pipe-user-pages-soft=PAGES raises it"
            )
        return text

    @property
    def pending(self) -> int:
        """Bytes that wait to be read."""
        count = array.array("i", [0])
        fcntl.ioctl(self.fileno(), termios.FIONREAD, count)
        return count[0]

    def reopen(self, *, blocking: bool = True) -> int:
        """A descriptor of its own for the same end: blocking, as other programs expect of their standard input and
        output, without a change to this one. Close-on-exec; subprocess makes it inheritable where it is asked to.
        """
        access = os.O_WRONLY if isinstance(self, PipeWriter) else os.O_RDONLY
        fd = os.open(f"/proc/self/fd/{self.fileno()}", access | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(fd, blocking)
        return fd


class PipeReader(PipeEnd):
    """The end that is read. Any number of threads and tasks may read; each byte goes to one of them."""

    def read(self, limit: int = CHUNK, *, timeout: float | None = None) -> bytes:
        """Up to `limit` bytes, as soon as there are any; b"" is the end: all writers are gone.

        Raises TimeoutError when nothing came within `timeout` seconds; nothing was taken then.
        """
        return self._until(lambda fd: self._take(fd, limit), timeout, "nothing came")

    def try_read(self, limit: int = CHUNK) -> bytes:
        """What is there. BlockingIOError: nothing is."""
        return self._take(self.fileno(), limit)

    async def read_async(self, limit: int = CHUNK, *, timeout: float | None = None) -> bytes:
        """`read` for an event loop. Cancelled, it has taken nothing."""
        return await self._until_async(lambda fd: self._take(fd, limit), timeout, "nothing came")

    def _take(self, fd: int, limit: int) -> bytes:
        return os.read(fd, limit)

    def _take_into(self, fd: int, buffer: Buffer) -> int:
        return os.readv(fd, [buffer])

    def read_into(self, buffer: Buffer, *, timeout: float | None = None) -> int:
        """`read` into memory of the caller's; how many bytes came, 0 at the end."""
        return self._until(lambda fd: self._take_into(fd, buffer), timeout, "nothing came")

    async def read_into_async(self, buffer: Buffer, *, timeout: float | None = None) -> int:
        """`read_into` for an event loop."""
        return await self._until_async(lambda fd: self._take_into(fd, buffer), timeout, "nothing came")

    def read_all(self, *, timeout: float | None = None) -> bytes:
        """Everything until the end. `timeout` is for all of it; what came before a TimeoutError is its `partial`."""
        parts: list[bytes] = []
        deadline = deadline_of(timeout)
        try:
            while part := self.read(timeout=left(deadline)):
                parts.append(part)
        except TimeoutError as error:
            error.partial = b"".join(parts)  # type: ignore[attr-defined]
            raise
        return b"".join(parts)

    async def read_all_async(self, *, timeout: float | None = None) -> bytes:
        """`read_all` for an event loop."""
        parts: list[bytes] = []
        deadline = deadline_of(timeout)
        try:
            while part := await self.read_async(timeout=left(deadline)):
                parts.append(part)
        except TimeoutError as error:
            error.partial = b"".join(parts)  # type: ignore[attr-defined]
            raise
        return b"".join(parts)

    def __iter__(self) -> Iterator[bytes]:
        while part := self.read():
            yield part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while part := await self.read_async():
            yield part


class PipeWriter(PipeEnd):
    """The end that is written. BrokenPipeError when nobody reads any more: Python ignores SIGPIPE."""

    def __init__(self, fd: int, name: str = "") -> None:
        super().__init__(fd, name)
        self.written = 0
        """Bytes that this end has handed to the kernel in all."""

    def _put(self, fd: int, rest: memoryview) -> int:
        try:
            count = os.write(fd, rest)
        except BrokenPipeError as error:
            raise BrokenPipeError(error.errno, "nobody has the read end open any more", self.name) from None
        self.written += count
        return count

    def write(self, data: Buffer, *, timeout: float | None = None) -> None:
        """Write all of it. Up to PIPE_BUF bytes are atomic; of more, a part may be written when TimeoutError is raised:
        `written` counts it. With O_DIRECT (`packets=True`) each PIPE_BUF bytes are a packet.
        """
        with memoryview(data).cast("B") as view:
            deadline = deadline_of(timeout)
            done = 0
            while True:
                done += self._until(
                    partial(self._put, rest=view[done:]), left(deadline), self._full(done, view), writing=True
                )
                if done == len(view):
                    return

    async def write_async(self, data: Buffer, *, timeout: float | None = None) -> None:
        """`write` for an event loop. Cancelled, it has written none of up to PIPE_BUF bytes; of more, maybe a part."""
        with memoryview(data).cast("B") as view:
            deadline = deadline_of(timeout)
            done = 0
            while True:
                done += await self._until_async(
                    partial(self._put, rest=view[done:]), left(deadline), self._full(done, view), writing=True
                )
                if done == len(view):
                    return

    @staticmethod
    def _full(done: int, view: memoryview) -> str:
        return f"{done} of {len(view)} bytes were written, and there was no room for more"

    def write_atomic(self, data: Buffer, *, timeout: float | None = None) -> None:
        """Write all of it at once, never mixed with what others write, or raise and write nothing.

        Raises OSError (EMSGSIZE) above PIPE_BUF bytes, of which the kernel does not promise that.
        """
        self.write(self._small(data), timeout=timeout)

    async def write_atomic_async(self, data: Buffer, *, timeout: float | None = None) -> None:
        """`write_atomic` for an event loop. Cancelled, it has written nothing."""
        await self.write_async(self._small(data), timeout=timeout)

    def _small(self, data: Buffer) -> memoryview:
        view = memoryview(data)
        if view.nbytes > PIPE_BUF:
            raise OSError(
                errno.EMSGSIZE,
                f"{view.nbytes} bytes can't be written atomically, a pipe promises that up to {PIPE_BUF} (PIPE_BUF): "
                "use write(), and a lock beside it where others write too",
                self.name,
            )
        return view

    def try_write(self, data: Buffer) -> int:
        """Write what there is room for now; how many bytes. BlockingIOError: no room; up to PIPE_BUF, for all."""
        with memoryview(data).cast("B") as view:
            return self._put(self.fileno(), view)


class Pipe(NamedTuple):
    """Both ends of a pipe; a tuple, and a context manager that closes what is still open of them."""

    reader: PipeReader
    writer: PipeWriter

    def close(self) -> None:
        """Close both ends."""
        self.reader.close()
        self.writer.close()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pipe(*, size: int | None = None, packets: bool = False) -> Pipe:
    """A new pipe. `size`: bytes it holds at least (default: the system's, mostly 65536). `packets`: each write of up to
    PIPE_BUF bytes is read by itself, and a read that is too short loses the rest (O_DIRECT).

    Raises PermissionError when `size` is above this user's limit, OSError (EMFILE, ENFILE) without descriptors.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if packets else 0)
    first, second = os.pipe2(flags)
    made = Pipe(PipeReader(first), PipeWriter(second))
    try:
        if size is not None:
            made.reader.resize(size)
    except BaseException:
        made.close()
        raise
    return made


def limit(name: str) -> int:
    """A limit of /proc/sys/fs: `pipe-max-size` in bytes, `pipe-user-pages-soft` and `-hard` in pages, 0 for none."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/fs", name).read_text(encoding="ascii"))
    return 0
