# What is to be called, and when.
from libc.stdint cimport uint64_t

from anywire.engine._timers cimport TimerQueue
from anywire.engine._wakeup cimport Wakeup
from anywire.engine._watches cimport Watcher
from anywire.loop._handles cimport Caller, Handle, TimerHandle


cdef class Waker(Watcher):
    cdef Wakeup wakeup


cdef class Schedule(Caller):
    cdef TimerQueue timers
    cdef Handle head, tail          # the ready queue
    cdef Py_ssize_t ready_count     # in it; of those that run now, what is left counts too
    cdef list due                   # timers whose time has come, and that haven't run yet; the next one last
    cdef Wakeup wakeup
    cdef bint sleeping              # in the kernel, or on the way there: whoever adds something wakes it
    cdef unsigned int generation    # of forks, when it was made
    cdef double began               # when the loop began to run; 0 while it doesn't
    cdef uint64_t calls
    cdef public bint _closed

    cdef int check(self) except -1                         # RuntimeError: closed, or of the parent process
    cdef bint forked(self) noexcept
    cdef Handle soon(self, object callback, tuple args, object context)     # context None: a copy of the current one
    cdef TimerHandle at(self, double when, object callback, tuple args, object context)
    cdef double now(self) noexcept
    cdef int wake(self) except -1
    cdef int run_ready(self, Py_ssize_t count) except -1
    cdef int run_due(self) except -1
    cdef int settle_all(self) except -1
    cdef int drop_all(self) except -1


cdef int install_quick_calls(object kind) except -1         # into a class that derives from Schedule
