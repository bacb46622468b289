"""Tasks that wait for semaphores: one thread of the process waits for all of them, and sleeps while nothing happens.

The thread takes a unit for the task that has waited longest for that Semaphore, and tells the task's loop. A task
that is cancelled after that gives the unit back (`_Waiter.won` says so; whoever sees it under the lock decides). A
wake-up that nobody here needs any more is passed on to other processes.

Where futex_waitv(2) is missing (Linux before 5.16, some filters of system calls), the C library isn't glibc, or more
than 127 semaphores are waited for at a time, each has a thread of its own while somebody waits; it looks ten times a
second whether somebody still does. In a forked child nobody waits yet.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import deque

from anywire.ipc import semaphore as native
from anywire.ipc.helpers import submit
from anywire.ipc.semaphore import Semaphore

LOOK = 0.1
"""Seconds after which a thread of one semaphore looks whether somebody still waits."""


class _Waiter:
    """One task that waits, and whether a unit was taken for it. Its loop's thread and the helper's, under the lock."""

    __slots__ = ("future", "loop", "won")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[None] = loop.create_future()
        self.won = False

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def fail(self, error: OSError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Waits:
    """All that wait in this process."""

    def __init__(self) -> None:
        # Reentrant: a collection inside may end a task that waits.
        self.lock = threading.RLock()
        self.queues: dict[Semaphore, deque[_Waiter]] = {}
        self.alone: set[Semaphore] = set()  # those that have a thread of their own
        self.inside: set[Semaphore] = set()  # those that the helper uses just now
        self.left = threading.Condition(self.lock)  # told when a thread has left one
        self.at_once = native._MOST if native._can_wait_for_any() else 0
        self.helped = False  # whether a helper's thread waits for those that are not alone

    def enter(self, semaphore: Semaphore, waiter: _Waiter) -> None:
        with self.lock:
            queue = self.queues.get(semaphore)
            if queue is not None:
                queue.append(waiter)
                return
            self.queues[semaphore] = deque([waiter])
            if semaphore in self.alone:
                return
            if len(self.queues.keys() - self.alone) > self.at_once:
                self.leave_alone(semaphore)
                return
            if not self.helped:
                self.helped = True
                submit(self.help)
        native._call_helper()

    def leave(self, semaphore: Semaphore, waiter: _Waiter) -> bool:
        """Whether a unit was taken for it; if not, none will be."""
        with self.lock:
            if waiter.won:
                return True
            queue = self.queues.get(semaphore)
            if queue is not None and waiter in queue:
                queue.remove(waiter)
                if not queue:
                    del self.queues[semaphore]
        native._call_helper()
        return False

    def serve(self, semaphore: Semaphore, *, has_one: bool) -> bool:
        """Under the lock: give units to those who wait, as long as there are some; `has_one` was taken before.
        Whether somebody waits still."""
        queue = self.queues.get(semaphore)
        while queue and (has_one or semaphore._try()):
            waiter = queue.popleft()
            try:
                waiter.loop.call_soon_threadsafe(waiter.wake)
                waiter.won, has_one = True, False
            except RuntimeError:  # its loop was closed: the unit is the next one's
                has_one = True
        if has_one:
            semaphore._give_back()
        if not queue:
            self.queues.pop(semaphore, None)
        return bool(queue)

    def help(self) -> None:
        while self.turn():
            pass

    def turn(self) -> bool:
        """Serve all, then sleep until there is something to do."""
        with self.lock:
            seen = native._seen()
            here = [s for s in list(self.queues) if s not in self.alone and self.serve(s, has_one=False)]
            self.inside.update(here)
            for semaphore in here:
                semaphore._hold()
        possible = native._wait_for_any(here, seen)
        with self.lock:
            for semaphore in here:
                if semaphore not in self.queues:
                    semaphore._pass_on()
                semaphore._leave()
            self.inside.clear()
            self.left.notify_all()
            if not possible:
                self.to_threads()
        return possible

    def to_threads(self) -> None:
        """Under the lock: the kernel, which could, now can't wait for these."""
        self.at_once, self.helped = 0, False
        for semaphore in self.queues.keys() - self.alone:
            self.leave_alone(semaphore)

    def leave_alone(self, semaphore: Semaphore) -> None:
        """Under the lock: give it a thread of its own."""
        self.alone.add(semaphore)
        semaphore._hold()  # the thread's own
        submit(lambda: self.help_one(semaphore))

    def help_one(self, semaphore: Semaphore) -> None:
        while True:
            took = semaphore._wait_until(LOOK)
            with self.lock:
                if took:
                    self.serve(semaphore, has_one=True)
                if semaphore not in self.queues:
                    self.alone.discard(semaphore)
                    semaphore._leave()
                    self.left.notify_all()
                    return

    def forget(self, semaphore: Semaphore) -> None:
        """It is being closed: whoever waits gets an error. When this returns, no thread of ours uses it."""
        with self.lock:
            left = self.queues.pop(semaphore, ())
        for waiter in left:
            error = OSError(errno.EBADF, "the semaphore was closed while a task waited for it", semaphore.name)
            try:
                waiter.loop.call_soon_threadsafe(waiter.fail, error)
            except RuntimeError:
                continue
        native._call_helper()
        with self.lock:
            while semaphore in self.inside or semaphore in self.alone:
                self.left.wait()


_waits = _Waits()


def _after_fork() -> None:
    global _waits
    _waits = _Waits()


os.register_at_fork(after_in_child=_after_fork)


async def acquire(semaphore: Semaphore, timeout: float | None) -> None:
    """Take a unit; see Semaphore.acquire_async."""
    waits = _waits
    loop = asyncio.get_running_loop()
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is a number of seconds that is not negative, or None for no limit; not {timeout!r}")
    waiter = _Waiter(loop)
    semaphore._enter()
    try:
        waits.enter(semaphore, waiter)
        timer = None if timeout is None else loop.call_later(timeout, waiter.wake)
        taken = False
        try:
            await waiter.future
            taken = waits.leave(semaphore, waiter)
        finally:
            if timer is not None:
                timer.cancel()
            if not taken and waits.leave(semaphore, waiter):
                semaphore._give_back()
        if not taken:
            why = f"{os.strerror(errno.ETIMEDOUT)}: no unit came within {timeout} s"
            raise TimeoutError(errno.ETIMEDOUT, why, semaphore.name)
    finally:
        semaphore._leave()


def forget(semaphore: Semaphore) -> None:
    """Before it is closed: end all waits for it with an OSError (EBADF). From any thread."""
    _waits.forget(semaphore)
