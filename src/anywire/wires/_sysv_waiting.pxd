# Threads that wait for a System V queue.
cdef extern from "anywire/wires/sysv_waiting.h" nogil:
    enum: ANYWIRE_COMING, ANYWIRE_SENDING                                                       # jobs
    enum: ANYWIRE_NOTHING, ANYWIRE_READY, ANYWIRE_TAKEN, ANYWIRE_SENT, ANYWIRE_FAILED           # outcomes
    ctypedef struct anywire_helper:
        int error                        # errno of FAILED
        long taken                       # type of the empty message of TAKEN
        int bell, id
        long type
        const void* message
        size_t size

cdef class Helper:
    cdef anywire_helper state
    cdef bint used                       # a job was begun whose outcome nobody has fetched
    cdef bint over
    cdef int number                      # the signal that ends a job
    cdef unsigned int generation
    cdef int wait_for_message(self, int id, long type) except -1
    cdef int send(self, int id, const void* message, size_t size) except -1
    cdef int begin(self, int job) except -1
    cdef bint busy(self) noexcept
    cdef int end(self) noexcept
    cdef void quit(self) noexcept
