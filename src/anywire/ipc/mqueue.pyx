# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""POSIX message queues (mq_overview(7)): whole messages by priority, kept by the kernel until somebody takes them.

Any thread, any number of threads at a time, in any number of processes; C programs share the same queues.

How a wait works. The kernel's timed calls measure by CLOCK_REALTIME, which anybody may step. So here:

- Without a time-out: a blocking call, in which the kernel hands a message from sender to receiver directly. (A poll before
  it, or a timer that ends it now and then, would cost 6 % and more of a round trip.) `close` ends it by a signal
  (interrupt.h); a thread that has that signal blocked waits as with a time-out.
- With a time-out: a call whose deadline is long past (so it never waits), then ppoll(2) with a deadline of
  CLOCK_MONOTONIC for the queue and for `close`, and so on. Linux's queue descriptors can be polled (mq_overview(7), "Polling message queue descriptors").
- In an event loop: the same without waiting, and the loop watches the descriptor.

The description is left blocking unless the user asks: O_NONBLOCK belongs to it and is shared with forked children. The GIL
is released in every wait, and held for short calls that can't wait. Messages are received into one buffer a queue (one more
for each further thread that receives at the same moment), and copied out with their exact length.

What can go wrong: the limits, which `mqueue_limits.py` explains; a queue closed by another thread (EBADF); a message over the queue's size (EMSGSIZE).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport (EAGAIN, EBADF, EEXIST, EINTR, EINVAL, EMSGSIZE, ETIMEDOUT, errno)
from libc.stdint cimport int64_t
from posix.time cimport timespec
from posix.unistd cimport usleep
from anywire.ipc._system cimport as_timespec, deadline, encoded, fail, failure, left, now

import os
import secrets
import sys
import threading
import warnings
import weakref

