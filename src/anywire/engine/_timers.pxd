cimport cython
from libc.stdint cimport int64_t, uint64_t

cdef struct aw_key:
    double when
    uint64_t order


cdef class Timer:
    cdef double when                    # of `monotonic`, in seconds
    cdef Py_ssize_t place               # in the heap; -1 while it is in none
    cdef TimerQueue queue


@cython.final
cdef class TimerQueue:
    cdef aw_key* keys                   # a 4-ary heap: the children of i are 4 i + 1 to 4 i + 4
    cdef list timers                    # in the same order
    cdef Py_ssize_t room
    cdef uint64_t order
    cdef int add_timer(self, Timer timer, double when) except -1
    cdef int cancel_timer(self, Timer timer) except -1
    cdef Py_ssize_t size(self) noexcept
    cdef double next_when(self) noexcept
    cdef Timer pop_due(self, double now)
    cdef int64_t timeout_ns(self, double now) noexcept
    cdef int take_out(self, Py_ssize_t place) except -1
    cdef int shrink(self, Py_ssize_t size) except -1
    cdef void set(self, Py_ssize_t place, aw_key key, void* timer) noexcept
    cdef void up(self, Py_ssize_t place, aw_key key, void* timer) noexcept
    cdef void down(self, Py_ssize_t place, Py_ssize_t size, aw_key key, void* timer) noexcept


cdef double monotonic() noexcept nogil
