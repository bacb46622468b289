# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Endpoints: one end of a connection, doing I/O and never waiting.

A *byte endpoint* moves bytes (sockets, pipes, TLS); a *message endpoint* moves whole messages. Channels and streams sit on
top and do all the waiting, so a wire is written once for the async and the blocking front. The common parts of everything
that writes to a byte endpoint (what is still to be written after a partial write, and what an abandoned send left over) are
in `BytePump`.

Called by the fronts (`channel`, `blocking`) and by the establishment generators of the wires, on the thread of the front:
the loop's thread for the async front, any thread for the blocking one (which holds a lock while it sends).

What can go wrong: a peer's death shows as `PeerLost`, a fork as `Forked`. A cancelled operation leaves the endpoint in a
state from which the next one continues; that is what PARTIAL, `flush_output` and `adopt_output` are for.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.buffer cimport PyBUF_WRITABLE, PyBUF_READ, PyBUF_WRITE, PyBuffer_FillInfo, PyObject_CheckBuffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.memoryview cimport PyMemoryView_FromMemory, PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF
from libc.errno cimport EINTR, errno
from libc.string cimport memcpy, memmove
from anywire.contract cimport counters
from anywire.contract.heap cimport keep_heap

import copy
import os

from anywire.contract.errors import AnywireError, ChannelClosed, Forked, PeerLost, Unsupported
from anywire.contract.waits import Wait

cdef extern from "Python.h":
    int PyBuffer_IsContiguous(Py_buffer* view, char order)
    PyObject* c_bytes "PyBytes_FromStringAndSize"(const char* p, Py_ssize_t n) except NULL
    char* c_bytes_data "PyBytes_AS_STRING"(PyObject* bytes)
    int _PyBytes_Resize(PyObject** bytes, Py_ssize_t n) except -1

cdef enum:
    DRAIN_TURNS = 16   # reads in a row while a closing stream drains
    DIRECT = 16384     # bytes; reads that bring so many are not copied, smaller ones are cheaper with a copy

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN, POLLOUT
    int c_poll "poll"(pollfd* fds, unsigned long n, int timeout)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC, CLOCK_MONOTONIC_COARSE
    int clock_gettime(int clock, timespec* t)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* p, size_t n)

cdef char _scratch[SCRATCH]
cdef unsigned int _generation = 0


cdef char* scratch() noexcept nogil:
    # Read area shared by every non-blocking read. Safe because the GIL is held from the read to the last use of the bytes.
    return _scratch


cdef unsigned int fork_generation() noexcept nogil:
    return _generation


def _count_fork():
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


cdef inline long coarse_tick() noexcept nogil:
    # The coarse clock costs a few nanoseconds and moves once a kernel tick (1-4 ms): clock_gettime(2).
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t)
    return t.tv_sec * 1000000000 + t.tv_nsec


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef inline double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + t.tv_nsec * 1e-9


cdef int wait_fd(int fd, int mask, int wake_fd, double timeout) except -1:
    """Wait in poll(2) with the GIL released until `fd` meets `mask`; 0 when `timeout` seconds passed (negative: for ever).

    Hang-up and errors count as ready: the next operation tells. A readable `wake_fd` ends the wait too. EINTR is retried
    with the remaining time after Python's signal handlers ran (PEP 475)."""
    cdef pollfd p[2]
    cdef int r, ms, e
    cdef double end = now() + timeout, left
    p[0].fd = fd
    p[0].events = (POLLIN if mask & READ else 0) | (POLLOUT if mask & WRITE else 0)
    p[1].fd = wake_fd
    p[1].events = POLLIN
    while True:
        ms = -1
        if timeout >= 0:
            left = end - now()
            ms = 0 if left <= 0 else <int> min(left * 1000 + 1, 2147483000.0)
        with nogil:
            r = c_poll(p, 2 if wake_fd >= 0 else 1, ms)
            e = errno
        if r > 0:
            return mask
        if r == 0:
            if timeout >= 0 and now() >= end:
                return 0
            continue
        if e != EINTR:
            errno_set(e)
            PyErr_SetFromErrno(OSError)
            return -1
        PyErr_CheckSignals()


cdef extern from *:
    """
    #include <errno.h>
    static void anywire_set_errno(int e) { errno = e; }
    """
    void errno_set "anywire_set_errno"(int e) noexcept nogil


