from libc.stdint cimport int64_t, uint32_t, uint64_t

from anywire.engine.demultiplexers._base cimport Demultiplexer


cdef class Watcher:
    cdef readonly int fd                # -1 while it isn't watched
    cdef uint32_t conditions            # what it is watched for
    cdef uint32_t trigger
    cdef uint32_t generation
    cdef int slot                       # in `watches`; -1 while it isn't watched
    cdef Watches watches
    cdef int ready(self, uint32_t conditions) except -1


cdef class Watches:
    cdef readonly Demultiplexer demultiplexer
    cdef list watchers                  # by slot: a Watcher or None
    cdef list free                      # slots without one
    cdef uint32_t generation
    cdef int* slots                     # by descriptor: its slot, or -1
    cdef int numbers
    cdef int first, last                # reports of the batch that wait to be delivered
    cdef int removed                    # watchers removed since that batch came
    cdef readonly int count             # watchers
    cdef readonly uint64_t stale        # reports dropped, for the counters
    cdef readonly uint64_t resets       # times the demultiplexer was made anew

    cdef int add(self, Watcher watcher, int fd, uint32_t conditions, uint32_t trigger) except -1
    cdef int modify(self, Watcher watcher, uint32_t conditions, uint32_t trigger) except -1
    cdef int remove(self, Watcher watcher) except -1
    cdef Watcher of(self, int fd)
    cdef int wait(self, int64_t timeout_ns) except -1
    cdef int dispatch(self, int count) except -1
    cdef int forget(self, Watcher watcher) except -1
    cdef int rebuild(self) except -1
    cdef int renew(self, Watcher watcher, uint32_t conditions, uint32_t trigger) except -1
