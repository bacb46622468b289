# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""POSIX message queues (mq_overview(7)): whole messages by priority, kept by the kernel until somebody takes them.

Any thread, any number of threads at a time, in any number of processes; C programs share the same queues.

How a wait works. The kernel's timed calls measure by CLOCK_REALTIME, which anybody may step. So here:

- Without a time-out: a blocking call, in which the kernel hands a message from sender to receiver directly. (A poll before
  it, or a timer that ends it now and then, would cost 6 % and more of a round trip.) `close` ends it by a signal
  (interrupt.h); a thread that has that signal blocked waits as with a time-out, and so do all where none is free.
- With a time-out: a call whose deadline is long past (so it never waits), then ppoll(2) with a deadline of
  CLOCK_MONOTONIC for the queue and for `close`, and so on. Linux's queue descriptors can be polled (mq_overview(7),
  "Polling message queue descriptors").
- In an event loop: the same without waiting, and the loop watches the descriptor.

The description is left blocking unless the user asks: O_NONBLOCK belongs to it and is shared with forked children. The GIL
is released in every wait, and held for short calls that can't wait. Messages are received into one buffer a queue (one more
for each further thread that receives at the same moment), and copied out with their exact length.

What can go wrong: the limits, which `mqueue_limits.py` explains; a queue closed by another thread (EBADF); a message over
the queue's size (EMSGSIZE).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport EAGAIN, EBADF, EINTR, EMSGSIZE, ETIMEDOUT, errno
from libc.stdint cimport int64_t
from posix.time cimport timespec
from anywire.ipc._interrupt cimport known_signal
from anywire.ipc._mqueue_notify cimport NotifyingQueue
from anywire.ipc._mqueue_open cimport OpenQueue, aw_delist, aw_enlist, aw_interruptible, aw_waiter
from anywire.ipc._system cimport as_timespec, deadline, fail, failure, left

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <mqueue.h>
    #include <poll.h>
    static int anywire_poll_two(int fd, short events, int waker, const struct timespec* left) {
        struct pollfd p[2] = { { fd, events, 0 }, { waker, POLLIN, 0 } };
        return ppoll(p, 2, left, NULL);
    }
    """
    int mq_send(int fd, const char* p, size_t n, unsigned int priority) nogil
    ssize_t mq_receive(int fd, char* p, size_t n, unsigned int* priority) nogil
    int mq_timedsend(int fd, const char* p, size_t n, unsigned int priority, const timespec* end) nogil
    ssize_t mq_timedreceive(int fd, char* p, size_t n, unsigned int* priority, const timespec* end) nogil
    int poll_two "anywire_poll_two"(int fd, short events, int waker, const timespec* left) nogil
    short POLLIN, POLLOUT

cdef enum:
    SPARES = 4
    SMALL = 4096                   # bytes that are copied while the GIL is held: releasing it costs more
    NOT_NOW = -2                   # what the calls below answer when the queue is empty or full
    PRIORITIES = 32768             # MQ_PRIO_MAX
    ONCE = 1                       # try, never wait
    UNTIL_NUDGED = 2               # try; wait in a blocking call only, which `_nudge` ends

cdef timespec _past                # of the deadline that never waits; the kernel knows 0 as a special case
_past.tv_sec = _past.tv_nsec = 0


cdef bint interruptible() noexcept:
    """Whether a signal can end a call of this thread: one is free, and the thread has not blocked it."""
    try:
        return aw_interruptible(known_signal())
    except OSError:
        return False


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


cdef class MessageQueue(NotifyingQueue):
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

    cdef char* spare[SPARES]           # buffers of message_size bytes that nobody uses
    cdef int spares

    # -- waiting --------------------------------------------------------------------------------------------------------

    cdef int wait(self, short events, int64_t end) except -1:
        """Until the queue has one of the events (1), or the deadline has come (0). Between `enter` and `leave`."""
        cdef timespec t
        cdef int64_t rest
        cdef int found, e
        if self.waker < 0:
            made = os.eventfd(0, os.EFD_CLOEXEC)               # meanwhile another thread may have made it
            if self.waker < 0:
                self.waker = made
            else:
                os.close(made)
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
        """One call. 0, or, if it must not wait (or was nudged), NOT_NOW."""
        cdef int r, e
        cdef aw_waiter waiter
        cdef unsigned int nudges = self.nudges
        while True:
            if waits:
                aw_enlist(&self.waiting, &waiter)
                with nogil:
                    r = mq_send(self.fd, p, n, priority)
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
            if nudges != self.nudges:
                return NOT_NOW

    cdef int refuse_send(self, int e, Py_ssize_t n, unsigned int priority) except -1:
        if e == EMSGSIZE:
            from anywire.ipc import mqueue_limits
            fail(e, self.name, mqueue_limits.explain_size(n, self.message_size))
        if e == EAGAIN:
            fail(e, self.name, "the queue is full, and opened with O_NONBLOCK")
        if e == EBADF:
            fail(e, self.name, "the queue is open for receiving only")
        return fail(e, self.name)

    cdef int send_buffer(self, object data, object priority, object timeout, bint block, int once) except -3:
        """`once`: ONCE, UNTIL_NUDGED or 0. 0, NOT_NOW, or raises."""
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
            # A small one is tried first, with the GIL held; a large one releases it anyway, so it may wait at once.
            if n > SMALL and end < 0 and block and interruptible():
                return self.put(p, n, level, True)
            if self.put(p, n, level, False) == 0:
                return 0
            if once == ONCE:
                return NOT_NOW
            if end < 0 and block and interruptible():
                return self.put(p, n, level, True)
            if once:
                return NOT_NOW
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
        self.send_buffer(data, priority, timeout, block, 0)

    def _try_send(self, data, priority=0):
        """Whether the message went; never waits."""
        return self.send_buffer(data, priority, None, False, ONCE) == 0

    def _send_until_nudged(self, data, priority=0):
        """Whether the message went; waits for room in the system call. False: `_nudge` was called, or this thread can't wait
        so (it has the interrupting signal blocked)."""
        return self.send_buffer(data, priority, None, True, UNTIL_NUDGED) == 0

    async def send_async(self, data, priority=0, timeout=None):
        """As `send`, waiting in the running event loop. A cancelled one has sent nothing."""
        if self.send_buffer(data, priority, None, False, ONCE) == 0:
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

    cdef void let_go(self) noexcept:
        OpenQueue.let_go(self)
        while self.spares > 0:
            self.spares -= 1
            PyMem_RawFree(self.spare[self.spares])

    def __dealloc__(self):
        while self.spares > 0:
            self.spares -= 1
            PyMem_RawFree(self.spare[self.spares])

    cdef Py_ssize_t get(self, char* p, Py_ssize_t n, unsigned int* priority, bint waits) except -3:
        """One call. The length, or, if it must not wait (or was nudged), NOT_NOW."""
        cdef Py_ssize_t r
        cdef int e
        cdef aw_waiter waiter
        cdef unsigned int nudges = self.nudges
        while True:
            if waits:
                aw_enlist(&self.waiting, &waiter)
                with nogil:
                    r = mq_receive(self.fd, p, n, priority)
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
            if nudges != self.nudges:
                return NOT_NOW

    cdef Py_ssize_t receive(self, char* p, Py_ssize_t n, unsigned int* priority, object timeout, bint block,
                            int once) except -3:
        """The next message's length, or NOT_NOW. `once`: ONCE, UNTIL_NUDGED or 0. Between `enter` and `leave`."""
        cdef Py_ssize_t r
        cdef int64_t end = -1
        cdef bint direct
        if timeout is not None:
            end = deadline(timeout)
        while True:
            direct = end < 0 and block and once != ONCE and interruptible()
            r = self.get(p, n, priority, direct)
            if r != NOT_NOW:
                return r
            if once:
                return NOT_NOW
            self.not_now("recv", block and self.blocks(), end, timeout)

    cdef object next_message(self, bint with_priority, object timeout, bint block, int once):
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

    cdef tuple next_into(self, object buffer, object timeout, bint block, int once):
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
        return self.next_message(False, timeout, block, 0)

    def recv_with_priority(self, timeout=None, *, bint block=True):
        """As `recv`, with the priority that the message was sent with: (message, priority)."""
        return self.next_message(True, timeout, block, 0)

    def recv_into(self, buffer, timeout=None, *, bint block=True):
        """As `recv`, into a writable buffer of at least `message_size` bytes; returns the message's length.

        Raises also OSError (EMSGSIZE) for a smaller buffer, whatever message is next: then none is taken."""
        return self.next_into(buffer, timeout, block, 0)[0]

    def recv_into_with_priority(self, buffer, timeout=None, *, bint block=True):
        """As `recv_into`, with the priority: (length, priority)."""
        return self.next_into(buffer, timeout, block, 0)

    def _try_recv(self):
        """(message, priority), or None; never waits."""
        return self.next_message(True, None, False, ONCE)

    def _recv_until_nudged(self):
        """The next message, waiting for it in the system call. None: `_nudge` was called, or there is none and this thread
        can't wait so (it has the interrupting signal blocked)."""
        return self.next_message(False, None, True, UNTIL_NUDGED)

    def _try_recv_into(self, buffer):
        """(length, priority), or None; never waits."""
        return self.next_into(buffer, None, False, ONCE)

    async def recv_async(self, timeout=None):
        """As `recv`, waiting in the running event loop. A cancelled one has taken nothing."""
        found = self.next_message(False, None, False, ONCE)
        if found is None:
            from anywire.ipc import mqueue_async
            found = (await mqueue_async.receive(self, timeout))[0]
        return found

    async def recv_with_priority_async(self, timeout=None):
        """As `recv_with_priority`, waiting in the running event loop."""
        found = self.next_message(True, None, False, ONCE)
        if found is None:
            from anywire.ipc import mqueue_async
            found = await mqueue_async.receive(self, timeout)
        return found

    async def recv_into_async(self, buffer, timeout=None):
        """As `recv_into`, waiting in the running event loop."""
        found = self.next_into(buffer, None, False, ONCE)
        if found is None:
            from anywire.ipc import mqueue_async
            found = await mqueue_async.receive_into(self, buffer, timeout)
        return found[0]

    def __iter__(self):
        """The messages, one after the other, waiting for each, until the queue is closed on this side."""
        return self

    def __next__(self):
        try:
            return self.next_message(False, None, True, 0)
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
