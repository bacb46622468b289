# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, auto_pickle=False
"""The core of the loop: the turn, in which everything has its time, and what a loop shows of itself.

A loop is one object, and its native half is written in four classes, each derived from the one before, so that each idea is
read alone and a call from one to the other costs no more than within one: `Caller` (`_handles`: how a callback is called),
`Schedule` (`_schedule`: what is to be called, and when), `Descriptors` (`_descriptors`: who watches which) and `Core`, which
runs them. What is done once per connection or per loop is the standard library's, of which `anywire.loop.Loop` is made
together with `Core`; so the methods have its names and its rules. A turn is, in the order of the standard loop:

    1. flush what was corked    2. look at the descriptors, and sleep if nothing else is to be done
    3. run the callbacks that were ready before    4. deliver the reports    5. run the timers that were due

A look costs a system call, so while callbacks go on making callbacks it is done every LOOK seconds only.

Called on the loop's thread. What can go wrong: SystemExit and KeyboardInterrupt of a callback end the run, and what was
ready stays so; the process forks (the child's copy refuses with RuntimeError and changes nothing of the parent's).
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t

from anywire.engine._figures cimport LoopFigures, Meter
from anywire.engine._pollers cimport Poller, Pollers
from anywire.engine._timers cimport monotonic
from anywire.engine._wakeup cimport Wakeup
from anywire.engine._watches cimport Watcher, Watches
from anywire.engine.conditions cimport EDGE, READ
from anywire.engine.demultiplexers._base cimport Demultiplexer
from anywire.loop._schedule cimport Waker, install_quick_calls

import threading
from asyncio import Future, Task

from anywire.engine.conditions import Trigger

cdef double LOOK = 50e-6            # seconds between looks at the descriptors while callbacks are ready


cdef class Corked(Watcher):
    """A watcher that can be flushed before the loop sleeps."""

    cdef int flush(self) except -1:
        return 0


cdef class Core(Descriptors):
    """See the module. Without the other half, `Loop`, it has no methods of its own that are public."""

    def __cinit__(self, *args, **options):
        self.pollers = Pollers()
        self.corked = []

    def _open(self, Demultiplexer demultiplexer not None, double spin, double slow, bint count_transports=False):
        """Called once, before anything else. Times in seconds; `slow` below 0: don't measure callbacks."""
        cdef Waker waker = Waker()
        self.watches = Watches(demultiplexer)
        self.wakeup = waker.wakeup = Wakeup()
        self.watches.add(waker, self.wakeup.fileno(), READ, EDGE if Trigger.EDGE in demultiplexer.triggers else 0)
        self.spin = spin
        self.slow = slow
        self.count_transports = count_transports
        self.meter = Meter()

    def _poll(self, Poller poller not None):
        """Look at it, too, before sleeping; False if this loop doesn't poll, or has enough to look at."""
        return self.spin > 0 and self.pollers.add(poller)

    def _unpoll(self, Poller poller not None):
        self.pollers.remove(poller)

    # ---- the turn ------------------------------------------------------------------------------------------------

    cdef int flush_later(self, Corked corked) except -1:
        if not corked.corked:
            corked.corked = True
            self.corked.append(corked)
        return 0

    cdef bint last(self) noexcept:
        return self.ready_count == 0 and self.watches.first == self.watches.last and not self.due

    cdef int flush_all(self) except -1:
        """All of them have their turn, also after one that raises KeyboardInterrupt or SystemExit; then the first such
        exception goes on."""
        cdef list corked = self.corked
        cdef Corked one
        cdef Py_ssize_t i
        cdef object failure = None
        self.corked = []
        for i in range(len(corked)):
            one = <Corked> corked[i]
            one.corked = False
            try:
                one.flush()
            except BaseException as error:
                if failure is None:
                    failure = error
        if failure is not None:
            raise failure
        return 0

    cdef int wait(self, double now) except -1:
        """Sleep until a report, a timer or somebody ends it. Returns how many reports there are."""
        cdef int count = 0
        cdef double end
        cdef bint polling = self.spin > 0 and self.pollers.size() > 0
        # Not for ever: descriptors have their turn, too.
        if polling and now - self.looked < LOOK and self.pollers.glance():
            return 0
        self.show(now, now)
        if self.spin > 0:
            end = now + self.spin
            while now < end:
                count = self.watches.wait(0)
                self.looked = now
                if count:
                    return count
                with nogil:
                    pass            # others may have the GIL
                PyErr_CheckSignals()
                now = monotonic()
                if self.ready_count or self.timers.is_due(now) or (polling and self.pollers.glance()):
                    return 0
            if self.pollers.arm():
                return 0
        self.sleeps += 1
        self.sleeping = True
        try:
            count = self.watches.wait(self.timers.timeout_ns(now))
            self.looked = monotonic()
            return count
        finally:
            self.sleeping = False

    cdef int turn(self, bint look) except -1:
        cdef int count = 0
        cdef double now = monotonic(), before
        cdef Py_ssize_t ready
        cdef list due
        if self.corked:
            self.flush_all()
        if self.ready_count == 0 and not self._stopping and not self.due and not self.timers.is_due(now):
            before = now
            count = self.wait(now)
            now = monotonic()
            self.slept += now - before
            if self.looked >= before:
                self.show(now, 0)
        elif look or now - self.looked >= LOOK:
            self.polls += 1
            count = self.watches.wait(0)
            self.looked = now
            self.show(now, 0)
            PyErr_CheckSignals()
        self.turns += 1
        ready = self.ready_count
        due = self.timers.take_due(now)
        if due is not None:
            self.due = due + self.due if self.due else due
        if ready > self.deepest:
            self.deepest = ready
        if ready:
            self.run_ready(ready)
        if count:
            self.watches.dispatch(count)
        if self.pollers.size():
            self.pollers.deliver()
        if self.due:
            self.run_due()
        return 0

    def _run_once(self):
        """Turns until somebody calls stop(); the first one looks at the descriptors in any case."""
        cdef bint look = True
        cdef double now
        self.check()
        self.began = monotonic()
        thread = threading.current_thread()
        self.meter.called(f"{thread.name} {thread.native_id}")
        try:
            while True:
                self.turn(look)
                look = False
                if self._stopping:
                    break
        finally:
            now = monotonic()
            self.ran += now - self.began
            self.began = 0
            self.show(now, 0)
            self.settle_all()
            if self.corked:
                self.flush_all()

    # ---- the loop's state ----------------------------------------------------------------------------------------

    def stop(self):
        """End the run after this turn. What is ready now is still called."""
        self._stopping = True

    def is_running(self):
        """Whether it runs."""
        return self._thread_id is not None

    def is_closed(self):
        """Whether it was closed."""
        return bool(self._closed)

    def get_debug(self):
        """Whether debug mode is on."""
        return bool(self._debug)

    def _check_closed(self):
        self.check()

    def create_future(self):
        """A Future of this loop."""
        return Future(loop=self)

    def create_task(self, coro, *, name=None, context=None, **options):
        """Run a coroutine as a task of this loop; the options are those of asyncio.create_task()."""
        self.check()
        if self._task_factory is not None or options:
            return super().create_task(coro, name=name, context=context, **options)
        task = Task(coro, loop=self, name=name, context=context)
        if task._source_traceback:
            task._source_traceback.pop()
        return task

    def _release(self):
        """After the other half has closed: forget all callbacks, release the demultiplexer and the eventfd."""
        self.drop_all()
        self.corked = []
        self.spare_waiter = None
        self.pollers = Pollers()
        self.watches.close()
        self.wakeup.close()
        self.meter.leave()

    # ---- figures -------------------------------------------------------------------------------------------------

    cdef void show(self, double now, double asleep) noexcept:
        """Bring the figures that others see up to date: with each look, so that callbacks pay nothing for it. `asleep`:
        since when it sleeps, 0 if it doesn't."""
        cdef LoopFigures* figures = self.meter.at
        if figures == NULL:
            return
        figures.began_ns = <uint64_t> (self.began * 1e9)
        figures.ran_ns = <uint64_t> (self.ran * 1e9)
        figures.looked_ns = <uint64_t> (now * 1e9)
        figures.asleep_ns = <uint64_t> (asleep * 1e9)
        figures.slept_ns = <uint64_t> (self.slept * 1e9)
        figures.turns = self.turns
        figures.callbacks = self.calls
        figures.polls = self.polls
        figures.sleeps = self.sleeps
        figures.wakeups = self.wakeup.c.written
        figures.ready = self.ready_count
        figures.ready_most = max(self.deepest, self.ready_count)
        figures.timers = self.timers.size()
        figures.watched = self.watches.count

    def _figures(self):
        """For `Loop.stats`."""
        cdef double now = monotonic()
        return {
            "turns": self.turns, "callbacks": self.calls, "polls": self.polls, "sleeps": self.sleeps,
            "wakeups": self.wakeup.c.written, "ready": self.ready_count, "ready_most": self.deepest,
            "timers": self.timers.size(), "watched": self.watches.count,
            "seconds": self.ran + (now - self.began if self.began else 0), "slept": self.slept,
        }


install_quick_calls(Core)
