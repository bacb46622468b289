# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The stream transport of the loop: TCP and Unix sockets, for plain and buffered protocols and the standard streams.

What users see is asyncio's: the order of callbacks, errors, water marks and half-close follow `selector_events` of CPython
3.11 to 3.13, and the same tests run against both. What differs is how bytes move:

- Writes of one turn leave together, in one sendmsg(2): when the protocol's callback returns, or before the loop sleeps. A
  large write, and one made while the loop does not run, leaves at once. What is immutable is never copied; what is mutable
  is copied by `write`, so that the caller may change it.
- A read goes into the loop's scratch room and becomes a `bytes` of exact size; a connection that fills the scratch gets
  reads straight into the object that it is given, up to 256 KiB a turn, so that none keeps the others waiting.
- `asyncio.StreamReaderProtocol` is recognised, and its StreamReader fed without a call into Python.

Everything here runs on the loop's thread. A transport owns its socket and closes it exactly once, after `connection_lost`.
What can go wrong: the caller closing a socket object under us (found before each system call, since the number may belong to
somebody else by then), protocols that raise, descriptors that hang up while nobody reads (never watched with nothing to do).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdlib cimport free, malloc, realloc
from libc.errno cimport EAGAIN, EBADF, EINTR, errno
from libc.string cimport memset
from anywire.engine._figures cimport READING_PAUSED, WRITING_PAUSED, claim_transport, release_figures
from anywire.engine._timers cimport monotonic
from anywire.engine.conditions cimport READ, WRITE
from anywire.loop._core cimport BUDGET, Core, Corked
from anywire.loop._outgoing cimport MOST_PIECES, Outgoing, iovec
from anywire.loop._socket_names cimport SocketName, name_of, sockaddr, sockaddr_storage, socklen_t
from anywire.loop._streams cimport ReadOperation, deliver, direct, feed, fields_of, stream_of, waiting_in

