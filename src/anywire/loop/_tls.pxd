# What is done for each record of a TLS connection, in C.
from anywire.loop._tls_engine cimport Engine, Outcome
from anywire.loop._connection cimport Layer
from anywire.loop._transport cimport StreamTransport


cdef class TLSLayer(Layer):
    cdef object protocol                 # the TLSProtocol, while it has a transport
    cdef object app                      # the application's protocol that `kind` is about
    cdef object backlog                  # the TLSProtocol's, of what can't be encrypted yet
    # Attributes of the TLSProtocol, which sees them as its own
    cdef public object state, app_protocol
    cdef public bint app_reading_paused, app_writing_paused, ssl_reading_paused, ssl_writing_paused
    cdef bint no_water                   # its high-water mark is 0: each write pauses
    cdef object reader                   # the weak reference to its StreamReader
    cdef object failure                  # what `decrypt` met
    cdef StreamTransport native          # the transport below, if it is one of ours
    cdef Engine engine
    cdef int kind

    cdef int read(self, bint from_the_loop) except -1
    cdef int take(self, object app) except -1
    cdef int read_plain(self) except -1
    cdef int read_stream(self, object reader, bint from_the_loop) except -1
    cdef int read_buffered(self) except -1
    cdef object decrypt(self, Outcome* outcome)
    cdef Outcome say_error(self)
    cdef int finish(self, Outcome outcome) except -1
    cdef int write(self, object protocol, object data) except -1
    cdef int encrypt(self, object protocol, const char* start, size_t size) except -1
    cdef int pass_on(self, bint soon) except -1
