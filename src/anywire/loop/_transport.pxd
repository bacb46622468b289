# The stream transport of a loop: what acceptor and streams need of it.
from libc.stdint cimport uint32_t, uint64_t
from anywire.engine._figures cimport TransportFigures
from anywire.loop._core cimport Core, Corked
from anywire.loop._outgoing cimport Outgoing
from anywire.loop._socket_names cimport SocketName

cdef enum:
    PLAIN = 0                # kinds of protocol: data_received(bytes)
    BUFFERED = 1             # get_buffer, buffer_updated
    STREAM = 2               # the standard library's StreamReaderProtocol: its StreamReader is fed directly
    LAYERED = 3              # a native layer (TLS) that has all bytes first


# What stands between a transport and its protocol, natively, and keeps what it writes in room of its own.
cdef class Layer:
    cdef int received(self, const char* start, Py_ssize_t size) except -1    # what came; the room is the caller's
    cdef int spill(self) except -1                                           # give the transport what was held back
    cdef object above(self)                                                  # the application's protocol


cdef class StreamTransport(Corked):
    cdef object __weakref__
    cdef Core core
    cdef object loop, protocol, context, server, extra
    cdef object sock                     # the Python socket object: given, or made when somebody asks
    cdef object empty_waiter             # sendfile waits with it until all is written
    cdef object stream_reader             # STREAM: the protocol's weak reference to the StreamReader
    cdef Layer layer                     # LAYERED: what gets and holds the bytes
    cdef Outgoing outgoing
    cdef SocketName local, remote
    cdef int sock_fd                     # stays what it was, for repr; `file` is -1 when closed
    cdef int file
    cdef int family
    cdef int kind
    cdef Py_ssize_t high_water, low_water
    cdef Py_ssize_t appetite             # bytes to ask the kernel for; grows with what comes
    cdef int conn_lost
    cdef bint adopted                    # the socket object is the caller's, who may close it behind our back
    cdef bint started, closing, paused, ended, eof_written, protocol_paused, held, reading
    cdef readonly uint64_t bytes_received, bytes_sent
    cdef TransportFigures* figures       # where others see all this; NULL: nobody asked for that

    cdef int show(self) noexcept
    cdef int open(self, object loop, Core core, int fd, object protocol, object waiter, object server) except -1
    cdef int take_protocol(self, object protocol) except -1
    cdef int arm(self) except -1
    cdef int usable(self) except -1
    cdef int serve(self, uint32_t conditions) except -1
    cdef int read_ready(self) except -1
    cdef int read_plain(self) except -1
    cdef int read_buffered(self) except -1
    cdef int read_stream(self) except -1
    cdef int read_layered(self) except -1
    cdef int put_layer(self, Layer layer) except -1
    cdef int end_of_input(self) except -1
    cdef int put(self, object data) except -1
    cdef int push(self, object data, const char* start, size_t size) except -1
    cdef int send_or_queue(self, object data, const char* start, size_t size) except -1
    cdef bint wait_a_little(self, size_t size) noexcept
    cdef int hold(self) except -1
    cdef int send_held(self) except -1
    cdef int no_input(self, Py_ssize_t got, int e) except -1
    cdef int refuse(self, Py_ssize_t size, str name) except -1
    cdef int write_failed(self, object error) except -1
    cdef int send_waiting(self) except -1
    cdef int drained(self) except -1
    cdef int shut_down_writing(self) except -1
    cdef int pause_protocol(self) except -1
    cdef int resume_protocol(self) except -1
    cdef int fatal(self, object error, str message) except -1
    cdef int force_close(self, object error) except -1
    cdef int lose(self, object error) except -1
    cdef int let_go(self) except -1
    cdef int detach_server(self) except -1
    cdef int look_up_names(self) except -1
    cdef int complain(self, str message, object error) except -1
    cdef object ask_socket(self, str name)

cdef StreamTransport transport_of(int fd)
