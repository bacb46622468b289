# Shared memory as both faces of the wire use it: see _shm.pyx.
cimport cython
from libc.stdint cimport uint32_t, uint64_t
from anywire.contract.endpoint cimport Loan, MessageEndpoint

cdef extern from "anywire/ipc/ring.h" nogil:
    enum:
        AW_RECORD, AW_RETURNS, AW_RING_VERSION
    uint64_t AW_RING_MAGIC
    ctypedef struct aw_control:
        uint64_t magic
        uint32_t version
        uint64_t nonce
    ctypedef struct aw_producer:
        char* data
        aw_control* control
        uint64_t size, head, published, tail_seen, returned_seen
    ctypedef struct aw_consumer:
        const char* data
        aw_control* control
        uint64_t size, tail, head_seen, looked, taken, returned
    ctypedef struct aw_record:
        uint32_t kind, length
        const char* data
    uint64_t aw_space(uint64_t length)
    int aw_see_tail(aw_producer* p)
    int aw_has_room(aw_producer* p, uint64_t length)
    char* aw_slot(aw_producer* p)
    void aw_commit(aw_producer* p, uint32_t kind, uint32_t length)
    void aw_publish(aw_producer* p)
    int aw_must_ring(aw_producer* p)
    void aw_awake_with_room(aw_producer* p)
    int aw_next_return(aw_producer* p, uint32_t* unit)
    int aw_has_data(aw_consumer* c)
    int aw_peek(aw_consumer* c, aw_record* record)
    void aw_advance(aw_consumer* c, uint32_t length)
    void aw_release_records(aw_consumer* c)
    void aw_count_taken(aw_consumer* c, uint64_t count)
    int aw_room_was_wanted(aw_consumer* c, int now)
    int aw_sleep_for_data(aw_consumer* c)
    void aw_awake_with_data(aw_consumer* c)
    void aw_return(aw_consumer* c, uint32_t unit)

cdef enum:
    MOST_EXTENTS = 512             # AW_RETURNS: so many can be lent at once


cdef struct Extent:
    uint32_t start, count          # in units
    void* loan                     # a ShmLoan of ours that may still be written to, NULL: none
    bint flying                    # the receiver has it
    uint64_t readers               # of a broadcast: a bit for each reader that has it
    uint64_t at                    # of a broadcast: where the record is that refers to it


cdef class Region:
    cdef char* base
    cdef size_t length


cdef class Outgoing:
    cdef aw_producer ring
    cdef Region data_region, control_region
    cdef readonly int data_fd, control_fd
    cdef readonly size_t ring_size, pool_size
    cdef readonly object nonce
    cdef char* pool
    cdef size_t real                             # bytes of the pool that have memory
    cdef uint32_t count                          # extents in use, sorted by their place
    cdef uint32_t turn                           # the unit behind the extent that was lent last
    cdef size_t lent                             # bytes of the extents in use
    cdef uint64_t frees                          # extents that became free since the beginning
    cdef object waker                            # async front: called when one does while a sender waits for a place
    cdef int bell                                # blocking front: an eventfd to ring then, -1: nobody waits
    cdef Extent extents[MOST_EXTENTS]
    cpdef close_descriptors(self)
    cdef int make_control(self) except -1
    cdef int share(self, Outgoing other) except -1
    cdef int collect(self) except -1
    cdef uint32_t find(self, uint32_t unit) noexcept
    cdef void free(self, uint32_t i) noexcept
    cdef uint32_t fit(self, uint32_t start, uint32_t need, uint32_t* place) noexcept
    cdef int wake_sender(self) except -1
    cdef Py_ssize_t lend(self, size_t nbytes) except -2
    cdef int make_real(self, size_t end) except -1


cdef class Incoming:
    cdef aw_consumer ring
    cdef Region data_region, control_region
    cdef size_t pool_size
    cdef const char* pool
    cdef size_t real                             # bytes of the pool known to have memory
    cdef int sock                                # to ring at when a view comes back; -1 when the channel is over
    cdef readonly Py_ssize_t views               # handed out in place and not returned yet
    cdef readonly Py_ssize_t forgotten           # ... that came back only by a garbage collection
    cdef unsigned int generation                 # of fork: a forked child gives nothing back
    cdef int need_extent(self, uint64_t offset, uint64_t length) except -1
    cdef void give_back(self, uint32_t unit) noexcept


