# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The stream transport of the loop: TCP and Unix sockets, for plain and buffered protocols and the standard streams.

What users see is asyncio's: the order of callbacks, errors, water marks and half-close follow `selector_events` of CPython
3.11 to 3.13, and the same tests run against both. A `StreamTransport` is one object, written in three classes, each derived
from the one before: `Connection` (`_connection`: the descriptor, and the end), `Writing` (`_writing`), and here reading, with
how it begins:

- A read goes into the loop's scratch room and becomes a `bytes` of exact size; a connection that fills the scratch gets
  reads straight into the object that it is given, up to 256 KiB a turn, so that none keeps the others waiting.
- `asyncio.StreamReaderProtocol` is recognised, and its StreamReader fed without a call into Python.

Everything here runs on the loop's thread. What can go wrong: protocols that raise (the connection is lost), and what
`_connection` and `_writing` name.
"""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc

from anywire.engine._awaiting cimport Waiter
from anywire.engine._figures cimport claim_transport
from anywire.engine._timers cimport monotonic
from anywire.engine.conditions cimport READ, WRITE
from anywire.loop._connection cimport Layer, failure
from anywire.loop._core cimport BUDGET, Core
from anywire.loop._streams cimport deliver, direct, feed, fields_of, stream_of, waiting_in

import asyncio
import warnings
from asyncio import constants, transports, trsock
from asyncio.log import logger

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    int _PyBytes_Resize(PyObject** bytes, Py_ssize_t size) except -1
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* start, Py_ssize_t size) except NULL

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, AF_INET, AF_INET6
    ssize_t recv(int fd, void* p, size_t n, int flags)
    int setsockopt(int fd, int level, int name, const void* value, unsigned int size)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef enum:
    SCRATCH = 65536          # the loop's room for one read

cdef char scratch[SCRATCH]   # for one recv(2) and the copy that follows at once, under the GIL: one does for all loops


class SocketTransport(transports._FlowControlMixin, transports.Transport):
    """What `isinstance` sees in a StreamTransport, which has C fields and so cannot inherit from Python classes."""

    __slots__ = ()


cdef char layers_room[BUDGET]
cdef bint room_is_lent = False


cdef char* borrow() except NULL:
    """Room for BUDGET bytes: the one of this module, or, while a loop of another thread has that, memory."""
    global room_is_lent
    cdef char* room
    if not room_is_lent:
        room_is_lent = True
        return layers_room
    room = <char*> malloc(BUDGET)
    if room == NULL:
        raise MemoryError()
    return room


cdef int give_back(char* room) noexcept:
    global room_is_lent
    if room == layers_room:
        room_is_lent = False
    else:
        free(room)
    return 0


cdef class StreamTransport(Writing):
    """A transport over a connected stream socket. Loops make it; see `asyncio.Transport` for its methods."""

    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.TRY_NATIVE

    def __cinit__(self):
        self.appetite = SCRATCH

    @property
    def __class__(self):
        return SocketTransport

    def __init__(self, loop, core, sock, protocol, waiter=None, extra=None, server=None):
        self.sock = sock
        self.adopted = True
        self.family = sock.family
        self.extra = extra
        self.open(loop, core, sock.fileno(), protocol, waiter, server)
        if server is not None:
            self.adopted = False                       # the loop has accepted it, so nobody else has the socket

    cdef int open(self, object loop, Core core, int fd, object protocol, object waiter, object server) except -1:
        """Begin life on the descriptor `fd`, which is the transport's from here on, whatever happens."""
        cdef int on = 1
        self.loop = loop
        self.core = core
        self.take_descriptor(fd)
        self.take_protocol(protocol)
        self.context = PyContext_CopyCurrent()
        if self.adopted and (self.family == AF_INET or self.family == AF_INET6):
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))     # what is not TCP refuses, and need not have it
        if self.adopted:
            self.look_up_names()
        if core.count_transports:
            self.look_up_names()
            self.figures = claim_transport(
                None if self.local is None else self.local.get(), None if self.remote is None else self.remote.get())
        if server is not None:
            self.attach_server(server)
        loop.call_soon(self._begin, waiter, context=self.context)
        return 0

    def _begin(self, waiter):
        """First callback of the loop: the protocol learns of its transport, then reading begins."""
        try:
            if self.kind == STREAM:
                self._introduce_stream()
            else:
                self.protocol.connection_made(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.loop.call_exception_handler({
                "message": f"Exception in callback {type(self.protocol).__name__}.connection_made()",
                "exception": error, "transport": self, "protocol": self.protocol})
        self.started = True
        self.arm()
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _introduce_stream(self):
        """`connection_made` of a StreamReaderProtocol, whose handler gets a quick writer."""
        from anywire.loop._stream_writer import quick      # which needs this module's types

        protocol = self.protocol
        handler = protocol._client_connected_cb
        if handler is not None:
            protocol._client_connected_cb = lambda reader, writer: handler(reader, quick(writer))
        try:
            protocol.connection_made(self)
        finally:
            protocol._client_connected_cb = handler

    def __del__(self):
        if self.file >= 0 and self.loop is not None:
            warnings.warn(f"unclosed transport {self!r}", ResourceWarning, source=self)
            if self.sock is not None:
                self.file = -1
                self.sock.close()
            self.detach_server()

    def __repr__(self):
        info = ["StreamTransport"]
        if self.file < 0:
            info.append("closed")
        elif self.closing:
            info.append("closing")
        info.append(f"fd={self.sock_fd}")
        if self.file >= 0:
            info.append("read=polling" if self.conditions & READ and self.is_reading() else "read=idle")
            info.append(f"write=<{'polling' if self.conditions & WRITE else 'idle'}, bufsize={self.get_write_buffer_size()}>")
        return f"<{' '.join(info)}>"

    # ---- names and state -------------------------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        if self.extra is not None and name in self.extra:
            return self.extra[name]
        if name == "socket":
            if self.held:
                self.send_held()                           # who has the socket may write to it
            if self.extra is None:
                self.extra = {}
            sock = self._sock
            if sock is None:
                return default
            self.extra["socket"] = trsock.TransportSocket(sock)
            return self.extra["socket"]
        if name == "sockname":
            if self.local is None and self.file >= 0:
                self.look_up_names()
            if self.local is not None:
                return self.local.get()
            return self.ask_socket("sockname")
        if name == "peername":
            return self.remote.get() if self.remote is not None else self.ask_socket("peername")
        return default

    def is_reading(self):
        return not self.closing and not self.paused

    def set_protocol(self, protocol):
        self.take_protocol(protocol)

    cdef int take_protocol(self, object protocol) except -1:
        if self.layer is not None and self.held:
            self.send_held()
        self.protocol = protocol
        self.stream_reader = self.layer = None
        self.kind = PLAIN
        if isinstance(protocol, asyncio.BufferedProtocol):
            self.kind = BUFFERED
        else:
            self.stream_reader = stream_of(protocol)
            if self.stream_reader is not None:
                self.kind = STREAM
        return 0

    cdef int put_layer(self, Layer layer) except -1:
        """Give what comes to the layer, until another protocol is set."""
        self.layer = layer
        self.kind = LAYERED
        return 0

    # ---- reading ---------------------------------------------------------------------------------------------------

    def pause_reading(self):
        """Stop calling the protocol. The descriptor stays watched until it next has something: often it never does."""
        if self.closing or self.paused:
            return
        self.paused = True
        if self.figures != NULL:
            self.figures.reading_pauses += 1
            self.show()
        if self.loop.get_debug():
            logger.debug("%r pauses reading", self)

    def resume_reading(self):
        if self.closing or not self.paused:
            return
        self.paused = False
        self.arm()
        if self.figures != NULL:
            self.show()
        if self.loop.get_debug():
            logger.debug("%r resumes reading", self)

    cdef int ready(self, uint32_t conditions) except -1:
        """What the loop calls when the descriptor is ready."""
        cdef double began
        cdef Waiter waiter
        cdef bint reads
        if self.core.slow < 0 and not self.core._debug:
            return self.serve(conditions)
        protocol, callback, reads = self.protocol, None, bool(conditions & ~<uint32_t> WRITE)
        if self.kind == LAYERED:
            protocol = self.layer.above()
        if reads and self.kind == STREAM:
            reader = self.stream_reader()
            waiter = waiting_in(fields_of(reader)) if reader is not None else None
            if waiter is not None:
                callback = waiter.sleeper()
        method = ("buffer_updated" if self.kind == BUFFERED else "data_received") if reads else "resume_writing"
        began = monotonic()
        try:
            return self.serve(conditions)
        finally:
            self.core.report_took(protocol, callback, method, monotonic() - began)

    cdef int serve(self, uint32_t conditions) except -1:
        """A hang-up or an error counts as both, as in select(2)."""
        cdef bint wanted = False
        if conditions & ~<uint32_t> WRITE:
            if not (self.closing or self.paused or self.ended):
                wanted = True
                PyContext_Enter(self.context)
                self.reading = True
                try:
                    self.read_ready()
                    self.reading = False
                    if self.held:
                        self.send_held()
                finally:
                    self.reading = False
                    PyContext_Exit(self.context)
        if conditions & ~<uint32_t> READ and self.conditions & WRITE:
            wanted = True
            if self.outgoing.total and not self.conn_lost:
                PyContext_Enter(self.context)
                try:
                    self.send_waiting()
                finally:
                    PyContext_Exit(self.context)
        if not wanted:
            self.arm()                                 # reading was paused, or ended: stop watching for it now
        return 0

    cdef int read_ready(self) except -1:
        try:
            self.usable()
        except OSError as error:
            return self.fatal(error, "Fatal read error on socket transport")
        if self.kind == PLAIN:
            return self.read_plain()
        if self.kind == STREAM:
            return self.read_stream()
        if self.kind == LAYERED:
            return self.read_layered()
        return self.read_buffered()

    cdef int read_plain(self) except -1:
        cdef Py_ssize_t got, asked, total = 0
        cdef PyObject* room
        cdef object data
        cdef int e
        while True:
            asked = self.appetite
            if asked <= SCRATCH:
                asked = SCRATCH
                got = recv(self.file, scratch, asked, MSG_DONTWAIT)
                e = errno
                data = PyBytes_FromStringAndSize(scratch, got) if got > 0 else None
            else:
                room = new_bytes(NULL, asked)
                got = recv(self.file, PyBytes_AS_STRING(<object> room), asked, MSG_DONTWAIT)
                e = errno
                if got < asked:
                    _PyBytes_Resize(&room, got if got > 0 else 0)
                data = <object> room
                Py_DECREF(data)
            if got <= 0:
                return self.no_input(got, e)
            self.bytes_received += got
            if self.figures != NULL:
                self.show()
            total += got
            # Twice of what filled the room is asked for next; a read below a quarter of it shrinks it again.
            if got == asked:
                self.appetite = min(asked * 2, BUDGET)
            elif got < asked >> 2:
                self.appetite = SCRATCH
            try:
                self.protocol.data_received(data)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.data_received() call failed.")
            if got < asked or total >= BUDGET or self.kind != PLAIN or self.closing or self.paused or self.file < 0:
                return 0

    cdef int read_buffered(self) except -1:
        cdef Py_ssize_t got, asked, total = 0
        cdef Py_buffer view
        cdef int e
        while True:
            try:
                room = self.protocol.get_buffer(-1)
                if not len(room):
                    raise RuntimeError("get_buffer() returned an empty buffer")
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.get_buffer() call failed.")
            if self.closing:
                return 0
            try:
                PyObject_GetBuffer(room, &view, PyBUF_WRITABLE)
            except BaseException as error:
                return self.fatal(error, "Fatal read error on socket transport")
            asked = view.len
            got = recv(self.file, view.buf, asked, MSG_DONTWAIT)
            e = errno
            PyBuffer_Release(&view)
            room = None                                # the protocol may resize it in buffer_updated
            if got <= 0:
                return self.no_input(got, e)
            self.bytes_received += got
            if self.figures != NULL:
                self.show()
            total += got
            try:
                self.protocol.buffer_updated(got)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.buffer_updated() call failed.")
            if got < asked or total >= BUDGET or self.kind != BUFFERED or self.closing or self.paused or self.file < 0:
                return 0

    cdef int read_stream(self) except -1:
        cdef Py_ssize_t got, asked, total = 0
        cdef Waiter waiter
        cdef PyObject* room
        cdef object reader = self.stream_reader(), data
        cdef dict fields
        cdef int e
        if reader is None:                             # nobody reads any more: its protocol drops what comes
            return self.read_plain()
        fields = fields_of(reader)
        while True:
            waiter = waiting_in(fields)
            data = None
            asked = direct(fields, waiter) if self.appetite > SCRATCH else 0
            if asked >= SCRATCH:
                asked = min(asked, <Py_ssize_t> BUDGET)
                room = new_bytes(NULL, asked)
                got = recv(self.file, PyBytes_AS_STRING(<object> room), asked, MSG_DONTWAIT)
                e = errno
                if got < asked:
                    _PyBytes_Resize(&room, got if got > 0 else 0)
                data = <object> room
                Py_DECREF(data)
            else:
                asked = SCRATCH
                got = recv(self.file, scratch, asked, MSG_DONTWAIT)
                e = errno
            if got <= 0:
                return self.no_input(got, e)
            self.bytes_received += got
            if self.figures != NULL:
                self.show()
            total += got
            self.appetite = BUDGET if got >= SCRATCH >> 2 else SCRATCH
            try:
                if data is None:
                    feed(reader, fields, waiter, scratch, got)
                else:
                    deliver(fields, waiter, data)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.data_received() call failed.")
            if got < asked or total >= BUDGET or self.kind != STREAM or self.closing or self.paused or self.file < 0:
                return 0

    cdef int read_layered(self) except -1:
        """One receive a turn, as large as a turn may be. What runs meanwhile may read elsewhere: the room is borrowed."""
        cdef char* room = borrow()
        cdef Py_ssize_t got
        cdef int e
        try:
            got = recv(self.file, room, BUDGET, MSG_DONTWAIT)
            e = errno
            if got <= 0:
                return self.no_input(got, e)
            self.bytes_received += got
            if self.figures != NULL:
                self.show()
            try:
                self.layer.received(room, got)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                return self.fatal(error, "Fatal error: protocol.buffer_updated() call failed.")
        finally:
            give_back(room)
        return 0

    cdef int no_input(self, Py_ssize_t got, int e) except -1:
        if got == 0:
            return self.end_of_input()
        if e == EAGAIN or e == EINTR:
            return 0
        return self.fatal(failure(e), "Fatal read error on socket transport")

    cdef int end_of_input(self) except -1:
        if self.loop.get_debug():
            logger.debug("%r received EOF", self)
        try:
            stay = self.protocol.eof_received()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            return self.fatal(error, "Fatal error: protocol.eof_received() call failed.")
        if stay:
            self.ended = True                          # the protocol may still write
            return self.arm()
        self.close()
        return 0
