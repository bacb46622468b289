# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Bytes in and out of descriptors: sockets, Unix sockets with descriptor passing, pipes.

Each object owns its descriptors and closes them exactly once, when the last thread has left its system call (a closed
number could already belong to somebody else). Called by framed endpoints and bare streams on the front's thread.

Non-blocking calls of up to 256 KiB keep the GIL: giving it up costs more than the copy, and under contention milliseconds.
Blocking and larger ones release it. Sockets need no O_NONBLOCK: MSG_DONTWAIT says it per call (recv(2)), so one descriptor
serves both fronts. Pipes have no such flag and are set O_NONBLOCK.
"""
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, ENOTCONN, EPIPE, errno
from libc.string cimport memcpy, memset
from anywire.contract.endpoint cimport AGAIN, READ, SCRATCH, WRITE, ByteEndpoint, iovec

import os
import weakref

cdef extern from "<sys/socket.h>" nogil:
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr* CMSG_FIRSTHDR(msghdr*)
    cmsghdr* CMSG_NXTHDR(msghdr*, cmsghdr*)
    unsigned char* CMSG_DATA(cmsghdr*)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)
    int SOL_SOCKET, SCM_RIGHTS, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_WAITALL, SHUT_WR, SHUT_RDWR
    ssize_t recv(int fd, void* p, size_t n, int flags)
    ssize_t send(int fd, const void* p, size_t n, int flags)
    ssize_t sendmsg(int fd, msghdr* m, int flags)
    ssize_t recvmsg(int fd, msghdr* m, int flags)
    int c_shutdown "shutdown"(int fd, int how)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* p, size_t n)
    int c_close "close"(int fd)

cdef extern from "<sys/ioctl.h>" nogil:
    int FIONREAD
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t writev(int fd, iovec* iov, int count)

cdef extern from *:
    """
    #include <errno.h>
    static void anywire_descriptor_errno(int e) { errno = e; }
    """
    void set_errno "anywire_descriptor_errno"(int e) noexcept nogil


cdef inline int error(int e) except -1:
    set_errno(e)
    PyErr_SetFromErrno(OSError)
    return -1


LOST_FDS = "descriptors were lost on their way: this process has no free descriptor (RLIMIT_NOFILE)"


cdef int gather_fds(msghdr* m, list into) except -1:
    """Append the descriptors that came with a message; they are this process's from now on."""
    cdef cmsghdr* c = CMSG_FIRSTHDR(m)
    cdef int fd
    cdef size_t i
    while c != NULL:
        if c.cmsg_level == SOL_SOCKET and c.cmsg_type == SCM_RIGHTS:
            for i in range((c.cmsg_len - CMSG_LEN(0)) // sizeof(int)):
                memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int))
                into.append(fd)
        c = CMSG_NXTHDR(m, c)
    return 0


cdef list numbers_of(object fds):
    """The numbers of `fds` (numbers or objects with fileno()), all open, and not too many: else nothing is sent."""
    numbers = [fd if isinstance(fd, int) else fd.fileno() for fd in fds]
    if len(numbers) > MOST_FDS:
        raise ValueError(f"{len(numbers)} descriptors in one message; the kernel passes at most {MOST_FDS} (unix(7))")
    for fd in numbers:
        os.fstat(fd)                             # a bad number is the caller's mistake, not a lost connection
    return numbers


cdef int attach_fds(msghdr* m, char* control, list numbers) except -1:
    """Let descriptors go with a message; `control` has CONTROL bytes."""
    cdef cmsghdr* c
    cdef int fd
    cdef size_t i, count = len(numbers)
    memset(control, 0, CONTROL)
    m.msg_control = control
    m.msg_controllen = CMSG_SPACE(count * sizeof(int))
    c = CMSG_FIRSTHDR(m)
    c.cmsg_level = SOL_SOCKET
    c.cmsg_type = SCM_RIGHTS
    c.cmsg_len = CMSG_LEN(count * sizeof(int))
    for i in range(count):
        fd = numbers[i]
        memcpy(CMSG_DATA(c) + i * sizeof(int), &fd, sizeof(int))
    return 0