cdef class ShmEndpoint(MessageEndpoint):
    cdef public object half                      # what a listener heard of a peer that has not been answered yet
    cdef readonly int sock, death
    cdef Outgoing out
    cdef Incoming inc
    cdef readonly Py_ssize_t peer_limit
    cdef int waiting                             # SLEEP, ADAPTIVE, SPIN
    cdef bint alone                              # both sides own one and the same CPU: spinning would only keep it busy
    cdef uint64_t spin_ns                        # async front: look so long before suspending
    cdef uint64_t budget                         # nanoseconds: what an adaptive wait spins next
    cdef unsigned int misses                     # waits in a row whose spinning did not pay
    cdef Py_ssize_t inline_limit
    cdef bint end_sent, ended, ending, gone, peer_closed
    cdef bint interrupted
    cdef bint shares_slot                        # of the counters, with the stream on top
    cdef bint waits_for_data                     # a thread of the blocking front is about to sleep, or does
    cdef int waits_for_room                      # how many are: a sender, and a receiver that finishes a left-over write
    cdef bint left_over                          # a receiver has one to finish now
    cdef bint doomed                             # released while a thread waits here: the last one closes
    cdef uint64_t need_room                      # bytes of the record that found no room
    cdef uint64_t frees_seen                     # AW_AN_EXTENT: `frees` when the pool had no place
    cdef uint64_t checked                        # tick of the last look whether the peer lives
    cdef unsigned int flurry
    cdef unsigned int pieces                     # records that were no whole message
    cdef uint32_t looks_to_skip, looks_skipped   # see keep_warm
    cdef readonly Py_ssize_t private_loans
    cdef readonly Py_ssize_t doorbells           # rung here, for the peer
    # A long message on its way out.
    cdef object long_keep
    cdef const char* long_data
    cdef uint64_t long_total, long_done
    cdef Py_ssize_t long_unit                    # of its one extent, -1: a new one for each piece
    # A long message on its way in.
    cdef bint incoming, contiguous
    cdef uint64_t total, got, copied
    cdef uint64_t base                           # offset in the pool, if contiguous
    cdef object body
    cdef char* target                            # the caller's buffer that it goes to, NULL: `body`
    cdef uint64_t missing(self) noexcept
    cdef void ring_peer(self) noexcept
    cdef int drain(self) except -1
    cdef Py_ssize_t lend_soon(self, Outgoing out, size_t nbytes) except -2
    cdef int look(self) except -1
    cdef int lose(self) except -1
    cdef object nonsense(self, object what)
    cdef int look_now_and_then(self) except -1
    cdef int share_slot(self, MessageEndpoint other) except -1
    cdef bint is_dead(self) noexcept
    @cython.final
    cdef void publish(self) noexcept
    @cython.final
    cdef void consumed(self, Incoming inc, uint32_t length) noexcept
    @cython.final
    cdef object hand_out(self, Incoming inc, aw_record* record)
    cdef int spoiled(self, object error) except -1
    cdef int need_sending(self) except -1
    cdef bint room_came(self, uint64_t need) except -1
    cdef bint can_send(self, Outgoing out) noexcept
    cdef void shut(self) noexcept
    cdef bint enough(self) noexcept
    cdef int no_room(self, uint64_t n, Py_ssize_t size) except -1
    cdef int put_long(self, const char* p, Py_ssize_t n, object keep) except -1
    @cython.final
    cdef int keep_warm(self, Outgoing out, size_t n) except -1
    cdef int refer(self, uint32_t kind, uint64_t offset, uint64_t length, uint64_t total, bint contiguous) except -1
    cdef int go_on(self) except -1
    cdef int stuck(self) except -1
    cdef int collect(self, Outgoing out) except -1
    cdef int abandon_long(self) except -1
    cdef int need_open_here(self) except -1
    cdef bint nothing_here(self, Incoming inc, int r) except -1
    cdef int too_large(self, uint64_t n) except -1
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
    @cython.final
    cdef int put_inline(self, const char* p, Py_ssize_t n) except -1
    @cython.final
    cdef void went(self, Py_ssize_t n) noexcept
    @cython.final
    cdef void handed_over(self, Incoming inc, Py_ssize_t n) noexcept
