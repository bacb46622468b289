# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Wakeups: a descriptor that one side waits for and any thread makes readable.

`wakeup.h` has the two operations and says why no wake is lost. Here is where the descriptors come from, and who closes
them: the Wakeup, once, under the GIL.
"""

from libc.errno cimport errno

import os
import socket

from anywire.engine.loopback import loopback_pair

cdef extern from "<sys/eventfd.h>" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)


cdef class Wakeup:
    """Wakes whoever waits for its descriptor to become readable.

    Args:
        kind: "eventfd" (default), "socketpair", "pipe", or "loopback": a TCP connection to itself over 127.0.0.1, for
            where nothing else exists. For signal.set_wakeup_fd take a socketpair: an eventfd takes no single bytes.

    Thread-safe: `wake` may be called by any thread and by signal handlers; `drain` by those that wait. Many wakes before
    a drain cost one write and are one wake. First put down what there is to do, then wake; first drain, then look.

    >>> with Wakeup() as wakeup:
    ...     wakeup.wake()
    ...     wakeup.wake()
    ...     wakeup.drain(), wakeup.drain()
    (True, False)

    Raises:
        ValueError: no such kind.
        OSError: no descriptors are left; for "loopback" also: the interface is down.
    """

    def __cinit__(self, str kind not None="eventfd"):
        cdef int fd
        self.c.read_fd = -1
        self.c.write_fd = -1
        self.kind = kind
        if kind == "eventfd":
            fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if fd < 0:
                raise OSError(errno, f"eventfd: {os.strerror(errno)}")
            self.c.counter = 1
            self.start(fd, fd)
        elif kind == "pipe":
            ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self.start(ends[0], ends[1])
        elif kind == "socketpair" or kind == "loopback":
            ends = socket.socketpair() if kind == "socketpair" else loopback_pair()
            for end in ends:
                end.setblocking(False)
            self.start(ends[0].detach(), ends[1].detach())
        else:
            raise ValueError(f"no wakeup is called {kind!r}; there are eventfd, socketpair, pipe, loopback")

    cdef int start(self, int read_fd, int write_fd) except -1:
        self.c.read_fd = read_fd
        self.c.write_fd = write_fd
        return 0

    def __dealloc__(self):
        if self.c.read_fd >= 0:
            c_close(self.c.read_fd)
            if self.c.write_fd != self.c.read_fd:
                c_close(self.c.write_fd)

    def fileno(self):
        """The descriptor that becomes readable. ValueError: it is closed."""
        if self.c.read_fd < 0:
            raise ValueError("this wakeup is closed")
        return self.c.read_fd

    @property
    def write_fd(self):
        """The descriptor that wakes; the same for an eventfd. What others write there is drained, too."""
        if self.c.read_fd < 0:
            raise ValueError("this wakeup is closed")
        return self.c.write_fd

    @property
    def writes(self):
        """How many writes all wakes so far have cost."""
        return self.c.written

    def wake(self):
        """Make the descriptor readable, if it isn't. ValueError: it is closed."""
        cdef int e
        if self.c.read_fd < 0:
            raise ValueError("this wakeup is closed")
        e = aw_wake(&self.c)
        if e:
            raise OSError(e, f"waking by {self.kind}: {os.strerror(e)}")

    def drain(self):
        """Make it unreadable until the next wake. Returns whether there had been one.

        Look at what there is to do after this, not before.
        """
        cdef int flag = self.c.flag
        if self.c.read_fd < 0:
            raise ValueError("this wakeup is closed")
        aw_drain(&self.c)
        return bool(flag)

    def close(self):
        """Close its descriptors; nobody can wake by it any more."""
        cdef int read_fd = self.c.read_fd, write_fd = self.c.write_fd
        self.c.read_fd = -1
        self.c.write_fd = -1
        if read_fd >= 0:
            c_close(read_fd)
            if write_fd != read_fd:
                c_close(write_fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
