from libc.stdint cimport uint32_t, uint64_t
from anywire.contract.endpoint cimport BytePump
from anywire.framing.codec cimport Decoder
from anywire.wires._descriptor cimport UnixBytes


cdef class FramedEndpoint(BytePump):
    cdef readonly Decoder decoder
    cdef bint all_taken                  # one way: the reader had read everything when it was found gone
    cdef UnixBytes carrier               # the byte endpoint if it carries descriptors
    cdef readonly Py_ssize_t peer_limit
    cdef uint64_t to_confirm, to_confirm_bytes
    cdef uint64_t confirm_at, confirm_at_bytes   # so many to confirm are worth a frame of their own
    cdef bint more_is_here(self) noexcept
    cdef readonly bint confirms
    cdef readonly bint end_sent
    cdef bint ending
    cdef uint64_t going              # messages inside a system call of another thread: not counted as sent yet
    cdef uint64_t missing(self) noexcept
    cdef object hand_over(self)
    cdef int more(self, bint block) except -1
    cdef int need_sending(self) except -1
    cdef int confirm_now(self) except -1
    cdef int confirm_due(self) except -1
    cdef int send_kind(self, uint32_t kind) except -1
    cdef int delivered(self, Py_ssize_t n) except -1
    cdef int lost(self, object reason, object cause) except -1
    cdef int went(self, Py_ssize_t count, Py_ssize_t nbytes, uint32_t confirmed) except -1
    cdef int raise_end(self) except -1
