# The core of the loop: what is done for each callback, timer and report. Loop is Core with the standard library's loop.
from libc.stdint cimport uint32_t, uint64_t

from anywire.engine._figures cimport Meter
from anywire.engine._pollers cimport Pollers
from anywire.engine._timers cimport Timer, TimerQueue
from anywire.engine._wakeup cimport Wakeup
from anywire.engine._watches cimport Watcher, Watches

cdef enum:
    BUDGET = 262144                 # bytes that one descriptor may move in a turn, so that the others get theirs


cdef class Handle:
    cdef object __weakref__
    cdef readonly Core _loop
    cdef readonly object _callback, _args, _context
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown               # its repr from before it was cancelled, in debug mode
    cdef Handle next                # in the ready queue
    cdef bint hidden                # its context isn't tracked by the garbage collector


cdef class TimerHandle(Timer):
    cdef object __weakref__
    cdef readonly Core _loop
    cdef readonly object _callback, _args, _context
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown
    cdef bint unseen                # it isn't tracked by the garbage collector
    cdef bint hidden                # nor is its context


# A watcher with something that is to be done before the loop sleeps, such as the writes of one turn.
cdef class Corked(Watcher):
    cdef bint corked                # it is in the list of Core.flush_later
    cdef int flush(self) except -1


cdef class Core:
    cdef readonly Watches watches
    cdef TimerQueue timers
    cdef Handle head, tail          # the ready queue
    cdef Py_ssize_t ready_count     # in it; of those that run now, what is left counts too
    cdef list due                   # timers whose time has come, and that haven't run yet; the next one last
    cdef Py_ssize_t unseen          # timers that the garbage collector doesn't track
    cdef list corked
    cdef Wakeup wakeup
    cdef bint sleeping              # in the kernel, or on the way there: whoever adds something wakes it
    cdef unsigned int generation    # of forks, when it was made
    cdef double spin                # seconds of polling before it sleeps
    cdef Pollers pollers            # what it looks at besides
    cdef double looked              # when it last asked the kernel
    cdef double slow                # seconds from which a callback is noted as slow; below 0: nobody measures
    cdef readonly object slow_calls # deque of (name, seconds)
    cdef uint64_t turns, calls, polls, sleeps
    cdef Py_ssize_t deepest         # largest number of callbacks ready at the start of a turn
    cdef double began, ran, slept   # when it began to run; seconds of running before that, and of sleeping in all
    cdef Meter meter                # where others see all this
    cdef bint count_transports      # each transport has a place of its own, too
    cdef public bint _closed
    cdef public bint _stopping
    cdef public bint _debug
    cdef public object _thread_id, _task_factory

    # For transports, on the loop's thread. The watcher's `ready` runs in the loop's turn; what it raises ends the loop,
    # so it hands errors to call_exception_handler, and uses `call` to run what belongs to a protocol in its context.
    cdef int watch(self, Watcher watcher, int fd, uint32_t conditions) except -1
    cdef int rewatch(self, Watcher watcher, uint32_t conditions) except -1
    cdef int unwatch(self, Watcher watcher) except -1      # 0: it wasn't watched. Before the descriptor is closed
    cdef int flush_later(self, Corked corked) except -1    # call its `flush` before the loop next looks at descriptors
    cdef bint last(self) noexcept                          # nothing else waits for its turn in this round
    cdef Handle soon(self, object callback, tuple args, object context)     # context None: a copy of the current one
    cdef TimerHandle at(self, double when, object callback, tuple args, object context)
    cdef double now(self) noexcept
    cdef int execute(self, object handle, object callback, tuple args, object context) except -1

    cdef int push(self, Handle handle) noexcept
    cdef int check(self) except -1
    cdef void show(self, double now, double asleep) noexcept
    cdef int note_slow(self, object culprit, double took) except -1
    cdef int report_took(self, object protocol, object callback, str method, double took) except -1
    cdef int failed(self, object handle) except -1
    cdef int measured(self, object handle, object callback, tuple args, object context) except -1
    cdef int wake(self) except -1
    cdef int turn(self, bint look) except -1
    cdef int wait(self, double now) except -1
    cdef int flush_all(self) except -1
    cdef int run_ready(self, Py_ssize_t count) except -1
    cdef int run_due(self) except -1
    cdef object set_reader(self, object fd, object callback, tuple args, bint writing)
    cdef bint drop_reader(self, object fd, bint writing) except -1