cdef class SocketBytes(ByteEndpoint):
    """A connected stream socket. Takes over the descriptor `fd`."""

    def __init__(self, int fd, *, address=None, peer=None, wire=None):
        self.fd = self.read_fd = self.write_fd = fd
        self.buffered = False
        self.interruptible = True
        self.address = address
        self.peer = peer
        self.wire = wire

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        cdef ssize_t r
        cdef int e, fd = self.fd, flags = (MSG_WAITALL if self.whole else 0) if block else MSG_DONTWAIT
        while True:
            if block or n > SCRATCH:
                self.users += 1
                with nogil:
                    r = recv(fd, p, n, flags)
                    e = errno
                self.leave()
            else:
                r = recv(fd, p, n, MSG_DONTWAIT)
                e = errno
            if r >= 0:
                return r
            if e == EAGAIN:
                self.want = READ
                return AGAIN
            if e != EINTR:
                return error(e)
            PyErr_CheckSignals()
            fd = self.fd                   # a handler, or a thread meanwhile, may have closed it: never use its number

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        cdef ssize_t r
        cdef int e, i, fd = self.fd, flags = MSG_NOSIGNAL | (0 if block else MSG_DONTWAIT)
        cdef size_t total = 0
        cdef msghdr m
        if count > 1:
            memset(&m, 0, sizeof(m))
            m.msg_iov = iov
            m.msg_iovlen = count
        for i in range(count):
            total += iov[i].iov_len
        while True:
            if block or total > SCRATCH:
                self.users += 1
                with nogil:
                    r = send(fd, iov[0].iov_base, iov[0].iov_len, flags) if count == 1 else sendmsg(fd, &m, flags)
                    e = errno
                self.leave()
            else:
                r = send(fd, iov[0].iov_base, iov[0].iov_len, flags) if count == 1 else sendmsg(fd, &m, flags)
                e = errno
            if r >= 0:
                return r
            if e == EAGAIN:
                self.want = WRITE
                return AGAIN
            if e != EINTR:
                return error(e)
            PyErr_CheckSignals()
            fd = self.fd

    def shutdown_write(self):
        if self.fd >= 0 and c_shutdown(self.fd, SHUT_WR) < 0 and errno != ENOTCONN:
            error(errno)

    def interrupt(self):
        if self.fd >= 0:
            c_shutdown(self.fd, SHUT_RDWR)

    def close_now(self):
        cdef int fd = self.fd
        self.fd = self.read_fd = self.write_fd = -1
        if fd >= 0:
            c_close(fd)

    def detach_state(self):
        """Give the descriptor away: this object forgets it."""
        cdef int fd = self.fd
        self.fd = self.read_fd = self.write_fd = -1
        return "socket", [fd]


cdef class UnixBytes(SocketBytes):
    """A connected Unix stream socket: bytes, and descriptors beside them.

    Descriptors arrive with the bytes they were sent with; a read never goes past such bytes (unix(7)), so their order
    among the frames is known. What no frame announces is closed."""

    carries_fds = True

    def __init__(self, int fd, *, address=None, peer=None, wire=None):
        SocketBytes.__init__(self, fd, address=address, peer=peer, wire=wire)
        self.arrived = []
        self.departing = None

    def __dealloc__(self):
        self.drop_fds()

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        cdef ssize_t r
        cdef int e, fd = self.fd, flags = MSG_CMSG_CLOEXEC | ((MSG_WAITALL if self.whole else 0) if block else MSG_DONTWAIT)
        cdef msghdr m
        cdef iovec v
        cdef char control[CONTROL]
        v.iov_base = p
        v.iov_len = n
        memset(&m, 0, sizeof(m))
        m.msg_iov = &v
        m.msg_iovlen = 1
        while True:
            m.msg_control = control
            m.msg_controllen = CONTROL
            if block or n > SCRATCH:
                self.users += 1
                with nogil:
                    r = recvmsg(fd, &m, flags)
                    e = errno
                self.leave()
            else:
                r = recvmsg(fd, &m, flags)
                e = errno
            if r >= 0:
                if m.msg_controllen:
                    self.collect(&m)
                return r
            if e == EAGAIN:
                self.want = READ
                return AGAIN
            if e != EINTR:
                return error(e)
            PyErr_CheckSignals()
            fd = self.fd

    cdef int collect(self, msghdr* m) except -1:
        gather_fds(m, self.arrived)
        if not self.keep_fds:                    # a bare stream has no way to hand them out
            self.drop_fds()
        if m.msg_flags & MSG_CTRUNC:
            raise OSError(24, LOST_FDS)
        if len(self.arrived) > 4 * MOST_FDS:
            self.drop_fds()
            raise OSError(71, "the peer sent more descriptors than it announced")
        return 0

    cdef object take_fds(self, Py_ssize_t count):
        if count > len(self.arrived):
            raise OSError(71, f"{count} descriptors were announced and {len(self.arrived)} came")
        fds = self.arrived[:count]
        del self.arrived[:count]
        return fds

    cdef int give_fds(self, object fds) except -1:
        self.departing = numbers_of(fds) or None
        return 0

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        cdef msghdr m
        cdef char control[CONTROL]
        cdef ssize_t r
        cdef int e, flags = MSG_NOSIGNAL | MSG_DONTWAIT
        if self.departing is None:
            return SocketBytes.write(self, iov, count, block)
        # Rare: with descriptors one never blocks inside the call, so that the ancillary data goes exactly once.
        memset(&m, 0, sizeof(m))
        m.msg_iov = iov
        m.msg_iovlen = count
        attach_fds(&m, control, self.departing)
        while True:
            r = sendmsg(self.fd, &m, flags)
            e = errno
            if r >= 0:
                self.departing = None
                return r
            if e == EAGAIN:
                self.want = WRITE
                return AGAIN
            if e != EINTR:
                self.departing = None
                return error(e)
            PyErr_CheckSignals()

    def detach_state(self):
        return "unix", SocketBytes.detach_state(self)[1]

    cdef int keep_first(self, Py_ssize_t count) except -1:
        """Close the descriptors that arrived and were not announced."""
        surplus = self.arrived[count:]
        del self.arrived[count:]
        for fd in surplus:
            c_close(fd)
        return 0

    def drop_fds(self):
        """Close descriptors that arrived and nobody asked for."""
        if self.arrived is not None:
            self.keep_first(0)

    def close_now(self):
        self.drop_fds()
        SocketBytes.close_now(self)


