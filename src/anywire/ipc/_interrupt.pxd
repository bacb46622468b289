# A call into the kernel that a deadline or another thread may end.
from libc.stdint cimport int64_t

cdef extern from "anywire/ipc/interrupt_timer.h" nogil:
    ctypedef void* timer_t
    ctypedef struct sigset_t:
        pass

cdef int interrupting_signal() except -1      # its number; a handler that does nothing is installed
cdef int known_signal() except -1             # the same, looked for by the first call only: for who asks before each wait

cdef class Interrupt:
    cdef timer_t timer
    cdef sigset_t before
    cdef bint ready                     # there is a timer
    cdef readonly bint cancelled
    cdef int begin(self, int64_t deadline) except -1        # on the thread that calls; -1: no deadline
    cdef int end(self) except -1                            # on the same thread, whatever happened
    cdef int over(self, int64_t deadline) except -1         # after EINTR: whether the time is over; runs signals' handlers
