# A shared-memory connection, as both faces of the wire and the broadcast use it: see _shm.pyx.
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from anywire.wires._ring cimport aw_consumer, aw_producer, aw_record
from anywire.wires._shm_memory cimport Incoming, Outgoing
from anywire.wires._shm_sending cimport ShmSender


cdef class ShmEndpoint(ShmSender):
    cdef public object half                      # what a listener heard of a peer that has not been answered yet
    cdef unsigned int misses                     # waits in a row whose spinning did not pay
    cdef bint ended, ending, peer_closed
    cdef bint interrupted
    cdef bint waits_for_data                     # a thread of the blocking front is about to sleep, or does
    cdef int waits_for_room                      # how many are: a sender, and a receiver that finishes a left-over write
    cdef bint left_over                          # a receiver has one to finish now
    cdef bint doomed                             # released while a thread waits here: the last one closes
    cdef unsigned int pieces                     # records that were no whole message
    # A long message on its way in.
    cdef bint incoming, contiguous
    cdef uint64_t total, got, copied
    cdef uint64_t base                           # offset in the pool, if contiguous
    cdef object body
    cdef char* target                            # the caller's buffer that it goes to, NULL: `body`
    @cython.final
    cdef object hand_out(self, Incoming inc, aw_record* record)
    @cython.final
    cdef void handed_over(self, Incoming inc, Py_ssize_t n) noexcept
    cdef int need_open_here(self) except -1
    cdef bint nothing_here(self, Incoming inc, int r) except -1
    cdef bint enough(self) noexcept
    cdef int too_large(self, uint64_t n) except -1
    cdef int no_room(self, uint64_t n, Py_ssize_t size) except -1
    cdef bint long_record(self, Incoming inc, aw_record* record, Py_ssize_t room=*) except -1
    cdef int need_extent(self, Incoming inc, uint32_t kind, uint64_t* words) except -1
    cdef int copy_piece(self, Incoming inc, uint64_t offset, uint64_t n) except -1
    cdef int catch_up(self, Incoming inc) except -1
    cdef object finished_copy(self, Incoming inc)
    cdef int finish_incoming(self, Incoming inc) except -1
    cdef int drop_incoming(self, Incoming inc) except -1
    cdef int spin(self, aw_consumer* c, aw_producer* p, uint64_t end, double timeout) except -2
    cdef int sleep(self, Outgoing out, Incoming inc, int mask, uint64_t end, double timeout) except -1
    cdef int leave_over(self) except -1
    cdef int put_back(self, bint ring) except -1
    cdef int put_end(self) except -1
    cdef int drop_all(self) except -1
