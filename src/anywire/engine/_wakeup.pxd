from libc.stdint cimport uint64_t

cdef extern from "anywire/engine/wakeup.h" nogil:
    ctypedef struct aw_wakeup:
        int flag
        int read_fd
        int write_fd
        int counter
        uint64_t written
    int aw_wake(aw_wakeup* w)
    void aw_heard(aw_wakeup* w)
    void aw_drain(aw_wakeup* w)


cdef class Wakeup:
    # aw_wake(&w.c) and aw_drain(&w.c) need no GIL. Whoever calls them without it sees to it that nobody closes it.
    cdef aw_wakeup c
    cdef readonly str kind
    cdef int start(self, int read_fd, int write_fd) except -1
