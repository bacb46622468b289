# The standard library's StreamReader, fed and read without calls into Python.
from cpython.object cimport PyObject
from anywire.engine._awaiting cimport Awaited, Waiter


cdef class ReadOperation(Awaited):
    cdef object reader, value
    cdef dict fields                    # of the reader
    cdef Waiter waiter                  # by which it waits, or did
    cdef int kind
    cdef Py_ssize_t most                # SOME: at most so many bytes; EXACTLY: so many
    cdef bytes separator                # UNTIL, LINE: bytes that end it
    cdef Py_ssize_t searched            # it begins in no earlier place of the reader's buffer
    cdef object attempt(self)
    cdef object attempt_until(self)
    cdef object wait(self)
    cdef Py_ssize_t find(self, object buffer) except -2
    cdef object take(self, Py_ssize_t n)
    cdef object partial(self, object expected)
    cdef object over_limit(self, bint found, Py_ssize_t consumed)
    cdef Py_ssize_t enough(self, const char* start, Py_ssize_t size) except -1
    cdef bint satisfied(self) except -1
    cdef int rest(self) except -1


cdef object stream_of(object protocol)
cdef dict fields_of(object reader)
cdef Waiter waiting_in(dict fields)
cdef int deliver(dict fields, Waiter waiter, object data) except -1
cdef int feed(object reader, dict fields, Waiter waiter, const char* start, Py_ssize_t size) except -1
cdef Py_ssize_t direct(dict fields, Waiter waiter) except -1
