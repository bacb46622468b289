# A transport's hold on its connection.
from libc.stdint cimport uint64_t

from anywire.engine._figures cimport TransportFigures
from anywire.loop._core cimport Core, Corked
from anywire.loop._outgoing cimport Outgoing
from anywire.loop._socket_names cimport SocketName


# What stands between a transport and its protocol, natively, and keeps what it writes in room of its own.
cdef class Layer:
    cdef int received(self, const char* start, Py_ssize_t size) except -1    # what came; the room is the caller's
    cdef int spill(self) except -1                                           # give the transport what was held back
    cdef object above(self)                                                  # the application's protocol


cdef class Connection(Corked):
    cdef object __weakref__
    cdef Core core
    cdef object loop, protocol, context, server, extra
    cdef object sock                     # the Python socket object: given, or made when somebody asks
    cdef object empty_waiter             # sendfile waits with it until all is written
    cdef object stream_reader            # STREAM: the protocol's weak reference to the StreamReader
    cdef Layer layer                     # LAYERED: what gets and holds the bytes
    cdef Outgoing outgoing
    cdef SocketName local, remote
    cdef int sock_fd                     # stays what it was, for repr; `file` is -1 when closed
    cdef int file
    cdef int family
    cdef int conn_lost
    cdef bint adopted                    # the socket object is the caller's, who may close it behind our back
    cdef bint started, closing, paused, ended, protocol_paused
    cdef bint held                       # what is queued waits for the end of the turn
    cdef readonly uint64_t bytes_received, bytes_sent
    cdef TransportFigures* figures       # where others see all this; NULL: nobody asked for that

    cdef int take_descriptor(self, int fd) except -1
    cdef int look_up_names(self) except -1
    cdef object ask_socket(self, str name)
    cdef int show(self) noexcept
    cdef int arm(self) except -1
    cdef int usable(self) except -1
    cdef int attach_server(self, object server) except -1
    cdef int detach_server(self) except -1
    cdef int complain(self, str message, object error) except -1
    cdef int fatal(self, object error, str message) except -1
    cdef int force_close(self, object error) except -1
    cdef int lose(self, object error) except -1
    cdef int let_go(self) except -1


cdef object failure(int e)               # the OSError of an errno
