"""A file as the medium: locks of open file descriptions, and appending whole records (fcntl(2), write(2)).

    >>> import os, tempfile
    >>> from anywire.ipc import Appender, FileLock
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with FileLock(directory + "/lock"), Appender(directory + "/log") as log:
    ...         log.append(b"one line\\n")
    ...     os.path.getsize(directory + "/log")
    9

A `FileLock` belongs to an open file description, not to a process as the older POSIX locks do: two of one process
exclude each other, threads too, and none is lost because some library closes another descriptor of the file. The kernel
gives it back when the last copy of the description is closed, also by kill -9. It is advisory: it excludes who locks,
not who writes. Linux 3.15; over NFS as the server has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from anywire.ipc import _calls, helpers
from anywire.ipc._interrupt import Interrupt
from anywire.ipc.fifo import LOCK
from anywire.ipc.owned import Owned, deadline_of, left

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST = 0x7FFFF000
"""Bytes that one write(2) takes."""


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int: ...


class Holder(NamedTuple):
    """Somebody who has a lock."""

    pid: int
    """A process that has the description open; -1: the kernel does not tell, or only to root and the same user."""
    name: str
    """The program's name (comm of proc(5)); "" when that is not known."""
    shared: bool
    """Whether it is a shared lock."""
    start: int
    """The first byte."""
    length: int
    """How many bytes; 0: to the end, however long the file becomes."""

    def __str__(self) -> str:
        who = f"process {self.pid} ({self.name})" if self.pid > 0 else "a process that the kernel does not tell"
        last = f"to {self.start + self.length - 1}" if self.length else "on"
        return f"{who} has a{' shared' if self.shared else 'n exclusive'} lock from byte {self.start} {last}"


