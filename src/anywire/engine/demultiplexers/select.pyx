# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""select(2): three bitmaps of FD_SETSIZE (1024) descriptors; the oldest, and everywhere.

A higher number would be written beside the bitmap, so it is refused. It tells a hang-up or an error as READ or WRITE
(and those only if asked for). ONESHOT is made here. What was closed without being removed (EBADF) is dropped in silence.
"""

from libc.errno cimport EBADF, EEXIST, EINTR, EINVAL, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

from anywire.engine.conditions cimport ERROR, HANGUP, ONESHOT, PRIORITY, READ, WRITE
from anywire.engine.demultiplexers._base cimport Demultiplexer, deadline_after, interrupted, refuse, spend

from anywire.engine.conditions import Condition, Trigger

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sys/select.h>
    """
    enum:
        FD_SETSIZE
    ctypedef struct fd_set:
        pass
    struct timeval:
        long tv_sec
        long tv_usec
    void FD_ZERO(fd_set*)
    void FD_SET(int, fd_set*)
    void FD_CLR(int, fd_set*)
    bint FD_ISSET(int, fd_set*)
    int c_select "select"(int count, fd_set* reading, fd_set* writing, fd_set* others, timeval* timeout) nogil
    int F_GETFD
    int fcntl(int fd, int command) nogil

cdef struct Watched:
    uint64_t token
    uint32_t trigger
    bint known

cdef uint32_t TELLS = READ | WRITE | PRIORITY | HANGUP | ERROR


cdef class Select(Demultiplexer):
    """select(2). LEVEL and ONESHOT; descriptors below FD_SETSIZE. See `Demultiplexer` for the methods."""

    name = "select"
    triggers = Trigger.ONESHOT
    conditions = Condition(47)

    cdef Watched watched[FD_SETSIZE]
    cdef fd_set reading, writing, urgent                # what is asked
    cdef fd_set can_read, can_write, is_urgent          # the kernel's answer
    cdef int top                                        # one more than the highest number watched

    def __cinit__(self):
        self.reserve(FD_SETSIZE)
        self.c_reset()

    cdef void clear(self, int fd) noexcept:
        FD_CLR(fd, &self.reading)
        FD_CLR(fd, &self.writing)
        FD_CLR(fd, &self.urgent)

    cdef int c_add(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        self.check_alone()
        if 0 <= fd < FD_SETSIZE and self.watched[fd].known:
            refuse(EEXIST, f"descriptor {fd} is watched already by this select; modify or remove it")
        return self.c_modify(fd, conditions, trigger, token)

    cdef int c_modify(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        self.check_alone()
        self.check(fd, conditions, trigger, ONESHOT, TELLS)
        if fd >= FD_SETSIZE:
            raise OSError(EINVAL, f"descriptor {fd}: select(2) takes only those below {FD_SETSIZE}; use poll or epoll")
        if conditions and not conditions & (READ | WRITE | PRIORITY):
            raise NotImplementedError("select tells a hang-up or an error only as READ or WRITE; poll and epoll do more")
        if not self.watched[fd].known and fcntl(fd, F_GETFD) < 0:
            refuse(EBADF, f"descriptor {fd}")
        self.clear(fd)
        if conditions & READ:
            FD_SET(fd, &self.reading)
        if conditions & WRITE:
            FD_SET(fd, &self.writing)
        if conditions & PRIORITY:
            FD_SET(fd, &self.urgent)
        self.watched[fd].token = token
        self.watched[fd].trigger = trigger
        self.watched[fd].known = True
        if fd >= self.top:
            self.top = fd + 1
        return 0

    cdef int c_remove(self, int fd) except -1:
        if self.is_closed:
            return 0
        self.check_alone()
        if not 0 <= fd < FD_SETSIZE or not self.watched[fd].known:
            return 0
        self.clear(fd)
        self.watched[fd].known = False
        while self.top and not self.watched[self.top - 1].known:
            self.top -= 1
        return 1

    cdef int drop_closed(self) except -1:
        """After EBADF, which doesn't say which. Returns how many there were."""
        cdef int fd, dropped = 0
        for fd in range(self.top - 1, -1, -1):
            if self.watched[fd].known and fcntl(fd, F_GETFD) < 0:
                self.c_remove(fd)
                dropped += 1
        return dropped

    cdef int collect(self, int bits) noexcept:
        cdef int fd, count = 0
        cdef uint32_t conditions
        for fd in range(self.top):
            if bits <= 0:
                break
            conditions = 0
            if FD_ISSET(fd, &self.can_read):
                conditions = READ
                bits -= 1
            if FD_ISSET(fd, &self.can_write):
                conditions |= WRITE
                bits -= 1
            if FD_ISSET(fd, &self.is_urgent):
                conditions |= PRIORITY
                bits -= 1
            if conditions == 0:
                continue
            if self.watched[fd].trigger & ONESHOT:
                self.clear(fd)
            self.ready[count].token = self.watched[fd].token
            self.ready[count].conditions = conditions
            count += 1
        return count

    cdef int c_wait(self, int64_t timeout_ns) except -1:
        cdef int64_t deadline = 0
        cdef int n, e
        cdef timeval t
        self.check_alone()
        if timeout_ns > 0:
            deadline = deadline_after(timeout_ns)
        while True:
            self.can_read = self.reading
            self.can_write = self.writing
            self.is_urgent = self.urgent
            # Microseconds, rounded up; the kernel refuses more than some 10^8 seconds on some systems.
            t.tv_sec = min(timeout_ns // 1000000000, <int64_t> 100000000)
            t.tv_usec = (timeout_ns % 1000000000 + 999) // 1000
            if t.tv_usec == 1000000:
                t.tv_sec += 1
                t.tv_usec = 0
            if timeout_ns == 0:
                n = c_select(self.top, &self.can_read, &self.can_write, &self.is_urgent, &t)
                e = errno
            else:
                self.waiting = True
                with nogil:
                    n = c_select(self.top, &self.can_read, &self.can_write, &self.is_urgent,
                                 &t if timeout_ns > 0 else NULL)
                    e = errno
                self.waiting = False
            if n >= 0:
                return self.collect(n)
            if e == EBADF and self.drop_closed():
                spend(deadline, &timeout_ns)
                continue
            if e != EINTR:
                refuse(e, "select")
            interrupted(deadline, &timeout_ns)
            if timeout_ns == 0:
                return 0

    cdef int c_reset(self) except -1:
        cdef int fd
        self.check_alone()
        for fd in range(FD_SETSIZE):
            self.watched[fd].known = False
        FD_ZERO(&self.reading)
        FD_ZERO(&self.writing)
        FD_ZERO(&self.urgent)
        self.top = 0
        return 0
