# Encryption and decryption of one TLS connection by the libssl that Python's `ssl` uses, without a call into Python.
cdef extern from "anywire/loop/ciphertext.h" nogil:
    ctypedef struct aw_bio:
        pass
    ctypedef struct aw_ssl:
        pass
    ctypedef struct aw_tls:
        const char* window
        size_t window_size, kept_size, inside, out_size, out_capacity
        char* out
    int aw_tls_keep(aw_tls* tls, const char* start, size_t size)
    int aw_tls_reserve(aw_tls* tls, size_t size)

cdef enum Outcome:
    DONE = 0
    AGAIN = 1                # more ciphertext must come first
    CLOSED = 2               # the peer's close_notify
    FAILED = 3               # SSLObject.read or .write, called now, raises the error


cdef class Engine:
    cdef aw_tls* tls
    cdef aw_bio* bio
    cdef aw_ssl* ssl
    cdef readonly object sslobj
    cdef object socket                   # the _ssl._SSLSocket, whose `ssl` is

    cdef Outcome read(self, char* room, size_t size, size_t* got) noexcept
    cdef Outcome write(self, const char* start, size_t size, size_t* written) noexcept
    cdef bint has_more(self) noexcept    # something that `read` could decrypt
    cdef size_t expected(self) noexcept  # how much it decrypts to, about
    cdef int keep(self, const char* start, size_t size) except -1
    cdef int keep_window(self) except -1
    cdef int reserve(self, size_t size) except -1
    cdef int sent(self) noexcept         # all of `out`
    cdef bytes take_out(self)
