# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Socket addresses (`sockname`, `peername`) that cost nothing until somebody asks.

An accepted connection keeps the 16 or 28 bytes that accept4(2) gave; the tuple of asyncio, as `socket` would make it, comes
from them when `get_extra_info` is called. Families other than IPv4, IPv6 and Unix are left to the `socket` module (None).
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char* text, Py_ssize_t size)

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char* text, size_t most)

cdef extern from "<netinet/in.h>" nogil:
    int AF_INET, AF_INET6
    int INET6_ADDRSTRLEN
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        in_addr sin_addr
        uint16_t sin_port
    struct sockaddr_in6:
        in6_addr sin6_addr
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        uint32_t sin6_scope_id
    uint16_t ntohs(uint16_t n)
    uint32_t ntohl(uint32_t n)

cdef extern from "<arpa/inet.h>" nogil:
    const char* inet_ntop(int family, const void* address, char* into, socklen_t size)

cdef extern from "<sys/un.h>" nogil:
    int AF_UNIX
    struct sockaddr_un:
        char* sun_path


cdef class SocketName:
    """One address; `get` makes the Python value once."""

    cdef object get(self):
        cdef char text[64]
        cdef sockaddr_in* four
        cdef sockaddr_in6* six
        if not self.made:
            four = <sockaddr_in*> &self.raw
            six = <sockaddr_in6*> &self.raw
            if (<sockaddr*> &self.raw).sa_family == AF_INET:
                inet_ntop(AF_INET, &four.sin_addr, text, sizeof(text))
                self.value = (text.decode("ascii"), ntohs(four.sin_port))
            else:
                inet_ntop(AF_INET6, &six.sin6_addr, text, sizeof(text))
                self.value = (text.decode("ascii"), ntohs(six.sin6_port), ntohl(six.sin6_flowinfo), six.sin6_scope_id)
            self.made = True
        return self.value


cdef SocketName name_of(sockaddr* address, socklen_t size):
    """The name in `address`, or None where the `socket` module must say it."""
    cdef SocketName name = SocketName.__new__(SocketName)
    cdef size_t length
    cdef const char* path
    if address.sa_family == AF_INET or address.sa_family == AF_INET6:
        memcpy(&name.raw, address, min(size, <socklen_t> sizeof(Room)))
        return name
    if address.sa_family != AF_UNIX:
        return None
    name.made = True
    path = (<sockaddr_un*> address).sun_path
    length = size - (path - <char*> address) if <ssize_t> size > path - <char*> address else 0
    if length == 0:
        name.value = ""                                        # unnamed (unix(7))
    elif path[0] == 0:
        name.value = PyBytes_FromStringAndSize(path, length)   # abstract: all bytes count, the first zero too
    else:
        name.value = PyUnicode_DecodeFSDefaultAndSize(path, strnlen(path, length))
    return name