class FileLock:
    """A lock on a file, or on a range of it; a context manager, also `async with`.

    Parameters: `file`, a path, which is opened (and made, with `mode`) while the lock is held; or an open file or its
    number, whose description gets the lock: others that have the same description are not excluded. `shared`: others
    may have shared locks at the same time. `start` and `length` in bytes; length 0: to the end, however long it is.

    Any thread may acquire and release. A forked child does not hold it, but the kernel keeps it until the child's
    copy of the file is closed too: `release` there closes that alone. It pickles by its path, not held.
    """

    def __init__(
        self, file: str | os.PathLike[str] | int | HasFileno, *, shared: bool = False, start: int = 0, length: int = 0,
        mode: int = 0o600,
    ) -> None:
        if start < 0 or length < 0:
            raise ValueError(f"a range starts at 0 or later and is not negative; not start={start}, length={length}")
        self.file = file
        self.shared = shared
        self.start = start
        self.length = length
        self.mode = mode
        self._fd = -1
        self._process = 0

    @property
    def name(self) -> str:
        """The file's path, or what /proc says of its descriptor."""
        if isinstance(self.file, (str, os.PathLike)):
            return os.fspath(self.file)
        number = self.file if isinstance(self.file, int) else self.file.fileno()
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{number}")
        return f"descriptor {number}"

    @property
    def held(self) -> bool:
        """Whether this object has it, in this process."""
        return self._fd >= 0 and self._process == os.getpid()

    @property
    def _opens(self) -> bool:
        return isinstance(self.file, (str, os.PathLike))

    def _open(self) -> int:
        if self.held:
            raise RuntimeError(f"this FileLock of {self.name} is held already; make another one for another lock")
        if not isinstance(self.file, (str, os.PathLike)):
            return self.file if isinstance(self.file, int) else self.file.fileno()
        # A shared lock needs a readable file, an exclusive one a writable one.
        access = os.O_RDONLY if self.shared else os.O_RDWR
        return os.open(self.file, access | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, self.mode)

    def _packed(self, kind: int) -> bytes:
        return LOCK.pack(kind, os.SEEK_SET, self.start, self.length, 0)

    def _lock(self, fd: int, command: int) -> bool:
        try:
            fcntl.fcntl(fd, command, self._packed(fcntl.F_RDLCK if self.shared else fcntl.F_WRLCK))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            self._refuse(error)
        self._fd, self._process = fd, os.getpid()
        return True

    def _refuse(self, error: OSError) -> NoReturn:
        text = error.strerror
        if error.errno == errno.EBADF:
            text = f"the file must be open for {'reading' if self.shared else 'writing'}"
        raise OSError(error.errno, text, self.name) from None

    def _wait(self, fd: int, deadline: float | None, timeout: float | None, interrupt: Interrupt) -> None:
        """Queue for it, as the kernel does; the timer that an Interrupt is ends that."""
        try:
            if not _calls.lock_file(fd, self.shared, self.start, self.length, left(deadline), interrupt):
                raise TimeoutError(errno.ETIMEDOUT, self._conflict(timeout), self.name)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            self._refuse(error)
        self._fd, self._process = fd, os.getpid()

    def _give_up(self, fd: int) -> None:
        if self._opens and self._fd != fd:
            os.close(fd)

    def _conflict(self, timeout: float | None) -> str:
        held = "; ".join(map(str, self.holders())) or "somebody had it, and has released it by now"
        return f"not locked within {timeout:g} s: {held}" if timeout else f"not locked: {held}"

    def acquire(self, *, timeout: float | None = None) -> None:
        """Lock. The kernel queues those who wait, and wakes one when it is free.

        Raises TimeoutError, whose text says who has it where the kernel tells; OSErrors of opening the file.
        """
        deadline = deadline_of(timeout)
        fd = self._open()
        try:
            if deadline is None:
                self._lock(fd, fcntl.F_OFD_SETLKW)
            elif not self._lock(fd, fcntl.F_OFD_SETLK):
                if not timeout:
                    raise TimeoutError(errno.ETIMEDOUT, self._conflict(timeout), self.name)
                self._wait(fd, deadline, timeout, Interrupt())
        finally:
            self._give_up(fd)

    def try_acquire(self) -> None:
        """Lock at once, or raise BlockingIOError, whose text says who has it."""
        fd = self._open()
        try:
            if not self._lock(fd, fcntl.F_OFD_SETLK):
                raise BlockingIOError(errno.EAGAIN, self._conflict(None), self.name)
        finally:
            self._give_up(fd)

    async def acquire_async(self, *, timeout: float | None = None) -> None:
        """`acquire` for an event loop; while it waits, a thread does. Cancelled, it has not locked, or has unlocked."""
        deadline = deadline_of(timeout)
        fd = self._open()
        try:
            if self._lock(fd, fcntl.F_OFD_SETLK):
                return
            if timeout == 0:
                raise TimeoutError(errno.ETIMEDOUT, self._conflict(timeout), self.name)
            helper = helpers.claim()
        except BaseException:
            self._give_up(fd)
            raise

        def wait(interrupt: Interrupt) -> None:
            try:
                self._wait(fd, deadline, timeout, interrupt)
            finally:
                self._give_up(fd)

        await helpers.on_thread(helper, wait, lambda _: self.release())

    def release(self) -> None:
        """Unlock. RuntimeError: this object does not hold it. In a forked child only its copy of the file is closed."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise RuntimeError(f"this FileLock of {self.name} is not held")
        if self._process == os.getpid():
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, self._packed(fcntl.F_UNLCK))
        if self._opens:
            os.close(fd)

    def holders(self) -> list[Holder]:
        """Who has locks that exclude this one, now; [] when nobody has. Of locks of open file descriptions the kernel
        tells the processes by /proc only: to root, and to others about their own."""
        fd = self._fd
        opened = fd < 0 and self._opens
        if fd < 0:
            try:
                fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC) if opened else self._open()
            except FileNotFoundError:
                return []
        try:
            kind = fcntl.F_RDLCK if self.shared else fcntl.F_WRLCK
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, self._packed(kind))
            found, _, start, length, pid = LOCK.unpack(answer)
            if found == fcntl.F_UNLCK:
                return []
            if pid > 0:
                return [Holder(pid, _program(pid), found == fcntl.F_RDLCK, start, length)]
            status = os.fstat(fd)
            told = [each for each in _locks_of(status.st_dev, status.st_ino, fd) if self._excludes(each)]
            return told or [Holder(-1, "", found == fcntl.F_RDLCK, start, length)]
        finally:
            if opened:
                os.close(fd)

    def _excludes(self, other: Holder) -> bool:
        if self.shared and other.shared:
            return False
        ours = self.start + self.length if self.length else 1 << 63
        theirs = other.start + other.length if other.length else 1 << 63
        return self.start < theirs and other.start < ours

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> FileLock:
        await self.acquire_async()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            mine, text = self.held, f"{self!r} was never released"
            if self._opens or mine:
                with contextlib.suppress(OSError):
                    self.release()
            if mine:
                warnings.warn(text, ResourceWarning, stacklevel=2)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._opens:
            raise TypeError("a FileLock of an open file does not pickle; one of a path does")
        return _unpickle, (self.name, self.shared, self.start, self.length, self.mode)

    def __repr__(self) -> str:
        kind = "shared" if self.shared else "exclusive"
        return f"<anywire.ipc.FileLock {self.name} {kind} {'held' if self.held else 'not held'}>"


def _unpickle(file: str, shared: bool, start: int, length: int, mode: int) -> FileLock:
    return FileLock(file, shared=shared, start=start, length=length, mode=mode)


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _locks_of(device: int, inode: int, own: int) -> Iterator[Holder]:
    """All locks of open file descriptions on a file, as /proc/PID/fdinfo tells them, but those of descriptor `own`."""
    me = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:                                     # it has ended, or is somebody else's
            continue
        for number in numbers:
            if pid == me and int(number) == own:
                continue
            with contextlib.suppress(OSError, ValueError):
                status = os.stat(f"/proc/{pid}/fd/{number}")
                if (status.st_dev, status.st_ino) != (device, inode):
                    continue
                for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
                    # lock:  1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 0 EOF
                    words = line.split()
                    if words[:1] == ["lock:"] and words[2] == "OFDLCK":
                        start = int(words[7])
                        length = 0 if words[8] == "EOF" else int(words[8]) - start + 1
                        yield Holder(pid, _program(pid), words[4] == "READ", start, length)


class Appender(Owned):
    """A file that records are appended to: each whole, by one write(2) at whatever is the end then, beside any number
    of other processes and threads that append (O_APPEND). Not on NFS, where the client looks for the end first.

    Parameters: `path`; `mode`, of a file that is made, less the umask.
    """

    def __init__(self, path: str | os.PathLike[str], mode: int = 0o600) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        super().__init__(os.open(path, flags, mode), os.fspath(path))

    @classmethod
    def _of(cls, fd: int, name: str) -> Appender:
        made = cls.__new__(cls)
        Owned.__init__(made, fd, name)
        return made

    def append(self, *parts: Buffer) -> None:
        """Append the parts, together as one record. Nothing of it is in the file when it raises, but for the last case.

        Raises ValueError above 2 GiB, which no single write takes; the OSErrors of write(2), such as ENOSPC; and
        OSError (EIO) when only a part fitted: then the file has that part, and the text says how much.
        """
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(map(len, views))
        if size > MOST:
            raise ValueError(f"{size} bytes: one write takes {MOST} at most, more could not be appended as one")
        try:
            count = os.writev(self.fileno(), views) if len(views) != 1 else os.write(self.fileno(), views[0])
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None
        if count != size:
            raise OSError(
                errno.EIO,
                f"only {count} of {size} bytes fitted (disk, quota or file size limit); those are in the file",
                self.name,
            )

    async def append_async(self, *parts: Buffer) -> None:
        """`append` for an event loop, by one of its threads: a disk is never "not ready". Once it has begun it is done,
        also when cancelled."""
        await asyncio.get_running_loop().run_in_executor(None, lambda: self.append(*parts))


def append(path: str | os.PathLike[str], *parts: Buffer, mode: int = 0o600) -> None:
    """Append one record to a file that is opened, or made, for that; see `Appender`."""
    with Appender(path, mode) as file:
        file.append(*parts)