cdef object hold(object data, const char** p, Py_ssize_t* n):
    """Find the bytes of `data`; returns the object to keep alive while they are used."""
    cdef Py_buffer* view
    if PyBytes_CheckExact(data):
        p[0] = PyBytes_AS_STRING(data)
        n[0] = PyBytes_GET_SIZE(data)
        return data
    if isinstance(data, Loan):
        (<Loan> data).need_open()
        p[0] = (<Loan> data).memory
        n[0] = (<Loan> data).nbytes
        return data
    if isinstance(data, str):
        raise TypeError("a message is bytes, not str: encode it first")
    if not PyObject_CheckBuffer(data):
        raise TypeError(f"a message is bytes, or another buffer such as a bytearray or an array, not {type(data).__name__}")
    keep = PyMemoryView_FromObject(data)
    view = PyMemoryView_GET_BUFFER(keep)
    if not PyBuffer_IsContiguous(view, b'C'):
        raise BufferError("a message must be a contiguous buffer; copy it first")
    p[0] = <const char*> view.buf
    n[0] = view.len
    return keep


cdef Py_ssize_t copy_message(object message, char* p, Py_ssize_t size, object address) except -1:
    """Copy a message to the `size` bytes at `p`; its size. Raises BufferError when it does not fit."""
    cdef const char* q
    cdef Py_ssize_t n
    keep = hold(message, &q, &n)
    if n > size:
        raise BufferError(f"recv_into {address}: the next message has {n} bytes and the buffer {size}; the message stays "
                          "queued")
    memcpy(p, q, n)
    return n


