# Bytes on their way out of a transport: pieces that are written later, in order, without a copy of what is immutable.
from cpython.object cimport PyObject
from posix.types cimport off_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef enum:
    MOST_PIECES = 1024       # IOV_MAX of Linux: what one writev(2) takes


cdef struct Piece:
    PyObject* owner          # a reference that is held: the bytes object that `start` points into
    char* start
    size_t size


cdef class Outgoing:
    cdef Piece* pieces
    cdef size_t head, count, capacity
    cdef readonly size_t total
    cdef int keep(self, object data, const char* start, size_t size) except -1
    cdef int append(self, object owner, const char* start, size_t size) except -1
    cdef int gather(self, iovec* into, int most) noexcept
    cdef int advance(self, size_t size) except -1
    cdef int clear(self) except -1
