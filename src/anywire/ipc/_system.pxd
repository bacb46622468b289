# What the primitives share: errors with the object's name, deadlines of the monotonic clock, waiting for a descriptor.
from libc.stdint cimport int64_t
from posix.time cimport timespec

cdef object failure(int e, object name, str more=*)                     # the OSError, to be raised
cdef int fail(int e, object name, str more=*) except -1                 # raises it

# The same for opening or removing by name; `most`: bytes behind the slash; `seeks`: whether nothing is made if it's missing.
cdef object refusal(int e, object name, int most, str what, bint seeks)

cdef bytes encoded(object name, str what, str example)                  # as the C library takes it

cdef int64_t deadline(object timeout) except? -2                        # seconds or None -> nanoseconds of `now`; -1: never
cdef int64_t now() noexcept nogil
cdef int64_t left(int64_t deadline) noexcept nogil                      # nanoseconds, at least 0; -1: for ever
cdef timespec as_timespec(int64_t nanoseconds) noexcept nogil

# Until the descriptor has one of poll(2)'s events or the deadline has come, without the GIL; signals' handlers run.
# 1: it has, 0: the deadline has come.
cdef int wait_for(int fd, short events, int64_t deadline) except -1
