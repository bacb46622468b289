# What async channels and streams share: waiting, in the event loop, without making a Future or a Task for each message.
from cpython.object cimport PyObject
from libc.stdint cimport uint64_t
from anywire.contract.face cimport Face, name_operation
from anywire.engine._awaiting cimport Awaited, Waiter
from anywire.engine._pollers cimport Poller
from anywire.engine._watches cimport Watcher


cdef class Operation(Awaited):
    cdef Front front
    cdef Waiter waiter
    cdef int mask                       # what it waits for
    cdef object timeout
    cdef object timer
    cdef object alarm                   # of an endpoint that wants to be tried again at some time
    cdef object wait(self)
    cdef int enter(self) except -1
    cdef object attempt(self)
    cdef int leave(self) except -1
    cdef int let_go(self) except -1
    cdef int rest(self) except -1
    cdef bint waiting(self) noexcept


cdef class ReceiveOperation(Operation):
    pass


cdef class SendOperation(Operation):
    cdef object data
    cdef Py_ssize_t index
    cdef int mode
    cdef bint partial
    cdef bint queued
    cdef object queue(self)
    cdef uint64_t since                 # when it began to wait, nanoseconds


cdef class Watched(Watcher):
    cdef Front front


cdef class Seen(Poller):
    cdef Front front


cdef class Front(Face):
    cdef readonly object driver
    cdef readonly object loop
    cdef unsigned long thread
    cdef Waiter spare                   # the waiter of the last operation that waited, for the next one
    cdef Operation reader
    cdef ReceiveOperation spare_reader  # the last ones, for the next ones
    cdef SendOperation spare_sender
    cdef object senders                 # deque of operations that wait for room, oldest first
    cdef bint watching_read, watching_write, notified
    cdef bint elsewhere(self) noexcept
    cdef int need_here(self, str operation) except -1
    cdef Seen seen                      # on our own loop, if that polls and looks at this connection itself
    cdef int be_seen(self) except -1
    cdef int here(self) except -1
    cdef int report(self, object error) except -1
    cdef list watchers                  # on our own loop: a Watched for each descriptor that is watched
    cdef int readable(self) except -1
    cdef int writable(self) except -1
    cdef int rung(self) except -1
    cdef int watch_fd(self, int fd, int mask, object callback) except -1
    cdef int unwatch_fd(self, int fd, int mask) except -1
    cdef Watched watched_fd(self, int fd)
    cdef int watch(self, int mask) except -1
    cdef int unwatch(self, int mask) except -1
    cdef Waiter take_waiter(self)

cdef bint unused(object operation) noexcept
cdef object sending(Front front, object data, int mode, object timeout)
cdef object GIVE_WAY
cdef object MUST_WAIT
