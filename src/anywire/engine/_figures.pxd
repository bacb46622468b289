# What a loop and its connections show of themselves, in slots of the process's counters page: docs/design/counters.md.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    LOOP = 6                        # kinds of slots; those below are the contract's
    TRANSPORT = 7
    READING_PAUSED = 1              # TransportFigures.paused
    WRITING_PAUSED = 2

cdef struct LoopFigures:
    uint32_t state
    uint32_t generation
    uint32_t kind
    uint32_t reserved
    uint64_t opened_ns
    uint64_t began_ns
    uint64_t ran_ns
    uint64_t slept_ns
    uint64_t asleep_ns
    uint64_t looked_ns
    uint64_t turns
    uint64_t callbacks
    uint64_t polls
    uint64_t sleeps
    uint64_t wakeups
    uint64_t ready
    uint64_t ready_most
    uint64_t timers
    uint64_t watched
    uint64_t slow
    uint64_t slow_ns
    uint64_t next_free
    char name[32]
    char culprit[64]

cdef struct TransportFigures:
    uint32_t state
    uint32_t generation
    uint32_t kind
    uint32_t paused
    uint64_t opened_ns
    uint64_t bytes_received
    uint64_t bytes_sent
    uint64_t queued
    uint64_t queued_most
    uint64_t reading_pauses
    uint64_t writing_pauses
    uint64_t unused[10]
    uint64_t next_free
    char local[32]
    char address[64]

# Slots are given by who has the page; he offers them once. All with the GIL. `claim` gives NULL when there is none.
ctypedef void* (*Claim)(unsigned int kind, bytes address) noexcept
ctypedef void (*Release)(void* slot) noexcept

cdef int offer(Claim claim, Release release) except -1
cdef TransportFigures* claim_transport(object local, object peer) noexcept
cdef void release_figures(void* slot) noexcept               # NULL is ignored


cdef class Meter:
    # The place of one loop's figures; NULL while there is none.
    cdef LoopFigures* at
    cdef object __weakref__
    cdef object name                # of the thread that runs it
    cdef int place(self) except -1
    cdef int leave(self) except -1
    cdef int called(self, object name) except -1
    cdef int slow(self, object culprit, double seconds) except -1
