# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The blocking front: the same channels and streams, where every call waits by itself.

No hidden loop and no helper thread. With no time-out a call on a socket is one blocking system call; otherwise poll(2) and
non-blocking calls. Any thread may call: senders take turns on a lock, a second concurrent receiver gets `Busy`.

What can go wrong: Ctrl-C (EINTR) at any point: nothing received is lost, a message half sent is finished by the next
operation or by `close`; a close from another thread (a receiver goes on until the peer's end or the deadline).
"""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_CheckExact, PyBytes_FromStringAndSize
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t
from anywire.contract.endpoint cimport (BLOCKED, DONE, PARTIAL, READ, SCRATCH, WRITE, ByteEndpoint, Loan, MessageEndpoint,
                                        RawEndpoint, fork_generation, monotonic_ns)
from anywire.contract.face cimport Face, name_operation

import time

from anywire.contract.driver import run_blocking
from anywire.contract.errors import (AnywireError, Busy, ChannelClosed, EndOfChannel, PeerLost, TimedOut, TooLarge,
                                     Unsupported)
from anywire.contract.loans import loan_array

cdef extern from "pythread.h":
    ctypedef void* PyThread_type_lock
    ctypedef enum PyLockStatus:
        PY_LOCK_FAILURE, PY_LOCK_ACQUIRED, PY_LOCK_INTR
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock)
    int PyThread_acquire_lock(PyThread_type_lock, int wait) nogil
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock, long long microseconds, int interruptible) nogil
    void PyThread_release_lock(PyThread_type_lock) nogil
    unsigned long PyThread_get_thread_ident() nogil

cdef enum:
    MESSAGE, VIEW, FDS
    ONE, MANY, CALL


cdef int acquire(PyThread_type_lock lock, double timeout) except -1:
    """1 when taken, 0 when `timeout` seconds passed (negative: for ever). Signal handlers run while waiting."""
    cdef PyLockStatus status
    cdef double end
    cdef long long left
    if PyThread_acquire_lock(lock, 0):
        return 1
    if timeout == 0:
        return 0
    end = time.monotonic() + timeout
    while True:
        left = -1 if timeout < 0 else <long long> max(0.0, (end - time.monotonic()) * 1e6)
        with nogil:
            status = PyThread_acquire_lock_timed(lock, left, 1)
        if status == PY_LOCK_ACQUIRED:
            return 1
        if status == PY_LOCK_FAILURE:
            return 0
        PyErr_CheckSignals()


cdef class BlockingFront(Face):
    cdef PyThread_type_lock send_lock
    cdef PyThread_type_lock recv_lock
    cdef unsigned long sender            # the thread that holds send_lock in `transmit`, 0: nobody
    cdef bint receiving                  # somebody holds recv_lock

    def __cinit__(self, *args, **keywords):
        self.send_lock = PyThread_allocate_lock()
        self.recv_lock = PyThread_allocate_lock()
        if self.send_lock == NULL or self.recv_lock == NULL:
            raise MemoryError()

    def __init__(self, MessageEndpoint end):
        self.end = end
        below = end.byte_endpoint()
        if (end.read_fd >= 0 or end.write_fd >= 0) and (below is None or not (<ByteEndpoint> below).interruptible):
            end.need_wake_fd()

    def __dealloc__(self):
        if self.send_lock != NULL:
            PyThread_free_lock(self.send_lock)
        if self.recv_lock != NULL:
            PyThread_free_lock(self.recv_lock)

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int transmit(self, int mode, object data, object timeout, str operation) except -1:
        """Send under the lock: whole or not at all, whatever interrupts."""
        cdef MessageEndpoint end = self.end
        cdef double limit = -1 if timeout is None else max(0.0, <double> timeout)
        cdef double deadline = 0 if limit < 0 else time.monotonic() + limit
        cdef int status
        cdef Py_ssize_t index = 0
        cdef bint block = False, partial = False
        cdef int ready
        cdef uint64_t since = 0
        if not PyThread_acquire_lock(self.send_lock, 0):
            self.check(operation)        # in a forked child the thread that holds it may not exist
            if self.sender == PyThread_get_thread_ident():
                raise Busy("this thread is sending here already, and a signal handler can't wait for what it interrupted",
                           address=str(end.address), operation=operation,
                           advice="use try_send() in signal handlers, or a channel of their own")
            if not acquire(self.send_lock, limit):
                raise TimedOut(timeout, address=str(end.address), operation=operation)
        self.sender = PyThread_get_thread_ident()
        try:
            if self.closing or end.closed or end.generation != fork_generation():
                self.check(operation)
            while True:
                if partial:
                    status = end.flush_output(block)
                elif mode == ONE:
                    status = end.put_message(data, block)
                elif mode == MANY:
                    index = end.put_messages(data, index, block)
                    status = end.put_status
                    if status == DONE and index < len(<list> data):
                        continue
                else:
                    status = data()
                if since:
                    end.slot.send_wait_ns += monotonic_ns() - since
                    since = 0
                if status == DONE:
                    if partial and mode == MANY and index < len(<list> data):
                        partial = False
                        continue
                    return 0
                if status == PARTIAL:
                    partial = True
                end.slot.send_waits += 1
                since = monotonic_ns()
                if limit < 0 and not block:
                    block = True             # the rest waits inside the system call
                    continue
                ready = end.wait_ready(end.want, -1 if limit < 0 else max(0.0, deadline - time.monotonic()))
                end.slot.send_wait_ns += monotonic_ns() - since
                since = 0
                if not ready:
                    raise TimedOut(timeout, address=str(end.address), operation=operation)
                if self.closing:
                    self.check(operation)
        except BaseException as error:
            if end.output_pending():
                end.adopt_output()
            name_operation(error, operation)
            if end.closed and isinstance(error, PeerLost):
                raise ChannelClosed("it was dropped on this side", address=str(end.address), operation=operation) from None
            raise
        finally:
            self.sender = 0
            PyThread_release_lock(self.send_lock)

    cdef bint flush_rest(self) except -1:
        """What an interrupted send left over goes on while this thread waits for input. False: a sender sees to it."""
        if not PyThread_acquire_lock(self.send_lock, 0):
            return False
        try:
            self.end.flush_output(False)
        except (AnywireError, OSError):
            self.end.unread_output = False
        finally:
            PyThread_release_lock(self.send_lock)
        return True

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef int start_receiving(self, str operation) except -1:
        if not PyThread_acquire_lock(self.recv_lock, 0):
            self.check(operation)
            raise Busy("another thread is already receiving here; one receiver at a time",
                       address=str(self.end.address), operation=operation)
        if self.closing or self.end.closed or self.end.generation != fork_generation():
            try:
                self.check(operation)
            except BaseException:
                self.stop_receiving()
                raise
        self.receiving = True
        self.end.start_turn()
        return 0

    cdef void stop_receiving(self) noexcept:
        self.receiving = False
        PyThread_release_lock(self.recv_lock)

    cdef int wait_input(self, double limit, double deadline, object timeout, str operation) except -1:
        cdef MessageEndpoint end = self.end
        cdef double left = -1 if limit < 0 else max(0.0, deadline - time.monotonic())
        cdef int mask = end.want
        end.slot.recv_waits += 1
        # A doorbell tells a receiver when a sender leaves something over; a socket must be asked whether it is writable.
        if end.unread_output and (self.flush_rest() or not end.doorbell):
            if end.unread_output and end.read_fd == end.write_fd:
                mask |= WRITE
        if not end.wait_ready(mask, left):
            raise TimedOut(timeout, address=str(end.address), operation=operation)
        end.start_turn()
        if self.closing and end.closed:
            self.check(operation)
        return 0

    def close(self, *, timeout=5.0):
        """End the connection politely: what was sent goes first, then the end, then wait for the peer's end.

        Parameters: `timeout`, seconds to wait for the peer; after them the connection is dropped. A receiver in another
        thread goes on until the peer's end or the deadline.
        Raises PeerLost when the peer was lost and messages are unconfirmed."""
        cdef MessageEndpoint end = self.end
        cdef double deadline = time.monotonic() + timeout
        cdef bint sending = False, receiving = False
        if self.closing or end.closed:
            return
        if end.generation != fork_generation():
            end.release()                # a forked child only drops its copy of the descriptors
            return
        self.closing = True
        try:
            sending = acquire(self.send_lock, timeout)
            try:
                if sending:
                    run_blocking(end.finish_steps(max(0.0, deadline - time.monotonic())))
                receiving = acquire(self.recv_lock, max(0.0, deadline - time.monotonic()))
                if receiving:
                    run_blocking(end.drain_steps(max(0.0, deadline - time.monotonic())))
            except (AnywireError, OSError):
                pass                     # the peer is gone; `verdict` tells what was lost
        finally:
            self.over()
            if sending:
                PyThread_release_lock(self.send_lock)
            if receiving:
                self.stop_receiving()
        end.verdict()

    def abort(self):
        """Drop the connection at once: no end frame, the peer sees a loss. Wakes threads that wait here."""
        if self.end.closed:
            return
        self.closing = True
        self.over()

    def over(self):
        """The connection is over (internal)."""
        if self.end.generation == fork_generation():
            self.end.interrupt()
        self.end.release()
        self.end.drop_wake_fd()
        self.told_over()

    def detach_state(self):
        """(kind, descriptors, state): what `detach` wraps."""
        self.check("detach")
        self.end.need_nothing_returned()
        if not PyThread_acquire_lock(self.recv_lock, 0):
            raise Busy("another thread is receiving", address=str(self.end.address), operation="detach")
        try:
            if not PyThread_acquire_lock(self.send_lock, 0):
                raise Busy("another thread is sending", address=str(self.end.address), operation="detach")
            try:
                state = self.end.detach_state()          # refused by some wires: then the channel goes on
                self.closing = True
                self.end.drop_wake_fd()
                return state
            finally:
                PyThread_release_lock(self.send_lock)
        finally:
            self.stop_receiving()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except AnywireError:
            pass                         # the block's own error matters more


cdef class Channel(BlockingFront):
    """A connection that carries messages, for threads. The methods of the async channel, each waiting by itself."""

    @property
    def max_message(self):
        """The largest message this side receives, in bytes."""
        return self.end.max_message

    def send(self, data, *, timeout=None):
        """Send one message: any contiguous buffer, or a Loan. Waits while the peer is slow (back-pressure).

        Parameters: `timeout`, seconds to wait for room, None for ever.
        Raises TooLarge, PeerLost, ChannelClosed, TimedOut, Forked. Interrupted, it went whole or not at all."""
        if (self.end.quick and self.sender == 0 and PyBytes_CheckExact(data) and not self.closing
                and self.end.put_quick(<bytes> data)):
            return
        self.transmit(ONE, data, timeout, "send")
        if isinstance(data, Loan):
            (<Loan> data).sent = True

    def try_send(self, data):
        """Send without waiting: True when the message was taken, False when there is no room now."""
        cdef int status
        self.check("try_send")
        if not PyThread_acquire_lock(self.send_lock, 0):
            return False
        try:
            status = self.end.put_message(data, False)
            if status == BLOCKED:
                return False
            if status == PARTIAL and self.end.adopt_output():
                return False
            if isinstance(data, Loan):
                (<Loan> data).sent = True
            return True
        finally:
            PyThread_release_lock(self.send_lock)

    def send_many(self, messages, *, timeout=None):
        """Send messages in order, many in one system call."""
        self.transmit(MANY, list(messages), timeout, "send_many")

    def send_fds(self, fds, message=b"", *, timeout=None):
        """Send descriptors (numbers or objects with fileno()) with a message. Unix sockets only; at most 253 at once."""
        need_fds(self.end, "send_fds")
        fds = list(fds)
        self.transmit(CALL, lambda: self.end.put_fds(fds, message, False), timeout, "send_fds")

    def send_eof(self, *, timeout=None):
        """Half-close: the peer's receives end after what was sent; it may still send. Raises Unsupported where none is."""
        self.transmit(CALL, self.end.try_eof, timeout, "send_eof")

    def recv(self, *, bint copy=True, timeout=None):
        """The next message as bytes; with `copy=False` a read-only memoryview, in place where the wire allows.

        Parameters: `timeout`, seconds, None for ever.
        Raises EndOfChannel, PeerLost, BadFrame, TooLarge, TimedOut, Busy, ChannelClosed, Forked."""
        if self.end.quick and copy and not self.receiving and not self.closing:
            message = self.end.take_quick()
            if message is not None:
                return self.end.after_signals(message)
        return self.receive(MESSAGE if copy else VIEW, timeout, "recv")

    cdef object receive(self, int mode, object timeout, str operation):
        cdef MessageEndpoint end = self.end
        cdef double limit = -1 if timeout is None else max(0.0, <double> timeout)
        cdef double deadline = 0 if limit < 0 else time.monotonic() + limit
        cdef object message
        self.start_receiving(operation)
        try:
            while True:
                if mode == VIEW:
                    message = end.next_view(timeout is None and not end.unread_output)
                elif mode == FDS:
                    message = end.next_fds_message(timeout is None and not end.unread_output)
                else:
                    message = end.next_message(timeout is None and not end.unread_output)
                if message is not None:
                    return message if mode == FDS else end.after_signals(message)
                self.wait_input(limit, deadline, timeout, operation)
        except AnywireError as error:
            name_operation(error, operation)
            if self.closing and end.closed:
                self.check(operation)
            raise
        finally:
            self.stop_receiving()

    def recv_into(self, buffer, *, timeout=None):
        """Receive the next message into a writable buffer; its size in bytes. Large ones go there straight from the kernel.

        Raises BufferError when it does not fit (the message stays), and what `recv` raises."""
        cdef MessageEndpoint end = self.end
        cdef double limit = -1 if timeout is None else max(0.0, <double> timeout)
        cdef double deadline = 0 if limit < 0 else time.monotonic() + limit
        cdef Py_buffer view
        cdef Py_ssize_t n
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self.start_receiving("recv_into")
            try:
                while True:
                    n = end.next_message_into(<char*> view.buf, view.len, timeout is None and not end.unread_output)
                    if n >= 0:
                        try:
                            PyErr_CheckSignals()
                        except BaseException:
                            end.give_back([PyBytes_FromStringAndSize(<char*> view.buf, n)])
                            raise
                        return n
                    self.wait_input(limit, deadline, timeout, "recv_into")
            except AnywireError as error:
                name_operation(error, "recv_into")
                if self.closing and end.closed:
                    self.check("recv_into")
                raise
            finally:
                try:
                    end.stop_into()
                finally:
                    self.stop_receiving()
        finally:
            PyBuffer_Release(&view)

    def recv_many(self, Py_ssize_t limit=1024, *, timeout=None):
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        cdef object first
        if limit < 1:
            raise ValueError(f"recv_many needs a limit of at least 1, not {limit}")
        first = self.receive(MESSAGE, timeout, "recv_many")
        try:
            self.start_receiving("recv_many")
        except AnywireError:
            return [first]               # another thread was quicker (a close, say); what was taken is not lost
        try:
            return self.end.after_signals(self.end.next_messages(first, limit))
        finally:
            self.stop_receiving()

    def recv_fds(self, *, timeout=None):
        """The next message with the descriptors that came with it: (bytes, list of int). Unix sockets only."""
        need_fds(self.end, "recv_fds")
        return self.receive(FDS, timeout, "recv_fds")

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self.receive(MESSAGE, None, "recv")
        except EndOfChannel:
            raise StopIteration from None

    def loan(self, Py_ssize_t nbytes):
        """Writable memory of `nbytes` bytes for one message: fill it, then `send(loan)`. On shared memory nothing is copied.

        When the wire's pool has no place now the loan is private memory, and its `send` copies, and waits like any other."""
        self.check("loan")
        return self.end.make_loan(nbytes)

    def loan_array(self, shape, dtype="uint8"):
        """As `loan`, as an uninitialised NumPy array: fill it, then `send(array)`. On shared memory nothing is copied.

        Parameters: `shape` and `dtype` as in numpy.empty. After the send the array still shows the memory that the peer now
        reads: leave it alone. Needs the extra anywire[numpy]; raises TypeError for a dtype that holds Python objects."""
        return loan_array(self.loan, shape, dtype)


cdef int need_fds(MessageEndpoint end, str operation) except -1:
    if not getattr(end, "carries_fds", False):
        raise Unsupported("this wire carries no descriptors; Unix sockets do", address=str(end.address),
                          operation=operation)
    return 0


cdef class Stream(BlockingFront):
    """A connection that carries bytes, for threads. The methods of the async stream, each waiting by itself."""

    def write(self, data, *, timeout=None):
        """Write all of `data` (any contiguous buffer); waits while the peer is slow."""
        self.transmit(ONE, data, timeout, "write")

    def write_many(self, parts, *, timeout=None):
        """Write buffers in order."""
        self.transmit(MANY, list(parts), timeout, "write_many")

    def write_eof(self, *, timeout=None):
        """Half-close: the peer reads the end after what was written. Raises Unsupported where the wire has none."""
        self.transmit(CALL, self.end.try_eof, timeout, "write_eof")

    cdef int see_whose_end(self, str operation) except -1:
        # shutdown(2), with which another thread's abort() or close() wakes this one, reads as the end of the stream.
        if self.closing and self.end.closed:
            self.check(operation)
        return 0

    cdef object some(self, Py_ssize_t n, object timeout, str operation):
        cdef RawEndpoint end = <RawEndpoint> self.end
        cdef double limit = -1 if timeout is None else max(0.0, <double> timeout)
        cdef double deadline = 0 if limit < 0 else time.monotonic() + limit
        cdef object data
        try:
            while True:
                data = end.read_bytes(n, timeout is None and not end.unread_output)
                if data is not None:
                    if not data:
                        self.see_whose_end(operation)
                    return data
                self.wait_input(limit, deadline, timeout, operation)
        except AnywireError as error:
            name_operation(error, operation)
            raise

    cdef Py_ssize_t some_into(self, char* p, Py_ssize_t n, object timeout, str operation) except -1:
        cdef RawEndpoint end = <RawEndpoint> self.end
        cdef double limit = -1 if timeout is None else max(0.0, <double> timeout)
        cdef double deadline = 0 if limit < 0 else time.monotonic() + limit
        cdef Py_ssize_t got
        try:
            while True:
                got = end.read_raw_into(p, n, timeout is None and not end.unread_output)
                if got >= 0:
                    if got == 0 and n > 0:
                        self.see_whose_end(operation)
                    return got
                self.wait_input(limit, deadline, timeout, operation)
        except AnywireError as error:
            name_operation(error, operation)
            raise

    def read(self, Py_ssize_t n=SCRATCH, *, timeout=None):
        """At least one byte and at most `n`: what is here. b"" at the end of the stream. `timeout` in seconds."""
        if n < 1:
            raise ValueError(f"read needs at least 1 byte, not {n}")
        self.start_receiving("read")
        try:
            return self.some(n, timeout, "read")
        except AnywireError:
            if self.closing and self.end.closed:
                self.check("read")
            raise
        finally:
            self.stop_receiving()

    def read_into(self, buffer, *, timeout=None):
        """Read into a writable buffer; the number of bytes, 0 at the end."""
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self.start_receiving("read_into")
            try:
                return self.some_into(<char*> view.buf, view.len, timeout, "read_into")
            finally:
                self.stop_receiving()
        finally:
            PyBuffer_Release(&view)

    def read_exactly(self, Py_ssize_t n, *, timeout=None):
        """Exactly `n` bytes. Raises EndOfChannel when the stream ends before (what came can still be read)."""
        cdef bytearray out
        cdef Py_ssize_t have = 0, got
        if n < 0:
            raise ValueError(f"read_exactly needs at least 0 bytes, not {n}")
        out = bytearray(n)
        self.start_receiving("read_exactly")
        try:
            while have < n:
                got = self.some_into(PyByteArray_AS_STRING(out) + have, n - have, timeout, "read_exactly")
                if got == 0:
                    raise EndOfChannel(f"the stream ended after {have} of {n} bytes", address=str(self.end.address),
                                       operation="read_exactly")
                have += got
            return bytes(out)
        except BaseException:
            (<RawEndpoint> self.end).push_back(out[:have])
            raise
        finally:
            self.stop_receiving()

    def read_until(self, bytes separator=b"\n", *, Py_ssize_t limit=65536, timeout=None):
        """Bytes up to and with `separator`. At most `limit` bytes, else TooLarge (they stay)."""
        cdef bytearray out = bytearray()
        cdef Py_ssize_t n
        if not separator:
            raise ValueError("read_until needs a separator of at least one byte")
        self.start_receiving("read_until")
        try:
            while True:
                data = self.some(SCRATCH, timeout, "read_until")
                if not data:
                    raise EndOfChannel(f"the stream ended before the separator; {len(out)} bytes came",
                                       address=str(self.end.address), operation="read_until")
                n = max(0, len(out) - len(separator) + 1)
                out += data
                n = out.find(separator, n)
                if 0 <= n <= limit - len(separator):
                    n += len(separator)
                    data = bytes(out[:n])
                    (<RawEndpoint> self.end).push_back(out[n:])
                    out = bytearray()
                    return data
                if len(out) > limit:
                    n = len(out)
                    raise TooLarge(n, limit, address=str(self.end.address), operation="read_until", option="limit")
        except BaseException:
            (<RawEndpoint> self.end).push_back(out)
            raise
        finally:
            self.stop_receiving()

    def __iter__(self):
        return self

    def __next__(self):
        data = self.read()
        if not data:
            raise StopIteration
        return data
