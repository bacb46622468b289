"""Locks for the tasks of an event loop: threads that hold a lock for one task each.

A lock of the C library belongs to a thread. So a task that takes one gets a helper thread, which takes it, holds it,
waits at a condition with it, and gives it back; others of the process can't unlock it, nor can other tasks. Of all
tasks that wait for one lock in one loop, only the first occupies a thread.

A task that is cancelled while its thread waits for a lock goes on at once; the thread, which can't be interrupted,
unlocks as soon as it gets the lock. If what it gets then is OwnerDied, the thread ends with the lock in its hands, so
that the next one is told. On each loop's thread, but for what the helper threads do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from anywire.ipc._lock import Lock
from anywire.ipc.helpers import Helper, claim
from anywire.ipc.mutex import OwnerDied


class _Job:
    """A call that a thread does for a task, and what becomes of it when the task is gone."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        undo: Callable[[], object] | None,
        of: Lock | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.function, self.arguments, self.undo, self.of = function, arguments, undo, of
        self.lock = threading.Lock()
        self.given_up = False
        self.finished = False
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> object:
        """On the thread."""
        try:
            self.value = self.function(*self.arguments)
        except BaseException as error:
            self.error = error
        with self.lock:
            self.finished = True
            if not self.given_up:
                try:
                    self.loop.call_soon_threadsafe(self.wake)
                    return None
                except RuntimeError:  # the loop was closed: nobody will ever unlock
                    self.give_up()
        return self.take_back()

    def give_up(self) -> bool:
        """Under the lock: nobody waits for it. Whether it was finished: then another job takes it back."""
        if self.of is not None:
            self.of._pass(1)
        self.given_up = True
        return self.finished

    def take_back(self) -> object:
        """On the thread."""
        if self.undo is not None:
            if isinstance(self.error, OwnerDied):
                return Helper.END  # which is when it is passed on
            if self.error is None:
                self.undo()
        if self.of is not None:
            self.of._pass(-1)
        return None

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


async def _call(
    helper: Helper,
    function: Callable[..., Any],
    *arguments: Any,
    undo: Callable[[], object] | None = None,
    of: Lock | None = None,
) -> Any:
    """The outcome of a call on the thread. Cancelled: the call goes on, and `undo` is called if it succeeded. Until
    then the lock `of` may be closed, though that thread holds it."""
    job = _Job(function, arguments, undo, of)
    helper.do(job.run)
    try:
        await job.future
    except BaseException:
        with job.lock:
            finished = job.give_up()
        if finished:
            helper.do(job.take_back)
        raise
    if job.error is not None:
        raise job.error
    return job.value


class _Side:
    """What the tasks of one loop have to do with one lock."""

    def __init__(self) -> None:
        self.gate = asyncio.Lock()  # who has it waits for the lock in a thread; the others wait here
        self.holders: dict[asyncio.Task[Any] | None, Helper] = {}


def _side(lock: Lock) -> _Side:
    if lock._tasks is None:
        lock._tasks = weakref.WeakKeyDictionary()
    side: _Side | None = lock._tasks.get(asyncio.get_running_loop())
    if side is None:
        side = lock._tasks[asyncio.get_running_loop()] = _Side()
    return side


def _timed_out(lock: Lock, timeout: float | None) -> TimeoutError:
    why = f"{os.strerror(errno.ETIMEDOUT)}: others held it for {timeout} s"
    return TimeoutError(errno.ETIMEDOUT, why, lock.name)


async def take(
    lock: Lock,
    function: Callable[[float | None], object],
    timeout: float | None,
) -> None:
    """Call `function` (which takes the lock, within so many seconds) on a thread that then belongs to this task."""
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is a number of seconds that is not negative, or None for no limit; not {timeout!r}")
    side, task = _side(lock), asyncio.current_task()
    if task in side.holders:
        raise OSError(errno.EDEADLK, f"{os.strerror(errno.EDEADLK)}: this task holds it already", lock.name)
    loop = asyncio.get_running_loop()
    end = None if timeout is None else loop.time() + timeout
    lock._enter()
    try:
        try:
            async with asyncio.timeout_at(end if side.gate.locked() else None):
                await side.gate.acquire()
        except TimeoutError:
            raise _timed_out(lock, timeout) from None
        worker = claim()
        try:
            left = None if end is None else max(0.0, end - loop.time())
            try:
                await _call(worker, function, left, undo=getattr(lock, "unlock", None), of=lock)
            except OwnerDied:
                side.holders[task] = worker
                raise
            except TimeoutError as error:
                raise (_timed_out(lock, timeout) if error.errno == errno.ETIMEDOUT else error) from None
            side.holders[task] = worker
        finally:
            if side.holders.get(task) is not worker:
                worker.rest()
            side.gate.release()
    finally:
        lock._leave()


async def give(lock: Lock, function: Callable[[], object]) -> None:
    """Call `function`, which gives the lock back, on this task's thread; then that is free. Done even if cancelled."""
    side, task = _side(lock), asyncio.current_task()
    worker = _holder(lock, side, task)
    del side.holders[task]
    try:
        await _call(worker, function, of=lock)
    except BaseException:
        worker.rest()
        raise
    worker.rest(answered=True)


async def by_holder(lock: Lock, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call something on the thread that holds the lock for this task."""
    return await _call(_holder(lock, _side(lock), asyncio.current_task()), function, *arguments)


async def wait_by_holder(
    lock: Lock, function: Callable[..., Any], interrupt: Callable[[], object], *arguments: Any
) -> Any:
    """The same for a call that waits at a condition: it always comes back with the lock. Cancelled, all who wait are
    woken by `interrupt` until it has, and then the task is: what this one was notified of, another one looks at."""
    worker = _holder(lock, _side(lock), asyncio.current_task())
    waiting = asyncio.ensure_future(_call(worker, function, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not waiting.done():
        try:
            # Again and again, because the thread may not have begun to wait when it is woken.
            await asyncio.wait([waiting], timeout=None if cancelled is None else 0.01)
        except asyncio.CancelledError as error:
            cancelled = error
        if cancelled is not None and not waiting.done():
            interrupt()
    if cancelled is not None:
        waiting.exception()
        interrupt()
        raise cancelled
    return waiting.result()


def _holder(lock: Lock, side: _Side, task: asyncio.Task[Any] | None) -> Helper:
    if task not in side.holders:
        why = f"{os.strerror(errno.EPERM)}: this task does not hold it: the task that locks it unlocks it"
        raise PermissionError(errno.EPERM, why, lock.name)
    return side.holders[task]
