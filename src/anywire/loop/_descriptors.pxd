# The descriptors of a loop.
from libc.stdint cimport uint32_t

from anywire.engine._watches cimport Watcher, Watches
from anywire.loop._handles cimport Handle
from anywire.loop._schedule cimport Schedule


cdef class Callbacks(Watcher):
    cdef Descriptors descriptors
    cdef Handle reader, writer
    cdef list waiting               # futures for whom it is to become readable


cdef class Descriptors(Schedule):
    cdef readonly Watches watches

    # For transports, on the loop's thread. The watcher's `ready` runs in the loop's turn; what it raises ends the loop,
    # so it hands errors to call_exception_handler, and uses `call` to run what belongs to a protocol in its context.
    cdef int watch(self, Watcher watcher, int fd, uint32_t conditions) except -1
    cdef int rewatch(self, Watcher watcher, uint32_t conditions) except -1
    cdef int unwatch(self, Watcher watcher) except -1      # 0: it wasn't watched. Before the descriptor is closed
    cdef object set_reader(self, object fd, object callback, tuple args, bint writing)
    cdef bint drop_reader(self, object fd, bint writing) except -1
