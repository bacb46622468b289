# The sending half of a shared-memory connection, for what is built on it: see _shm_sending.pyx.
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from anywire.wires._shm_end cimport ShmEnd
from anywire.wires._shm_memory cimport Outgoing


cdef class ShmSender(ShmEnd):
    cdef bint end_sent
    cdef uint64_t need_room                      # bytes of the record that found no room
    cdef uint64_t frees_seen                     # AW_AN_EXTENT: `frees` when the pool had no place
    cdef uint32_t looks_to_skip, looks_skipped   # see keep_warm
    cdef readonly Py_ssize_t private_loans
    # A long message on its way out.
    cdef object long_keep
    cdef const char* long_data
    cdef uint64_t long_total, long_done
    cdef Py_ssize_t long_unit                    # of its one extent, -1: a new one for each piece
    cdef int need_sending(self) except -1
    cdef int look_now_and_then(self) except -1
    @cython.final
    cdef int put_inline(self, const char* p, Py_ssize_t n) except -1
    @cython.final
    cdef void went(self, Py_ssize_t n) noexcept
    cdef bint room_came(self, uint64_t need) except -1
    cdef bint can_send(self, Outgoing out) noexcept
    cdef int put_long(self, const char* p, Py_ssize_t n, object keep) except -1
    @cython.final
    cdef int keep_warm(self, Outgoing out, size_t n) except -1
    cdef int refer(self, uint32_t kind, uint64_t offset, uint64_t length, uint64_t total, bint contiguous) except -1
    cdef int go_on(self) except -1
    cdef int stuck(self) except -1
    cdef int collect(self, Outgoing out) except -1
    cdef int abandon_long(self) except -1
    cdef Py_ssize_t lend_soon(self, Outgoing out, size_t nbytes) except -2
