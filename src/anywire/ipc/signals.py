"""Signals: handlers, masks, values, and waiting for them as for messages (signal(7), sigqueue(3), signalfd(2)).

    with SignalQueue(signal.SIGTERM, signal.SIGRTMIN) as queue:
        sigqueue(os.getpid(), signal.SIGRTMIN, 42)
        queue.recv(timeout=5).value         # 42

Real-time signals (SIGRTMIN to SIGRTMAX) queue: each is told, those of one number in the order they were sent, and lower
numbers first. Of any other signal at most one waits; further ones are merged with it.

Threads: a signal for the process goes to any thread that does not block it. So what is waited for must be blocked in
all threads: block it, or make the `SignalQueue`, before others are started, which inherit the mask. Programs that are
started inherit it too. Handlers run in the main thread only, between two of its bytecodes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from anywire.ipc import _calls
from anywire.ipc.owned import Owned, late
from anywire.ipc.process import Process

# struct signalfd_siginfo of signalfd(2): 128 bytes.
_TOLD = struct.Struct("=IiiIIiIIIIii8x8x8x8x48x")


class SignalInfo(NamedTuple):
    """A signal that came."""

    number: int
    """Which; a signal.Signals where it has a name."""
    code: int
    """Why it came (si_code of sigaction(2)): 0 kill, -1 sigqueue, -2 a timer, -3 a message queue."""
    pid: int
    """The sender, or the child that SIGCHLD is about; 0: the kernel, or a process of another PID namespace."""
    uid: int
    """The sender's real user id."""
    value: int
    """What came with sigqueue; else 0."""
    status: int
    """Of SIGCHLD: the child's exit status, or the signal that ended it."""


def _named(number: int) -> int:
    try:
        return signal.Signals(number)
    except ValueError:
        return number


def _set_of(numbers: Iterable[int]) -> frozenset[int]:
    found = frozenset(int(number) for number in numbers)
    if not found:
        raise ValueError("name at least one signal")
    for number in found:
        if not 0 < number < signal.NSIG:
            raise ValueError(f"{number} is no signal's number: 1 to {signal.NSIG - 1}")
        if number in (signal.SIGKILL, signal.SIGSTOP):
            raise ValueError(f"{_named(number)!r} can be neither blocked nor handled")
    return found


@contextlib.contextmanager
def blocked(*numbers: int) -> Iterator[None]:
    """During the block these signals wait, as far as this thread goes; then the thread's former mask is back."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, _set_of(numbers))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def unblocked(*numbers: int) -> Iterator[None]:
    """During the block these signals are delivered to this thread; then the thread's former mask is back."""
    former = signal.pthread_sigmask(signal.SIG_UNBLOCK, _set_of(numbers))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextlib.contextmanager
def handled(handler: Callable[[int], object], *numbers: int) -> Iterator[None]:
    """During the block each of these signals calls handler(number) in the main thread, between two bytecodes of what
    runs there; what it raises comes out there. Then the former handlers are back.

    RuntimeError in other threads: Python sets handlers in the main one only.
    """
    wanted = _set_of(numbers)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("Python runs signal handlers in the main thread only; other threads can use a SignalQueue")
    former: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
    try:
        for number in wanted:
            former[number] = signal.signal(number, lambda number, frame: handler(_named(number)))
        yield
    finally:
        for number, before in former.items():
            # None: a handler that is not Python's; it can't be brought back by Python.
            signal.signal(number, signal.SIG_DFL if before is None else before)


def sigqueue(process: int | Process, number: int, value: int = 0) -> None:
    """Send a signal with a value.

    Parameters: `process`, its number, or a `Process`, which never means a later one with the same number; `value`,
    32 bits with sign, the receiver's `SignalInfo.value`.
    Raises ProcessLookupError, PermissionError, and BlockingIOError when as many signals wait as this user may queue
    (RLIMIT_SIGPENDING).
    """
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"a signal's value has 32 bits with sign; {value} does not fit")
    if isinstance(process, Process):
        _calls.sigqueue(process.pid, process.fileno(), number, value)
    elif process <= 0:
        raise ValueError(f"a process number is positive, not {process}: sigqueue sends to no groups")
    else:
        _calls.sigqueue(process, -1, number, value)


