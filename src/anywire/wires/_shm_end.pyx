# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""One end of a shared-memory connection: its socket, its doorbell, and whether the peer still lives.

What moves messages is on top (`_shm_sending.pyx`, `_shm.pyx`). The doorbell is one byte on the Unix socket by which the two
met, sent only to a side that said it sleeps. A socket, and not an eventfd(2): the blocking mode of an eventfd belongs to both
who hold it, so a hostile peer could make our write wait for ever; the socket must be watched anyway, for its end; and so an
endpoint is one descriptor in the event loop (the peer's pidfd beside it, for a socket that a forked child of the peer keeps
open).

Everything here happens under the GIL and never waits. What can go wrong: the peer dies (`PeerLost`), or breaks the rules
(`BadFrame`); both end the connection.
"""
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from anywire.contract cimport counters
from anywire.contract.endpoint cimport MessageEndpoint
from anywire.wires._ring cimport (aw_advance, aw_must_ring, aw_producer, aw_publish, aw_release_records, aw_room_was_wanted,
                                  aw_taken, aw_tick)
from anywire.wires._shm_memory cimport Incoming, Outgoing

from anywire.contract.errors import BadFrame, PeerLost

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    ssize_t c_send "send"(int fd, const void* p, size_t n, int flags)
    ssize_t c_recv "recv"(int fd, void* p, size_t n, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int SHUT_RDWR

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int c_poll "poll"(pollfd* fds, unsigned long n, int timeout)

WAITING = {"sleep": SLEEP, "adaptive": ADAPTIVE, "spin": SPIN}


cdef class ShmEnd(MessageEndpoint):
    """One side of a shared-memory connection. Owns the socket `sock` and, if it is not -1, the pidfd of the peer.

    `complete` is called once both sides have mapped each other's memory."""

    def __cinit__(self, *args, **keywords):
        self.sock = self.death = -1
        self.doorbell = True

    def __dealloc__(self):
        if self.shares_slot:
            self.slot = NULL                     # the other endpoint gives it back
        if self.sock >= 0:
            c_close(self.sock)
        if self.death >= 0:
            c_close(self.death)

    def __init__(self, int sock, address, peer, wire, Py_ssize_t max_message):
        self.sock = self.read_fd = self.write_fd = sock
        self.peer = peer
        self.wire = wire
        self.max_message = max_message
        self.set_label(address)

    def complete(self, Outgoing out, Incoming inc, int death, Py_ssize_t peer_limit, waiting, spin_us, bint alone):
        """The handshake is done: from now on messages flow."""
        self.out = out
        self.inc = inc
        inc.sock = self.sock
        self.death = self.death_fd = death
        self.peer_limit = peer_limit
        self.waiting = WAITING[waiting]
        self.spin_ns = <uint64_t> (spin_us * 1000)
        self.alone = alone
        self.budget = LONGEST_SPIN
        self.inline_limit = min(<Py_ssize_t> (out.ring_size // 8), 65536)
        self.checked = aw_tick()
        self.quick = True

    @property
    def unconfirmed(self):
        return self.missing()

    @property
    def views(self):
        """Messages handed out in place and not returned yet."""
        return 0 if self.inc is None else self.inc.views

    @property
    def forgotten(self):
        """Messages handed out in place that came back only by a garbage collection: kept in a reference cycle."""
        return 0 if self.inc is None else self.inc.forgotten

    cdef uint64_t missing(self) noexcept:
        """Exact: the peer counts what it hands out in the memory that both see."""
        cdef uint64_t taken
        if self.out is not None:
            taken = aw_taken(self.out.ring.control)
            self.confirmed = self.slot.confirmed = min(taken, self.sent)
        return self.sent - self.confirmed

    cdef int share_slot(self, MessageEndpoint other) except -1:
        """Count where `other` does: the connection has one slot of the counters."""
        counters.release(self.slot)
        self.slot = other.slot
        self.shares_slot = True
        return 0

    def give_socket_away(self):
        """Another endpoint is made of the socket: this one closes it no more."""
        self.sock = self.read_fd = self.write_fd = -1

    # -- doorbells and death --------------------------------------------------------------------------------------------

    cdef void ring_peer(self) noexcept:
        if self.sock >= 0:
            self.doorbells += 1
            c_send(self.sock, b"!", 1, MSG_DONTWAIT | MSG_NOSIGNAL)   # full: it has tokens enough; gone: recv tells

    cdef void publish(self) noexcept:
        """Show the peer what was committed, and ring if it sleeps."""
        cdef aw_producer* ring = &self.out.ring
        aw_publish(ring)
        if aw_must_ring(ring):
            self.ring_peer()

    cdef void consumed(self, Incoming inc, uint32_t length) noexcept:
        """The oldest record, of `length` bytes, is done with: its place is the peer's again."""
        aw_advance(&inc.ring, length)
        aw_release_records(&inc.ring)
        if aw_room_was_wanted(&inc.ring, 0):
            self.ring_peer()

    cdef int drain(self) except -1:
        """Read the tokens; notice the end. 1: there were some, so the peer lived a moment ago, and needs no look."""
        cdef char tokens[64]
        cdef ssize_t r
        if self.sock < 0:
            return 0
        r = c_recv(self.sock, tokens, sizeof(tokens), MSG_DONTWAIT)
        if r > 0:
            self.checked = aw_tick()
            return 1
        if r == 0 or (errno != EAGAIN and errno != EINTR):
            self.gone = True
        return 0

    cdef int look(self) except -1:
        """Whether the peer still lives, by the kernel's word. Drains nothing."""
        cdef char token
        cdef ssize_t r
        self.checked = aw_tick()
        if self.gone or self.sock < 0:
            return 0
        r = c_recv(self.sock, &token, 1, MSG_DONTWAIT | MSG_PEEK)
        if r == 0 or (r < 0 and errno != EAGAIN and errno != EINTR):
            self.gone = True
        elif self.is_dead():
            self.gone = True
        return 0

    cdef int rung(self) except -1:
        """Async front: the socket or the pidfd is readable."""
        self.turns = 0
        # Where tokens hid an end, the socket or the pidfd stays readable, and this is called again.
        if not self.drain() and not self.gone:
            self.look()
        return 0

    cdef bint hung_up(self) noexcept:
        return self.gone

    cdef int lose(self) except -1:
        """The peer is gone, and what it published has been taken: an end, or a loss?"""
        if not self.broken:
            died = self.peer is not None and self.is_dead()
            reason = (f"the peer process {self.peer.pid} died" if died else
                      "the peer dropped the connection without an end")
            counters.lost(self.slot, reason.encode())
            self.fail(PeerLost(reason, address=str(self.address), operation="use", unconfirmed=self.missing()))
        return 0

    cdef bint is_dead(self) noexcept:
        """Whether the peer process has died, as far as its pidfd tells: poll(2) passes over -1."""
        cdef pollfd p
        p.fd = self.death
        p.events = POLLIN
        return c_poll(&p, 1, 0) > 0

    cdef int spoiled(self, object error) except -1:
        """The peer broke the rules: this connection is over, for both."""
        if self.broken:
            self.raise_failure()
        error.address = str(self.address)
        error.operation = error.operation or "use"
        counters.lost(self.slot, str(error.what).encode("utf-8", "replace"))
        self.fail(error)
        self.gone = True
        self.shut()
        self.raise_failure()

    cdef void shut(self) noexcept:
        """Let the peer see the end of the socket."""
        if self.sock >= 0:
            c_shutdown(self.sock, SHUT_RDWR)

    cdef object nonsense(self, object what):
        return BadFrame(what, received=b"")
