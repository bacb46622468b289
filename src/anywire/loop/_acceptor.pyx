# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Accepting connections: accept4(2) in a loop, a transport for each, without a Task or a socket object for each.

One `Acceptor` watches one listening socket for a Server of asyncio. In one turn it takes at most `backlog` connections and at
most 64 (a burst must not hold up those who are served already; the listener stays readable, so the next turn goes on). When
the process or the machine is out of descriptors or memory (EMFILE, ENFILE, ENOBUFS, ENOMEM) it says so once to the loop's
exception handler, stops watching, and tries again after `ACCEPT_RETRY_DELAY` of asyncio, as the standard loop does; a
connection that its peer gave up meanwhile (ECONNABORTED, and the network errors that accept(2) passes on) is skipped.

TLS connections go the standard library's way (`_accept_connection2`, a Task for the handshake) over a native transport.
"""
from libc.errno cimport (EAGAIN, ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, EMFILE, ENETDOWN, ENETUNREACH, ENFILE, ENOBUFS,
                         ENOMEM, ENOPROTOOPT, EOPNOTSUPP, EPERM, EPROTO, errno)
from libc.stdint cimport uint32_t
from anywire.engine.conditions cimport READ
from anywire.engine._watches cimport Watcher
from anywire.loop._core cimport Core
from anywire.loop._socket_names cimport name_of, sockaddr, sockaddr_storage, socklen_t
from anywire.loop._transport cimport StreamTransport

import socket as sockets
from asyncio import constants, trsock
from asyncio.log import logger

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    object PyContext_Copy(object context)
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1

cdef extern from "<sys/socket.h>" nogil:
    int AF_INET, AF_INET6, AF_UNIX, SOCK_NONBLOCK, SOCK_CLOEXEC
    int accept4(int fd, sockaddr* address, socklen_t* size, int flags)
    int setsockopt(int fd, int level, int name, const void* value, socklen_t size)

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef enum:
    MOST_A_TURN = 64


cdef class Acceptor(Watcher):
    """What accepts at one listening socket.

    Args:
        loop: the event loop.
        core: its core.
        factory: makes a protocol for each connection.
        sock: the listening socket, an object; it stays the caller's.
        server: the `asyncio.Server` that counts its connections.
        backlog: connections taken in one turn, at most.
        ssl: the context of TLS connections, or None; with the seconds for handshake and shutdown.
    """
    cdef Core core
    cdef object loop, factory, sock, server, ssl, handshake_timeout, shutdown_timeout, context, retry, local
    cdef int file, family, backlog

    def __init__(self, loop, core, factory, sock, server, backlog, ssl, handshake_timeout, shutdown_timeout):
        cdef int on = 1
        self.loop = loop
        self.core = core
        self.factory = factory
        self.sock = sock
        self.server = server
        self.backlog = min(max(backlog, 1), MOST_A_TURN)
        self.ssl = ssl
        self.handshake_timeout = handshake_timeout
        self.shutdown_timeout = shutdown_timeout
        self.context = PyContext_CopyCurrent()
        self.file = sock.fileno()
        self.family = sock.family
        if self.family == AF_INET or self.family == AF_INET6:
            # Linux hands it on to what is accepted: one call for all.
            setsockopt(self.file, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))

    def start(self):
        """Begin to accept; also after `start` once more."""
        self.retry = None
        if self.file >= 0 and self.slot < 0:
            self.core.watch(self, self.file, READ)

    def stop(self):
        """Accept no more. The socket stays open."""
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.core.unwatch(self)
        self.file = -1
        self.factory = self.server = None

    cdef int ready(self, uint32_t conditions) except -1:
        cdef sockaddr_storage room
        cdef socklen_t size
        cdef int i, fd, e
        for i in range(self.backlog):
            if self.file < 0 or self.sock.fileno() != self.file:
                self.core.unwatch(self)                # closed by its owner without a word
                return 0
            size = sizeof(room)
            fd = accept4(self.file, <sockaddr*> &room, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)
            if fd < 0:
                e = errno
                if e == EAGAIN:
                    return 0
                if e in (EINTR, ECONNABORTED, EPROTO, ENOPROTOOPT, ENETDOWN, EHOSTDOWN, ENETUNREACH, EHOSTUNREACH, EOPNOTSUPP,
                         EPERM):
                    continue
                return self.exhausted(e)
            PyContext_Enter(self.context)
            try:
                self.welcome(fd, <sockaddr*> &room, size)
            finally:
                PyContext_Exit(self.context)
        return 0

    cdef int welcome(self, int fd, sockaddr* address, socklen_t size) except -1:
        """A transport for the connection `fd`, which is closed if there cannot be one."""
        cdef StreamTransport transport
        if self.ssl is not None or not (self.family == AF_INET or self.family == AF_INET6 or self.family == AF_UNIX):
            return self.welcome_in_python(fd)
        context = PyContext_Copy(self.context)
        PyContext_Enter(context)
        try:
            protocol = self.factory()
            if self.file < 0:                          # the factory closed the server
                c_close(fd)
                return 0
            transport = StreamTransport.__new__(StreamTransport)
            transport.family = self.family
            transport.remote = name_of(address, size)
            fd, given = -1, fd
            transport.open(self.loop, self.core, given, protocol, None, self.server)
            if self.loop.get_debug():
                logger.debug("%r got a new connection from %r: %r", self.server, transport.remote.get(), transport)
        except (SystemExit, KeyboardInterrupt):
            if fd >= 0:
                c_close(fd)
            raise
        except BaseException as error:
            if fd >= 0:
                c_close(fd)
            if self.loop.get_debug():
                self.loop.call_exception_handler({
                    "message": "Error on transport creation for incoming connection", "exception": error})
        finally:
            PyContext_Exit(context)
        return 0

    cdef int welcome_in_python(self, int fd) except -1:
        sock = sockets.socket(fileno=fd)
        sock.setblocking(False)
        try:
            peername = sock.getpeername()
        except OSError:
            peername = None
        self.loop.create_task(self.loop._accept_connection2(
            self.factory, sock, {"peername": peername}, self.ssl, self.server, self.handshake_timeout,
            self.shutdown_timeout))
        return 0

    cdef int exhausted(self, int e) except -1:
        error = OSError(e, sockets.os.strerror(e))
        if e not in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
            self.loop.call_exception_handler({
                "message": "socket.accept() failed", "exception": error, "socket": trsock.TransportSocket(self.sock)})
            return 0
        self.core.unwatch(self)
        self.retry = self.loop.call_later(constants.ACCEPT_RETRY_DELAY, self.start)
        self.loop.call_exception_handler({
            "message": "socket.accept() out of system resource", "exception": error,
            "socket": trsock.TransportSocket(self.sock)})
        return 0
