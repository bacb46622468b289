"""FIFOs, usable bare: making them, and opening them without ever waiting (fifo(7), mkfifo(3)).

The opening rules: without O_NONBLOCK an open waits until the other side is opened too. With it, reading opens at once,
and writing fails with ENXIO while nobody reads: so a writer learns whether there is a reader. Everything here opens
with it. Plain functions, any thread.

What can go wrong: OSErrors as the system calls give them. A file that is no FIFO is never opened (EINVAL).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import secrets
import select
import stat
import struct
import termios

from anywire.ipc.names import identity

LOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def open_reader(path: str) -> int:
    """Open the read end, whether or not somebody writes."""
    return _open(path, os.O_RDONLY)


def open_writer(path: str) -> int:
    """Open the write end. Raises ENXIO when nobody reads."""
    return _open(path, os.O_WRONLY)


def _open(path: str, access: int) -> int:
    if not stat.S_ISFIFO(os.stat(path).st_mode):  # opening a device might do anything
        raise OSError(errno.EINVAL, "the file is no FIFO", path)
    fd = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "the file is no FIFO", path)
    return fd


def reopen_reader(fd: int) -> int:
    """The read end of the same FIFO once more, also when it has no name any more.

    A read end at which the last writer left stays "hung up" until the next one comes; a new one is not."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def keep_open(fd: int) -> int:
    """A write end of the FIFO whose read end is `fd`: while it is open, the read end never ends."""
    return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def make(path: str, mode: int) -> int:
    """Make a FIFO with exactly this mode, whatever the umask, and open its read end. The name is new (EEXIST)."""
    os.mkfifo(path, mode & 0o600)
    try:
        fd = open_reader(path)
        try:
            os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        os.unlink(path)
        raise
    return fd


def put_in_place(path: str, mode: int, group: int | None = None) -> int:
    """Make a FIFO and put it in place of whatever file has this name, in one step (rename(2)); its read end."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.next")
    fd = make(temporary, mode)
    try:
        if group is not None and group != os.getegid():
            with contextlib.suppress(PermissionError):
                os.fchown(fd, -1, group)
        os.rename(temporary, path)
    except BaseException:
        os.close(fd)
        os.unlink(temporary)
        raise
    return fd


def pending(fd: int) -> int:
    """Bytes that wait in the FIFO; through either end."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


def hung_up(fd: int) -> bool:
    """Whether a writer came to this read end and none is there any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def sweep(path: str) -> None:
    """Delete what killed processes left beside the FIFO `path`: names of ours that nobody reads."""
    directory, name = os.path.split(path)
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory or "."):
            if entry.startswith(f".{name}.") and entry.endswith((".next", ".reply")):
                left = os.path.join(directory, entry)
                with contextlib.suppress(OSError):
                    before = identity(left)
                    try:
                        os.close(open_writer(left))
                    except OSError as error:
                        if error.errno == errno.ENXIO and identity(left) == before:
                            os.unlink(left)


def claim_writer(fd: int, writer: int) -> None:
    """Say that this open write end is that writer: a lock on a byte that has its number (fcntl(2), F_OFD_SETLK).

    The kernel gives the lock back when the last copy of the write end is closed, also by kill -9."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, writer, 1, 0))


def is_writer_alive(fd: int, writer: int) -> bool:
    """Whether that writer still has the FIFO open; `fd` is any end of it."""
    if writer >= (1 << 63) - 1:  # no offset of a file, so nobody can have locked it
        return False
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, writer, 1, 0))
    return bool(LOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def claim_session(fd: int) -> bool:
    """Become the only writer of our kind at this write end (flock(2)); False when another one is."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
