# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""An open POSIX message queue: opening and closing it, its name, what it is. `mqueue.pyx` sends and receives.

Any thread. `close` waits for no other thread: it ends their waits (by an eventfd where they poll, by a signal where they
are in a blocking call: interrupt.h), and the last of them closes the descriptor. So a number is never closed, or used
for something else, while a thread is in a system call with it. In a forked child the waits are the parent's.

What can go wrong: names and limits, which `mqueue_limits.py` explains.
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBADF, EEXIST, EINTR, errno
from libc.stdint cimport int64_t
from posix.unistd cimport usleep
from anywire.ipc._interrupt cimport interrupting_signal
from anywire.ipc._system cimport encoded, fail, now

import os
import secrets
import sys
import warnings

from anywire.ipc.unlinking import Unlink

cdef extern from *:
    """
    #include <fcntl.h>
    #include <mqueue.h>
    static int anywire_mq_open(const char* name, int flags, mode_t mode, long count, long size) {
        struct mq_attr a = { .mq_maxmsg = count, .mq_msgsize = size };
        return mq_open(name, flags, mode, count ? &a : NULL);
    }
    """
    int mq_getattr(int fd, mq_attr* a) nogil
    int mq_setattr(int fd, const mq_attr* new, mq_attr* old) nogil
    int mq_unlink(const char* name) nogil
    int open_queue "anywire_mq_open"(const char* name, int flags, int mode, long count, long size) nogil
    int O_NONBLOCK

cdef extern from "anywire/ipc/interrupt.h":
    void aw_interrupt(const aw_waiter* all, int number)

cdef int _generation = 0           # how many times this process is a forked child: waits under way are the parent's
cdef int64_t PATIENCE = 1000000000  # nanoseconds until `close` gives up on a thread that took to blocking the signal


def _forked():
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)

cdef dict ACCESS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}


def remove(name):
    """Take the name away now; the queue goes when the last one who has it open closes it.

    Raises FileNotFoundError, PermissionError.
    """
    cdef bytes raw = encoded(name, "a message queue", "/orders")
    cdef int e
    if mq_unlink(raw) < 0:
        e = errno
        from anywire.ipc import mqueue_limits
        fail(e, name, mqueue_limits.explain_name(e, name))


cdef int access_flag(object access) except -1:
    try:
        return ACCESS[access]
    except (KeyError, TypeError):
        raise ValueError(f"access is 'r', 'w' or 'rw', not {access!r}") from None


