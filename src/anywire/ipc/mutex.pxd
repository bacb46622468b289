# A robust mutex of processes.
from anywire.ipc._lock cimport Lock


cdef class Mutex(Lock):
    cdef public object repair

    cdef int wait(self, int e, object timeout) except -1
    cdef int took(self, int e) except -1
