# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Messages kept whole by the kernel: connected Unix sockets of type SOCK_SEQPACKET (unix(7)).

The user's bytes go unchanged, one packet a message, one system call each way, so any program can be at the other end. Both
fronts; on the blocking one a thread may receive while another sends.

Four things that the plain calls hide, and what is done about them:

- An empty packet and the end of the connection both read as 0 bytes. SO_PASSCRED tells them apart: with it every packet
  carries its sender's credentials as ancillary data, the end carries nothing.
- A packet longer than the buffer is cut silently by recv(2). Here the read area has room for `max_message` bytes: address
  space that costs memory only where the kernel wrote (mmap(2)), given back after a large message. What is even longer is
  reported by MSG_TRUNC as its true length and fails the channel with TooLarge.
- When the peer closes without having read everything, the kernel reports ECONNRESET *before* the packets that it had sent;
  they are still there (`unix_dgram_recvmsg` looks at the socket's error first) and are handed out first.
- A packet is at most the sending socket's buffer less the kernel's overhead: EMSGSIZE becomes TooLarge with the option to
  raise.

What can go wrong: a killed process closes its sockets just as a polite one does. Without an end frame nobody can tell them
apart, so the end is EndOfChannel unless the kernel says "reset" (PeerLost); a send that finds nobody is PeerLost.
`unconfirmed` counts every message sent: without framing nothing confirms them.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EMSGSIZE, EPIPE, errno
from libc.string cimport memset
from anywire.contract cimport counters
from anywire.contract.endpoint cimport AGAIN, BLOCKED, DONE, READ, SCRATCH, WRITE, MessageEndpoint, copy_message, hold, iovec
from anywire.wires._descriptor cimport (CONTROL, MOST_FDS, SocketBytes, attach_fds, gather_fds, msghdr, numbers_of)

import os
import socket
import time

from anywire.contract.errors import ChannelClosed, EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.contract.waits import Wait
from anywire.wires import _descriptor

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_TRUNC
    ssize_t sendmsg(int fd, msghdr* m, int flags)
    ssize_t recvmsg(int fd, msghdr* m, int flags)

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_DONTNEED
    void* MAP_FAILED
    void* mmap(void* address, size_t n, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t n)
    int madvise(void* address, size_t n, int advice)

cdef enum:
    ENDED = -3
    MOST_TURNS = 64                # system calls in a row while a closing channel drains
    OVERHEAD = 32                  # bytes of SO_SNDBUF that the kernel keeps for itself (unix_dgram_sendmsg)
    LARGEST_AREA = 1 << 30         # a packet can't be larger: socket buffers are ints, and half is bookkeeping


@cython.internal
cdef class Area:
    """Address space to receive into; pages that were never written cost nothing."""

    cdef char* data
    cdef size_t size

    def __cinit__(self, size_t size):
        self.size = max(size, <size_t> SCRATCH)
        self.data = <char*> mmap(NULL, self.size, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if self.data == <char*> MAP_FAILED:
            self.data = NULL
            raise MemoryError(f"no address space for messages of {size} bytes; lower max_message=")

    def __dealloc__(self):
        if self.data != NULL:
            munmap(self.data, self.size)

    cdef void used(self, size_t n) noexcept:
        if n > SCRATCH:
            madvise(self.data, n, MADV_DONTNEED)


cdef Area _shared = None           # every non-blocking read's, as long as the GIL is held


cdef Area shared_area(size_t size):
    global _shared
    if _shared is None or _shared.size < size:
        _shared = Area(size)
    return _shared


cdef class PacketEndpoint(MessageEndpoint):
    """A connected SOCK_SEQPACKET socket; takes over the descriptor `fd`. `max_message`: the largest to receive, in bytes."""

    cdef readonly SocketBytes bytes      # owns the descriptor
    cdef Area area                       # of the blocking front, which reads without the GIL
    cdef list came                       # descriptors that came with the packet just read
    cdef object waiting                  # (message, descriptors) that is out of the kernel and nobody has taken
    cdef readonly Py_ssize_t send_limit
    cdef readonly bint end_sent
    cdef bint reset                      # the kernel said that the peer closed without reading everything
    cdef bint over                       # the end was read

    carries_fds = True

    def __init__(self, int fd, Py_ssize_t max_message=16 << 20, *, address=None, peer=None, wire=None):
        self.bytes = SocketBytes(fd, address=address, peer=peer, wire=wire)
        self.read_fd = self.write_fd = fd
        self.max_message = min(max_message, <Py_ssize_t> LARGEST_AREA)
        self.peer = peer
        self.wire = wire
        self.came = []
        self.set_label(address)
        with socket.socket(fileno=os.dup(fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self.send_limit = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - OVERHEAD

    def byte_endpoint(self):
        return self.bytes

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int need_sending(self) except -1:
        if self.broken:
            self.raise_failure()
        if self.end_sent:
            raise ChannelClosed("send_eof() was called", address=str(self.address), operation="send")
        return 0

    cdef int put_message(self, object data, bint block) except -1:
        return self.put_packet(data, None, block)

    def put_fds(self, fds, message, bint block):
        """Send `message` with descriptors. Returns DONE or BLOCKED as put_message."""
        return self.put_packet(message, numbers_of(fds), block)

    cdef int put_packet(self, object data, list fds, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef ssize_t r
        cdef int e, fd = self.bytes.fd, flags = MSG_NOSIGNAL | (0 if block else MSG_DONTWAIT)
        cdef msghdr m
        cdef iovec v
        cdef char control[CONTROL]
        if self.broken or self.end_sent:
            self.need_sending()
        keep = hold(data, &p, &n)
        if n > self.max_message:
            raise TooLarge(n, self.max_message, address=str(self.address), operation="send")
        v.iov_base = <void*> p
        v.iov_len = n
        memset(&m, 0, sizeof(m))
        m.msg_iov = &v
        m.msg_iovlen = 1
        if fds:
            attach_fds(&m, control, fds)
        self.turns += 1
        while True:
            if block or n > SCRATCH:
                self.bytes.users += 1
                with nogil:
                    r = sendmsg(fd, &m, flags)
                    e = errno
                self.bytes.leave()
            else:
                r = sendmsg(fd, &m, flags)
                e = errno
            if r >= 0:
                self.sent += 1
                self.slot.messages_sent += 1
                self.slot.bytes_sent += n
                return DONE
            if e == EAGAIN:
                self.want = WRITE
                return BLOCKED
            if e == EMSGSIZE:
                raise TooLarge(n, self.send_limit, address=str(self.address), operation="send", option="sndbuf",
                               advice="a packet must fit into the sending socket's buffer: pass sndbuf=BYTES (up to "
                                      "the sysctl net.core.wmem_max), or use type=stream")
            if e == EPIPE or e == ECONNRESET:
                # What the peer sent before is still to be read, so receiving goes on to its own end.
                self.reset = True
                raise PeerLost("the peer closed its end or died (this wire can't tell which)", address=str(self.address),
                               operation="send", unconfirmed=self.sent)
            if self.closed:
                raise ChannelClosed("it was closed on this side", address=str(self.address), operation="send")
            if e != EINTR:
                raise OSError(e, f"send {self.address}: {os.strerror(e)}")
            PyErr_CheckSignals()
            fd = self.bytes.fd             # a handler, or a thread meanwhile, may have closed it: never use its number

    def try_eof(self):
        """Half-close: shutdown(2); the peer reads what was sent, then the end."""
        if not self.end_sent:
            if self.broken:
                self.raise_failure()
            self.end_sent = True
            self.bytes.shutdown_write()
        return DONE

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef Py_ssize_t get_packet(self, iovec* v, int count, bint block) except -1:
        """One packet into `v`: its true length, AGAIN, or ENDED. Its descriptors go to `came`."""
        cdef ssize_t r
        cdef int e, fd = self.bytes.fd, flags = MSG_CMSG_CLOEXEC | MSG_TRUNC | (0 if block else MSG_DONTWAIT)
        cdef msghdr m
        cdef char control[CONTROL]
        if self.broken:
            self.raise_failure()
        if self.over:
            return ENDED
        memset(&m, 0, sizeof(m))
        m.msg_iov = v
        m.msg_iovlen = count
        self.turns += 1
        while True:
            m.msg_control = control
            m.msg_controllen = CONTROL
            if block:
                self.bytes.users += 1
                with nogil:
                    r = recvmsg(fd, &m, flags)
                    e = errno
                self.bytes.leave()
            else:
                r = recvmsg(fd, &m, flags)
                e = errno
            if r >= 0:
                break
            if e == EAGAIN:
                self.want = READ
                return AGAIN
            if e == ECONNRESET:
                self.reset = True            # once; what it had sent comes now
            elif e != EINTR:
                self.lost(os.strerror(e))
            PyErr_CheckSignals()
            fd = self.bytes.fd
        if r == 0 and m.msg_controllen == 0 and not m.msg_flags & MSG_CTRUNC:
            self.over = True
            return ENDED
        gather_fds(&m, self.came)
        if m.msg_flags & MSG_CTRUNC:
            self.lost(_descriptor.LOST_FDS)
        if r > self.max_message:
            self.drop_came()
            error = TooLarge(r, self.max_message, address=str(self.address), operation="recv",
                             advice="raise max_message= on this side, or send it in parts")
            counters.lost(self.slot, b"message over the limit")
            self.fail(error)
            self.bytes.interrupt()
            raise error
        return r

    cdef int lost(self, object reason) except -1:
        self.drop_came()
        counters.lost(self.slot, reason.encode()[:64])
        self.fail(PeerLost(reason, address=str(self.address), operation="recv", unconfirmed=self.sent))
        self.raise_failure()

    cdef int raise_end(self) except -1:
        if self.reset:
            counters.lost(self.slot, b"reset")
            raise PeerLost("the peer closed its end or died before it had read everything", address=str(self.address),
                           operation="recv", unconfirmed=self.sent)
        raise EndOfChannel("the peer closed its end (on this wire a crash looks the same)", address=str(self.address),
                           operation="recv", unconfirmed=self.sent)

    cdef int delivered(self, Py_ssize_t n) except -1:
        self.slot.messages_received += 1
        self.slot.bytes_received += n
        return 0

    cdef Area area_for(self, bint block):
        if not block:
            return shared_area(self.max_message)
        if self.area is None:
            self.area = Area(self.max_message)
        return self.area

    cdef object next_packet(self, bint block):
        """The next message; what came with it is in `came`."""
        cdef Area area
        cdef iovec v
        cdef Py_ssize_t n
        area = self.area_for(block)
        v.iov_base = area.data
        v.iov_len = area.size
        n = self.get_packet(&v, 1, block)
        if n == AGAIN:
            return None
        if n == ENDED:
            self.raise_end()
        message = PyBytes_FromStringAndSize(area.data, n)
        area.used(n)
        return message

    cdef object take_message(self, bint block):
        if self.waiting is not None:
            if self.waiting[1]:
                self.refuse_fds()
            message, self.waiting = self.waiting[0], None
            self.delivered(len(message))
            return message
        message = self.next_packet(block)
        if message is not None:
            if self.came:
                self.waiting, self.came = (message, self.came), []
                self.refuse_fds()
            self.delivered(len(message))
        return message

    cdef int refuse_fds(self) except -1:
        raise Unsupported("the next message carries descriptors: take it with recv_fds()", address=str(self.address),
                          operation="recv")

    def take_fds_message(self, bint block):
        """The next message with its descriptors: (message, [fd, ...]), or None when nothing is here now."""
        if self.waiting is not None:
            found, self.waiting = self.waiting, None
        else:
            message = self.next_packet(block)
            if message is None:
                return None
            found, self.came = (message, self.came), []
        self.delivered(len(found[0]))
        return found

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Area area
        cdef iovec v[2]
        cdef Py_ssize_t n
        if self.waiting is None:
            # Straight into the caller's memory; what does not fit goes to the read area, so that nothing is cut.
            area = self.area_for(block)
            v[0].iov_base = p
            v[0].iov_len = size
            v[1].iov_base = area.data
            v[1].iov_len = area.size
            n = self.get_packet(v, 2, block)
            if n == AGAIN:
                return -1
            if n == ENDED:
                self.raise_end()
            if n <= size and not self.came:
                self.delivered(n)
                return n
            message = p[:min(n, size)] + area.data[:max(n - size, 0)]
            self.waiting, self.came = (message, self.came), []
        if self.waiting[1]:
            self.refuse_fds()
        n = copy_message(self.waiting[0], p, size, self.address)
        self.waiting = None
        self.delivered(n)
        return n

    # -- ending ---------------------------------------------------------------------------------------------------------

    cdef int drop_came(self) except -1:
        fds, self.came = self.came, []
        for fd in fds:
            os.close(fd)
        return 0

    def finish_steps(self, timeout):
        """Generator: half-close. What was sent is the kernel's already."""
        self.try_eof()
        return
        yield

    def drain_steps(self, timeout):
        """Generator: drop what still comes, up to the peer's end or the deadline. Closing with unread packets would
        destroy what the peer has not read yet of ours: it would meet a reset first."""
        cdef double end = time.monotonic() + timeout
        cdef bint first = True
        while self.bytes.fd >= 0 and (first or time.monotonic() < end):      # a peer may never stop sending
            first = False
            self.waiting_dropped()
            try:
                message = self.next_packet(False)
            except EndOfChannel:
                return
            self.drop_came()
            if message is not None:
                self.slot.drops += 1
                if self.turns < MOST_TURNS:
                    continue
                self.turns = 0               # a flood: the loop's other tasks get a turn
            if not (yield Wait([(self.read_fd, READ)], max(0.0, end - time.monotonic()))):
                return

    def waiting_dropped(self):
        """Drop the message that waits outside the kernel, with its descriptors."""
        found, self.waiting = self.waiting, None
        if found is not None:
            self.slot.drops += 1
            for fd in found[1]:
                os.close(fd)

    def verdict(self):
        if self.reset and self.sent:
            raise PeerLost("the peer closed its end or died before it had read everything", address=str(self.address),
                           operation="close", unconfirmed=self.sent)

    def interrupt(self):
        self.bytes.interrupt()
        MessageEndpoint.interrupt(self)

    def release(self):
        self.closed = True
        self.read_fd = self.write_fd = -1
        self.waiting_dropped()
        self.drop_came()
        self.bytes.release()

    # -- moving to another process --------------------------------------------------------------------------------------

    def detach_state(self):
        """(kind, descriptors, state): what another process needs to go on where this one stops."""
        if self.waiting is not None:
            raise ChannelClosed("a message waits: take it before detach()", address=str(self.address), operation="detach")
        fds = self.bytes.detach_state()[1]
        state = {"max_message": self.max_message, "sent": self.sent, "end_sent": self.end_sent, "over": self.over,
                 "reset": self.reset}
        self.release()
        return "packet", fds, state

    def restore_state(self, state):
        """Go on where `detach_state` stopped in another process."""
        self.sent = state["sent"]
        self.end_sent = state["end_sent"]
        self.over = state["over"]
        self.reset = state["reset"]
