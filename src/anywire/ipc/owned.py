"""What every object made of one descriptor shares: owning it, closing it, waiting for it on both fronts.

An operation is tried first; when the kernel says EAGAIN the descriptor is waited for and the operation tried again. So
several threads and tasks may wait at a time, and a wait that is cancelled or timed out has taken nothing. All
descriptors here are close-on-exec and non-blocking.

Threads: any. `close` ends the waits of all threads and tasks of this process with OSError (EBADF). `fork`: the child
has a copy of the same kernel object, which each process closes for itself; a child's copy that is dropped warns of
nothing. `pickle`: only as an argument of a process that multiprocessing starts, which gets a copy; elsewhere TypeError.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Self, TypeVar

from anywire.ipc import waiting

T = TypeVar("T")

_local = threading.local()
_blocked: dict[int, set[int]] = {}      # descriptor -> the eventfds of the threads that wait for it
_guard = threading.Lock()


def _after_fork() -> None:
    # The child has one thread, and an eventfd shared with the parent would wake the wrong one.
    global _guard, _local
    _guard = threading.Lock()
    _local = threading.local()
    _blocked.clear()


os.register_at_fork(after_in_child=_after_fork)


class _Bell:
    """A thread's own eventfd; closed with the thread."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.process = os.getpid()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


def _bell() -> int:
    bell: _Bell | None = getattr(_local, "bell", None)
    if bell is None:
        bell = _local.bell = _Bell()
    return bell.fd


def deadline_of(timeout: float | None) -> float | None:
    """The end of a time-out on the monotonic clock. ValueError: below 0, or NaN."""
    if timeout is None:
        return None
    if not timeout >= 0:
        raise ValueError(
            f"timeout is a number of seconds that is not negative, or None for no limit; not {timeout!r}"
        )
    return time.monotonic() + timeout


def left(deadline: float | None) -> float | None:
    """Seconds until the deadline, at least 0; None: for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def wait(fd: int, deadline: float | None, *, writing: bool = False) -> bool:
    """Until the descriptor is ready: True; False when the deadline has come. OSError (EBADF): it was closed."""
    bell = _bell()
    with _guard:
        _blocked.setdefault(fd, set()).add(bell)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT if writing else select.POLLIN)
        poll.register(bell, select.POLLIN)
        # poll takes milliseconds and rounds up: never early. It goes on after a signal (PEP 475).
        rest = left(deadline)
        ready = dict(poll.poll(None if rest is None else min(rest * 1000, 2**31 - 1)))
    finally:
        with _guard:
            waiters = _blocked.get(fd)
            if waiters is not None:
                waiters.discard(bell)
                if not waiters:
                    del _blocked[fd]
    if bell in ready:
        os.eventfd_read(bell)
        raise OSError(errno.EBADF, "it was closed while a thread waited for it")
    if ready.get(fd, 0) & select.POLLNVAL:
        raise OSError(errno.EBADF, "the descriptor is not open")
    return bool(ready)


def forget(fd: int) -> None:
    """Before a descriptor is closed: end all waits for it, of threads and of tasks."""
    with _guard:
        for bell in _blocked.pop(fd, ()):
            with contextlib.suppress(OSError):
                os.eventfd_write(bell, 1)
    waiting.forget(fd)


def late(name: str | None, what: str, timeout: float | None) -> TimeoutError:
    """The error of a wait that took too long."""
    return TimeoutError(errno.ETIMEDOUT, f"{what} within {timeout:g} s" if timeout else f"{what} now", name)


class Owned:
    """An object that owns one descriptor. `name` is what its errors call it."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._process = os.getpid()
        self.name = name

    def fileno(self) -> int:
        """The descriptor. OSError (EBADF): it is closed."""
        if self._fd < 0:
            raise OSError(errno.EBADF, f"{type(self).__name__} is closed", self.name)
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it was closed here."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; a second time does nothing. Waits for it end with OSError (EBADF)."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            forget(fd)
            os.close(fd)

    def detach(self) -> int:
        """Give the descriptor away: it stays open, and whoever called owns it."""
        fd = self.fileno()
        self._fd = -1
        forget(fd)
        return fd

    def _until(
        self, attempt: Callable[[int], T], timeout: float | None, what: str, *, writing: bool = False
    ) -> T:
        """Try, wait, try again. TimeoutError, whose text is `what`, when the time is over."""
        deadline = deadline_of(timeout)
        while True:
            with contextlib.suppress(BlockingIOError):
                return attempt(self.fileno())
            if not wait(self.fileno(), deadline, writing=writing):
                raise late(self.name, what, timeout)

    async def _until_async(
        self, attempt: Callable[[int], T], timeout: float | None, what: str, *, writing: bool = False
    ) -> T:
        """The same in an event loop, whose other tasks run meanwhile."""
        deadline_of(timeout)
        with contextlib.suppress(BlockingIOError):
            return attempt(self.fileno())
        if timeout == 0:
            raise late(self.name, what, timeout)
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                while True:
                    await (waiting.writable if writing else waiting.readable)(self.fileno())
                    with contextlib.suppress(BlockingIOError):
                        return attempt(self.fileno())
        except TimeoutError as error:
            if not scope.expired() or error.errno is not None:
                raise
        raise late(self.name, what, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            text = f"{self!r} was never closed"
            self.close()
            if self._process == os.getpid():
                warnings.warn(text, ResourceWarning, stacklevel=2)

    @classmethod
    def _of(cls, fd: int, *state: Any) -> Self:
        """One around a descriptor that came from another process, with its `_state` there."""
        return cls(fd, *state)

    def _state(self) -> tuple[Any, ...]:
        """What `_of` takes beside the descriptor."""
        return (self.name,)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        from multiprocessing import context, reduction

        if context.get_spawning_popen() is None:
            raise TypeError(
                f"{type(self).__name__} pickles only as an argument of a process that multiprocessing starts; to "
                "another process send its descriptor over a Unix socket: anywire.ipc.send_fds(sock, [it])"
            )
        return _unpickle, (type(self), reduction.DupFd(self.fileno()), self._state())

    def __repr__(self) -> str:
        return f"<anywire.ipc.{type(self).__name__} {self.name} {'closed' if self.closed else f'fd={self._fd}'}>"


def _unpickle(cls: type[Owned], copy: Any, state: tuple[Any, ...]) -> Owned:
    return cls._of(copy.detach(), *state)
