"""`Process`: another process by its pidfd, a descriptor that never means a later process with the same number.

    >>> import os
    >>> from anywire.ipc import Process
    >>> with Process(os.posix_spawnp("sleep", ["sleep", "60"], os.environ)) as process:
    ...     process.send_signal(9)
    ...     process.wait(timeout=5)
    -9

Linux 5.3. Any thread. `wait` takes a child's end as os.waitpid does: subprocess, asked for the same child later, finds
none. In a forked child it still means the same process, but only its parent is told how it ended.
"""

from __future__ import annotations

import errno
import os
import select
import signal

from anywire.ipc import _calls
from anywire.ipc.owned import Owned


class Process(Owned):
    """A process that exists, of whatever user. Parameters: `pid`, its number; 0 is this process.

    Raises ProcessLookupError when there is none, OSError (EINVAL) when the number is a thread's.
    """

    def __init__(self, pid: int) -> None:
        pid = pid or os.getpid()
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            text = "there is no such process" if error.errno == errno.ESRCH else f"{error.strerror}: pidfd_open"
            raise OSError(error.errno, text, f"process {pid}") from None
        super().__init__(fd, f"process {pid}")
        self.pid = pid
        """Its number; after its end, and once its parent has asked how it ended, another process may get it."""
        self.status: int | None = None
        """How it ended, when it was this process's child and `wait` has asked: its exit status, or minus a signal."""

    @property
    def alive(self) -> bool:
        """Whether it runs; one that has ended, and whose parent has not asked yet (a zombie), doesn't."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return not poll.poll(0)

    def _ended(self, fd: int) -> int | None:
        if self.status is None:
            if self.alive:
                raise BlockingIOError(errno.EAGAIN, "the process runs", self.name)
            try:
                told = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:       # no child of this process, or somebody else here has asked already
                return None
            if told is not None:
                self.status = told.si_status if told.si_code == os.CLD_EXITED else -told.si_status
        return self.status

    def wait(self, *, timeout: float | None = None) -> int | None:
        """Wait for its end. A child's exit status, or minus the signal that ended it; None of a process that is no
        child of this one, or whose end this process has taken by other means (os.wait, subprocess).

        Raises TimeoutError when it still runs after `timeout` seconds.
        """
        return self._until(self._ended, timeout, "it did not end")

    async def wait_async(self, *, timeout: float | None = None) -> int | None:
        """`wait` for an event loop. Cancelled, it has not asked."""
        return await self._until_async(self._ended, timeout, "it did not end")

    def send_signal(self, number: int) -> None:
        """Send it a signal; 0 only looks whether that is allowed. ProcessLookupError: it has ended."""
        try:
            signal.pidfd_send_signal(self.fileno(), number)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: signal {int(number)}", self.name) from None

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def getfd(self, fd: int) -> int:
        """A copy here of its descriptor number `fd`, close-on-exec; yours to close (pidfd_getfd(2), Linux 5.6).

        Raises OSError (EBADF) when it has none of that number, and PermissionError without the right to trace it
        (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS: the same user, and where Yama restricts that an ancestor, or root).
        """
        try:
            return _calls.pidfd_getfd(self.fileno(), fd)
        except OSError as error:
            text = {
                errno.EBADF: f"it has no descriptor {fd}",
                errno.EPERM: "this process may not trace that one (ptrace(2)), which copying a descriptor needs",
                errno.ESRCH: "it has ended",
            }.get(error.errno or 0, error.strerror)
            raise OSError(error.errno, text, self.name) from None

    def __reduce__(self) -> tuple[type[Process], tuple[int]]:
        raise TypeError(
            "a Process does not pickle, its number might mean another one by then: send its descriptor over a Unix "
            "socket, anywire.ipc.send_fds(sock, [process]), or the number if you can rule that out"
        )