cdef class Loan:
    """Writable memory for one message: fill it, then `send(loan)`. Where the wire shares memory nothing is copied.

    Supports the buffer protocol; `len(loan)` is its size in bytes. After the send it can't be opened again. Not thread-safe.
    """

    def __cinit__(self, Py_ssize_t nbytes, bint private=True):
        if nbytes < 0:
            raise ValueError(f"a loan needs a size of at least 0 bytes, not {nbytes}")
        self.private = private
        if not private:                  # a wire's own memory: it sets `memory`, and gives it back
            self.nbytes = nbytes
            return
        self.memory = <char*> PyMem_RawMalloc(nbytes if nbytes else 1)
        if self.memory == NULL:
            raise MemoryError(f"no memory for a loan of {nbytes} bytes")
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.private:
            PyMem_RawFree(self.memory)

    def __len__(self):
        return self.nbytes

    cdef int need_open(self) except -1:
        if self.sent:
            raise BufferError("this loan was sent; ask the channel for a new one")
        return 0

    def __getbuffer__(self, Py_buffer* view, int flags):
        self.need_open()
        PyBuffer_FillInfo(view, self, self.memory, self.nbytes, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1


cdef class ByteEndpoint:
    """One end of a byte connection. Third-party wires subclass it in Python and define `do_read_into` and `do_write`.

    `read_fd`/`write_fd` are what a front waits on; `want` says for what after an operation returned None.
    """

    def __cinit__(self, *args, **keywords):
        self.read_fd = self.write_fd = -1
        self.want = READ
        self.buffered = True

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        self.want = READ
        got = self.do_read_into(PyMemoryView_FromMemory(p, n, PyBUF_WRITE))
        return AGAIN if got is None else <Py_ssize_t> got

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        cdef Py_ssize_t total = 0, n
        cdef int i
        self.want = WRITE
        for i in range(count):
            if iov[i].iov_len == 0:
                continue
            done = self.do_write(PyMemoryView_FromMemory(<char*> iov[i].iov_base, iov[i].iov_len, PyBUF_READ))
            if done is None:
                return total if total else AGAIN
            n = done
            total += n
            if <size_t> n < iov[i].iov_len:
                break
        return total

    def do_read_into(self, buffer):
        """Read into `buffer`; return the number of bytes, 0 at the end, None when nothing is here now."""
        raise TypeError(f"{type(self).__name__} must define do_read_into()")

    def do_write(self, data):
        """Write some of `data`; return how many bytes were taken, None when nothing can be taken now."""
        raise TypeError(f"{type(self).__name__} must define do_write()")

    def read_some(self, Py_ssize_t n):
        """Up to `n` bytes, b"" at the end, None when nothing is here now (then wait for `want`)."""
        cdef Py_ssize_t got = self.read(_scratch, min(n, SCRATCH), False)
        return None if got == AGAIN else PyBytes_FromStringAndSize(_scratch, got)

    def write_some(self, data):
        """Write some of `data`; how many bytes were taken, None when nothing can be taken now (then wait for `want`)."""
        cdef iovec v
        cdef const char* p
        cdef Py_ssize_t n, done
        keep = hold(data, &p, &n)
        v.iov_base = <void*> p
        v.iov_len = n
        done = self.write(&v, 1, False)
        return None if done == AGAIN else done

    cdef void leave(self) noexcept:
        """A thread leaves a system call on the descriptors: the last one closes what was released meanwhile."""
        self.users -= 1
        if self.users == 0 and self.doomed:
            self.doomed = False
            self.close_now()

    cdef object take_fds(self, Py_ssize_t count):
        raise OSError(95, f"{self.address}: this wire carries no descriptors")

    cdef int give_fds(self, object fds) except -1:
        raise OSError(95, f"{self.address}: this wire carries no descriptors")

    def shutdown_write(self):
        """Say that no more bytes come (half-close)."""

    def unread(self):
        """Bytes written that the other end has not read yet; 0 where the kernel doesn't tell."""
        return 0

    def interrupt(self):
        """Wake every thread that waits in a system call on this endpoint, as far as the kernel can."""

    def release(self):
        """Close the descriptors; when a thread is still inside a system call on them, as soon as it left."""
        if self.users:
            self.doomed = True
        else:
            self.close_now()

    def close_now(self):
        self.read_fd = self.write_fd = -1

    def detach_state(self):
        """(kind, descriptors) for `detach()`; wires whose state can't leave the process refuse."""
        raise Unsupported("this wire can't move to another process", address=str(self.address), operation="detach")


cdef class MessageEndpoint:
    """One end of a message connection. Third-party message wires subclass it in Python and define `take` and `put`.

    Such a subclass sets `read_fd`/`write_fd`, or leaves them at -1 and calls `notify()` (from any thread) when it became
    ready to receive or to send.
    """

    def __cinit__(self, *args, **keywords):
        self.read_fd = self.write_fd = self.wake_fd = self.death_fd = -1
        self.max_message = 16 << 20
        self.generation = _generation
        self.want = READ
        self.slot = counters.claim(counters.CHANNEL, b"")

    def __dealloc__(self):
        counters.release(self.slot)
        if self.wake_fd >= 0:
            os.close(self.wake_fd)

    # -- for Python subclasses ------------------------------------------------------------------------------------------

    def take(self):
        """The next message, or None when none is here now. Raises EndOfChannel or PeerLost."""
        raise TypeError(f"{type(self).__name__} must define take()")

    def put(self, data):
        """Take one whole message for sending: True, or False when there is no room now."""
        raise TypeError(f"{type(self).__name__} must define put()")

    def notify(self):
        """Tell the waiting front, from any thread, that this endpoint may have become ready."""
        if self.wakeup is not None:
            self.wakeup()

    def set_wakeup(self, callback):
        """The front's callback for `notify()`; it may be called from any thread."""
        self.wakeup = callback

    def fail(self, error):
        """From now on every operation raises a copy of `error`."""
        self.failure = error
        self.broken = True

    def finish_steps(self, timeout):
        """Generator: write what is left and tell the peer that nothing more comes, within `timeout` seconds."""
        return
        yield

    def drain_steps(self, timeout):
        """Generator: read to the peer's end, within `timeout` seconds."""
        return
        yield

    def verdict(self):
        """After the release: raise PeerLost when the peer was lost and messages are unconfirmed."""

    def close_steps(self, timeout):
        """Generator: end the connection politely within `timeout` seconds; releases it in any case."""
        cdef double end = now() + timeout
        try:
            yield from self.finish_steps(timeout)
            yield from self.drain_steps(max(0.0, end - now()))
        except (AnywireError, OSError):
            pass               # the peer is gone: nobody is left to be polite to; `verdict` tells what was lost
        finally:
            self.release()
        self.verdict()

    def try_eof(self):
        """Half-close: DONE, BLOCKED or PARTIAL (as put). Refused by wires that have none."""
        raise Unsupported("this wire has no half-close", address=str(self.address), operation="send_eof")

    def detach_state(self):
        """(kind, descriptors, state) for `detach()`."""
        raise Unsupported("this wire can't move to another process", address=str(self.address), operation="detach")

    def release(self):
        """Give back what the endpoint holds. Safe to call more than once."""
        self.closed = True

    def refuse(self):
        """The listener does not want this peer (`authorize`): release, and leave nothing that would bring it again."""
        self.release()

    def interrupt(self):
        """Wake threads of the blocking front that wait on this endpoint."""
        cdef uint64_t token = 1
        # With the GIL, so that no other thread closes the descriptor between the look and the write; it never waits.
        if self.wake_fd >= 0 and c_write(self.wake_fd, &token, sizeof(token)) < 0:
            return               # its count is at the limit: it is readable, all the same

    def byte_endpoint(self):
        """The byte endpoint below, None for native message wires."""
        return None

    def make_loan(self, Py_ssize_t nbytes):
        """Writable memory for one message: a Loan."""
        return Loan(nbytes)

    def answer_steps(self, refusal):
        """Generator: the listener's answer, after `authorize`: a refusal with its reason, or None. Returns the endpoint that
        goes on, None when it was refused."""
        if refusal is not None:
            self.refuse()
            return None
        return self
        yield

    def set_asynchronous(self):
        """Its front is the async one: an endpoint with a doorbell arms it before it says that there is nothing."""
        self.asynchronous = True

    def set_label(self, address):
        """Name the counters' slot after the address."""
        self.address = address
        counters.set_label(self.slot, str(address).encode())

    def count_connect(self):
        """This side made the connection (for the counters)."""
        self.slot.connects += 1

    @property
    def unconfirmed(self):
        """Messages sent and not known to have been handed to the peer's application."""
        return self.sent - self.confirmed

    # -- for the fronts -------------------------------------------------------------------------------------------------

    cdef int check(self) except -1:
        if self.generation != _generation:
            raise Forked("this channel was opened by the parent process; open a new one in the child, or detach() it "
                         "before the fork", address=str(self.address), operation="use")
        if self.closed:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation="use")
        return 0

    cdef int raise_failure(self) except -1:
        raise copy.copy(self.failure)

    cdef void start_turn(self) noexcept:
        # The loop told that the descriptor is ready, or the task gave way: reads are worth trying again.
        self.drained = False
        self.turns = 0

    cdef object next_message(self, bint block):
        """What the fronts receive: first what was taken and not handed out, then `take_message`."""
        if self.returned is None:
            return self.take_message(block)
        message = self.returned.pop()
        if not self.returned:
            self.returned = None
        return message if PyBytes_CheckExact(message) else bytes(message)      # it may have been a view

    cdef Py_ssize_t next_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Py_ssize_t n
        if self.returned is None:
            return self.take_message_into(p, size, block)
        n = copy_message(self.returned[len(self.returned) - 1], p, size, self.address)
        self.next_message(block)
        return n

    cdef object next_view(self, bint block):
        """As `next_message`, in place where the wire has it: a read-only memoryview."""
        if self.returned is None:
            return self.take_view(block)
        return memoryview(self.next_message(block)).toreadonly()

    cdef object take_view(self, bint block):
        message = self.take_message(block)
        return None if message is None else memoryview(message).toreadonly()

    cdef bint put_quick(self, bytes data) except -1:
        """Blocking front, without its locks: put a small message if that can be done at once without giving up the GIL.

        False: nothing happened, whatever the reason; the usual way finds out."""
        return False

    cdef object take_quick(self):
        """Likewise: the next message, or None."""
        return None

    cdef int rung(self) except -1:
        """Async front: the doorbell rang, or the peer went (endpoints with a doorbell)."""
        return 0

    cdef bint hung_up(self) noexcept:
        """Whether the peer went: the doorbell is watched no longer."""
        return False

    # Async front, on a loop that polls before it sleeps: what it needs to look for itself, with no doorbell rung.

    cdef bint set_polled(self, bint polled) noexcept:
        """From now on the loop looks whether something is here, or no longer. False: this endpoint needs its doorbell."""
        return False

    cdef bint something_here(self) noexcept:
        """Whether a receive is worth trying. No system call."""
        return False

    cdef bint arm(self) noexcept:
        """Arm the doorbell: the loop is about to sleep. True: something is here."""
        return False

    cdef object next_fds_message(self, bint block):
        if self.returned is not None:
            return self.next_message(block), []
        return self.take_fds_message(block)

    cdef int give_back(self, list messages) except -1:
        """Messages that were taken and not handed out are the next ones again, in their order."""
        if self.returned is None:
            self.returned = []
        self.returned.extend(reversed(messages))
        return 0

    cdef object after_signals(self, object taken):
        """`taken`, a message or a list of them, or back with it when a signal handler raises. The interpreter runs
        handlers as soon as the call returns, before the caller has the result; those that are due are run while what
        was taken can still be kept."""
        try:
            PyErr_CheckSignals()
        except BaseException:
            self.give_back(taken if type(taken) is list else [taken])
            raise
        return taken

    cdef int need_nothing_returned(self) except -1:
        if self.returned is not None:
            raise ChannelClosed(f"{len(self.returned)} messages of an interrupted recv_many, or too large for a "
                                "recv_into, wait: take them before detach()",
                                address=str(self.address), operation="detach")
        return 0

    cdef list next_messages(self, object first, Py_ssize_t limit):
        """`first` and what else is here now, up to `limit` in all. An end or a loss is left for the next call; whatever else
        ends this (a signal handler that raises inside TLS, or inside a wire written in Python) loses nothing of it."""
        cdef list out = [first]
        cdef object message
        try:
            while len(out) < limit:
                message = self.next_message(False)
                if message is None:
                    break
                out.append(message)
        except AnywireError:
            pass
        except BaseException:
            self.give_back(out)
            raise
        return out

    cdef object take_message(self, bint block):
        if self.broken:
            self.raise_failure()
        message = self.take()
        if message is None:
            self.want = READ
        return message

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        # -1: nothing here now. The default copies; framed channels receive large messages in place.
        message = self.take_message(block)
        if message is None:
            return -1
        try:
            return copy_message(message, p, size, self.address)
        except BufferError:
            self.give_back([message])
            raise

    cdef int stop_into(self) except -1:
        return 0

    cdef int put_message(self, object data, bint block) except -1:
        if self.broken:
            self.raise_failure()
        self.want = WRITE
        if not self.put(data):
            return BLOCKED
        self.sent += 1
        self.slot.messages_sent += 1
        return DONE

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        # Returns the index of the first message not taken; put_status tells about the last one taken.
        cdef Py_ssize_t i
        self.put_status = DONE
        for i in range(start, len(data)):
            self.put_status = self.put_message(data[i], block)
            if self.put_status == BLOCKED:
                return i
            if self.put_status == PARTIAL:
                return i + 1
        return len(data)

    cdef int flush_output(self, bint block) except -1:
        return DONE

    cdef int adopt_output(self) except -1:
        """The sender left after PARTIAL: what is left goes on without it. 1: it does not, and the message goes not at all."""
        return 0

    cdef bint output_pending(self) noexcept:
        return False

    cdef int wait_ready(self, int mask, double timeout) except -1:
        """Blocking front: wait until ready for `mask`; 0 when `timeout` seconds passed (negative: for ever)."""
        cdef int fd = self.write_fd if mask == WRITE else self.read_fd
        cdef double left
        cdef int otherwise = 0
        if fd < 0:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation="wait")
        if self.wake_at > 0 and mask & READ:
            left = max(0.0, self.wake_at - now())
            if timeout < 0 or left < timeout:
                timeout = left
                otherwise = mask                 # not a time-out of the caller's: it tries again
        bytes_ = self.byte_endpoint()
        if bytes_ is not None:
            (<ByteEndpoint> bytes_).users += 1
        self.waiters += 1
        try:
            return wait_fd(fd, mask, self.wake_fd, timeout) or otherwise
        finally:
            self.waiters -= 1
            if self.closed:
                self.drop_wake_fd()
            if bytes_ is not None:
                (<ByteEndpoint> bytes_).leave()

    def need_wake_fd(self):
        """Blocking front: make `interrupt` able to wake a thread in poll(2), for descriptors that have no shutdown."""
        if self.wake_fd < 0:
            self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def drop_wake_fd(self):
        """Blocking front: close what `need_wake_fd` made, unless a thread still waits on it (the last one closes it)."""
        if self.wake_fd >= 0 and self.waiters == 0:
            fd, self.wake_fd = self.wake_fd, -1
            os.close(fd)


