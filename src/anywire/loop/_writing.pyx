# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""What a transport writes: at once or together with what else its turn writes, queued when the kernel is full, water marks.

Writes of one turn leave together, in one sendmsg(2): when the protocol's callback returns, or before the loop sleeps. A large
write, and one made while the loop does not run, leaves at once. What is immutable is never copied; what is mutable is copied
by `write`, so that the caller may change it.

`Writing` is the second of the three classes that a `StreamTransport` is made of (see `_connection`). On the loop's thread.
What can go wrong: a write after `write_eof` or during sendfile (RuntimeError); the connection is lost (`connection_lost` says
so, and what is written later is dropped, with a warning if it goes on); a protocol that raises when it is paused.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memset

from anywire.engine.conditions cimport WRITE
from anywire.loop._connection cimport Connection, failure
from anywire.loop._outgoing cimport Outgoing, iovec

import sys
from asyncio import constants
from asyncio.log import logger

cdef extern from "Python.h":
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    bint PyByteArray_Check(object o)
    bint PyMemoryView_Check(object o)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR
    ssize_t send(int fd, const void* p, size_t n, int flags)
    ssize_t sendmsg(int fd, msghdr* m, int flags)
    int c_shutdown "shutdown"(int fd, int how)

cdef enum:
    LARGE = 65536            # what is as large as this is not held back for the end of the turn
    MOST_AT_ONCE = 64        # pieces of one sendmsg(2): the array is on the stack


