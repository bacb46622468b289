# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""epoll(7): the kernel keeps the set, and a wait costs by what is ready, not by what is watched.

The only one with edge and exclusive triggers. The kernel's set is keyed by number *and* open file: closing the last
descriptor of a file takes it out; closing one that was duplicated leaves a report behind that no number reaches any
more. `Watches` notices such a report and calls `c_reset`.
"""

from libc.errno cimport EAGAIN, EBADF, EEXIST, EINTR, EINVAL, ENOENT, ENOSYS, EPERM, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from anywire.engine.conditions cimport EDGE, ERROR, EXCLUSIVE, HANGUP, ONESHOT, PRIORITY, READ, READ_HANGUP, WRITE
from anywire.engine.demultiplexers._base cimport Demultiplexer, deadline_after, interrupted, refuse

from anywire.engine.conditions import Condition, Trigger

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/epoll.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef EPOLLEXCLUSIVE
    #define EPOLLEXCLUSIVE (1u << 28)
    #endif
    #ifndef __NR_epoll_pwait2
    #define __NR_epoll_pwait2 441
    #endif

    /* Nanoseconds where the kernel counts them (5.11), else milliseconds, rounded up. By syscall(2), for older C
       libraries; only where time_t is what the kernel takes. */
    static int anywire_epoll_wait(int fd, struct epoll_event *events, int count, int64_t ns)
    {
        static int coarse = sizeof(time_t) != 8;    /* written once, to the same value by whichever thread */
        int64_t ms;
        if (ns > 0 && !__atomic_load_n(&coarse, __ATOMIC_RELAXED)) {
            struct timespec t;
            long n;
            t.tv_sec = (time_t) (ns / 1000000000);
            t.tv_nsec = (long) (ns % 1000000000);
            n = syscall(__NR_epoll_pwait2, fd, events, count, &t, NULL, (size_t) 0);
            if (n >= 0 || (errno != ENOSYS && errno != EPERM))
                return (int) n;
            __atomic_store_n(&coarse, 1, __ATOMIC_RELAXED);
        }
        ms = ns <= 0 ? ns : ns / 1000000 + (ns % 1000000 != 0);
        return epoll_wait(fd, events, count, ms < 0 ? -1 : ms > 2000000000 ? 2000000000 : (int) ms);
    }
    """
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    unsigned int EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLET, EPOLLONESHOT, EPOLLEXCLUSIVE
    int epoll_create1(int flags) nogil
    int epoll_ctl(int epfd, int operation, int fd, epoll_event* event) nogil
    int dup3(int old, int new, int flags) nogil
    int O_CLOEXEC
    int c_close "close"(int fd) nogil
    int anywire_epoll_wait(int fd, epoll_event* events, int count, int64_t ns) nogil

cdef enum:
    BATCH = 1024


cdef inline uint32_t to_kernel(uint32_t conditions, uint32_t trigger) noexcept:
    cdef uint32_t events = 0
    if conditions & READ:
        events |= EPOLLIN
    if conditions & WRITE:
        events |= EPOLLOUT
    if conditions & PRIORITY:
        events |= EPOLLPRI
    if conditions & READ_HANGUP:
        events |= EPOLLRDHUP
    if trigger & EDGE:
        events |= EPOLLET
    if trigger & ONESHOT:
        events |= EPOLLONESHOT
    if trigger & EXCLUSIVE:
        events |= EPOLLEXCLUSIVE
    return events


cdef inline uint32_t from_kernel(uint32_t events) noexcept:
    cdef uint32_t conditions = 0
    if events & EPOLLIN:
        conditions = READ
    if events & EPOLLOUT:
        conditions |= WRITE
    if events & ~(EPOLLIN | EPOLLOUT):
        if events & EPOLLPRI:
            conditions |= PRIORITY
        if events & EPOLLHUP:
            conditions |= HANGUP
        if events & EPOLLRDHUP:
            conditions |= READ_HANGUP
        if events & EPOLLERR:
            conditions |= ERROR
    return conditions


