# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""A transport's hold on its connection: the descriptor, what it is watched for, its names, and the end.

`Connection` is the first of the three classes that a `StreamTransport` is made of: `Writing` derives from it and
`StreamTransport` from that, so that each idea is read alone and a call between them costs no more than within one. It owns the
socket and closes it exactly once, after `connection_lost`.

On the loop's thread. What can go wrong: the caller closing a socket object under us (found before each system call, since the
number may belong to somebody else by then), descriptors that hang up while nobody reads (never watched with nothing to do).
"""
from cpython.exc cimport PyErr_SetFromErrno
from cpython.object cimport PyObject
from libc.errno cimport EBADF
from libc.stdint cimport uint32_t
from libc.stdlib cimport realloc
from libc.string cimport memset

from anywire.engine._figures cimport READING_PAUSED, WRITING_PAUSED, release_figures
from anywire.engine.conditions cimport READ, WRITE
from anywire.loop._socket_names cimport name_of, sockaddr, sockaddr_storage, socklen_t

import socket as sockets
import sys
from asyncio.log import logger

cdef extern from "<sys/socket.h>" nogil:
    int getsockname(int fd, sockaddr* address, socklen_t* size)
    int getpeername(int fd, sockaddr* address, socklen_t* size)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from *:
    """
    #include <errno.h>
    static void anywire_connection_errno(int e) { errno = e; }
    """
    void set_errno "anywire_connection_errno"(int e) noexcept nogil

cdef bint SERVER_KNOWS_TRANSPORTS = sys.version_info >= (3, 13)


# Whose a descriptor is: borrowed pointers by number, of this process. A connection takes itself out before it goes.
cdef PyObject** owners = NULL
cdef int owned = 0


cdef int register(Connection connection, int fd) except -1:
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
    owners[fd] = <PyObject*> connection
    return 0


cdef int unregister(Connection connection, int fd) noexcept:
    if 0 <= fd < owned and owners[fd] == <PyObject*> connection:
        owners[fd] = NULL
    return 0


def owner_of(int fd):
    """The transport that lives on the descriptor, or None."""
    if fd < 0 or fd >= owned or owners[fd] == NULL:
        return None
    return <Connection> owners[fd]


cdef object failure(int e):
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


cdef class Connection(Corked):
    """A stream socket that a loop watches for a protocol."""

    def __cinit__(self):
        self.file = self.sock_fd = -1

    def __dealloc__(self):
        unregister(self, self.sock_fd)
        release_figures(self.figures)
        if self.file >= 0 and not self.adopted:          # __del__ has looked after those with a socket object
            c_close(self.file)

    cdef int take_descriptor(self, int fd) except -1:
        """The descriptor is this object's from here on, whatever happens."""
        self.file = self.sock_fd = fd
        return register(self, fd)

    # ---- what the loop and the standard library's helpers use ------------------------------------------------------

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

    def get_protocol(self):
        return self.protocol

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

    # ---- the descriptor --------------------------------------------------------------------------------------------

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

    # ---- the end ---------------------------------------------------------------------------------------------------

    cdef int attach_server(self, object server) except -1:
        if SERVER_KNOWS_TRANSPORTS:
            server._attach(self)
        else:
            server._attach()
        self.server = server
        return 0

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

