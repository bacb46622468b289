# What a transport writes.
from anywire.loop._connection cimport Connection


cdef class Writing(Connection):
    cdef Py_ssize_t high_water, low_water
    cdef bint eof_written
    cdef bint reading                    # the protocol is in a callback with what came: its answers leave when it returns

    cdef int put(self, object data) except -1
    cdef int push(self, object data, const char* start, size_t size) except -1
    cdef int send_or_queue(self, object data, const char* start, size_t size) except -1
    cdef bint wait_a_little(self, size_t size) noexcept
    cdef int hold(self) except -1
    cdef int send_held(self) except -1
    cdef int send_waiting(self) except -1
    cdef int refuse(self, Py_ssize_t size, str name) except -1
    cdef int write_failed(self, object error) except -1
    cdef int drained(self) except -1
    cdef int shut_down_writing(self) except -1
    cdef int pause_protocol(self) except -1
    cdef int resume_protocol(self) except -1
