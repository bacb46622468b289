# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Bytes on their way out of a transport: pieces in order, handed to writev(2) and dropped as the kernel takes them.

What cannot change is referenced, never copied: `bytes`, and views of whole `bytes` objects. Everything else (a bytearray,
a view of one, shared memory) is copied at once, so that the caller may change, resize or release it after `write`.
Used by one transport on its loop's thread. What can go wrong: memory (MemoryError, with nothing taken).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

cdef extern from "Python.h":
    bint PyMemoryView_Check(object o)
    Py_buffer* PyMemoryView_GET_BUFFER(object view)

cdef enum:
    FEW = 8                  # an array of up to so many pieces is kept for the next write


@cython.final
@cython.no_gc                # holds bytes objects only: no cycle can pass through here
cdef class Outgoing:
    """Pieces that wait to be written; `total` counts their bytes."""

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.head, self.head + self.count):
            Py_DECREF(<object> self.pieces[i].owner)
        free(self.pieces)

    cdef int keep(self, object data, const char* start, size_t size) except -1:
        """Append the `size` bytes at `start`, which lie in `data`: by reference where nobody can change them."""
        cdef object owner
        cdef PyObject* whole
        if PyBytes_Check(data):
            return self.append(data, start, size)
        if PyMemoryView_Check(data):
            whole = <PyObject*> PyMemoryView_GET_BUFFER(data).obj
            owner = <object> whole if whole != NULL else None
            if type(owner) is bytes and PyBytes_AS_STRING(owner) <= start and \
                    start + size <= PyBytes_AS_STRING(owner) + PyBytes_GET_SIZE(owner):
                return self.append(owner, start, size)
        copy = PyBytes_FromStringAndSize(start, size)
        return self.append(copy, PyBytes_AS_STRING(copy), size)

    cdef int append(self, object owner, const char* start, size_t size) except -1:
        cdef Piece* grown
        cdef size_t capacity
        if size == 0:
            return 0
        if self.head + self.count == self.capacity:
            if self.head > self.count:                 # more than half is gone: use its room
                memmove(self.pieces, self.pieces + self.head, self.count * sizeof(Piece))
                self.head = 0
            else:
                capacity = self.capacity * 2 if self.capacity else 4
                grown = <Piece*> realloc(self.pieces, capacity * sizeof(Piece))
                if grown == NULL:
                    raise MemoryError()
                self.pieces, self.capacity = grown, capacity
        grown = self.pieces + self.head + self.count
        Py_INCREF(owner)
        grown.owner = <PyObject*> owner
        grown.start = <char*> start
        grown.size = size
        self.count += 1
        self.total += size
        return 0

    cdef int gather(self, iovec* into, int most) noexcept:
        """Fill at most `most` entries for writev(2); returns how many."""
        cdef int i, n = <int> self.count if self.count < <size_t> most else most
        cdef Piece* piece = self.pieces + self.head
        for i in range(n):
            into[i].iov_base = piece[i].start
            into[i].iov_len = piece[i].size
        return n

    cdef int advance(self, size_t size) except -1:
        """The kernel took the first `size` bytes."""
        cdef Piece* piece
        self.total -= size
        while self.count:
            piece = self.pieces + self.head
            if size < piece.size:
                piece.start += size
                piece.size -= size
                return 0
            size -= piece.size
            self.head += 1
            self.count -= 1
            Py_DECREF(<object> piece.owner)
        self.head = 0
        if self.capacity > FEW:
            free(self.pieces)
            self.pieces = NULL
            self.capacity = 0
        return 0

    cdef int clear(self) except -1:
        return self.advance(self.total)
