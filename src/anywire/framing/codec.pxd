# Frames: whole messages in a stream of bytes. Layout: docs/design/interfaces.md, "Bytes of a framed connection".
from cpython.object cimport PyObject
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    HEADER = 8
    LONGEST_HEADER = 16
    FIRST_KIND = 0xFFFFFFF0      # lengths from here on are kinds

cdef enum Kind:
    END = 0xFFFFFFFF
    CLOSE = 0xFFFFFFFE
    LARGE = 0xFFFFFFFD
    CONFIRM = 0xFFFFFFFC
    DESCRIPTORS = 0xFFFFFFFB

cdef int write_header(char* out, uint64_t size, uint32_t confirmed) noexcept nogil
cdef int write_kind(char* out, uint32_t kind, uint32_t confirmed) noexcept nogil
cdef int write_descriptors(char* out, uint32_t size, uint32_t confirmed, uint32_t count) noexcept nogil


cdef class Decoder:
    cdef readonly Py_ssize_t limit
    cdef readonly uint64_t confirmed       # sum of all confirmations received
    cdef readonly uint64_t received        # whole messages decoded
    cdef readonly bint ended               # an end or close frame came
    cdef readonly bint closed              # a close frame came
    cdef bint fds_allowed
    # whole messages that wait: a ring of owned references
    cdef PyObject** ready
    cdef Py_ssize_t ready_size, ready_head
    cdef readonly Py_ssize_t ready_count
    cdef readonly Py_ssize_t ready_bytes
    # the header being collected
    cdef char head[LONGEST_HEADER]
    cdef int head_have, head_need
    # the message being collected: in `body` (a bytes object that grows with what really came) or in the caller's `target`
    cdef bint in_body
    cdef PyObject* body
    cdef char* body_data
    cdef uint64_t body_size, body_have, body_room
    cdef uint64_t last                     # size of the last message of this connection
    cdef uint64_t largest                  # largest message that ever came whole: this much may be allocated at once
    cdef long fds                          # descriptors announced with the message being collected, -1 for none
    cdef readonly Py_ssize_t fds_due       # descriptors announced and not yet handed out
    cdef char* target
    cdef Py_ssize_t target_size
    cdef readonly Py_ssize_t target_done   # size of the message that is whole in the target, -1 for none
    cdef bint to_target

    cdef int eat(self, const char* p, Py_ssize_t n) except -1
    cdef Py_ssize_t ahead(self, Py_ssize_t most) noexcept
    cdef int direct(self, char** p, Py_ssize_t* n) except -1
    cdef int advance(self, Py_ssize_t n) except -1
    cdef object peek(self)
    cdef object pop(self)
    cdef int set_target(self, char* p, Py_ssize_t n) except -1
    cdef int drop_target(self) except -1
    cdef int header_done(self, const char* h, Py_ssize_t available) except -1
    cdef int start_body(self, uint64_t size, Py_ssize_t available) except -1
    cdef int room_for(self, uint64_t n) except -1
    cdef int body_done(self) except -1
    cdef int push(self, PyObject* message, Py_ssize_t n) except -1
