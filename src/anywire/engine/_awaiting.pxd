# Awaitables that cost no Future and no Task for each of them: what an operation is, and by what it waits.
from cpython.object cimport PyObject

cdef enum:
    RETURN = 0               # PYGEN_RETURN, PYGEN_NEXT of PyIter_Send
    NEXT = 1

cdef enum:
    NEW, RUNNING, FINISHED   # states: not awaited yet; it waits, or tries; nothing is to be done any more


cdef class Waiter:
    cdef readonly object loop
    cdef object owner                   # the operation that waits, for whoever finds the waiter; may be None
    cdef object failure                 # what the operation raises when it goes on; or None
    cdef object future
    cdef bint fresh                     # the future has never been done, and nobody waits for it
    cdef bint woken
    cdef object sleep(self)
    cdef bint asleep(self) noexcept
    cdef object sleeper(self)
    cdef int wake(self) except -1
    cdef int wake_soon(self) except -1


cdef class Awaited:
    cdef int state
    cdef int proceed(self, PyObject** result) except -1
    cdef int failed(self) except -1
    cdef int finish(self) except -1


cdef int install(object kind) except -1

# A `try` costs something also where nothing is raised. What is done for each message calls what may raise by a name that says
# it doesn't, looks at the result, and catches only then: an exception is set, and this makes Cython see it.
cdef extern from *:
    """
    static int anywire_an_exception_is_set(void) { return -1; }
    """
    int an_exception_is_set "anywire_an_exception_is_set"() except -1
