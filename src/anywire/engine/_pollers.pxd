# What a loop that polls before it sleeps can look at without a system call.
cdef enum:
    MOST_POLLERS = 64               # looked at by one loop; a look is a load from memory that another CPU writes


cdef class Poller:
    cdef bint here(self) noexcept           # whether something is here for somebody who waits for it
    cdef bint arm(self) noexcept            # before the loop sleeps: a descriptor will end that. True: don't, it is here
    cdef int ready(self) except -1          # it is here


cdef class Pollers:
    cdef list pollers
    cdef bint add(self, Poller poller) except -1
    cdef int remove(self, Poller poller) except -1
    cdef Py_ssize_t size(self) noexcept
    cdef bint glance(self) noexcept
    cdef bint arm(self) noexcept
    cdef int deliver(self) except -1
