# The stream transport of a loop: what acceptor, TLS and streams need of it.
from libc.stdint cimport uint32_t

from anywire.loop._connection cimport Layer
from anywire.loop._core cimport Core
from anywire.loop._writing cimport Writing

cdef enum:
    PLAIN = 0                # kinds of protocol: data_received(bytes)
    BUFFERED = 1             # get_buffer, buffer_updated
    STREAM = 2               # the standard library's StreamReaderProtocol: its StreamReader is fed directly
    LAYERED = 3              # a native layer (TLS) that has all bytes first


cdef class StreamTransport(Writing):
    cdef int kind
    cdef Py_ssize_t appetite             # bytes to ask the kernel for; grows with what comes

    cdef int open(self, object loop, Core core, int fd, object protocol, object waiter, object server) except -1
    cdef int take_protocol(self, object protocol) except -1
    cdef int put_layer(self, Layer layer) except -1
    cdef int serve(self, uint32_t conditions) except -1
    cdef int read_ready(self) except -1
    cdef int read_plain(self) except -1
    cdef int read_buffered(self) except -1
    cdef int read_stream(self) except -1
    cdef int read_layered(self) except -1
    cdef int no_input(self, Py_ssize_t got, int e) except -1
    cdef int end_of_input(self) except -1