def sigtimedwait(*numbers: int, timeout: float | None = None) -> SignalInfo:
    """Wait for one of these signals, which this thread blocks, and take it.

    Raises TimeoutError after `timeout` seconds of the monotonic clock, and ValueError for signals that this thread does
    not block: their handlers would get them.
    """
    wanted = _set_of(numbers)
    open_ones = wanted - signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if open_ones:
        raise ValueError(
            f"this thread does not block {_words(open_ones)}: wait inside `with signals.blocked(...)`, in all threads"
        )
    told = _calls.sigtimedwait(wanted, timeout)
    if told is None:
        raise late(_words(wanted), "no such signal came", timeout)
    number, code, _, pid, uid, status, value = told
    return SignalInfo(_named(number), code, pid, uid, value, status)


async def sigtimedwait_async(*numbers: int, timeout: float | None = None) -> SignalInfo:
    """`sigtimedwait` for an event loop; all threads block them. Cancelled, it has taken none."""
    with SignalQueue(*numbers) as queue:
        return await queue.recv_async(timeout=timeout)


def _words(numbers: Iterable[int]) -> str:
    return ", ".join(getattr(_named(number), "name", None) or f"signal {number}" for number in sorted(numbers))


def threads_without(numbers: Iterable[int]) -> dict[int, str]:
    """The threads of this process that don't block all of these signals, by their numbers, with their names."""
    mask = sum(1 << (number - 1) for number in set(numbers))
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):              # it has ended
            lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
            if int(lines["SigBlk"], 16) & mask != mask:
                found[int(task.name)] = lines["Name"].strip()
    return found


class SignalQueue(Owned):
    """Signals as messages: a signalfd. Making one blocks the signals in this thread; closing it in the same thread
    unblocks those that were not blocked before, and what still waits is delivered then.

    Raises RuntimeError when another thread of the process doesn't block them: it would get them.
    Iterating gives one SignalInfo after the other, also with `async for`. Any number of threads and tasks may take: a
    signal goes to one of them. A forked child's copy tells of the child's own signals. It doesn't pickle.
    """

    def __init__(self, *numbers: int) -> None:
        wanted = _set_of(numbers)
        former = signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
        self._added = wanted - former
        self._thread = threading.get_ident()
        try:
            others = threads_without(wanted)
            if others:
                names = ", ".join(f"{number} ({name})" for number, name in sorted(others.items()))
                raise RuntimeError(
                    f"these threads of the process don't block {_words(wanted)}, and would get them: {names}. Make the "
                    "SignalQueue, or block the signals, before threads are started: they inherit the mask"
                )
            super().__init__(_calls.signalfd(-1, wanted), f"signals {_words(wanted)}")
        except BaseException:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._added)
            raise
        self.numbers = wanted
        """Which signals come here."""

    def _take(self, fd: int) -> SignalInfo:
        number, _, code, pid, uid, _, _, _, _, _, status, value = _TOLD.unpack(os.read(fd, _TOLD.size))
        child = number == signal.SIGCHLD
        return SignalInfo(_named(number), code, pid, uid, 0 if child else value, status if child else 0)

    def recv(self, *, timeout: float | None = None) -> SignalInfo:
        """Wait for the next one. TimeoutError: none came within `timeout` seconds."""
        return self._until(self._take, timeout, "no signal came")

    def try_recv(self) -> SignalInfo:
        """One that has come. BlockingIOError: none has."""
        return self._take(self.fileno())

    async def recv_async(self, *, timeout: float | None = None) -> SignalInfo:
        """`recv` for an event loop. Cancelled, it has taken none."""
        return await self._until_async(self._take, timeout, "no signal came")

    def __iter__(self) -> Iterator[SignalInfo]:
        while True:
            yield self.recv()

    async def __aiter__(self) -> AsyncIterator[SignalInfo]:
        while True:
            yield await self.recv_async()

    def close(self) -> None:
        """Close it, and in the thread that made it bring the mask back."""
        if not self.closed:
            super().close()
            if threading.get_ident() == self._thread:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._added)

    def __reduce__(self) -> tuple[type[SignalQueue], tuple[int, ...]]:
        raise TypeError(
            "a SignalQueue does not pickle: each process has signals of its own, make one there "
            f"(it had {_words(self.numbers)})"
        )