cdef class Writing(Connection):
    """The writing half of a transport, and closing, which waits for it."""

    def __cinit__(self):
        self.high_water = 65536
        self.low_water = 16384

    # ---- to the kernel, or into the queue --------------------------------------------------------------------------

    def write(self, data):
        self.put(data)

    cdef int put(self, object data) except -1:
        cdef Py_buffer view
        if PyBytes_Check(data):
            if self.eof_written or self.empty_waiter is not None or self.conn_lost:
                return self.refuse(len(data), "write")
            if PyBytes_GET_SIZE(data) == 0:
                return 0
            return self.push(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        if not (PyByteArray_Check(data) or PyMemoryView_Check(data)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self.eof_written or self.empty_waiter is not None or self.conn_lost:
            return self.refuse(len(data), "write")
        if PyMemoryView_Check(data) and not data.c_contiguous:
            data = bytes(data)
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if view.len:
                self.push(data, <char*> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)
        return 0

    cdef int refuse(self, Py_ssize_t size, str name) except -1:
        """Writing after write_eof, during sendfile, or after the connection is lost."""
        if self.eof_written:
            raise RuntimeError(f"Cannot call {name}() after write_eof()")
        if self.empty_waiter is not None:
            raise RuntimeError(f"unable to {name}; sendfile is in progress")
        if size:
            if self.conn_lost >= constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                logger.warning("socket.send() raised exception.")
            self.conn_lost += 1
        return 0

    cdef int push(self, object data, const char* start, size_t size) except -1:
        """Send or queue `size` > 0 bytes at `start` in `data`, or hold them back a little."""
        cdef Outgoing out = self.outgoing
        if out is None:
            out = self.outgoing = Outgoing.__new__(Outgoing)
        if out.total == 0:
            if self.wait_a_little(size):
                out.keep(data, start, size)
                self.hold()
                if out.total > <size_t> self.high_water:
                    self.send_held()
                    return self.pause_protocol()
                return 0
            return self.send_or_queue(data, start, size)
        out.keep(data, start, size)
        if self.held and (out.total >= LARGE or out.total > <size_t> self.high_water):
            self.send_held()
        return self.pause_protocol()

    cdef int send_or_queue(self, object data, const char* start, size_t size) except -1:
        """Send `size` > 0 bytes now, and queue what the kernel does not take. Without `data` what is queued is a copy."""
        cdef ssize_t sent
        cdef Outgoing out = self.outgoing
        if out is None:
            out = self.outgoing = Outgoing.__new__(Outgoing)
        if out.total == 0:
            if self.adopted:
                try:
                    self.usable()
                except OSError as error:
                    return self.fatal(error, "Fatal write error on socket transport")
            sent = send(self.file, start, size, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    return self.fatal(failure(errno), "Fatal write error on socket transport")
                sent = 0
            self.bytes_sent += sent
            if self.figures != NULL:
                self.show()
            if <size_t> sent == size:
                return 0
            start += sent
            size -= sent
        out.keep(data, start, size)
        self.arm()
        return self.pause_protocol()

    cdef bint wait_a_little(self, size_t size) noexcept:
        """Whether this write may wait for more of the same turn: a protocol's callback, or others that are to run yet."""
        return size < LARGE and self.core._thread_id is not None and (self.reading or not self.core.last())

    cdef int hold(self) except -1:
        """What is queued leaves with what else this turn writes, at its end."""
        self.held = True
        return self.core.flush_later(self)

    cdef int send_held(self) except -1:
        if not self.held:
            return 0
        cdef bint waiting = self.outgoing is not None and self.outgoing.total > 0
        self.held = False
        if self.layer is not None:
            self.layer.spill()
        if self.conn_lost or not waiting:
            return 0
        return self.send_waiting()

    cdef int flush(self) except -1:
        """What the loop calls at the end of the turn, outside of any callback."""
        if not self.held:
            return 0
        PyContext_Enter(self.context)
        try:
            self.send_held()
        finally:
            PyContext_Exit(self.context)
        return 0

    cdef int send_waiting(self) except -1:
        cdef iovec pieces[MOST_AT_ONCE]
        cdef msghdr message
        cdef Outgoing out = self.outgoing
        cdef ssize_t sent
        cdef size_t offered
        cdef int i, count
        try:
            self.usable()
        except OSError as error:
            return self.write_failed(error)
        while out.total:
            count = out.gather(pieces, MOST_AT_ONCE)
            if count == 1:
                offered = pieces[0].iov_len
                sent = send(self.file, pieces[0].iov_base, offered, MSG_NOSIGNAL | MSG_DONTWAIT)
            else:
                offered = 0
                for i in range(count):
                    offered += pieces[i].iov_len
                memset(&message, 0, sizeof(message))
                message.msg_iov = pieces
                message.msg_iovlen = count
                sent = sendmsg(self.file, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
            if sent < 0:
                if errno != EAGAIN and errno != EINTR:
                    return self.write_failed(failure(errno))
                break
            self.bytes_sent += sent
            out.advance(sent)
            if <size_t> sent < offered:
                break
        if self.figures != NULL:
            self.show()
        if self.protocol_paused:
            self.resume_protocol()                     # may write more
        if self.conn_lost:
            return 0
        if out.total == 0:
            return self.drained()
        if not self.held:
            self.arm()
        return 0

    cdef int write_failed(self, object error) except -1:
        waiter = self.empty_waiter
        self.fatal(error, "Fatal write error on socket transport")
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        return 0

    cdef int drained(self) except -1:
        if self.conditions & WRITE:
            self.arm()
        if self.empty_waiter is not None and not self.empty_waiter.done():
            self.empty_waiter.set_result(None)
        if self.closing:
            return self.lose(None)
        if self.eof_written:
            return self.shut_down_writing()
        return 0

    def writelines(self, list_of_data):
        cdef Py_buffer view
        cdef Outgoing out
        if self.eof_written or self.empty_waiter is not None:
            self.refuse(0, "writelines")
        pieces = list(list_of_data)
        if self.conn_lost:
            self.refuse(len(pieces), "writelines")
            return
        if not pieces:
            return
        out = self.outgoing
        if out is None:
            out = self.outgoing = Outgoing.__new__(Outgoing)
        cdef size_t before = out.total
        for data in pieces:
            if PyBytes_Check(data):
                out.append(data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
                continue
            if PyMemoryView_Check(data) and not data.c_contiguous:
                data = bytes(data)
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
            try:
                out.keep(data, <char*> view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
        if out.total == before:
            return
        if before == 0:
            self.hold()
        if self.held and (out.total > <size_t> self.high_water or not self.wait_a_little(out.total)):
            self.send_held()
        self.pause_protocol()

    def write_eof(self):
        if self.closing or self.eof_written:
            return
        if self.held:
            self.send_held()
            if self.closing:
                return
        self.eof_written = True
        if self.outgoing is None or self.outgoing.total == 0:
            self.shut_down_writing()

    cdef int shut_down_writing(self) except -1:
        self.usable()
        if c_shutdown(self.file, SHUT_WR) < 0:
            PyErr_SetFromErrno(OSError)
        return 0

    def can_write_eof(self):
        return True

    def _make_empty_waiter(self):
        if self.empty_waiter is not None:
            raise RuntimeError("Empty waiter is already set")
        if self.held:
            self.send_held()
        self.empty_waiter = self.loop.create_future()
        if self.outgoing is None or self.outgoing.total == 0:
            self.empty_waiter.set_result(None)
        return self.empty_waiter

    def _reset_empty_waiter(self):
        self.empty_waiter = None

    # ---- water marks -----------------------------------------------------------------------------------------------

    def get_write_buffer_size(self):
        return self.outgoing.total if self.outgoing is not None else 0

    def get_write_buffer_limits(self):
        return (self.low_water, self.high_water)

    def set_write_buffer_limits(self, high=None, low=None):
        if high is None:
            high = 65536 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self.high_water = min(high, sys.maxsize)
        self.low_water = min(low, sys.maxsize)
        if self.held and self.outgoing is not None and self.outgoing.total > <size_t> self.high_water:
            self.send_held()
        self.pause_protocol()

    cdef int pause_protocol(self) except -1:
        if self.figures != NULL:
            self.show()
        if self.protocol_paused or self.outgoing is None or self.outgoing.total <= <size_t> self.high_water:
            return 0
        if self.conn_lost:
            return 0
        self.protocol_paused = True
        if self.figures != NULL:
            self.figures.writing_pauses += 1
            self.show()
        try:
            self.protocol.pause_writing()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.complain("protocol.pause_writing() failed", error)
        return 0

    cdef int resume_protocol(self) except -1:
        if self.outgoing.total > <size_t> self.low_water:
            return 0
        self.protocol_paused = False
        if self.figures != NULL:
            self.show()
        try:
            self.protocol.resume_writing()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.complain("protocol.resume_writing() failed", error)
        return 0

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self):
        if self.closing:
            return
        if self.held:
            self.send_held()
            if self.closing:
                return
        self.closing = True
        if self.outgoing is None or self.outgoing.total == 0:
            self.conn_lost += 1
            self.loop.call_soon(self._call_connection_lost, None, context=self.context)

    def abort(self):
        if self.held:
            self.send_held()                               # it would be in the kernel already if it had not been held back
        self.force_close(None)
