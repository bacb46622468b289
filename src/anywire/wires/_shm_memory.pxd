# Memory that two processes share, as the modules of the wire use it: see _shm_memory.pyx.
from libc.stdint cimport uint32_t, uint64_t
from anywire.contract.endpoint cimport Loan
from anywire.wires._ring cimport AW_RETURNS, aw_consumer, aw_producer

cdef enum:
    UNIT = 4096                    # bytes: extents begin and end at multiples of it
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

cdef class ShmLoan(Loan):
    cdef Outgoing owner
    cdef uint32_t unit


cdef class View:
    cdef Incoming owner
    cdef char* memory
    cdef Py_ssize_t nbytes, exports
    cdef uint32_t unit


cdef int hear_of_collections() except -1
