# Awaitables that cost no Future and no Task: what an operation is, and what it yields while it waits.
from cpython.object cimport PyObject

cdef enum:
    RETURN = 0               # PYGEN_RETURN, PYGEN_NEXT of PyIter_Send
    NEXT = 1

cdef enum:
    NEW, RUNNING, FINISHED   # states: not awaited yet; it waits, or tries; nothing is to be done any more


cdef class Waiter:
    cdef readonly object loop
    cdef object owner                   # the operation that waits, for whoever finds the waiter; may be None
    cdef object callback, context, failure
    cdef public bint _asyncio_future_blocking
    cdef bint woken
    cdef int reset(self) except -1
    cdef int wake(self) except -1
    cdef int wake_soon(self) except -1


cdef class Awaited:
    cdef int state
    cdef int step(self, PyObject** result) except -1
    cdef int finish(self) except -1


cdef int install(object kind) except -1
