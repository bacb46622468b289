# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A place in memory that others share: some bytes of a writable buffer, exported for as long as an object lies there.

Used by semaphores and locks. What lies outside the buffer, or at an address where the processor has no atomic access,
is refused here. Any thread.
"""
from libc.stdint cimport uintptr_t
from cpython.buffer cimport PyBUF_WRITABLE, PyObject_GetBuffer, PyBuffer_Release, Py_buffer


cdef char *take_place(Py_buffer *view, object buffer, object offset, Py_ssize_t size, Py_ssize_t alignment, str what) except NULL:
    """ValueError: the place is not inside the buffer, or not aligned. BufferError, TypeError: no writable buffer."""
    cdef Py_ssize_t start = offset
    cdef char *at
    PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
    if start < 0 or start > view.len or view.len - start < size:
        length = view.len
        PyBuffer_Release(view)
        raise ValueError(f"a {what} has {size} bytes: no room at offset {offset} of {length} bytes")
    at = <char *> view.buf + start
    if <uintptr_t> at % alignment:
        PyBuffer_Release(view)
        raise ValueError(f"a {what} lies at a multiple of {alignment} bytes: offset {offset} does not")
    return at
