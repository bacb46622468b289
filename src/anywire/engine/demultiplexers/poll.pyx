# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""poll(2): an array of descriptors goes into the kernel with each wait, so a wait costs by what is watched.

ONESHOT is made here, by watching for nothing after the report. What was closed without being removed (POLLNVAL) is
dropped in silence, as epoll does.
"""

from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.errno cimport EBADF, EEXIST, EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport timespec

from anywire.engine.conditions cimport ERROR, HANGUP, ONESHOT, PRIORITY, READ, READ_HANGUP, WRITE
from anywire.engine.demultiplexers._base cimport Demultiplexer, deadline_after, interrupted, refuse, spend, with_room_for

from anywire.engine.conditions import Condition, Trigger

cdef extern from *:
    """
    #include <fcntl.h>
    #include <poll.h>
    #include <signal.h>
    """
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLOUT, POLLPRI, POLLERR, POLLHUP, POLLRDHUP, POLLNVAL
    int ppoll(pollfd* fds, unsigned long count, const timespec* timeout, void* mask) nogil
    int F_GETFD
    int fcntl(int fd, int command) nogil

cdef struct Watched:
    uint64_t token
    uint32_t trigger
    short events            # what it is watched for; the pollfd has -1 for its number while that is nothing
    int fd


cdef class Poll(Demultiplexer):
    """poll(2). LEVEL and ONESHOT; any number of descriptors. See `Demultiplexer` for the methods."""

    name = "poll"
    triggers = Trigger.ONESHOT
    conditions = Condition(63)

    cdef pollfd* fds            # the two arrays go together, without gaps
    cdef Watched* watched
    cdef int count, room
    cdef int* places            # by descriptor: its place in the arrays, or -1
    cdef int numbers

    def __dealloc__(self):
        PyMem_Free(self.fds)
        PyMem_Free(self.watched)
        PyMem_Free(self.places)

    cdef inline int place(self, int fd) noexcept:
        return self.places[fd] if 0 <= fd < self.numbers else -1

    cdef int make_room(self, int fd) except -1:
        cdef int more
        cdef void* p
        if self.count == self.room:
            more = max(64, 2 * self.room)
            p = PyMem_Realloc(self.fds, more * sizeof(pollfd))
            if p == NULL:
                raise MemoryError
            self.fds = <pollfd*> p
            p = PyMem_Realloc(self.watched, more * sizeof(Watched))
            if p == NULL:
                raise MemoryError
            self.watched = <Watched*> p
            self.reserve(more)
            self.room = more
        if fd >= self.numbers:
            self.places = with_room_for(fd, self.places, &self.numbers)
        return 0

    cdef void put(self, int i, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) noexcept:
        cdef short events = 0
        if conditions & READ:
            events |= POLLIN
        if conditions & WRITE:
            events |= POLLOUT
        if conditions & PRIORITY:
            events |= POLLPRI
        if conditions & READ_HANGUP:
            events |= POLLRDHUP
        self.watched[i].fd = fd
        self.watched[i].token = token
        self.watched[i].trigger = trigger
        self.watched[i].events = events
        self.fds[i].fd = fd if conditions else -1
        self.fds[i].events = events
        self.fds[i].revents = 0

    cdef void drop(self, int i) noexcept:
        """The last one takes the place of the one that goes."""
        self.places[self.watched[i].fd] = -1
        self.count -= 1
        if i != self.count:
            self.fds[i] = self.fds[self.count]
            self.watched[i] = self.watched[self.count]
            self.places[self.watched[i].fd] = i

    cdef int c_add(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        self.check_alone()
        self.check(fd, conditions, trigger, ONESHOT, 63)
        if self.place(fd) >= 0:
            refuse(EEXIST, f"descriptor {fd} is watched already by this poll; modify or remove it")
        return self.c_modify(fd, conditions, trigger, token)

    cdef int c_modify(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        cdef int i
        self.check_alone()
        self.check(fd, conditions, trigger, ONESHOT, 63)
        i = self.place(fd)
        if i < 0:
            if fcntl(fd, F_GETFD) < 0:
                refuse(EBADF, f"descriptor {fd}")
            self.make_room(fd)
            i = self.count
            self.count += 1
            self.places[fd] = i
        self.put(i, fd, conditions, trigger, token)
        return 0

    cdef int c_remove(self, int fd) except -1:
        cdef int i
        if self.is_closed:
            return 0
        self.check_alone()
        i = self.place(fd)
        if i < 0:
            return 0
        self.drop(i)
        return 1

    cdef int collect(self, int n) noexcept:
        """From the last to the first, so that a dropped one's place is taken by one that was looked at."""
        cdef int i, count = 0
        cdef uint32_t conditions
        cdef short events
        for i in range(self.count - 1, -1, -1):
            if n == 0:
                break
            events = self.fds[i].revents
            if events == 0 or self.fds[i].fd < 0:
                continue
            n -= 1
            if events & POLLNVAL:
                self.drop(i)
                continue
            conditions = 0
            if events & POLLIN:
                conditions = READ
            if events & POLLOUT:
                conditions |= WRITE
            if events & POLLPRI:
                conditions |= PRIORITY
            if events & POLLHUP:
                conditions |= HANGUP
            if events & POLLRDHUP:
                conditions |= READ_HANGUP
            if events & POLLERR:
                conditions |= ERROR
            if self.watched[i].trigger & ONESHOT:
                self.fds[i].fd = -1
            self.ready[count].token = self.watched[i].token
            self.ready[count].conditions = conditions
            count += 1
        return count

    cdef int c_wait(self, int64_t timeout_ns) except -1:
        cdef int64_t deadline = 0
        cdef int n, e
        cdef timespec t
        self.check_alone()
        if timeout_ns > 0:
            deadline = deadline_after(timeout_ns)
        while True:
            t.tv_sec = timeout_ns // 1000000000
            t.tv_nsec = timeout_ns % 1000000000
            if timeout_ns == 0:
                n = ppoll(self.fds, self.count, &t, NULL)
                e = errno
            else:
                self.waiting = True
                with nogil:
                    n = ppoll(self.fds, self.count, &t if timeout_ns > 0 else NULL, NULL)
                    e = errno
                self.waiting = False
            if n >= 0:
                n = self.collect(n)
                # Only what was closed has been "ready": that is no event.
                if n or timeout_ns == 0:
                    return n
                spend(deadline, &timeout_ns)
                if timeout_ns == 0:
                    return 0
                continue
            if e != EINTR:
                refuse(e, "poll")
            interrupted(deadline, &timeout_ns)
            if timeout_ns == 0:
                return 0

    cdef int c_reset(self) except -1:
        self.check_alone()
        while self.count:
            self.drop(self.count - 1)
        return 0