import asyncio
import socket as sockets
import sys
import warnings
from asyncio import constants, transports, trsock
from asyncio.log import logger

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    int _PyBytes_Resize(PyObject** bytes, Py_ssize_t size) except -1
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* start, Py_ssize_t size) except NULL
    bint PyByteArray_Check(object o)
    bint PyMemoryView_Check(object o)

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, AF_INET, AF_INET6
    ssize_t recv(int fd, void* p, size_t n, int flags)
    ssize_t send(int fd, const void* p, size_t n, int flags)
    ssize_t sendmsg(int fd, msghdr* m, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int getsockname(int fd, sockaddr* address, socklen_t* size)
    int getpeername(int fd, sockaddr* address, socklen_t* size)
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from *:
    """
    #include <errno.h>
    static void anywire_transport_errno(int e) { errno = e; }
    """
    void set_errno "anywire_transport_errno"(int e) noexcept nogil

cdef enum:
    SCRATCH = 65536          # the loop's room for one read
    LARGE = 65536            # what is as large as this is not held back for the end of the turn
    MOST_AT_ONCE = 64        # pieces of one sendmsg(2): the array is on the stack

cdef char scratch[SCRATCH]   # for one recv(2) and the copy that follows at once, under the GIL: one does for all loops

cdef bint SERVER_KNOWS_TRANSPORTS = sys.version_info >= (3, 13)


class SocketTransport(transports._FlowControlMixin, transports.Transport):
    """What `isinstance` sees in a StreamTransport, which has C fields and so cannot inherit from Python classes."""

    __slots__ = ()


# Whose a descriptor is: borrowed pointers by number, of this process. A transport takes itself out before it goes.
cdef PyObject** owners = NULL
cdef int owned = 0


cdef int register(StreamTransport transport, int fd) except -1:
    global owners, owned
    cdef PyObject** grown
    cdef int i, more
    if fd >= owned:
        more = max(fd + 1, 2 * owned, 256)
        grown = <PyObject**> realloc(owners, more * sizeof(PyObject*))
        if grown == NULL:
            raise MemoryError()
        for i in range(owned, more):
            grown[i] = NULL
        owners, owned = grown, more
    owners[fd] = <PyObject*> transport
    return 0


cdef int unregister(StreamTransport transport, int fd) noexcept:
    if 0 <= fd < owned and owners[fd] == <PyObject*> transport:
        owners[fd] = NULL
    return 0


cdef StreamTransport transport_of(int fd):
    """The transport that lives on the descriptor, or None."""
    if fd < 0 or fd >= owned or owners[fd] == NULL:
        return None
    return <StreamTransport> owners[fd]


def owner_of(fd):
    """The StreamTransport whose descriptor has the number `fd`, or None."""
    return transport_of(fd)


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


cdef inline object failure(int e):
    set_errno(e)
    try:
        PyErr_SetFromErrno(OSError)
    except OSError as error:
        return error


cdef class Layer:
    """What stands between a transport and its protocol: it gets what comes, and holds back what it writes."""

    cdef int received(self, const char* start, Py_ssize_t size) except -1:
        return 0

    cdef int spill(self) except -1:
        return 0

    cdef object above(self):
        return None


cdef class StreamTransport(Corked):
    """A transport over a connected stream socket. Loops make it; see `asyncio.Transport` for its methods."""

    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.TRY_NATIVE

    def __cinit__(self):
        self.file = self.sock_fd = -1
        self.high_water = 65536
        self.low_water = 16384
        self.appetite = SCRATCH

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
        self.file = self.sock_fd = fd
        self.loop = loop
        self.core = core
        register(self, fd)
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
            if SERVER_KNOWS_TRANSPORTS:
                server._attach(self)
            else:
                server._attach()
            self.server = server
        loop.call_soon(self._begin, waiter, context=self.context)
        return 0

    def __dealloc__(self):
        unregister(self, self.sock_fd)
        release_figures(self.figures)
        if self.file >= 0 and not self.adopted:          # __del__ has looked after those with a socket object
            c_close(self.file)

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

    # ---- what the loop and the standard library's helpers use ------------------------------------------------------

    @property
    def __class__(self):
        return SocketTransport

    @property
    def _loop(self):
        return self.loop

    @property
    def _protocol(self):
        return self.protocol

    @property
    def _protocol_paused(self):
        return self.protocol_paused

    @property
    def _conn_lost(self):
        return self.conn_lost

    @property
    def _sock_fd(self):
        return self.sock_fd

    @property
    def _sock(self):
        if self.sock is None and self.file >= 0:
            # Only sockets that were accepted natively; the families that can be are named in the acceptor.
            self.sock = sockets.socket(self.family, sockets.SOCK_STREAM, 0, fileno=self.file)
        return self.sock

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

    def _lend(self):
        """Leave the descriptor to `sock_sendfile`, which watches it by itself, until `_take_back`."""
        self.core.unwatch(self)
        unregister(self, self.file)

    def _take_back(self):
        if self.file >= 0:
            register(self, self.file)
            self.arm()

    def _force_close(self, exc):
        self.force_close(exc)

    def _fatal_error(self, exc, message="Fatal error on transport"):
        self.fatal(exc, message)

    # ---- names and state -------------------------------------------------------------------------------------------

    cdef int look_up_names(self) except -1:
        """Ask the kernel for both addresses while the descriptor is there."""
        cdef sockaddr_storage room
        cdef socklen_t size
        if self.local is None:
            size = sizeof(room)
            memset(&room, 0, sizeof(room))
            if getsockname(self.file, <sockaddr*> &room, &size) == 0:
                self.local = name_of(<sockaddr*> &room, size)
        if self.remote is None and self.adopted:
            size = sizeof(room)
            memset(&room, 0, sizeof(room))
            if getpeername(self.file, <sockaddr*> &room, &size) == 0:
                self.remote = name_of(<sockaddr*> &room, size)
        return 0

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

    cdef object ask_socket(self, str name):
        """The address by the `socket` module's own reading of it; None when there is none any more."""
        value = None
        if self.file >= 0:
            try:
                value = getattr(self._sock, "get" + name)()
            except OSError:
                pass
            if self.extra is None:
                self.extra = {}
            self.extra[name] = value
        return value

    def is_closing(self):
        return self.closing

    def is_reading(self):
        return not self.closing and not self.paused

    def get_protocol(self):
        return self.protocol

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

    cdef int arm(self) except -1:
        """Watch for what there is to do now, and for nothing when there is nothing: a hang-up cannot be masked."""
        cdef uint32_t wanted = 0
        if self.file < 0:
            return 0
        if self.started and not (self.closing or self.paused or self.ended):
            wanted = READ
        if self.outgoing is not None and self.outgoing.total and not self.held and not self.conn_lost:
            wanted |= WRITE
        if wanted == self.conditions:
            return 0
        if self.slot < 0:
            return self.core.watch(self, self.file, wanted)
        if wanted == 0:
            self.core.unwatch(self)
            return 0
        return self.core.rewatch(self, wanted)

    cdef int usable(self) except -1:
        """0, or -1 with an exception: a socket object that its owner closed must not be used by its number."""
        if self.adopted and self.sock.fileno() != self.file:
            set_errno(EBADF)
            PyErr_SetFromErrno(OSError)
        return 0

    cdef int ready(self, uint32_t conditions) except -1:
        """What the loop calls when the descriptor is ready."""
        cdef double began
        cdef ReadOperation operation
        cdef bint reads
        if self.core.slow < 0 and not self.core._debug:
            return self.serve(conditions)
        protocol, callback, reads = self.protocol, None, bool(conditions & ~<uint32_t> WRITE)
        if self.kind == LAYERED:
            protocol = self.layer.above()
        if reads and self.kind == STREAM:
            reader = self.stream_reader()
            operation = waiting_in(fields_of(reader)) if reader is not None else None
            if operation is not None:
                callback = operation.waiter.callback
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
        cdef ReadOperation operation
        cdef PyObject* room
        cdef object reader = self.stream_reader(), data
        cdef dict fields
        cdef int e
        if reader is None:                             # nobody reads any more: its protocol drops what comes
            return self.read_plain()
        fields = fields_of(reader)
        while True:
            operation = waiting_in(fields)
            data = None
            asked = direct(fields, operation) if self.appetite > SCRATCH else 0
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
                    feed(reader, fields, operation, scratch, got)
                else:
                    deliver(fields, operation, data)
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

    # ---- writing ---------------------------------------------------------------------------------------------------

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

    cdef int show(self) noexcept:
        """Bring the figures that others see up to date, where there are such."""
        cdef size_t queued = self.outgoing.total if self.outgoing is not None else 0
        self.figures.bytes_received = self.bytes_received
        self.figures.bytes_sent = self.bytes_sent
        self.figures.queued = queued
        if queued > self.figures.queued_most:
            self.figures.queued_most = queued
        self.figures.paused = READING_PAUSED * self.paused | WRITING_PAUSED * self.protocol_paused
        return 0

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

    cdef int complain(self, str message, object error) except -1:
        self.loop.call_exception_handler({
            "message": message, "exception": error, "transport": self, "protocol": self.protocol})
        return 0

    cdef int fatal(self, object error, str message) except -1:
        if isinstance(error, OSError):
            if self.loop.get_debug():
                logger.debug("%r: %s", self, message, exc_info=error)
        else:
            self.complain(message, error)
        return self.force_close(error)

    cdef int force_close(self, object error) except -1:
        if self.conn_lost:
            return 0
        self.conn_lost += 1
        self.closing = True
        if self.outgoing is not None:
            self.outgoing.clear()
        self.loop.call_soon(self._call_connection_lost, error, context=self.context)
        return self.arm()

    def _call_connection_lost(self, error):
        self.lose(error)

    cdef int lose(self, object error) except -1:
        """The last callback of the protocol, then the socket goes. Only from a callback of the loop."""
        if self.file < 0:
            return 0
        if not self.conn_lost:
            self.conn_lost = 1
        try:
            self.protocol.connection_lost(error)
        finally:
            self.let_go()
        return 0

    cdef int let_go(self) except -1:
        cdef int fd = self.file
        if self.local is None:
            self.look_up_names()                       # asked for even later
        self.core.unwatch(self)
        self.file = -1
        unregister(self, fd)
        release_figures(self.figures)
        self.figures = NULL
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        else:
            c_close(fd)
        self.protocol = None
        self.stream_reader = self.layer = None
        self.loop = None
        if self.outgoing is not None:
            self.outgoing.clear()
        waiter = self.empty_waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(ConnectionError("Connection is closed by peer"))
        self.detach_server()
        return 0

    cdef int detach_server(self) except -1:
        server = self.server
        self.server = None
        if server is not None:
            if SERVER_KNOWS_TRANSPORTS:
                server._detach(self)
            else:
                server._detach()
        return 0

