# The broadcast as both modes use it: see _shm_broadcast.pyx.
from libc.stdint cimport uint32_t, uint64_t
from anywire.contract.endpoint cimport Loan
from anywire.wires._ring cimport aw_consumer, aw_producer, aw_record
from anywire.wires._shm cimport ShmEndpoint
from anywire.wires._shm_memory cimport Incoming, Outgoing

cdef extern from "anywire/ipc/broadcast.h" nogil:
    void aw_let_begin(aw_producer* p, uint64_t at)
    void aw_fence()
    int aw_was_asleep(aw_producer* p)
    void aw_want_room(aw_producer* p)
    void aw_drop(aw_producer* p, uint32_t why)
    uint64_t aw_start(aw_consumer* c)
    void aw_begin(aw_consumer* c, uint64_t at)
    uint32_t aw_dropped(aw_consumer* c)
    uint32_t aw_still_kept(aw_consumer* c)

cdef enum:
    UNIT = 4096                    # as in _shm
    NOGIL_COPY = 65536


cdef class Broadcast
cdef class SeatedEndpoint(ShmEndpoint)

cdef bint is_alike(const char* p, Py_ssize_t n, bytes prefix) noexcept


cdef class PooledLoan(Loan):
    cdef Outgoing owner
    cdef uint32_t unit


cdef class Lent:
    cdef object keep
    cdef const char* p
    cdef Py_ssize_t n


cdef class Seat(Outgoing):
    cdef object __weakref__
    cdef Broadcast owner
    cdef ShmEndpoint end           # this side's end of its connection, while there is one
    cdef int bit                   # its number among the readers, -1: it has not joined, or has nothing any more
    cdef int watch                 # pidfd of a process that still has memory in hand, -1
    cdef bint narrow               # a message over its limit went
    cdef uint64_t waited_at        # its tail when the writer began to wait for it ...
    cdef double since              # ... at this time, monotonic seconds; 0: the writer does not
    cdef uint64_t first            # of mode latest: the number of the message with which it began
    cdef bint lives(self) noexcept


cdef class Broadcast:
    cdef Outgoing memory           # the data; nobody has its control page
    cdef readonly bytes greeting
    cdef Py_ssize_t inline_limit
    cdef list readers              # Seats that are written to
    cdef list lingering            # Seats that are not, whose readers still have extents
    cdef object waiting            # Seats that were given to readers which have not joined yet
    cdef list bad                  # (endpoint, error) of readers to drop, for the publisher
    cdef bint starved              # the writer waits for room: whoever rings may have made some
    cdef uint64_t need             # bytes that it waits for
    cdef bint wants_place          # it waits for a place in the pool
    cdef object rest               # a message that goes in parts, and how much of it went
    cdef uint64_t rest_done
    cdef bint over
    cdef unsigned int generation
    cdef readonly int refused
    cdef public object when_room   # called on the loop's thread: somebody made room
    cdef public object when_full   # called by whoever puts: there is no room
    cdef public object when_bad    # called by whoever puts: `take_bad` has something
    cdef int let_begin(self, Seat seat) except -1
    cdef int let_go(self, Seat seat, uint32_t why) except -1
    cdef int vacate(self, Seat seat) except -1
    cdef void free_extents(self) noexcept
    cdef bint is_over(self, uint32_t i) noexcept
    cdef bint take_returns(self, Seat seat) except -1
    cdef int collect(self) except -1
    cdef int expel(self, Seat seat, str what) except -1
    cdef int complain(self, object end, object error) except -1
    cdef int rang(self) except -1
    cdef int look(self) except -1
    cdef bint room(self, uint64_t need) noexcept
    cdef bint has_room(self, uint64_t need) except -1
    cdef bint gates(self, Seat seat) noexcept
    cdef bint leaves_unread(self, Seat seat) noexcept
    cdef int starve(self) except -1
    cdef Py_ssize_t place(self, size_t n) except -3
    cdef Py_ssize_t lend(self, size_t n) except -2
    cdef Py_ssize_t of_loan(self, const char* p, Py_ssize_t n) noexcept
    cdef int need_own(self) except -1
    cdef int show(self) except -1
    cdef void commit(self, uint32_t kind, const char* p, Py_ssize_t n) noexcept
    cdef int count(self, Py_ssize_t n) except -1
    cdef int put_extent(self, const char* p, size_t n, uint32_t unit) except -1
    cdef int show_extent(self, size_t n, uint32_t unit) except -1


cdef class SeatedEndpoint(ShmEndpoint):
    cdef Seat seat


cdef class BroadcastReader(ShmEndpoint):
    cdef bytes greeting
    cdef bint joined
    cdef int need_kept(self) except -1
    cdef object wait_to_join(self)
    cdef int take_part(self, const char* p, uint64_t n) except -1
