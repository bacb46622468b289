# One end of a shared-memory connection, for what is built on it: see _shm_end.pyx.
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from anywire.contract.endpoint cimport MessageEndpoint
from anywire.wires._shm_memory cimport Incoming, Outgoing

cdef enum:
    PIECE = 262144                 # bytes of a long message that are copied, and shown, at a time
    NOGIL_COPY = 65536             # bytes from which on a copy releases the GIL
    FLURRY = 8                     # messages that count as one turn of a front (64 turns, then others get one)
    LONGEST_SPIN = 60000           # nanoseconds; sleeping and waking costs about 45 microseconds

cdef enum:                         # kinds of records
    INLINE = 0                     # a message
    EXTENT = 1                     # a message in the pool: u64 offset, u64 length
    FIRST = 2                      # a long message begins: u64 offset, u64 length, u64 total, u64 contiguous
    NEXT = 3                       # ... goes on: u64 offset, u64 length
    ABANDONED = 4                  # ... does not go on: the sender gave up
    END = 5                        # no more messages

cdef enum:                         # `waiting`
    SLEEP, ADAPTIVE, SPIN


cdef class ShmEnd(MessageEndpoint):
    cdef readonly int sock, death
    cdef Outgoing out
    cdef Incoming inc
    cdef readonly Py_ssize_t peer_limit
    cdef int waiting                             # SLEEP, ADAPTIVE, SPIN
    cdef bint alone                              # both sides own one and the same CPU: spinning would only keep it busy
    cdef uint64_t spin_ns                        # async front: look so long before suspending
    cdef uint64_t budget                         # nanoseconds: what an adaptive wait spins next
    cdef Py_ssize_t inline_limit
    cdef bint gone
    cdef bint shares_slot                        # of the counters, with the stream on top
    cdef uint64_t checked                        # tick of the last look whether the peer lives
    cdef unsigned int flurry
    cdef readonly Py_ssize_t doorbells           # rung here, for the peer
    cdef uint64_t missing(self) noexcept
    cdef int share_slot(self, MessageEndpoint other) except -1
    cdef void ring_peer(self) noexcept
    @cython.final
    cdef void publish(self) noexcept
    @cython.final
    cdef void consumed(self, Incoming inc, uint32_t length) noexcept
    cdef int drain(self) except -1
    cdef int look(self) except -1
    cdef int lose(self) except -1
    cdef bint is_dead(self) noexcept
    cdef int spoiled(self, object error) except -1
    cdef void shut(self) noexcept
    cdef object nonsense(self, object what)
