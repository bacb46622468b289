"""Threads of this process that wait for its event loops, where the kernel has nothing that a loop could poll.

A `Helper` does jobs, one after another. Who needs one thread for several jobs (a lock of the C library belongs to the
thread that took it) takes it by `claim` and lets it go by `rest`; `submit` is for one job. Threads are made when
needed, used again, and end when they have had nothing to do for some seconds; a forked child has none.

`on_thread` makes a blocking call for a task, which ends at once when the task is cancelled (see interrupt_timer.h);
`Turns` lets tasks that wait for the same thing (one queue and type, one list of operations) take turns, so that they
use one thread in all, in the order in which they came. A task that is cancelled waits for the answer of its call, which
takes microseconds; a call that had won by then is undone, on the spot.

Used by System V's objects, locks, semaphores, FileLock and Fifo. What can go wrong: no thread can be made
(RuntimeError). A program that ends while its loop is stopped with tasks that wait is the one case in which something
can be taken and lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NoReturn, TypeVar

from anywire.ipc._interrupt import Interrupt

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

IDLE = 5.0
"""Seconds that a thread without work is kept."""

_idle: list[Helper] = []
os.register_at_fork(after_in_child=_idle.clear)


class Helper(threading.Thread):
    """A thread that does jobs; they must not raise. A job that returns `END` ends it."""

    END = object()

    def __init__(self) -> None:
        super().__init__(name="anywire-ipc", daemon=True)
        self.jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.rests = False
        self.start()

    def run(self) -> None:
        # The program's signals are for its own threads (SignalQueue insists); an Interrupt lets its own through.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            try:
                job = self.jobs.get(timeout=IDLE if self.rests else None)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:              # just claimed
                    continue
                return
            self.rests = False
            if job() is Helper.END:
                return
            del job

    def do(self, job: Callable[[], object]) -> None:
        """After what is still to be done, do this."""
        self.jobs.put(job)

    def rest(self, *, answered: bool = False) -> None:
        """After what is still to be done, be there for others. `answered`: all is done but for the last job's return,
        so that the next claim may be for this thread."""
        if answered:
            _idle.append(self)
            self.jobs.put(self._settle)
        else:
            self.jobs.put(self._rest)

    def _rest(self) -> None:
        self._settle()
        _idle.append(self)

    def _settle(self) -> None:
        self.rests = True


def claim() -> Helper:
    """A thread for the caller alone, until it calls `rest`."""
    try:
        return _idle.pop()
    except IndexError:
        return Helper()


def submit(job: Callable[[], object]) -> None:
    """Run it on a thread soon. It must not raise."""
    helper = claim()
    helper.do(job)
    helper.rest()


class Turns:
    """Who waits for what of one object, by event loop."""

    def __init__(self) -> None:
        self._locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, tuple[asyncio.Lock, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def busy(self, key: Hashable) -> bool:
        """Whether tasks of the running loop wait for this already."""
        import asyncio

        return key in self._locks.get(asyncio.get_running_loop(), ())

    async def wait(
        self, key: Hashable, call: Callable[[Interrupt, float | None], T], undo: Callable[[T], object],
        timeout: float | None, late: Callable[[float], NoReturn],
    ) -> T:
        """What `call(interrupt, seconds left)` returns, made on a helper's thread when it is this task's turn. `undo`
        gives back what a cancelled call had won; it is called in the loop, or on the helper's thread when the loop is
        closed. `late(timeout)` raises the error of a task whose turn did not come in time."""
        import asyncio  # here, so that who never awaits does not load it

        loop = asyncio.get_running_loop()
        until = None if timeout is None else loop.time() + timeout
        locks = self._locks.setdefault(loop, {})
        lock, users = locks.get(key) or (asyncio.Lock(), 0)
        locks[key] = lock, users + 1
        try:
            if lock.locked():
                try:
                    async with asyncio.timeout_at(until):
                        await lock.acquire()
                except TimeoutError:
                    assert timeout is not None
                    late(timeout)
            else:
                await lock.acquire()
            try:
                left = None if until is None else max(until - loop.time(), 0.0)
                return await on_thread(claim(), lambda interrupt: call(interrupt, left), undo)
            except TimeoutError:
                assert timeout is not None
                late(timeout)
            finally:
                lock.release()
        finally:
            lock, users = locks[key]
            if users == 1:
                del locks[key]
            else:
                locks[key] = lock, users - 1


async def on_thread(helper: Helper, call: Callable[[Interrupt], T], undo: Callable[[T], object]) -> T:
    """What `call(interrupt)` returns, made on this thread, which rests then. Cancelled, the call is interrupted; `undo`
    gives back what it had won by then. `call` is made in any case, once this has begun."""
    import asyncio

    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    interrupt = Interrupt()

    def work() -> None:
        result: T
        try:
            result = call(interrupt)
        except BaseException as error:  # goes to whoever waits
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_fail, answer, error)
            return
        try:
            loop.call_soon_threadsafe(answer.set_result, result)
        except RuntimeError:  # the loop is closed: nobody will come for it
            with contextlib.suppress(OSError):
                undo(result)

    helper.do(work)
    helper.rest()
    try:
        # Shielded: only the helper's thread sets the answer.
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        interrupt.cancel()
        while not answer.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([answer])
        _give_back(answer, undo)
        raise
    except GeneratorExit:  # the task is destroyed, and nobody can wait
        interrupt.cancel()
        answer.add_done_callback(lambda answer: _give_back(answer, undo))
        raise


def _give_back(answer: asyncio.Future[T], undo: Callable[[T], object]) -> None:
    if answer.exception() is None:
        undo(answer.result())


def _fail(answer: asyncio.Future[T], error: BaseException) -> None:
    if isinstance(error, StopIteration):
        error = RuntimeError(repr(error))
    answer.set_exception(error)
