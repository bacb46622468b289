# The core of the loop: its turn. Loop is Core with the standard library's loop.
from libc.stdint cimport uint64_t

from anywire.engine._awaiting cimport Waiter
from anywire.engine._pollers cimport Pollers
from anywire.engine._watches cimport Watcher
from anywire.loop._descriptors cimport Descriptors

cdef enum:
    BUDGET = 262144                 # bytes that one descriptor may move in a turn, so that the others get theirs


# A watcher with something that is to be done before the loop sleeps, such as the writes of one turn.
cdef class Corked(Watcher):
    cdef bint corked                # it is in the list of Core.flush_later
    cdef int flush(self) except -1


cdef class Core(Descriptors):
    cdef list corked
    cdef double spin                # seconds of polling before it sleeps
    cdef Pollers pollers            # what it looks at besides
    cdef double looked              # when it last asked the kernel
    cdef uint64_t turns, polls, sleeps
    cdef Py_ssize_t deepest         # largest number of callbacks ready at the start of a turn
    cdef double ran, slept          # seconds of running before `began`, and of sleeping in all
    cdef Waiter spare_waiter        # of the last read of a stream that waited, for the next one
    cdef bint count_transports      # each transport has a place of its own, too
    cdef public bint _stopping
    cdef public object _thread_id, _task_factory

    # For transports, on the loop's thread.
    cdef int flush_later(self, Corked corked) except -1    # call its `flush` before the loop next looks at descriptors
    cdef bint last(self) noexcept                          # nothing else waits for its turn in this round

    cdef void show(self, double now, double asleep) noexcept
    cdef int turn(self, bint look) except -1
    cdef int wait(self, double now) except -1
    cdef int flush_all(self) except -1
