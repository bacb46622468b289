# Messages of many writers in one byte stream, in pieces that the kernel never interleaves.
from libc.stdint cimport uint64_t

cdef enum:
    ATOM = 4096                            # PIPE_BUF on Linux (pipe(7)): a write up to this size is never interleaved
    FRAGMENT_HEADER = 24
    FRAGMENT_ROOM = ATOM - FRAGMENT_HEADER

cdef int write_fragment_header(char* h, uint64_t writer, size_t n, uint64_t place, int flags) noexcept
cdef bytes cut(uint64_t writer, const char* p, size_t n)


cdef class Partial:
    cdef uint64_t total
    cdef bytearray data                    # None: the message is passed over
    cdef bint grown                        # since the last call of `idle`


cdef class Fragments:
    cdef readonly Py_ssize_t max_message
    cdef readonly object ready             # whole messages, oldest first
    cdef readonly list problems            # (reason, sample) of what was passed over, until somebody takes them
    cdef dict partials
    cdef bytes tail                        # the start of a fragment whose rest is still to come
    cdef bint lost_place                   # searching for the next fragment in foreign bytes
    cdef readonly bint began               # a message of several fragments began since the last call of `idle`
    cdef int eat(self, const char* p, size_t n) except -1
    cdef int take_fragment(self, const char* p) except -1
