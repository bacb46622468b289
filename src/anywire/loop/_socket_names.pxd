# The address of a socket, kept as the kernel gave it and made a Python value when somebody asks.
from libc.stdint cimport uint8_t, uint16_t, uint32_t

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        unsigned short sa_family
    struct sockaddr_storage:
        unsigned short ss_family

cdef union Room:
    uint8_t bytes[28]        # sockaddr_in6, the larger of the two that are kept raw
    uint32_t words[7]


cdef class SocketName:
    cdef Room raw
    cdef object value
    cdef bint made
    cdef object get(self)

cdef SocketName name_of(sockaddr* address, socklen_t size)