from anywire.ipc.unlinking import Unlink

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <mqueue.h>
    #include <poll.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static int anywire_mq_open(const char* name, int flags, mode_t mode, long count, long size) {
        struct mq_attr a = { .mq_maxmsg = count, .mq_msgsize = size };
        return mq_open(name, flags, mode, count ? &a : NULL);
    }
    static int anywire_poll_two(int fd, short events, int waker, const struct timespec* left) {
        struct pollfd p[2] = { { fd, events, 0 }, { waker, POLLIN, 0 } };
        return ppoll(p, 2, left, NULL);
    }
    /* The C library would run SIGEV_THREAD's function on a thread of its own; the kernel itself sends `cookie` through a
     * netlink socket (ipc/mqueue.c), which any thread and any event loop can wait for. */
    static int anywire_mq_notify_socket(int fd, int socket, const char* cookie) {
        struct sigevent e;
        memset(&e, 0, sizeof(e));
        e.sigev_notify = SIGEV_THREAD;
        e.sigev_signo = socket;
        e.sigev_value.sival_ptr = (void*) cookie;
        return (int) syscall(SYS_mq_notify, fd, &e);
    }
    static int anywire_mq_notify_signal(int fd, int kind, int signo, int value) {
        struct sigevent e;
        memset(&e, 0, sizeof(e));
        e.sigev_notify = kind;
        e.sigev_signo = signo;
        e.sigev_value.sival_int = value;
        return mq_notify(fd, &e);
    }
    """
    struct mq_attr:
        long mq_flags
        long mq_maxmsg
        long mq_msgsize
        long mq_curmsgs
    int mq_getattr(int fd, mq_attr* a) nogil
    int mq_setattr(int fd, const mq_attr* new, mq_attr* old) nogil
    int mq_unlink(const char* name) nogil
    int mq_notify(int fd, void* e) nogil
    int mq_timedsend(int fd, const char* p, size_t n, unsigned int priority, const timespec* end) nogil
    ssize_t mq_timedreceive(int fd, char* p, size_t n, unsigned int* priority, const timespec* end) nogil
    int open_queue "anywire_mq_open"(const char* name, int flags, int mode, long count, long size) nogil
    int poll_two "anywire_poll_two"(int fd, short events, int waker, const timespec* left) nogil
    int notify_socket "anywire_mq_notify_socket"(int fd, int socket, const char* cookie) nogil
    int notify_signal "anywire_mq_notify_signal"(int fd, int kind, int signo, int value) nogil
    short POLLIN, POLLOUT
    int O_NONBLOCK, SIGEV_SIGNAL, SIGEV_NONE

cdef extern from "anywire/ipc/interrupt.h":
    struct aw_waiter:
        pass
    void aw_enlist(aw_waiter** all, aw_waiter* one)
    void aw_delist(aw_waiter* one)
    bint aw_interruptible()
    void aw_interrupt_begin()
    void aw_interrupt(aw_waiter* all)
    void aw_interrupt_end()

cdef enum:
    SPARES = 4
    SMALL = 4096                   # bytes that are copied while the GIL is held: releasing it costs more
    NOT_NOW = -2                   # what the calls below answer when the queue is empty or full
    PRIORITIES = 32768             # MQ_PRIO_MAX

cdef timespec _past                # of the deadline that never waits; the kernel knows 0 as a special case
_past.tv_sec = _past.tv_nsec = 0

cdef int _generation = 0           # how many times this process is a forked child: waits under way are the parent's
cdef object _interrupting = threading.Lock()
cdef int64_t PATIENCE = 1000000000  # nanoseconds until `close` gives up on a thread that took to blocking the signal


def _forked():
    global _generation, _interrupting
    _generation += 1
    if _interrupting.locked():
        aw_interrupt_end()
        _interrupting = threading.Lock()


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


cdef unsigned int checked(object priority) except? 40000:
    cdef long level
    if type(priority) is int and 0 <= priority < PRIORITIES:
        return priority
    try:
        level = priority.__index__()
    except OverflowError:
        level = -1
    except AttributeError:
        raise TypeError(f"priority is a whole number from 0 to {PRIORITIES - 1}, not {priority!r}") from None
    if not 0 <= level < PRIORITIES:
        raise ValueError(f"priority is a whole number from 0 to {PRIORITIES - 1}, not {priority!r}")
    return level


cdef int access_flag(object access) except -1:
    try:
        return ACCESS[access]
    except (KeyError, TypeError):
        raise ValueError(f"access is 'r', 'w' or 'rw', not {access!r}") from None


cdef class MessageQueue:
    """An open POSIX message queue.

    Messages come out highest priority first, and oldest first among those of one priority. Sending needs no reader; what
    was sent stays when its sender ends, until somebody takes it, the queue is unlinked and closed by all, or the system
    restarts.

    Parameters: `name`, a slash and up to 255 bytes without one, or None for a new random one; `flags`, as mq_open(3) has
    them: one of O_RDONLY, O_WRONLY, O_RDWR, with any of O_CREAT, O_EXCL, O_NONBLOCK. Only for a queue that is made:
    `mode`, permission bits, less the umask; `max_messages`, how many it holds before `send` waits; `message_size`, the
    largest message in bytes (both default to the system's; `mqueue_limits.limits()` has them). `owner`: `close` unlinks
    the name, in the process that opened it here.

    Thread-safe. After a fork both processes have it open. Pickled, it opens the same name again; without a name it refuses
    (TypeError).

    >>> with MessageQueue.create("/anywire-example", owner=True) as queue:
    ...     queue.send(b"later")
    ...     queue.send(b"first", priority=9)
    ...     queue.recv(), queue.depth
    (b'first', 1)

    Raises FileNotFoundError, FileExistsError, PermissionError, and OSErrors that name the limit in the way.
    """

    cdef int fd
    cdef readonly object name
    cdef readonly long max_messages
    cdef readonly long message_size
    cdef readonly bint owner
    cdef object maker                  # the process that opened it
    cdef int users                     # threads in a system call without the GIL
    cdef aw_waiter* waiting            # those of them whose call only a signal ends
    cdef int generation
    cdef bint closing
    cdef int waker                     # eventfd that `close` makes readable; -1: nobody has waited long yet
    cdef char* spare[SPARES]           # buffers of message_size bytes that nobody uses
    cdef int spares
    cdef object notifications          # a WeakSet, or None
    cdef object __weakref__

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
        cdef MessageQueue queue = cls.__new__(cls)
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
                self.unlink_own()
        finally:
            self.current()
            if self.users == 0:
                self.let_go()
            else:
                if self.waker >= 0:
                    os.eventfd_write(self.waker, 1)
                if self.waiting != NULL:
                    self.interrupt()

    cdef int interrupt(self) except -1:
        """End the waits that only a signal ends. The GIL is released between the signals, so that they can end."""
        cdef int64_t end = now() + PATIENCE
        cdef int pause = 20
        with _interrupting:
            aw_interrupt_begin()
            try:
                while self.waiting != NULL and now() < end:
                    aw_interrupt(self.waiting)
                    with nogil:
                        usleep(pause)
                    pause = min(2 * pause, 5000)
            finally:
                aw_interrupt_end()
        return 0

    cdef int unlink_own(self) except -1:
        """Unlink the name if it still leads to this queue."""
        try:
            other = MessageQueue(self.name, os.O_RDONLY)
        except FileNotFoundError:
            return 0
        except OSError:
            pass                       # can't be looked at, so can't be compared
        else:
            try:
                if not os.path.samestat(os.fstat(other.fileno()), os.fstat(self.fd)):
                    return 0
            finally:
                other.close()
        try:
            remove(self.name)
        except FileNotFoundError:
            pass
        return 0

    cdef void let_go(self) noexcept:
        cdef int fd = self.fd, waker = self.waker
        self.fd = self.waker = -1
        if fd >= 0:
            os.close(fd)
        if waker >= 0:
            os.close(waker)
        while self.spares > 0:
            self.spares -= 1
            PyMem_RawFree(self.spare[self.spares])

    def __dealloc__(self):
        while self.spares > 0:
            self.spares -= 1
            PyMem_RawFree(self.spare[self.spares])

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
        return MessageQueue, (self.name, ACCESS[self.access] | (0 if self.blocking else os.O_NONBLOCK))

    # -- waiting --------------------------------------------------------------------------------------------------------

    cdef inline int usable(self) except -1:
        if self.closing:
            fail(EBADF, self.name, "the queue is closed on this side")
        return 0

    cdef inline int current(self) except -1:
        """In a forked child: the waits under way, and the eventfd that ends them, are the parent's."""
        if self.generation != _generation:
            self.generation = _generation
            self.users = 0
            self.waiting = NULL
            if self.waker >= 0:
                os.close(self.waker)
                self.waker = -1
        return 0

    cdef inline int enter(self) except -1:
        self.usable()
        self.current()
        self.users += 1
        return 0

    cdef inline void leave(self) noexcept:
        self.users -= 1
        if self.closing and self.users == 0:
            self.let_go()

    cdef int wait(self, short events, int64_t end) except -1:
        """Until the queue has one of the events (1), or the deadline has come (0). Between `enter` and `leave`."""
        cdef timespec t
        cdef int64_t rest
        cdef int found, e
        if self.waker < 0:
            self.waker = os.eventfd(0, os.EFD_CLOEXEC)
        while True:
            self.usable()
            with nogil:
                rest = left(end)
                if rest >= 0:
                    t = as_timespec(rest)
                found = poll_two(self.fd, events, self.waker, &t if rest >= 0 else NULL)
                e = errno
            if found < 0 and e == EINTR:
                PyErr_CheckSignals()
            elif found < 0:
                fail(e, self.name, "poll")
            else:
                self.usable()
                return found > 0

    cdef int not_now(self, str what, bint block, int64_t end, object timeout) except -1:
        """After a call that would have to wait: raise, or wait and return."""
        cdef short events = POLLOUT if what == "send" else POLLIN
        if not block:
            raise failure(EAGAIN, self.name, "the queue is full" if what == "send" else "the queue is empty")
        if end >= 0 and left(end) == 0 or not self.wait(events, end):
            state = "full" if what == "send" else "empty"
            raise failure(ETIMEDOUT, self.name, f"{what}: the queue stayed {state} for {timeout} s")
        return 0

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int put(self, const char* p, Py_ssize_t n, unsigned int priority, bint waits) except -3:
        """One call. 0, or, if it must not wait, NOT_NOW."""
        cdef int r, e
        cdef aw_waiter waiter
        while True:
            if waits:
                aw_enlist(&self.waiting, &waiter)
                with nogil:
                    r = mq_timedsend(self.fd, p, n, priority, NULL)
                    e = errno
                aw_delist(&waiter)
            elif n <= SMALL:
                r = mq_timedsend(self.fd, p, n, priority, &_past)
                e = errno
            else:
                with nogil:
                    r = mq_timedsend(self.fd, p, n, priority, &_past)
                    e = errno
            if r == 0:
                return 0
            if not waits and (e == ETIMEDOUT or e == EAGAIN):
                return NOT_NOW
            if e != EINTR:
                self.refuse_send(e, n, priority)
            PyErr_CheckSignals()
            self.usable()

    cdef int refuse_send(self, int e, Py_ssize_t n, unsigned int priority) except -1:
        if e == EMSGSIZE:
            from anywire.ipc import mqueue_limits
            fail(e, self.name, mqueue_limits.explain_size(n, self.message_size))
        if e == EAGAIN:
            fail(e, self.name, "the queue is full, and opened with O_NONBLOCK")
        if e == EBADF:
            fail(e, self.name, "the queue is open for receiving only")
        return fail(e, self.name)

    cdef int send_buffer(self, object data, object priority, object timeout, bint block, bint once) except -3:
        """`once`: never wait; NOT_NOW if it would have to. Else 0, or raises."""
        cdef Py_buffer view
        cdef const char* p
        cdef Py_ssize_t n
        cdef unsigned int level = checked(priority)
        cdef int64_t end = -1
        cdef bint held = False
        if timeout is not None:
            end = deadline(timeout)
        self.enter()
        try:
            if PyBytes_CheckExact(data):
                p = PyBytes_AS_STRING(data)
                n = PyBytes_GET_SIZE(data)
            else:
                PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
                held = True
                p = <const char*> view.buf
                n = view.len
            if self.put(p, n, level, False) == 0:
                return 0
            if once:
                return NOT_NOW
            if end < 0 and block and aw_interruptible():
                return self.put(p, n, level, True)
            block = block and self.blocks()
            while True:
                self.not_now("send", block, end, timeout)
                if self.put(p, n, level, False) == 0:
                    return 0
        finally:
            if held:
                PyBuffer_Release(&view)
            self.leave()

    def send(self, data, priority=0, timeout=None, *, bint block=True):
        """Put a message into the queue, its bytes unchanged; no reader is needed.

        Parameters: `data`, bytes or any contiguous buffer, at most `message_size` bytes, may be empty; `priority`, 0 to
        32767, higher ones are received first; `timeout`, how many seconds to wait while the queue is full, None for any
        time; `block=False`, don't wait.
        Raises TimeoutError, BlockingIOError, ValueError (priority), OSError: EMSGSIZE (too large), EBADF (closed, or
        opened for receiving only)."""
        self.send_buffer(data, priority, timeout, block, False)

    def _try_send(self, data, priority=0):
        """Whether the message went; never waits."""
        return self.send_buffer(data, priority, None, False, True) == 0

    async def send_async(self, data, priority=0, timeout=None):
        """As `send`, waiting in the running event loop. A cancelled one has sent nothing."""
        if self.send_buffer(data, priority, None, False, True) == 0:
            return
        from anywire.ipc import mqueue_async
        await mqueue_async.send(self, data, priority, timeout)

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef char* borrow(self) except NULL:
        """A buffer of message_size bytes."""
        cdef char* p
        if self.spares > 0:
            self.spares -= 1
            return self.spare[self.spares]
        p = <char*> PyMem_RawMalloc(self.message_size)
        if p == NULL:
            raise MemoryError(f"no memory for messages of {self.message_size} bytes")
        return p

    cdef void give_back(self, char* p) noexcept:
        if self.spares < SPARES and self.fd >= 0:
            self.spare[self.spares] = p
            self.spares += 1
        else:
            PyMem_RawFree(p)

    cdef Py_ssize_t get(self, char* p, Py_ssize_t n, unsigned int* priority, bint waits) except -3:
        """One call. The length, or, if it must not wait, NOT_NOW."""
        cdef Py_ssize_t r
        cdef int e
        cdef aw_waiter waiter
        while True:
            if waits:
                aw_enlist(&self.waiting, &waiter)
                with nogil:
                    r = mq_timedreceive(self.fd, p, n, priority, NULL)
                    e = errno
                aw_delist(&waiter)
            elif n <= SMALL * 4:
                r = mq_timedreceive(self.fd, p, n, priority, &_past)
                e = errno
            else:
                with nogil:
                    r = mq_timedreceive(self.fd, p, n, priority, &_past)
                    e = errno
            if r >= 0:
                return r
            if not waits and (e == ETIMEDOUT or e == EAGAIN):
                return NOT_NOW
            if e == EAGAIN:
                fail(e, self.name, "the queue is empty, and opened with O_NONBLOCK")
            if e == EBADF:
                fail(e, self.name, "the queue is open for sending only")
            if e == EMSGSIZE:
                fail(e, self.name, f"the buffer has {n} bytes, and this queue's messages up to {self.message_size}: pass "
                                   "a buffer of that size")
            if e != EINTR:
                fail(e, self.name)
            PyErr_CheckSignals()
            self.usable()

    cdef Py_ssize_t receive(self, char* p, Py_ssize_t n, unsigned int* priority, object timeout, bint block,
                            bint once) except -3:
        """The next message's length. `once`: never wait; NOT_NOW if there is none. Between `enter` and `leave`."""
        cdef Py_ssize_t r
        cdef int64_t end = -1
        cdef bint direct
        if timeout is not None:
            end = deadline(timeout)
        while True:
            direct = end < 0 and block and not once and aw_interruptible()
            r = self.get(p, n, priority, direct)
            if r != NOT_NOW:
                return r
            if once:
                return NOT_NOW
            self.not_now("recv", block and self.blocks(), end, timeout)

    cdef object next_message(self, bint with_priority, object timeout, bint block, bint once):
        cdef unsigned int priority = 0
        cdef Py_ssize_t n
        cdef char* p
        self.enter()
        try:
            p = self.borrow()
            try:
                n = self.receive(p, self.message_size, &priority, timeout, block, once)
                if n == NOT_NOW:
                    return None
                message = PyBytes_FromStringAndSize(p, n)
            finally:
                self.give_back(p)
        finally:
            self.leave()
        return (message, priority) if with_priority else message

    cdef tuple next_into(self, object buffer, object timeout, bint block, bint once):
        """(length, priority), or None."""
        cdef unsigned int priority = 0
        cdef Py_buffer view
        cdef Py_ssize_t n
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self.enter()
            try:
                n = self.receive(<char*> view.buf, view.len, &priority, timeout, block, once)
            finally:
                self.leave()
        finally:
            PyBuffer_Release(&view)
        return None if n == NOT_NOW else (n, priority)

    def recv(self, timeout=None, *, bint block=True):
        """Take the next message: the oldest of the highest priority.

        Parameters: `timeout`, how many seconds to wait for one, None for any time; `block=False`, don't wait.
        Raises TimeoutError, BlockingIOError, OSError: EBADF (closed, or opened for sending only)."""
        return self.next_message(False, timeout, block, False)

    def recv_with_priority(self, timeout=None, *, bint block=True):
        """As `recv`, with the priority that the message was sent with: (message, priority)."""
        return self.next_message(True, timeout, block, False)

    def recv_into(self, buffer, timeout=None, *, bint block=True):
        """As `recv`, into a writable buffer of at least `message_size` bytes; returns the message's length.

        Raises also OSError (EMSGSIZE) for a smaller buffer, whatever message is next: then none is taken."""
        return self.next_into(buffer, timeout, block, False)[0]

    def recv_into_with_priority(self, buffer, timeout=None, *, bint block=True):
        """As `recv_into`, with the priority: (length, priority)."""
        return self.next_into(buffer, timeout, block, False)

    def _try_recv(self):
        """(message, priority), or None; never waits."""
        return self.next_message(True, None, False, True)

    def _try_recv_into(self, buffer):
        """(length, priority), or None; never waits."""
        return self.next_into(buffer, None, False, True)

    async def recv_async(self, timeout=None):
        """As `recv`, waiting in the running event loop. A cancelled one has taken nothing."""
        found = self.next_message(False, None, False, True)
        if found is None:
            from anywire.ipc import mqueue_async
            found = (await mqueue_async.receive(self, timeout))[0]
        return found

    async def recv_with_priority_async(self, timeout=None):
        """As `recv_with_priority`, waiting in the running event loop."""
        found = self.next_message(True, None, False, True)
        if found is None:
            from anywire.ipc import mqueue_async
            found = await mqueue_async.receive(self, timeout)
        return found

    async def recv_into_async(self, buffer, timeout=None):
        """As `recv_into`, waiting in the running event loop."""
        found = self.next_into(buffer, None, False, True)
        if found is None:
            from anywire.ipc import mqueue_async
            found = await mqueue_async.receive_into(self, buffer, timeout)
        return found[0]

    def __iter__(self):
        """The messages, one after the other, waiting for each, until the queue is closed on this side."""
        return self

    def __next__(self):
        try:
            return self.next_message(False, None, True, False)
        except OSError:
            if self.closing:
                raise StopIteration from None
            raise

    def __aiter__(self):
        """The messages, one after the other, waiting in the running event loop, until the queue is closed here."""
        return self

    async def __anext__(self):
        try:
            return await self.recv_async()
        except OSError:
            if self.closing:
                raise StopAsyncIteration from None
            raise

    # -- being notified -------------------------------------------------------------------------------------------------

    def notify(self, callback, *, once=False, loop=None):
        """Have `callback()` called when a message comes into the empty queue: see `mqueue_notify.Notification`, which
        this returns. On a thread of its own, or, with an event loop as `loop`, there.

        It is armed again before each call, and called at once if messages wait already: so a callback that takes all
        messages (`recv(block=False)` until BlockingIOError) misses none. `once=True`: one call, of the next message into
        the empty queue. One process at a time can be notified for a queue. Raises OSError: EBUSY."""
        from anywire.ipc.mqueue_notify import Notification
        self.usable()
        notification = Notification(self, callback, once, loop)
        if self.notifications is None:
            self.notifications = weakref.WeakSet()
        self.notifications.add(notification)
        return notification

    def notify_signal(self, int signo, int value=0):
        """Have one signal sent to this process when the next message comes into the empty queue (mq_notify(3)).

        `value`, a C int, comes with it (`signal.sigwaitinfo` shows who sent the message). For another one, call again,
        *before* taking the messages. `stop_notify` takes it back. Raises OSError: EBUSY, EINVAL."""
        self.usable()
        if notify_signal(self.fd, SIGEV_SIGNAL, signo, value) < 0:
            self._refuse_notify(errno)

    def _notify_socket(self, int socket, bytes cookie):
        """Have the kernel send the cookie (32 bytes) into a netlink socket."""
        self.usable()
        if len(cookie) != 32:
            raise ValueError("a cookie has 32 bytes")
        if notify_socket(self.fd, socket, cookie) < 0:
            self._refuse_notify(errno)

    def stop_notify(self):
        """Take back what this process asked for by `notify_signal` (or `notify`, which asks again by itself: cancel it).
        Does nothing when another process, or nobody, is to be notified."""
        self.usable()
        if mq_notify(self.fd, NULL) < 0:
            fail(errno, self.name)

    def _refuse_notify(self, int e):
        from anywire.ipc import mqueue_limits
        fail(e, self.name, mqueue_limits.explain_notify(e, self.fd))
