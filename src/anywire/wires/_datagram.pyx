# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Datagrams of one peer: a connected UDP socket (udp(7), RFC 768). One datagram is one message, its bytes unchanged.

Both sides have one: connected, the kernel keeps strangers out and reports what ICMP says of the peer. How a listener comes
to a socket for each peer is in `udp.py`. Runs on the front's thread; on the blocking front one thread may receive while
another sends.

- Nothing is cut silently: the read area is as large as the largest datagram, and what is longer than `max_message` raises.
- The sender's address is compared once more for each datagram: between bind(2) and connect(2) of a listener's socket the
  kernel gave it everybody's.
- The kernel drops what comes while the socket's buffer is full, and counts it (SO_RXQ_OVFL, socket(7)): `stats().drops`.
- An empty datagram is an empty message. There is no end: the end after `idle` seconds of silence is this side's decision.

What can go wrong: nobody listens, which ICMP may tell (`Refused`, from the next operation, once; the channel goes on, for
somebody may listen later; on a listener's side `PeerLost`, and the channel is over), a message over the limit
(`TooLarge`), no route (`Refused`). A lost datagram is never seen.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport (EAGAIN, ECONNREFUSED, EHOSTUNREACH, EINTR, EMSGSIZE, ENETUNREACH, ENOBUFS, errno)
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset
from anywire.contract.endpoint cimport (BLOCKED, DONE, READ, WRITE, MessageEndpoint, fork_generation, hold, iovec,
                                        monotonic_ns, scratch)
from anywire.contract cimport counters
from anywire.wires._descriptor cimport SocketBytes, msghdr

import os
from collections import deque

from anywire.contract.errors import ChannelClosed, EndOfChannel, PeerLost, Refused, TooLarge

cdef extern from "<sys/socket.h>" nogil:
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr* CMSG_FIRSTHDR(msghdr*)
    unsigned char* CMSG_DATA(cmsghdr*)
    int AF_INET, AF_INET6, SOL_SOCKET, SO_RXQ_OVFL, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC
    struct sockaddr_storage:
        unsigned short ss_family
    int setsockopt(int fd, int level, int name, const void* p, unsigned int n)
    ssize_t send(int fd, const void* p, size_t n, int flags)
    ssize_t recvmsg(int fd, msghdr* m, int flags)

cdef extern from *:
    """
    #define _GNU_SOURCE 1
    #include <errno.h>
    #include <netinet/in.h>
    #include <sys/socket.h>
    /* sendmmsg(2) over plain iovecs; the headers live here, so that Cython needs no struct mmsghdr. */
    static int anywire_send_all(int fd, struct iovec *v, int count, int flags) {
        struct mmsghdr m[64];
        __builtin_memset(m, 0, sizeof(m[0]) * (size_t) count);
        for (int i = 0; i < count; i++) { m[i].msg_hdr.msg_iov = v + i; m[i].msg_hdr.msg_iovlen = 1; }
        return sendmmsg(fd, m, (unsigned) count, flags);
    }
    static int anywire_peer_name(int fd, struct sockaddr_storage *name) {
        socklen_t n = sizeof(*name);
        return getpeername(fd, (struct sockaddr *) name, &n);
    }
    /* The same address and port; a flow label may differ from datagram to datagram. */
    static int anywire_same_name(const struct sockaddr_storage *a, const struct sockaddr_storage *b) {
        if (a->ss_family != b->ss_family) return 0;
        if (a->ss_family == AF_INET) {
            const struct sockaddr_in *x = (const void *) a, *y = (const void *) b;
            return x->sin_port == y->sin_port && x->sin_addr.s_addr == y->sin_addr.s_addr;
        }
        const struct sockaddr_in6 *x = (const void *) a, *y = (const void *) b;
        return x->sin6_port == y->sin6_port && !__builtin_memcmp(&x->sin6_addr, &y->sin6_addr, 16)
            && x->sin6_scope_id == y->sin6_scope_id;
    }
    static int anywire_is_mapped(const struct sockaddr_storage *a) {
        return a->ss_family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&((const struct sockaddr_in6 *) a)->sin6_addr);
    }
    """
    int send_all "anywire_send_all"(int fd, iovec* v, int count, int flags) nogil
    int peer_name "anywire_peer_name"(int fd, sockaddr_storage* name) nogil
    bint same_name "anywire_same_name"(const sockaddr_storage* a, const sockaddr_storage* b) nogil
    bint is_mapped "anywire_is_mapped"(const sockaddr_storage* a) nogil

cdef enum:
    AREA = 65536           # no datagram is larger: the length field of UDP has 16 bits
    LIMIT_4 = 65507        # 65535 less the headers of IPv4 and UDP
    LIMIT_6 = 65527        # IPv6's length counts no header of its own
    BATCH = 64             # messages of one sendmmsg(2)


cdef class DatagramEndpoint(MessageEndpoint):
    """A connected UDP socket; takes over the descriptor `fd` (not if this raises).

    Parameters: `max_message`, the largest to receive, in bytes; `idle`, seconds of silence after which receiving ends, 0
    for never; `early`, messages of the peer that came another way before this socket was connected; `accepted`, the peer
    began (then a peer that is gone ends the channel)."""

    cdef readonly SocketBytes bytes      # owns the descriptor
    cdef sockaddr_storage name           # of the peer
    cdef object early                    # deque, or None
    cdef object waiting                  # a message that did not fit into recv_into's buffer
    cdef char* area                      # of the blocking front, which reads without the GIL
    cdef readonly Py_ssize_t send_limit
    cdef readonly double idle
    cdef bint accepted
    cdef double heard                    # when the last message was taken, monotonic seconds
    cdef uint32_t overflowed             # what the kernel has counted so far
    cdef public object on_release        # called once
    cdef object __weakref__

    def __init__(self, int fd, Py_ssize_t max_message=16 << 20, *, double idle=0, early=(), bint accepted=False,
                 address=None, peer=None, wire=None):
        cdef int on = 1
        if peer_name(fd, &self.name) < 0 or setsockopt(fd, SOL_SOCKET, SO_RXQ_OVFL, &on, sizeof(on)) < 0:
            PyErr_SetFromErrno(OSError)
        self.bytes = SocketBytes(fd, address=address, peer=peer, wire=wire)
        self.read_fd = self.write_fd = fd
        self.peer = peer
        self.wire = wire
        self.set_label(address)
        self.send_limit = LIMIT_6 if self.name.ss_family == AF_INET6 and not is_mapped(&self.name) else LIMIT_4
        self.max_message = min(max_message, <Py_ssize_t> AREA)
        self.early = deque(early) or None
        self.idle = idle
        self.accepted = accepted
        self.heard = now()

    def __dealloc__(self):
        PyMem_RawFree(self.area)

    def byte_endpoint(self):
        return self.bytes

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int fits(self, Py_ssize_t n) except -1:
        if n > self.send_limit:
            raise TooLarge(n, self.send_limit, address=str(self.address), operation="send", option="",
                           advice="one datagram carries no more; send it in parts, or use tcp://")
        return 0

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef ssize_t r
        cdef int e, fd = self.bytes.fd, flags = MSG_NOSIGNAL | (0 if block else MSG_DONTWAIT)
        if self.broken:
            self.raise_failure()
        keep = hold(data, &p, &n)
        self.fits(n)
        self.turns += 1
        while True:
            if block:
                self.bytes.users += 1
                with nogil:
                    r = send(fd, p, n, flags)
                    e = errno
                self.bytes.leave()
            else:
                r = send(fd, p, n, flags)
                e = errno
            if r >= 0:
                self.sent += 1
                self.slot.messages_sent += 1
                self.slot.bytes_sent += n
                return DONE
            if e == EAGAIN or e == ENOBUFS:
                self.want = WRITE
                return BLOCKED
            if e != EINTR:
                return self.refuse(e, "send", n)
            PyErr_CheckSignals()
            fd = self.bytes.fd             # a handler, or a thread meanwhile, may have closed it: never use its number

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        """Up to 64 messages in one system call."""
        cdef Py_ssize_t i = start, count = len(data), n
        cdef iovec v[BATCH]
        cdef const char* p
        cdef int have, sent, e, fd = self.bytes.fd, flags = MSG_NOSIGNAL | (0 if block else MSG_DONTWAIT)
        cdef list keep
        if self.broken:
            self.raise_failure()
        self.put_status = DONE
        while i < count:
            have = 0
            keep = []
            while have < BATCH and i + have < count:
                keep.append(hold(data[i + have], &p, &n))
                if n > self.send_limit:
                    if have:
                        break              # what lies before it goes first, then it raises
                    self.fits(n)
                v[have].iov_base = <void*> p
                v[have].iov_len = n
                have += 1
            self.turns += 1
            if block:
                self.bytes.users += 1
                with nogil:
                    sent = send_all(fd, v, have, flags)
                    e = errno
                self.bytes.leave()
            else:
                sent = send_all(fd, v, have, flags)
                e = errno
            if sent >= 0:
                self.sent += sent
                self.slot.messages_sent += sent
                for n in range(sent):
                    self.slot.bytes_sent += v[n].iov_len
                i += sent
            elif e == EAGAIN or e == ENOBUFS:
                self.want = WRITE
                self.put_status = BLOCKED
                return i
            elif e == EINTR:
                PyErr_CheckSignals()
                fd = self.bytes.fd
            else:
                self.refuse(e, "send_many", v[0].iov_len)
        return i

    cdef int refuse(self, int e, str operation, Py_ssize_t n) except -1:
        """Raise what the kernel says. ICMP's word is about an earlier datagram: this one was not sent."""
        if self.closed:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation=operation)
        if e == ECONNREFUSED and self.accepted:
            reason = "nobody listens there any more (ICMP port unreachable)"
            counters.lost(self.slot, b"ICMP port unreachable", e)
            self.fail(PeerLost(reason, address=str(self.address), operation=operation, unconfirmed=self.sent))
            self.raise_failure()
        if e == ECONNREFUSED:
            raise Refused("an earlier message found nobody listening (ICMP port unreachable)", address=str(self.address),
                          operation=operation, advice="start the peer; this channel can still be used")
        if e == EMSGSIZE:
            raise TooLarge(n, n - 1, address=str(self.address), operation=operation, option="",
                           advice="this route carries no such datagram; send it in parts, or use tcp://")
        if e == ENETUNREACH or e == EHOSTUNREACH:
            raise Refused(f"no way there ({os.strerror(e)})", address=str(self.address), operation=operation,
                          advice="this channel can still be used once there is one")
        raise OSError(e, f"{operation} {self.address}: {os.strerror(e)}")

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef Py_ssize_t get(self, iovec* v, int count, bint block) except -2:
        """One datagram into `v`: its length, or -1 when none is here now. Raises EndOfChannel after silence."""
        cdef ssize_t r
        cdef int e, fd = self.bytes.fd
        cdef int flags = MSG_TRUNC | (0 if block and self.idle == 0 else MSG_DONTWAIT)
        cdef msghdr m
        cdef sockaddr_storage sender
        cdef char control[64]
        if self.broken:
            self.raise_failure()
        memset(&m, 0, sizeof(m))
        m.msg_iov = v
        m.msg_iovlen = count
        m.msg_name = &sender
        while True:
            m.msg_namelen = sizeof(sender)
            m.msg_control = control
            m.msg_controllen = sizeof(control)
            self.turns += 1
            if flags & MSG_DONTWAIT:
                r = recvmsg(fd, &m, flags)
                e = errno
            else:
                self.bytes.users += 1
                with nogil:
                    r = recvmsg(fd, &m, flags)
                    e = errno
                self.bytes.leave()
            if r >= 0 and m.msg_namelen == 0:
                # Not a datagram: shutdown(2) woke this thread.
                raise ChannelClosed("it was closed on this side", address=str(self.address), operation="recv")
            if r >= 0:
                self.count_overflow(&m)
                if same_name(&sender, &self.name):
                    break
                self.slot.drops += 1
            elif e == EAGAIN:
                self.want = READ
                if self.idle > 0:
                    self.wake_at = self.heard + self.idle
                    if now() >= self.wake_at:
                        raise EndOfChannel(f"nothing came for {self.idle:g} s (idle_timeout=)", address=str(self.address),
                                           operation="recv")
                return -1
            elif e != EINTR:
                self.refuse(e, "recv", 0)
            PyErr_CheckSignals()
            fd = self.bytes.fd
        if self.idle > 0:
            self.heard = now()
        if r > self.max_message:
            self.slot.drops += 1
            raise TooLarge(r, self.max_message, address=str(self.address), operation="recv",
                           advice="it was dropped; raise max_message= here, or send it in parts")
        return r

    cdef int count_overflow(self, msghdr* m) except -1:
        cdef cmsghdr* c = CMSG_FIRSTHDR(m)
        cdef uint32_t total
        if c != NULL and c.cmsg_level == SOL_SOCKET and c.cmsg_type == SO_RXQ_OVFL:
            memcpy(&total, CMSG_DATA(c), sizeof(total))
            self.slot.drops += <uint32_t> (total - self.overflowed)
            self.overflowed = total
        return 0

    cdef char* area_for(self, bint block) except NULL:
        if not block:
            return scratch()
        if self.area == NULL:
            self.area = <char*> PyMem_RawMalloc(AREA)
            if self.area == NULL:
                raise MemoryError()
        return self.area

    cdef int delivered(self, Py_ssize_t n) except -1:
        self.slot.messages_received += 1
        self.slot.bytes_received += n
        return 0

    cdef object stored(self):
        """A message that is here already: one that did not fit, or one that came early."""
        if self.waiting is None and self.early is not None:
            self.waiting = self.early.popleft()
            if not self.early:
                self.early = None
        return self.waiting

    cdef object take_message(self, bint block):
        cdef iovec v
        cdef Py_ssize_t n
        cdef char* area
        message = self.stored()
        if message is not None:
            self.waiting = None
        else:
            area = self.area_for(block)
            v.iov_base = area
            v.iov_len = AREA
            n = self.get(&v, 1, block)
            if n < 0:
                return None
            message = PyBytes_FromStringAndSize(area, n)
        self.delivered(len(message))
        return message

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        """Straight into the caller's memory; what does not fit goes to the read area, so that nothing is cut."""
        cdef iovec v[2]
        cdef Py_ssize_t n
        cdef const char* q
        cdef char* area
        message = self.stored()
        if message is None:
            area = self.area_for(block)
            v[0].iov_base = p
            v[0].iov_len = size
            v[1].iov_base = area
            v[1].iov_len = AREA
            n = self.get(v, 2, block)
            if n < 0:
                return -1
            if n <= size:
                self.delivered(n)
                return n
            self.waiting = message = p[:size] + area[:n - size]
        hold(message, &q, &n)
        if n > size:
            raise BufferError(f"recv_into {self.address}: the next message has {n} bytes and the buffer {size}; the "
                              "message stays queued")
        memcpy(p, q, n)
        self.waiting = None
        self.delivered(n)
        return n

    # -- ending ---------------------------------------------------------------------------------------------------------

    def interrupt(self):
        self.bytes.interrupt()
        MessageEndpoint.interrupt(self)

    def release(self):
        """There is no end to tell the peer. What was not taken is dropped, and counted."""
        self.read_fd = self.write_fd = -1
        if not self.closed and self.generation == fork_generation():     # a child's socket shares the parent's queue
            self.slot.drops += len(self.early or ()) + (self.waiting is not None) + left_in(self.bytes.fd)
        self.early = self.waiting = None
        self.closed = True
        self.bytes.release()
        if self.on_release is not None:
            callback, self.on_release = self.on_release, None
            callback()


cdef int left_in(int fd) noexcept:
    """How many datagrams a socket still has: they are taken out. At most a thousand, for more may come meanwhile."""
    cdef int n = 0
    cdef msghdr m
    cdef sockaddr_storage sender
    memset(&m, 0, sizeof(m))
    m.msg_name = &sender
    while n < 1000:
        m.msg_namelen = sizeof(sender)
        if recvmsg(fd, &m, MSG_DONTWAIT | MSG_TRUNC) < 0 or m.msg_namelen == 0:     # nobody: after a shutdown(2)
            break
        n += 1
    return n


cdef inline double now() noexcept nogil:
    return monotonic_ns() * 1e-9