cdef class BytePump(MessageEndpoint):
    """What framed channels and bare streams share: writing to a byte endpoint without ever leaving half a message."""

    def __cinit__(self, *args, **keywords):
        self.rest = NULL
        self.own_buffer = NULL

    def __init__(self, ByteEndpoint below, object address=None):
        self.bytes = below
        self.read_fd = below.read_fd
        self.write_fd = below.write_fd
        self.peer = below.peer
        self.wire = below.wire
        self.set_label(address if address is not None else below.address)

    def __dealloc__(self):
        PyMem_RawFree(self.rest)
        PyMem_RawFree(self.own_buffer)

    def byte_endpoint(self):
        return self.bytes

    def release(self):
        self.closed = True
        self.read_fd = self.write_fd = -1
        if not self.writing:             # else a thread is inside write(2) with these bytes; it drops them itself
            self.drop_output()
        self.bytes.release()

    def interrupt(self):
        self.bytes.interrupt()
        MessageEndpoint.interrupt(self)

    cdef bint output_pending(self) noexcept:
        return self.head_sent < self.head_size or self.body is not None or self.rest != NULL

    cdef int emit(self, const char* head, int head_size, const char* p, size_t n, object keep, bint block) except -1:
        """Write `head` and then `n` bytes at `p`. DONE, BLOCKED (nothing was written) or PARTIAL (`keep` is kept).

        Small messages are joined on the stack: one send(2) of a few hundred bytes is cheaper than sendmsg(2) with two
        parts; larger ones are never copied."""
        cdef iovec v[2]
        cdef char joined[2048 + 32]
        cdef Py_ssize_t done
        cdef int count
        self.begun = False
        if self.writing:
            # The receiver's thread is inside a write of a confirmation (blocking front; a byte endpoint that gives up
            # the GIL): its frame must be whole before another begins.
            self.want = WRITE
            return BLOCKED
        if self.output_pending() and self.flush_output(block) != DONE:
            return BLOCKED
        if n == 0:
            p = b""                # memcpy(3) may not be given NULL, not even for nothing
        if head_size == 0:
            head = b""
        if head_size == 0:
            v[0].iov_base = <void*> p
            v[0].iov_len = n
            count = 1
        elif n + head_size <= sizeof(joined):
            memcpy(joined, head, head_size)
            memcpy(joined + head_size, p, n)
            v[0].iov_base = joined
            v[0].iov_len = head_size + n
            count = 1
        else:
            v[0].iov_base = <void*> head
            v[0].iov_len = head_size
            v[1].iov_base = <void*> p
            v[1].iov_len = n
            count = 2
        self.writing = True
        self.turns += 1
        try:
            done = self.bytes.write(v, count, block)
        except OSError as error:
            self.on_io_error(error)
            return -1
        finally:
            self.writing = False
        if done == AGAIN:
            self.want = self.bytes.want
            return BLOCKED
        self.begun = True
        if <size_t> done == head_size + n:
            return DONE
        memcpy(self.head, head, head_size)
        self.head_size = head_size
        self.head_sent = <int> min(done, <Py_ssize_t> head_size)
        self.body = keep
        self.body_data = p
        self.body_size = n
        self.body_sent = done - self.head_sent
        if not block:
            self.want = WRITE
            return PARTIAL
        try:
            PyErr_CheckSignals()             # it may have ended this call early, with a count
            return DONE if self.flush_output(True) == DONE else PARTIAL
        except BaseException:
            self.adopt_output()
            raise

    cdef int flush_output(self, bint block) except -1:
        cdef iovec v[2]
        cdef int count
        cdef Py_ssize_t done
        while self.output_pending():
            if self.writing:
                self.want = WRITE
                return BLOCKED
            count = 0
            if self.rest != NULL:
                v[0].iov_base = self.rest + self.rest_sent
                v[0].iov_len = self.rest_size - self.rest_sent
                count = 1
            else:
                if self.head_sent < self.head_size:
                    v[0].iov_base = self.head + self.head_sent
                    v[0].iov_len = self.head_size - self.head_sent
                    count = 1
                if self.body_sent < self.body_size:
                    v[count].iov_base = <void*> (self.body_data + self.body_sent)
                    v[count].iov_len = self.body_size - self.body_sent
                    count += 1
            self.writing = True
            self.turns += 1
            try:
                done = self.bytes.write(v, count, block) if count else 0
            except OSError as error:
                self.drop_output()
                self.on_io_error(error)
                return -1
            finally:
                self.writing = False
            if done == AGAIN:
                self.want = self.bytes.want
                return BLOCKED
            self.advance_output(done)
            if block and self.output_pending():
                PyErr_CheckSignals()     # a signal ends send(2) early with a count, not with EINTR: signal(7)
        self.unread_output = False
        return DONE

    def flush_steps(self, timeout):
        """Generator: write what earlier, abandoned sends left over; ends at the deadline without an error."""
        cdef double end = now() + timeout
        while self.flush_output(False) != DONE:
            if not (yield Wait([(self.write_fd if self.want == WRITE else self.read_fd, self.want)],
                               max(0.0, end - now()))):
                return

    cdef void advance_output(self, Py_ssize_t done) noexcept:
        cdef Py_ssize_t part
        if self.rest != NULL:
            self.rest_sent += done
            if self.rest_sent == self.rest_size:
                PyMem_RawFree(self.rest)
                self.rest = NULL
            return
        part = min(done, <Py_ssize_t> (self.head_size - self.head_sent))
        self.head_sent += <int> part
        self.body_sent += done - part
        if self.head_sent == self.head_size and self.body_sent == self.body_size:
            self.body = None
            self.head_size = self.head_sent = 0
            self.body_size = self.body_sent = 0

    cdef void drop_output(self) noexcept:
        PyMem_RawFree(self.rest)
        self.rest = NULL
        self.body = None
        self.head_size = self.head_sent = 0
        self.body_size = self.body_sent = 0

    cdef int adopt_output(self) except -1:
        """The sender gives up in mid-message: copy what is left, for its buffer is the caller's again. The message still
        goes whole; `unread_output` tells the front to flush it when the descriptor is writable."""
        cdef size_t head_left = self.head_size - self.head_sent, body_left = self.body_size - self.body_sent
        cdef char* p
        if self.rest != NULL:
            self.unread_output = True
            return 0
        if head_left + body_left == 0:
            return 0
        p = <char*> PyMem_RawMalloc(head_left + body_left)
        if p == NULL:
            self.drop_output()
            self.fail(PeerLost("no memory to finish an abandoned message", address=str(self.address), operation="send",
                               unconfirmed=self.sent - self.confirmed))
            raise MemoryError()
        memcpy(p, self.head + self.head_sent, head_left)
        if body_left:
            memcpy(p + head_left, self.body_data + self.body_sent, body_left)
        self.drop_output()
        self.rest = p
        self.rest_size = head_left + body_left
        self.rest_sent = 0
        self.unread_output = True
        return 0

    cdef Py_ssize_t fill(self, char** p, size_t n, bint block) except -1:
        """Read up to `n` bytes (at most SCRATCH) into the read area and point `p` at them. 0 at the end, AGAIN."""
        cdef size_t size = min(n, <size_t> (OWN_BUFFER if block else SCRATCH))
        if block:
            if self.own_buffer == NULL:
                self.own_buffer = <char*> PyMem_RawMalloc(OWN_BUFFER)
                if self.own_buffer == NULL:
                    raise MemoryError()
            p[0] = self.own_buffer
        else:
            p[0] = _scratch
        return self.read_at(p[0], size, block)

    cdef Py_ssize_t read_at(self, char* p, size_t size, bint block) except -1:
        """Read up to `size` bytes to `p`. A short read emptied the kernel's buffer: within the same tick of the coarse clock
        trying again would only cost a system call, for the loop tells when more comes."""
        cdef Py_ssize_t got
        if self.drained and not block:
            if self.drained_tick == coarse_tick():
                self.want = READ
                return AGAIN
            self.drained = False
        self.reading = True
        self.turns += 1
        try:
            got = self.bytes.read(p, size, block)
        except OSError as error:
            self.on_io_error(error)
            return -1
        finally:
            self.reading = False
        if got == AGAIN:
            self.want = self.bytes.want
        elif not block and 0 < got < <Py_ssize_t> size and not self.bytes.buffered:
            self.drained = True
            self.drained_tick = coarse_tick()
        return got

    cdef int on_io_error(self, object error) except -1:
        reason = error.strerror or str(error)
        self.fail(PeerLost(reason, address=str(self.address), operation="use", unconfirmed=self.sent - self.confirmed))
        counters.lost(self.slot, reason.encode("utf-8", "replace"), error.errno or 0)
        raise copy.copy(self.failure) from error


