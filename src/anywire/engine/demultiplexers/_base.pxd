from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef struct aw_ready:
    uint64_t token
    uint32_t conditions


cdef class Demultiplexer:
    # Filled by c_wait, valid until the next c_wait, c_add or c_close.
    cdef aw_ready* ready
    cdef int capacity
    cdef bint waiting               # a thread is inside the kernel, without the GIL
    cdef bint is_closed
    cdef int check(self, int fd, uint32_t conditions, uint32_t trigger, uint32_t able, uint32_t tells) except -1
    cdef int reserve(self, int count) except -1
    cdef int check_alone(self) except -1

    # The contract; anywire/engine/demultiplexers/_base.pyx says what each promises.
    cdef int c_add(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1
    cdef int c_modify(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1
    cdef int c_remove(self, int fd) except -1
    cdef int c_wait(self, int64_t timeout_ns) except -1
    cdef int c_reset(self) except -1
    cdef int c_close(self) except -1
    cdef int c_fileno(self) except -2


cdef int64_t now_ns() noexcept nogil
cdef int64_t deadline_after(int64_t timeout_ns) noexcept
cdef void spend(int64_t deadline, int64_t* timeout_ns) noexcept
cdef int* with_room_for(int fd, int* numbers, int* room) except NULL
cdef int interrupted(int64_t deadline, int64_t* timeout_ns) except -1
cdef int refuse(int e, str what) except -1
