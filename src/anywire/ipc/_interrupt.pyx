# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Ending a blocking call into the kernel: by a deadline, or from another thread. How, and why nothing is lost:
interrupt_timer.h.

One `Interrupt` belongs to one call on one thread; `cancel` may come from any thread, before, during or after it. All of
it runs under the GIL, so a timer is never used after its end. What can go wrong: no timer (EAGAIN: the user's limit of
pending signals), no free real-time signal (EBUSY).
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, errno
from libc.stdint cimport int64_t

from anywire.ipc._system cimport fail, left

cdef extern from "anywire/ipc/interrupt_timer.h" nogil:
    int anywire_free_signal()
    int anywire_timer_make(timer_t* timer, sigset_t* before)
    int anywire_timer_at(timer_t timer, int64_t moment)
    void anywire_timer_drop(timer_t timer, const sigset_t* before)


class Cancelled(Exception):
    """A wait on a helper's thread was ended by `Interrupt.cancel`."""


cdef int interrupting_signal() except -1:
    cdef int number = anywire_free_signal()
    return number if number >= 0 else fail(errno, None, "no real-time signal is free to end a wait with")


cdef int _known = 0


cdef int known_signal() except -1:
    global _known
    if _known == 0:
        _known = interrupting_signal()
    return _known


cdef class Interrupt:
    """The means to end one blocking call."""

    def cancel(self):
        """Make the call return now, with what it has by then. From any thread; also before the call, and twice."""
        self.cancelled = True
        if self.ready:
            anywire_timer_at(self.timer, 1)         # long ago: at once, and again until the call has come back

    cdef int begin(self, int64_t deadline) except -1:
        if anywire_timer_make(&self.timer, &self.before) < 0:
            more = "a timer for the wait's end"
            if errno == EAGAIN:
                more += "; the limit is the user's of pending signals (ulimit -i)"
            return fail(errno, None, more)
        self.ready = True
        if self.cancelled:
            anywire_timer_at(self.timer, 1)
        elif deadline >= 0:
            anywire_timer_at(self.timer, deadline if deadline > 0 else 1)
        return 0

    cdef int end(self) except -1:
        if self.ready:
            self.ready = False
            anywire_timer_drop(self.timer, &self.before)
        return 0

    cdef int over(self, int64_t deadline) except -1:
        PyErr_CheckSignals()
        if self.cancelled:
            raise Cancelled
        return deadline >= 0 and left(deadline) == 0