cdef class Epoll(Demultiplexer):
    """epoll(7). All triggers; any number of descriptors. See `Demultiplexer` for the methods."""

    name = "epoll"
    triggers = Trigger.EDGE | Trigger.ONESHOT | Trigger.EXCLUSIVE
    conditions = Condition(63)

    cdef int fd
    cdef epoll_event events[BATCH]

    def __cinit__(self):
        self.fd = epoll_create1(EPOLL_CLOEXEC)
        if self.fd < 0:
            refuse(errno, "epoll_create1")
        self.reserve(BATCH)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1

    cdef int control(self, int operation, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) noexcept:
        """0, or the error's number."""
        cdef epoll_event event
        memset(&event, 0, sizeof(event))
        event.events = to_kernel(conditions, trigger)
        event.data.u64 = token
        return 0 if epoll_ctl(self.fd, operation, fd, &event) == 0 else errno

    cdef int failed(self, int e, int fd) except -1:
        if e == EEXIST:
            return refuse(e, f"descriptor {fd} is watched already by this epoll; modify or remove it")
        if e == EPERM:
            return refuse(e, f"descriptor {fd} can't be waited for: regular files and directories are always ready")
        return refuse(e, f"epoll_ctl for descriptor {fd}")

    cdef int c_add(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        cdef int e
        self.check(fd, conditions, trigger, EDGE | ONESHOT | EXCLUSIVE, 63)
        e = self.control(EPOLL_CTL_ADD, fd, conditions, trigger, token)
        if e == 0 and conditions == 0:
            # The kernel would report hang-ups and errors all the same, for ever. Whether it can be watched is known now.
            e = self.control(EPOLL_CTL_DEL, fd, 0, 0, 0)
        if e:
            self.failed(e, fd)
        return 0

    cdef int c_modify(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        cdef int e
        self.check(fd, conditions, trigger, EDGE | ONESHOT | EXCLUSIVE, 63)
        if conditions == 0:
            self.c_remove(fd)
            return 0
        if trigger & EXCLUSIVE:
            raise ValueError("EXCLUSIVE can't be modified (epoll_ctl(2)): remove the descriptor and add it")
        e = self.control(EPOLL_CTL_MOD, fd, conditions, trigger, token)
        if e == ENOENT:
            e = self.control(EPOLL_CTL_ADD, fd, conditions, trigger, token)
        if e == EINVAL:
            raise ValueError(f"descriptor {fd} was added EXCLUSIVE and can't be modified: remove it and add it")
        if e:
            self.failed(e, fd)
        return 0

    cdef int c_remove(self, int fd) except -1:
        cdef int e
        if self.is_closed:
            return 0
        e = self.control(EPOLL_CTL_DEL, fd, 0, 0, 0)
        if e == 0:
            return 1
        if e != ENOENT and e != EBADF and e != EPERM:
            self.failed(e, fd)
        return 0

    cdef int c_wait(self, int64_t timeout_ns) except -1:
        cdef int64_t deadline = 0
        cdef int i, n, e
        self.check_alone()
        if timeout_ns == 0:
            n = anywire_epoll_wait(self.fd, self.events, BATCH, 0)
            if n < 0:
                if errno != EINTR:
                    refuse(errno, "epoll_wait")
                interrupted(0, &timeout_ns)
                n = 0
        else:
            if timeout_ns > 0:
                deadline = deadline_after(timeout_ns)
            while True:
                self.waiting = True
                with nogil:
                    n = anywire_epoll_wait(self.fd, self.events, BATCH, timeout_ns)
                    e = errno
                self.waiting = False
                if n >= 0:
                    break
                if e != EINTR:
                    refuse(e, "epoll_wait")
                interrupted(deadline, &timeout_ns)
        for i in range(n):
            self.ready[i].token = self.events[i].data.u64
            self.ready[i].conditions = from_kernel(self.events[i].events)
        return n

    cdef int c_reset(self) except -1:
        cdef int new
        self.check_alone()
        new = epoll_create1(EPOLL_CLOEXEC)
        if new < 0:
            refuse(errno, "epoll_create1")
        # The number stays; another epoll that watches this one forgets it.
        if dup3(new, self.fd, O_CLOEXEC) < 0:
            e = errno
            c_close(new)
            refuse(e, "dup3")
        c_close(new)
        return 0

    cdef int c_close(self) except -1:
        Demultiplexer.c_close(self)
        c_close(self.fd)
        self.fd = -1
        return 0

    cdef int c_fileno(self) except -2:
        return self.fd
