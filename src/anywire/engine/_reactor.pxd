from libc.stdint cimport int64_t, uint32_t, uint64_t

from anywire.engine._timers cimport Timer, TimerQueue
from anywire.engine._wakeup cimport Wakeup
from anywire.engine._watches cimport Watcher, Watches


cdef class Reactor:
    cdef readonly Watches watches
    cdef readonly TimerQueue timers
    cdef readonly int priorities
    cdef readonly object on_error
    cdef Wakeup wakeup
    cdef object wake_watcher, signal_watcher
    cdef object posted                  # a deque: what other threads want run
    cdef list active                    # by priority: a deque of events that are ready
    cdef Py_ssize_t active_count
    cdef object again                   # a deque: events activated by themselves for the next turn
    cdef dict signals                   # by number: the SignalEvent
    cdef object signal_wakeup
    cdef int former_wakeup_fd
    cdef long thread                    # that is in `turn`, 0 if none
    cdef long process
    cdef int depth
    cdef bint stopping, is_closed
    cdef readonly uint64_t turns
    cdef readonly uint64_t handled

    cdef int check(self) except -1
    cdef TimerEvent timer(self, double when, double every, object handler, object priority)
    cdef int activate(self, object event, int priority) except -1
    cdef int handle(self) except -1
    cdef int c_turn(self, int64_t timeout_ns) except -1


cdef class Event(Watcher):
    """A descriptor's event."""
    cdef readonly Reactor reactor
    cdef public object handler
    cdef readonly int priority
    cdef readonly bint once
    cdef uint32_t pending               # conditions that wait for the handler
    cdef uint32_t activated             # the generation that they came for
    cdef int run(self) except -1


cdef class TimerEvent(Timer):
    cdef readonly Reactor reactor
    cdef public object handler
    cdef readonly int priority
    cdef readonly double every          # seconds; 0 for once
    cdef bint due
    cdef int run(self) except -1


cdef class SignalEvent:
    cdef readonly Reactor reactor
    cdef public object handler
    cdef readonly int number
    cdef readonly int priority
    cdef readonly bint once
    cdef object former
    cdef uint64_t count
    cdef int run(self) except -1


cdef class WakeWatcher(Watcher):
    cdef Wakeup wakeup


cdef class Posted:
    cdef object function
    cdef tuple arguments
    cdef int run(self) except -1
