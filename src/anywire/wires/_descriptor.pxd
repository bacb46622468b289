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


cdef class SocketBytes(ByteEndpoint):
    cdef int fd


cdef class UnixBytes(SocketBytes):
    cdef list arrived           # descriptors received and not yet asked for
    cdef list departing         # descriptors that go with the next byte written
    cdef int collect(self, msghdr* m) except -1


cdef class PipeBytes(ByteEndpoint):
    pass