cdef class RawEndpoint(BytePump):
    """The bare face of a byte endpoint: what a `Stream` reads and writes, without frames."""

    def __cinit__(self, *args, **keywords):
        counters.set_kind(self.slot, counters.STREAM)

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef int status
        if self.broken:
            self.raise_failure()
        if self.bytes.eof_written:
            raise ChannelClosed("write_eof() was called", address=str(self.address), operation="write")
        if self.write_fd < 0 and self.read_fd >= 0:
            raise ChannelClosed("it can only be read", address=str(self.address), operation="write")
        keep = hold(data, &p, &n)
        if n == 0:
            return DONE
        status = self.emit(NULL, 0, p, n, keep, block)
        if status != BLOCKED:
            self.slot.bytes_sent += n
            self.slot.messages_sent += 1
        return status

    cdef object read_bytes(self, Py_ssize_t n, bint block):
        """Up to `n` bytes, b"" at the end, None when nothing is here now."""
        cdef char* p
        cdef Py_ssize_t got
        if self.pushed is not None:
            data = bytes(self.pushed[:n])
            del self.pushed[:n]
            if not self.pushed:
                self.pushed = None
            return data
        if self.at_eof:
            return b""
        if self.broken:
            self.raise_failure()
        if self.expected and n > DIRECT:
            return self.read_direct(min(n, self.expected), block)
        got = self.fill(&p, n, block)
        if got == AGAIN:
            return None
        if got == 0:
            self.at_eof = True
            return b""
        if got >= DIRECT:
            self.expected = got + DIRECT
        self.slot.bytes_received += got
        return PyBytes_FromStringAndSize(p, got)

    cdef object read_direct(self, Py_ssize_t n, bint block):
        """As read_bytes, straight into the object to return, whose size follows what the reads before it brought."""
        cdef PyObject* made
        cdef Py_ssize_t got
        keep_heap()
        made = c_bytes(NULL, n)
        try:
            got = self.read_at(c_bytes_data(made), n, block)
            if got > 0:
                self.slot.bytes_received += got
                self.expect(n, got)
                _PyBytes_Resize(&made, got)
                return <object> made
        finally:
            Py_XDECREF(made)
        if got == AGAIN:
            return None
        self.at_eof = True
        return b""

    cdef void expect(self, Py_ssize_t n, Py_ssize_t got) noexcept:
        """Set the size of the next direct read, after one of `n` bytes that brought `got`.

        Full: there may be more, so twice as much. Else a little more than this read or a little less than the last size,
        whichever is more: a message often comes in two parts, and the second must not make the next read a small one.
        Small reads in a row lead back to the shared area and a copy."""
        if got == n:
            self.expected = min(max(2 * n, self.expected), <Py_ssize_t> SCRATCH)
            return
        self.expected = max(got + DIRECT, self.expected - self.expected // 32)
        if self.expected < 2 * DIRECT:
            self.expected = 0

    cdef Py_ssize_t read_raw_into(self, char* p, Py_ssize_t n, bint block) except -2:
        # -1: nothing here now; 0: the end. Straight into the caller's memory, no matter how large.
        cdef Py_ssize_t got
        if self.pushed is not None:
            got = min(n, PyByteArray_GET_SIZE(self.pushed))
            memcpy(p, PyByteArray_AS_STRING(self.pushed), got)
            del self.pushed[:got]
            if not self.pushed:
                self.pushed = None
            return got
        if self.at_eof or n == 0:                    # read(2) of no bytes gives 0 too, and that is no end
            return 0
        if self.broken:
            self.raise_failure()
        got = self.read_at(p, n, block)
        if got == AGAIN:
            return -1
        if got == 0:
            self.at_eof = True
        self.slot.bytes_received += got
        return got

    def push_back(self, data):
        """Bytes read too far: the next read returns them first."""
        if data:
            self.pushed = bytearray(data) + self.pushed if self.pushed is not None else bytearray(data)

    def try_eof(self):
        if self.flush_output(False) != DONE:
            return BLOCKED
        if not self.bytes.eof_written:
            self.bytes.eof_written = True
            self.bytes.shutdown_write()
            self.write_fd = self.bytes.write_fd      # a pipe's is closed by that
        return DONE

    def detach_state(self):
        if self.output_pending():
            raise ChannelClosed("a write is still under way", address=str(self.address), operation="detach")
        kind, fds = self.bytes.detach_state()
        state = {"pushed": bytes(self.pushed or b""), "eof_written": self.bytes.eof_written}
        self.release()
        return kind, fds, state

    def restore_state(self, state):
        self.push_back(state["pushed"])
        self.bytes.eof_written = state["eof_written"]

    def finish_steps(self, timeout):
        if not self.broken and self.write_fd >= 0:
            yield from self.flush_steps(timeout)
            if not self.output_pending():
                self.try_eof()

    def drain_steps(self, timeout):
        """Closing a socket with unread input makes TCP send a reset, which can destroy what we sent last
        (RFC 1122 4.2.2.13): hence reading to the end."""
        cdef double end = now() + timeout
        cdef bint first = True
        while not self.at_eof and not self.broken and self.read_fd >= 0 and self.write_fd >= 0:
            if not first and now() >= end:           # a peer may never stop sending
                return
            first = False
            self.pushed = None
            self.drained = False
            if self.read_bytes(SCRATCH, False) is None or self.turns >= DRAIN_TURNS:
                self.turns = 0                       # in a flood, too, the loop's other tasks get a turn
                if not (yield Wait([(self.read_fd, self.want)], max(0.0, end - now()))):
                    return
