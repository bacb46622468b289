from anywire.contract.endpoint cimport ByteEndpoint, iovec

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags

cdef enum:
    MOST_FDS = 253          # SCM_MAX_FD, unix(7)
    CONTROL = 1088          # CMSG_SPACE(253 * 4) + CMSG_SPACE(sizeof(struct ucred)), rounded up

cdef int gather_fds(msghdr* m, list into) except -1
cdef list numbers_of(object fds)
cdef int attach_fds(msghdr* m, char* control, list numbers) except -1


cdef class SocketBytes(ByteEndpoint):
    cdef int fd


cdef class UnixBytes(SocketBytes):
    cdef list arrived           # descriptors received and not yet asked for
    cdef list departing         # descriptors that go with the next byte written
    cdef public bint keep_fds   # for a reader that asks for them; otherwise each is closed as it comes
    cdef int collect(self, msghdr* m) except -1
    cdef int keep_first(self, Py_ssize_t count) except -1


cdef class PipeBytes(ByteEndpoint):
    cdef object __weakref__
