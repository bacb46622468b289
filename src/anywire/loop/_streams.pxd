# The standard library's StreamReader, fed and read without calls into Python.
from cpython.object cimport PyObject

cdef enum:
    RETURN = 0               # PYGEN_RETURN, PYGEN_NEXT of PyIter_Send
    NEXT = 1


cdef class ReadWaiter:
    cdef ReadOperation operation
    cdef object loop, callback, context, failure
    cdef public bint _asyncio_future_blocking
    cdef bint woken
    cdef int wake(self) except -1
    cdef int wake_soon(self) except -1


cdef class Operation:
    cdef int state
    cdef int step(self, PyObject** result) except -1
    cdef int finish(self) except -1


cdef class ReadOperation(Operation):
    cdef object reader, value
    cdef ReadWaiter waiter
    cdef Py_ssize_t most
    cdef object begin(self)
    cdef object take(self)


cdef int install(object kind) except -1
cdef object stream_of(object protocol)
cdef ReadOperation waiting_in(object reader)
cdef int deliver(object reader, ReadOperation operation, object data) except -1
cdef int buffer(object reader, const char* start, Py_ssize_t size) except -1
cdef int feed(object reader, const char* start, Py_ssize_t size) except -1
