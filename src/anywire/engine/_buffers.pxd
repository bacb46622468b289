cimport cython
from cpython.object cimport PyObject

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

# Drawn in _buffers.pyx.
cdef struct aw_block:
    aw_block* next
    PyObject* owner         # a bytes object whose memory `data` is; NULL: the pool's, behind this header
    char* data
    Py_ssize_t start        # the first byte that is content
    Py_ssize_t end          # one more than the last
    Py_ssize_t size


@cython.final
cdef class BlockPool:
    cdef readonly Py_ssize_t block_size     # bytes of content
    cdef readonly Py_ssize_t keep           # as many free blocks are kept
    cdef readonly Py_ssize_t free_count
    cdef readonly Py_ssize_t used           # blocks in buffers
    cdef aw_block* free
    cdef aw_block* take(self) except NULL
    cdef void give(self, aw_block* block) noexcept


@cython.final
cdef class Buffer:
    cdef readonly BlockPool pool
    cdef Py_ssize_t size
    cdef aw_block* head
    cdef aw_block* tail
    cdef int window                         # blocks that the next fill offers
    cdef int plain, plain_fd                # plain_fd is no socket
    cdef aw_block* link(self, aw_block* block) noexcept
    cdef int c_append(self, const char* p, Py_ssize_t n) except -1
    cdef int c_append_bytes(self, bytes data) except -1
    cdef void c_skip(self, Py_ssize_t n) noexcept
    cdef int c_copy(self, char* into, Py_ssize_t start, Py_ssize_t n) noexcept
    # n bytes; 0 is the end; -1: EAGAIN; -2: an exception is set
    cdef Py_ssize_t c_fill(self, int fd, Py_ssize_t most) except -2
    # n bytes written (0: nothing was here); -1: EAGAIN before the first; -2: an exception is set
    cdef Py_ssize_t c_drain(self, int fd, Py_ssize_t most) except -2
    # The content as it lies in memory, at most `count` pieces; for gathered writes of one's own.
    cdef int c_pieces(self, iovec* into, int count, Py_ssize_t most) noexcept
    cdef void c_move(self, Buffer other) noexcept
    cdef Py_ssize_t c_find(self, const char* what, Py_ssize_t length, Py_ssize_t start) noexcept
