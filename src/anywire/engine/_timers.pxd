cimport cython
from libc.stdint cimport int64_t, uint64_t

cdef struct aw_key:
    double when
    uint64_t order


cdef extern from "anywire/engine/due.h":
    ctypedef struct aw_due:
        double when
        uint64_t order
        void* timer
    void aw_due_sort(aw_due* due, aw_due* spare, size_t n) noexcept


cdef class Timer:
    cdef double when                    # of `monotonic`, in seconds
    cdef Py_ssize_t place               # in the queue's arrays; -1 while it is in none
    cdef TimerQueue queue
    cdef int left(self) except -1       # it was taken out by `Timer.cancel`


@cython.final
cdef class TimerQueue:
    cdef aw_key* keys                   # a 4-ary heap (the children of i are 4 i + 1 to 4 i + 4), then the new ones
    cdef list timers                    # in the same order
    cdef Py_ssize_t heap                # how many are in the heap
    cdef Py_ssize_t room
    cdef aw_due* due_keys               # to sort those that are due together: room for twice `due_room`
    cdef Py_ssize_t due_room
    cdef uint64_t order
    cdef int add_timer(self, Timer timer, double when) except -1
    cdef int cancel_timer(self, Timer timer) except -1
    cdef Py_ssize_t size(self) noexcept
    cdef bint is_due(self, double now) noexcept
    cdef double next_when(self) noexcept
    cdef Timer pop_due(self, double now)
    cdef list take_due(self, double now)
    cdef int64_t timeout_ns(self, double now) noexcept
    cdef int take_out(self, Py_ssize_t place) except -1
    cdef int shrink(self) except -1
    cdef void settle(self) noexcept
    cdef void set(self, Py_ssize_t place, aw_key key, void* timer) noexcept
    cdef void up(self, Py_ssize_t place, aw_key key, void* timer) noexcept
    cdef void down(self, Py_ssize_t place, Py_ssize_t size, aw_key key, void* timer) noexcept


cdef double monotonic() noexcept nogil