_open_pipes = weakref.WeakSet()


cdef class PipeBytes(ByteEndpoint):
    """One or two pipe or FIFO ends: read from `read_fd`, write to `write_fd`; -1 for a direction that does not exist.

    A forked child's copies are closed in it at once. It could not use them, and a pipe's end is only over when the last
    copy is closed: a child that held one of its own peer's ends would never see that peer die."""

    def __init__(self, int read_fd, int write_fd, *, address=None, peer=None, wire=None):
        self.address = address
        self.peer = peer
        self.wire = wire
        for fd in (read_fd, write_fd):
            if fd >= 0:
                os.set_blocking(fd, False)
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.buffered = False
        _open_pipes.add(self)

    def __dealloc__(self):
        if self.read_fd >= 0:
            c_close(self.read_fd)
        if self.write_fd >= 0 and self.write_fd != self.read_fd:
            c_close(self.write_fd)

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        cdef ssize_t r
        cdef int e, fd = self.read_fd
        while True:
            if n > SCRATCH:
                self.users += 1
                with nogil:
                    r = c_read(fd, p, n)
                    e = errno
                self.leave()
            else:
                r = c_read(fd, p, n)
                e = errno
            if r >= 0:
                return r
            if e == EAGAIN:
                self.want = READ
                return AGAIN
            if e != EINTR:
                return error(e)
            PyErr_CheckSignals()
            fd = self.read_fd

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        # SIGPIPE: Python ignores it at start (signal module docs); a program that restored it chose to die of it.
        cdef ssize_t r
        cdef int e, i, fd = self.write_fd
        cdef size_t total = 0
        for i in range(count):
            total += iov[i].iov_len
        while True:
            if total > SCRATCH:
                self.users += 1
                with nogil:
                    r = writev(fd, iov, count)
                    e = errno
                self.leave()
            else:
                r = writev(fd, iov, count)
                e = errno
            if r >= 0:
                return r
            if e == EAGAIN:
                self.want = WRITE
                return AGAIN
            if e != EINTR:
                return error(e)
            PyErr_CheckSignals()
            fd = self.write_fd

    def unread(self):
        cdef int n = 0
        if self.write_fd >= 0 and ioctl(self.write_fd, FIONREAD, &n) < 0:
            error(errno)
        return n

    def shutdown_write(self):
        cdef int fd = self.write_fd
        if fd >= 0 and fd != self.read_fd:
            self.write_fd = -1
            c_close(fd)

    def close_now(self):
        cdef int r = self.read_fd, w = self.write_fd
        self.read_fd = self.write_fd = -1
        if r >= 0:
            c_close(r)
        if w >= 0 and w != r:
            c_close(w)

    def detach_state(self):
        """Give the descriptors away: this object forgets them."""
        how = "pipe" if self.read_fd >= 0 and self.write_fd >= 0 else "pipe-read" if self.read_fd >= 0 else "pipe-write"
        fds = [fd for fd in (self.read_fd, self.write_fd) if fd >= 0]
        self.read_fd = self.write_fd = -1
        return how, fds


def _close_inherited():
    cdef PipeBytes pipe
    for pipe in list(_open_pipes):
        pipe.users = 0                   # the threads that were inside a call are the parent's
        pipe.close_now()


os.register_at_fork(after_in_child=_close_inherited)
