"""Names in directories: what sockets and FIFOs share when they make, replace and delete the file that stands for them.

Plain functions, any thread. `locked` is for the moments in which a stale file is told from a living one.

What can go wrong: OSErrors as the system calls give them; EBUSY when another program keeps a lock on the directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

PATIENCE = 5.0
"""Seconds to wait for the lock on a directory; its holders keep it for a few system calls."""


def identity(path: str) -> tuple[int, int]:
    """(device, inode) of the file itself, symbolic links not followed."""
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def remove_if(path: str, expected: tuple[int, int]) -> None:
    """Delete the file if it is still the expected one. Says nothing when it is not, or can't be deleted."""
    with contextlib.suppress(OSError):
        if identity(path) == expected:
            os.unlink(path)


@contextlib.contextmanager
def locked(directory: str, operation: str) -> Iterator[None]:
    """Hold the lock on a directory (flock(2)): it leaves no file behind and dies with its holder.

    A directory that can't be read can't be locked; there a race stays possible. Raises OSError: ENOENT, ENOTDIR, EBUSY,
    with texts that begin with `operation`."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield
        return
    except OSError as error:
        raise OSError(error.errno, f"{operation}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    why = f"another program keeps a lock on {directory} (flock(2))"
                    raise OSError(errno.EBUSY, f"{operation}: {why}") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(fd)