cdef class OpenQueue:
    """What a MessageQueue is, but for its messages."""

    unlink = Unlink(remove)

    def __cinit__(self, *args, **keywords):
        self.fd = self.waker = -1
        self.closing = True
        self.generation = _generation

    def __init__(self, name, flags=os.O_RDWR, mode=0o600, max_messages=None, message_size=None, *, owner=False):
        cdef long count = 0, size = 0
        cdef int fd, e, how = flags, bits = mode
        cdef bytes raw
        if self.maker is not None:
            raise RuntimeError("this queue was opened already")
        if max_messages is not None or message_size is not None:
            from anywire.ipc import mqueue_limits
            count, size = mqueue_limits.complete(max_messages, message_size)
        if name is None:
            if not how & os.O_CREAT:
                raise ValueError("only a queue that is made can have a random name: pass a name, or use create()")
            how |= os.O_EXCL
        while True:
            path = f"/anywire-{secrets.token_hex(8)}" if name is None else name
            raw = encoded(path, "a message queue", "/orders")
            fd = open_queue(raw, how, bits, count, size)
            e = errno
            if fd >= 0:
                break
            if e == EINTR:
                PyErr_CheckSignals()
            elif e != EEXIST or name is not None:
                from anywire.ipc import mqueue_limits
                fail(e, path, mqueue_limits.explain(e, path, how, count, size))
        self.take(fd, path, owner)

    cdef int take(self, int fd, object name, bint owner) except -1:
        cdef mq_attr a
        if mq_getattr(fd, &a) < 0:
            fail(errno, name, "the descriptor is not a message queue's")
        self.fd = fd
        self.name = name
        self.owner = owner
        self.maker = os.getpid()
        self.max_messages = a.mq_maxmsg
        self.message_size = a.mq_msgsize
        self.closing = False
        return 0

    # -- opening by intent ----------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, name=None, max_messages=None, message_size=None, *, mode=0o600, access="rw", owner=False):
        """Make a queue that does not exist yet; None makes up a name. Raises FileExistsError."""
        return cls(name, access_flag(access) | os.O_CREAT | os.O_EXCL, mode=mode, max_messages=max_messages,
                   message_size=message_size, owner=owner)

    @classmethod
    def open(cls, name, *, access="rw", owner=False):
        """Open a queue that exists. Raises FileNotFoundError."""
        return cls(name, access_flag(access), owner=owner)

    @classmethod
    def create_or_open(cls, name, max_messages=None, message_size=None, *, mode=0o600, access="rw", owner=False):
        """Open the queue, made if it is not there. One that is there keeps its mode and sizes: look at them."""
        return cls(name, access_flag(access) | os.O_CREAT, mode=mode, max_messages=max_messages,
                   message_size=message_size, owner=owner)

    @classmethod
    def from_fd(cls, int fd):
        """A queue from its descriptor, inherited or received from another process; takes it over. Raises OSError (EBADF)
        for what is no queue's."""
        cdef OpenQueue queue = cls.__new__(cls)
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            fail(EBADF, None)
        queue.take(fd, name if name.startswith("/") and not name.endswith(" (deleted)") else None, False)
        return queue

    @staticmethod
    def limits():
        """What the system allows now, as `mqueue_limits.Limits`."""
        from anywire.ipc import mqueue_limits
        return mqueue_limits.limits()

    # -- closing --------------------------------------------------------------------------------------------------------

    def close(self):
        """Close it, on this side only; an `owner` unlinks the name. Closing again does nothing.

        Waits of other threads, and those of tasks, end with an OSError (EBADF), unless they just get their message, or
        send it."""
        if self.closing:
            return
        if self.notifications:
            for notification in list(self.notifications):
                notification.cancel()
        self.closing = True
        waiting = sys.modules.get("anywire.ipc.waiting")
        if waiting is not None:                # else nobody has waited in a loop
            waiting.forget(self.fd)
        try:
            if self.owner and self.maker == os.getpid():
                self._unlink_own()
        finally:
            self.current()
            if self.users == 0:
                self.let_go()
            else:
                if self.waker >= 0:
                    os.eventfd_write(self.waker, 1)
                if self.waiting != NULL:
                    self.interrupt()

    def _nudge(self):
        """End the waits of other threads in `_recv_until_nudged` and `_send_until_nudged`."""
        self.nudges += 1
        self.current()
        if self.waiting != NULL:
            self.interrupt()

    cdef int interrupt(self) except -1:
        """End the waits that only a signal ends. The GIL is released between the signals, so that they can end."""
        cdef int64_t end = now() + PATIENCE
        cdef int pause = 20
        while self.waiting != NULL and now() < end:
            aw_interrupt(self.waiting, interrupting_signal())
            with nogil:
                usleep(pause)
            pause = min(2 * pause, 5000)
        return 0

    def _unlink_own(self):
        """Unlink the name if it still leads to this queue: somebody may have unlinked it and made another. OSError."""
        try:
            other = OpenQueue(self.name, os.O_RDONLY)
        except FileNotFoundError:
            return
        except OSError:
            pass                       # can't be looked at, so can't be compared
        else:
            try:
                if not os.path.samestat(os.fstat(other.fileno()), os.fstat(self.fd)):
                    return
            finally:
                other.close()
        try:
            remove(self.name)
        except FileNotFoundError:
            pass

    cdef void let_go(self) noexcept:
        cdef int fd = self.fd, waker = self.waker
        self.fd = self.waker = -1
        if fd >= 0:
            os.close(fd)
        if waker >= 0:
            os.close(waker)

    def __del__(self):
        if not self.closing:
            warnings.warn(f"message queue {self.name} was never closed", ResourceWarning, stacklevel=1, source=self)
            self.close()

    def __enter__(self):
        self.usable()
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def closed(self):
        """Whether `close` was called here."""
        return self.closing

    def fileno(self):
        """The descriptor: readable when a message waits, writable when there is room. Don't read or write it."""
        self.usable()
        return self.fd

    # -- what it is -----------------------------------------------------------------------------------------------------

    cdef mq_attr attributes(self) except *:
        cdef mq_attr a
        self.usable()
        if mq_getattr(self.fd, &a) < 0:
            fail(errno, self.name)
        return a

    @property
    def depth(self):
        """How many messages are in the queue now."""
        return self.attributes().mq_curmsgs

    cdef bint blocks(self) except -1:
        return not self.attributes().mq_flags & O_NONBLOCK

    @property
    def blocking(self):
        """False: O_NONBLOCK is set, and `send` and `recv` raise BlockingIOError instead of waiting, whatever their
        time-out. It belongs to what was opened here, so a forked child has and sets the same one."""
        return bool(self.blocks())

    @blocking.setter
    def blocking(self, bint value):
        cdef mq_attr a = self.attributes()
        a.mq_flags = 0 if value else O_NONBLOCK
        if mq_setattr(self.fd, &a, NULL) < 0:
            fail(errno, self.name)

    @property
    def access(self):
        """'r', 'w' or 'rw'."""
        import fcntl
        self.usable()
        mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        return "rw" if mode == os.O_RDWR else "w" if mode == os.O_WRONLY else "r"

    def __repr__(self):
        state = "closed" if self.closing else f"fd={self.fd}"
        return f"<{type(self).__name__} {self.name} {state} {self.max_messages} x {self.message_size} B>"

    def __reduce__(self):
        self.usable()
        if self.name is None:
            raise TypeError("this queue has no name by which another process could open it")
        return type(self), (self.name, ACCESS[self.access] | (0 if self.blocking else os.O_NONBLOCK))

    # -- waiting --------------------------------------------------------------------------------------------------------

    cdef int usable(self) except -1:
        if self.closing:
            fail(EBADF, self.name, "the queue is closed on this side")
        return 0

    cdef int current(self) except -1:
        """In a forked child: the waits under way, and the eventfd that ends them, are the parent's."""
        if self.generation != _generation:
            self.generation = _generation
            self.users = 0
            self.waiting = NULL
            if self.waker >= 0:
                os.close(self.waker)
                self.waker = -1
        return 0

    cdef int enter(self) except -1:
        self.usable()
        self.current()
        self.users += 1
        return 0

    cdef void leave(self) noexcept:
        self.users -= 1
        if self.closing and self.users == 0:
            self.let_go()
