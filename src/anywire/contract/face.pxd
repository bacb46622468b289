# What a connection shows of itself, whichever front waits on it.
from anywire.contract.endpoint cimport MessageEndpoint

cdef int name_operation(object error, str operation) except -1


cdef class Face:
    cdef MessageEndpoint end
    cdef bint closing
    cdef object on_close                # called once when the connection is over
    cdef object __weakref__
    cdef int check(self, str operation) except -1
    cdef int told_over(self) except -1
