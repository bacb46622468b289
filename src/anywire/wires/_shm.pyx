# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Messages through shared memory: one ring each way, a pool for large messages, a socket as doorbell and sign of life.

`shm.py` makes the memory known to both sides. The ring itself is `ipc/ring.h`. Small messages lie in the ring; larger ones in
*extents* of the sender's pool, which the ring refers to and the receiver gives back. Messages longer than a piece are shown
piece by piece, so that both sides copy at the same time.

Each side writes its own data only: the other maps it read-only, and the control page holds nothing that could lead either
astray, because every value from there is loaded once and checked. A peer that breaks the rules gets `BadFrame`.

Of one endpoint, `_shm_memory.pyx` has the memory, `_shm_end.pyx` the doorbell and the sign of life, `_shm_sending.pyx` the
sending; here is the receiving, the waiting of the blocking front, and the end.

Called by the fronts, on the loop's thread, or on the blocking front by one receiving and one sending thread at a time.
Waiting releases the GIL, copies of large pieces too; everything else happens under it.

What can go wrong: the peer dies (what it published is handed out, then `PeerLost`), memory runs out (`MemoryError` from
`loan`, a send waits), the peer writes nonsense (`BadFrame`).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy
from anywire.contract cimport counters
from anywire.contract.endpoint cimport BLOCKED, DONE, READ, WRITE, MessageEndpoint, fork_generation
from anywire.contract.heap cimport keep_heap
from anywire.wires._ring cimport (aw_advance, aw_awake_with_data, aw_awake_with_room, aw_closed, aw_commit,
                                  aw_consumer, aw_count_taken, aw_data_wanted, aw_glance, aw_has_data, aw_has_room,
                                  aw_now, aw_peek, aw_producer, aw_record, aw_release_records, aw_room_wanted,
                                  aw_room_was_wanted, aw_set_closed, aw_sleep_for_data, aw_sleep_to_send, aw_spin)
from anywire.wires._shm_end cimport (ABANDONED, ADAPTIVE, END, EXTENT, FIRST, FLURRY, INLINE, LONGEST_SPIN, NEXT,
                                     NOGIL_COPY, PIECE, SLEEP, SPIN)
from anywire.wires._shm_memory cimport UNIT, Incoming, Outgoing, View, hear_of_collections
from anywire.wires._shm_sending cimport ShmSender

import os
import time

from anywire.contract.errors import BadFrame, ChannelClosed, EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.contract.waits import Wait

cdef extern from "<sys/socket.h>" nogil:
    int c_shutdown "shutdown"(int fd, int how)
    int SHUT_RDWR

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* p, size_t n)
    ssize_t c_write "write"(int fd, const void* p, size_t n)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int c_poll "poll"(pollfd* fds, unsigned long n, int timeout)

cdef enum:
    MOST_PIECES = 4096             # records without a message that a receive takes in one turn
    QUICK_SLEEP = 100000           # nanoseconds: LONGEST_SPIN, and most of what it takes to be woken


cdef class ShmEndpoint(ShmSender):
    """One side of a shared-memory connection, as the fronts use it."""

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef object take_quick(self):
        cdef Incoming inc = self.inc
        cdef aw_record record
        cdef int r
        if (inc is None or self.closed or self.incoming or self.returned is not None
                or self.generation != fork_generation()):
            return None
        r = aw_peek(&inc.ring, &record)
        if r == 0 and self.waiting != SLEEP and not self.alone and aw_glance(&inc.ring, NULL, 0):
            r = aw_peek(&inc.ring, &record)
        if r <= 0 or record.kind != INLINE or <Py_ssize_t> record.length > self.max_message:
            return None
        return self.hand_out(inc, &record)

    cdef object hand_out(self, Incoming inc, aw_record* record):
        """The small message of the oldest record, which is done with."""
        cdef object message = PyBytes_FromStringAndSize(record.data, record.length)
        self.handed_over(inc, record.length)
        self.consumed(inc, record.length)
        return message

    cdef object take_message(self, bint block):
        cdef Incoming inc = self.inc
        cdef aw_record record
        cdef int r
        while True:
            if inc is None:
                self.need_open_here()
            if self.incoming and self.got == self.total:
                return self.finished_copy(inc)
            r = aw_peek(&inc.ring, &record)
            if r > 0 and record.kind == INLINE and not self.incoming:
                if <Py_ssize_t> record.length > self.max_message:
                    self.too_large(record.length)
                return self.hand_out(inc, &record)
            if r > 0:
                self.long_record(inc, &record)
                if self.enough():
                    return None
            elif not self.nothing_here(inc, r):
                return None

    cdef int need_open_here(self) except -1:
        if self.broken:
            self.raise_failure()
        raise ChannelClosed("it was closed on this side", address=str(self.address), operation="recv")

    cdef void handed_over(self, Incoming inc, Py_ssize_t n) noexcept:
        aw_count_taken(&inc.ring, 1)
        self.slot.messages_received += 1
        self.slot.bytes_received += n
        self.flurry += 1
        if self.flurry % FLURRY == 0:
            self.turns += 1

    cdef bint nothing_here(self, Incoming inc, int r) except -1:
        """The ring is empty, or nonsense. True: look again; False: wait. Raises what follows the last message."""
        if r < 0:
            self.spoiled(self.nonsense("the peer's ring makes no sense"))
        if aw_room_was_wanted(&inc.ring, 1):
            self.ring_peer()
        if self.ended:
            raise EndOfChannel(address=str(self.address), operation="recv", unconfirmed=self.missing())
        if self.broken:
            self.raise_failure()
        if self.gone:
            if aw_has_data(&inc.ring):           # published before it went, seen only now
                return True
            self.lose()
            self.raise_failure()
        self.want = READ
        if not self.asynchronous:
            return False
        if self.waiting != SLEEP and not self.alone:
            # A peer in the middle of a flurry has the next message ready within a microsecond; to sleep, and to be rung for
            # it, costs both sides a hundred times that.
            if aw_glance(&inc.ring, NULL, 0):
                return True
            if self.spin_ns:
                with nogil:
                    r = aw_spin(&inc.ring, NULL, 0, self.spin_ns)
                if r:
                    return True
        if self.polled:
            return False                         # the loop looks, and arms the doorbell before it sleeps
        r = aw_sleep_for_data(&inc.ring)
        if r:
            aw_awake_with_data(&inc.ring)
            return True
        return False

    cdef bint set_polled(self, bint polled) noexcept:
        self.polled = polled and self.waiting != SLEEP and not self.alone
        return self.polled

    cdef bint something_here(self) noexcept:
        return self.inc is not None and aw_has_data(&self.inc.ring) != 0

    cdef bint arm(self) noexcept:
        return self.inc is not None and aw_sleep_for_data(&self.inc.ring) != 0

    cdef int too_large(self, uint64_t n) except -1:
        if self.broken:
            self.raise_failure()
        error = TooLarge(n, self.max_message, address=str(self.address), operation="recv",
                         advice="raise max_message= on this side, or send it in parts")
        counters.lost(self.slot, b"a message over the limit")
        self.fail(error)
        self.gone = True
        self.shut()
        self.raise_failure()

    cdef bint long_record(self, Incoming inc, aw_record* record, Py_ssize_t room=-1) except -1:
        """Take a record that is no small message. True: a long message is whole now (`got` is `total`).

        `room` is the size of the caller's buffer that `target` is: BufferError when the message is larger."""
        cdef uint64_t words[4]
        cdef uint64_t total
        cdef uint32_t kind = record.kind, length = record.length
        if self.incoming and kind != NEXT:
            self.drop_incoming(inc)              # its sender gave up
            if kind == INLINE:
                return False
        if kind == EXTENT or kind == FIRST or kind == NEXT:
            if length != (32 if kind == FIRST else 16):
                self.spoiled(self.nonsense(f"a record of kind {kind} has {length} bytes"))
            memcpy(words, record.data, length)   # a private copy: the peer can't change it after the check
            total = words[2] if kind == FIRST else words[1]
            if kind != NEXT:
                if total > <uint64_t> self.max_message:
                    self.too_large(total)
                if room >= 0 and total > <uint64_t> room:
                    self.no_room(total, room)
            try:
                if kind == NEXT and not self.incoming:
                    raise self.nonsense("a long message goes on that never began")
                self.need_extent(inc, kind, words)
            except BadFrame as error:
                self.spoiled(error)
            if kind != NEXT:
                self.total = total
                self.contiguous = kind == EXTENT or words[3] != 0
                self.base = words[0]
                self.got = self.copied = 0
                self.incoming = True
            if not self.contiguous:
                self.copy_piece(inc, words[0], words[1])
                inc.give_back(<uint32_t> (words[0] // UNIT))
            self.got += words[1]
        elif kind == END and not self.ended:
            self.ended = True
        elif kind != ABANDONED:
            self.spoiled(self.nonsense(f"a record of kind {kind}"))
        self.consumed(inc, length)
        return self.incoming and self.got == self.total

    cdef int need_extent(self, Incoming inc, uint32_t kind, uint64_t* words) except -1:
        cdef uint64_t offset = words[0], length = words[1]
        if kind == NEXT:
            if length == 0 or length > self.total - self.got:
                raise self.nonsense("a long message is longer than it said")
            if self.contiguous:
                if offset != self.base + self.got:
                    raise self.nonsense("a long message goes on somewhere else")
                return 0                         # the whole extent was checked when it began
        elif kind == FIRST and (length == 0 or length >= words[2]):
            raise self.nonsense("a long message begins with all of itself, or nothing")
        if kind == FIRST and words[3]:
            inc.need_extent(offset, words[2])
        else:
            inc.need_extent(offset, length)
        return 0

    cdef int copy_piece(self, Incoming inc, uint64_t offset, uint64_t n) except -1:
        """Copy the next `n` bytes of the long message to where it goes."""
        cdef char* to
        cdef const char* source = inc.pool + offset
        cdef object body
        if self.target != NULL:
            to = self.target
        else:
            if self.body is None:
                keep_heap()
                # No memory is used by an announced length: the allocator maps it, and only what comes is touched.
                self.body = PyBytes_FromStringAndSize(NULL, self.total)
            to = PyBytes_AS_STRING(self.body)
        to += self.copied
        body = self.body                         # without the GIL another thread may abort() this channel
        if n >= NOGIL_COPY:
            with nogil:
                memcpy(to, source, n)
            if self.inc is not inc:
                self.need_open_here()
        else:
            memcpy(to, source, n)
        self.copied += n
        return 0

    cdef int catch_up(self, Incoming inc) except -1:
        """Copy what came of a contiguous message."""
        while self.contiguous and self.copied < self.got:
            self.copy_piece(inc, self.base + self.copied, min(self.got - self.copied, <uint64_t> PIECE))
        return 0

    cdef object finished_copy(self, Incoming inc):
        cdef object message
        self.catch_up(inc)
        message = self.body if self.total else b""
        self.finish_incoming(inc)
        return message

    cdef int finish_incoming(self, Incoming inc) except -1:
        cdef Py_ssize_t n = self.total
        if self.contiguous:
            inc.give_back(<uint32_t> (self.base // UNIT))
        self.body = None
        self.target = NULL
        self.incoming = False
        self.handed_over(inc, n)
        return 0

    cdef int drop_incoming(self, Incoming inc) except -1:
        if self.incoming:
            self.incoming = False
            if self.contiguous:
                inc.give_back(<uint32_t> (self.base // UNIT))
            self.body = None
        return 0

    cdef object take_view(self, bint block):
        """The next message in place, as a read-only memoryview; small ones as a view of a copy, which costs less."""
        cdef Incoming inc = self.inc
        cdef aw_record record
        cdef View view
        cdef int r
        while True:
            if inc is None:
                self.need_open_here()
            if self.incoming and self.got == self.total:
                if not self.contiguous:
                    return memoryview(self.finished_copy(inc))
                view = View.__new__(View)
                view.owner = inc
                view.memory = <char*> (inc.pool + self.base)
                view.nbytes = self.total
                view.unit = <uint32_t> (self.base // UNIT)
                inc.views += 1
                hear_of_collections()
                self.body = None
                self.incoming = False
                self.handed_over(inc, self.total)
                return memoryview(view)
            r = aw_peek(&inc.ring, &record)
            if r > 0 and record.kind == INLINE:
                message = self.take_message(block)
                return None if message is None else memoryview(message)
            if r > 0:
                self.long_record(inc, &record)
                if self.enough():
                    return None
            elif not self.nothing_here(inc, r):
                return None

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Incoming inc = self.inc
        cdef aw_record record
        cdef Py_ssize_t n
        cdef int r
        while True:
            if inc is None:
                self.need_open_here()
            if self.incoming and self.total > <uint64_t> size:
                self.no_room(self.total, size)
            if self.incoming and self.got == self.total:
                if self.target == NULL and self.body is None:
                    self.target = p
                self.catch_up(inc)
                n = self.total
                if self.body is not None:
                    memcpy(p, PyBytes_AS_STRING(self.body), n)
                self.finish_incoming(inc)
                return n
            r = aw_peek(&inc.ring, &record)
            if r > 0 and record.kind == INLINE:
                self.drop_incoming(inc)
                n = record.length
                if n > self.max_message:
                    self.too_large(n)
                if n > size:
                    self.no_room(n, size)
                memcpy(p, record.data, n)
                self.handed_over(inc, n)
                self.consumed(inc, record.length)
                return n
            if r > 0:
                if self.target == NULL and self.body is None:
                    self.target = p
                self.long_record(inc, &record, size)
                if self.incoming:
                    self.catch_up(inc)
                if self.enough():
                    return -1
            elif not self.nothing_here(inc, r):
                return -1

    cdef bint enough(self) noexcept:
        """Whether a receive took so many records without a message that others get a turn: a peer can write them for ever."""
        self.pieces += 1
        if self.pieces % MOST_PIECES:
            return False
        self.want = READ
        self.again = True
        return True

    cdef int no_room(self, uint64_t n, Py_ssize_t size) except -1:
        raise BufferError(f"recv_into {self.address}: the next message has {n} bytes and the buffer {size}; the message "
                          "stays queued")

    cdef int stop_into(self) except -1:
        """The caller's buffer is the caller's again: what came of a long message goes elsewhere."""
        cdef char* target = self.target
        if target == NULL:
            return 0
        self.target = NULL
        if self.incoming:
            if self.contiguous:
                self.copied = 0                  # it is all still in the pool
            elif self.copied:
                self.body = PyBytes_FromStringAndSize(NULL, self.total)
                memcpy(PyBytes_AS_STRING(self.body), target, self.copied)
        return 0

    cdef list next_messages(self, object first, Py_ssize_t limit):
        """As the base's, without arming the doorbell at its end, and with one store for all that was taken."""
        cdef Incoming inc = self.inc
        cdef list out = [first]
        cdef aw_record record
        cdef Py_ssize_t n = 0, nbytes = 0
        while self.returned is not None and len(out) < limit:
            out.append(self.next_message(False))
        if inc is None or self.incoming:
            return out
        while len(out) < limit and aw_peek(&inc.ring, &record) > 0 and record.kind == INLINE \
                and <Py_ssize_t> record.length <= self.max_message:
            out.append(PyBytes_FromStringAndSize(record.data, record.length))
            aw_advance(&inc.ring, record.length)
            n += 1
            nbytes += record.length
        if n:
            aw_release_records(&inc.ring)
            aw_count_taken(&inc.ring, n)
            self.slot.messages_received += n
            self.slot.bytes_received += nbytes
            self.turns += 1 + n // FLURRY // 8
            if aw_room_was_wanted(&inc.ring, 0):
                self.ring_peer()
        return out

    # -- waiting, on the blocking front ---------------------------------------------------------------------------------

    cdef int wait_ready(self, int mask, double timeout) except -1:
        """Spin as far as that pays, then sleep until the doorbell rings."""
        cdef Outgoing out = self.out
        cdef Incoming inc = self.inc
        cdef aw_consumer* c
        cdef aw_producer* p
        cdef bint reading = mask == READ
        cdef uint64_t end = 0, began
        cdef int r
        if out is None or inc is None:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation="wait")
        if reading and self.again:
            self.again = False
            PyErr_CheckSignals()
            with nogil:
                sched_yield()
            return 0 if timeout == 0 else mask
        c = &inc.ring if reading else NULL
        p = &out.ring
        if timeout >= 0:
            end = aw_now() + <uint64_t> (min(timeout, 1e9) * 1e9)
        self.waiters += 1
        try:
            # READ and WRITE: a receiver that also finishes what an abandoned write left over; that one only sleeps.
            if mask != (READ | WRITE) and not self.gone and (
                    self.waiting == SPIN or (self.waiting == ADAPTIVE and not self.alone)):
                if aw_glance(c, p, self.need_room):
                    return mask
                began = aw_now()
                r = self.spin(c, p, end, timeout)
                if r != 0:
                    return mask if r > 0 else 0
                r = self.sleep(out, inc, mask, end, timeout)
                if r and aw_now() - began < QUICK_SLEEP:
                    # What came had come before LONGEST_SPIN, but for the waking: the next wait looks as long.
                    self.budget = LONGEST_SPIN
                    self.misses = 0
                return r
            return self.sleep(out, inc, mask, end, timeout)
        finally:
            self.waiters -= 1
            if self.closed:
                self.drop_wake_fd()
                if self.doomed and self.waiters == 0:
                    self.close_now()

    cdef int spin(self, aw_consumer* c, aw_producer* p, uint64_t end, double timeout) except -2:
        """1: ready; 0: go to sleep; -1: the time is up."""
        cdef uint64_t ns = self.budget, now
        cdef int r
        if self.waiting == SPIN:
            while True:
                ns = 500000
                if timeout >= 0:
                    now = aw_now()
                    if now >= end:
                        return -1
                    ns = min(ns, end - now)
                with nogil:
                    r = aw_spin(c, p, self.need_room, ns)
                if r or self.closed or (c == NULL and self.can_send(self.out)):
                    return 1
                PyErr_CheckSignals()
                self.look()
                if self.gone:
                    return 1
        if self.misses >= 8:
            # It has not paid for a while: look only now and then whether the peer has become quicker.
            self.misses += 1
            if self.misses % 16:
                return 0
        if timeout >= 0:
            now = aw_now()
            ns = min(ns, end - now) if now < end else 0
        with nogil:
            r = aw_spin(c, p, self.need_room, ns)
        if r:
            self.misses = 0
            self.budget = LONGEST_SPIN
            return 1
        self.misses += 1
        if self.budget > LONGEST_SPIN // 8:
            self.budget //= 2
        return 0

    cdef int sleep(self, Outgoing out, Incoming inc, int mask, uint64_t end, double timeout) except -1:
        """Say that we sleep, look once more, sleep in poll(2)."""
        cdef pollfd fds[3]
        cdef int r, ms, e
        cdef uint64_t now
        cdef bint reading = mask & READ != 0, writing = mask & WRITE != 0
        fds[0].fd = self.sock
        fds[1].fd = self.death
        fds[2].fd = self.wake_fd
        fds[0].events = fds[1].events = fds[2].events = POLLIN
        if reading:
            self.waits_for_data = True
        if writing:
            self.waits_for_room += 1
            out.bell = self.wake_fd
        try:
            while True:
                r = reading and aw_sleep_for_data(&inc.ring)
                if writing and not r:
                    r = aw_sleep_to_send(&out.ring, self.need_room) or self.can_send(out)
                if r or self.gone or self.closed:
                    return mask
                ms = -1
                if timeout >= 0:
                    now = aw_now()
                    if now >= end:
                        return 0
                    ms = <int> min((end - now + 999999) // 1000000, <uint64_t> 2000000000)
                with nogil:
                    r = c_poll(fds, 3, ms)
                    e = errno
                if r > 0:
                    # One token may be for the other thread of this side. So: empty the bell first, then look at the other,
                    # and put the token back if that one waits and was rung. (Looking first loses what is rung between.)
                    if fds[2].revents:
                        if self.interrupted:
                            return mask              # the caller looks why
                        self.put_back(False)
                    if fds[1].revents:
                        self.gone = True
                    elif fds[0].revents:
                        self.drain()
                    if (self.waits_for_room > writing and not aw_room_wanted(out.ring.control)
                            or self.waits_for_data and not reading and not aw_data_wanted(inc.ring.control)):
                        self.put_back(True)
                    if self.gone or (reading and aw_has_data(&inc.ring)) or (writing and self.can_send(out)):
                        return mask
                    if reading and (self.left_over or (writing and self.waits_for_room > 1)):
                        self.left_over = False
                        return mask                  # a sender came, or went: the caller looks what there is to wait for
                elif r < 0 and e != EINTR:
                    raise OSError(e, f"poll {self.address}: {os.strerror(e)}")
                if r < 0:
                    PyErr_CheckSignals()
        finally:
            if reading:
                self.waits_for_data = False
                aw_awake_with_data(&inc.ring)
            if writing:
                self.waits_for_room -= 1
                if self.waits_for_room:
                    self.put_back(True)              # the flag may have been taken for both: the other looks, and sets it
                else:
                    out.bell = -1
                    aw_awake_with_room(&out.ring)

    cdef int leave_over(self) except -1:
        """A sender gave up in the middle: a thread that receives finishes it."""
        if self.waits_for_data:
            self.left_over = True
            self.put_back(True)
        return 0

    cdef int put_back(self, bint ring) except -1:
        """Ring the bell that is this side's own, or empty it."""
        cdef uint64_t token = 1
        cdef ssize_t r = 0
        # With the GIL, so that no other thread closes the descriptor between the look and the call; it never waits.
        if self.wake_fd >= 0:
            r = c_write(self.wake_fd, &token, 8) if ring else c_read(self.wake_fd, &token, 8)
        return r > 0

    def interrupt(self):
        self.interrupted = True
        MessageEndpoint.interrupt(self)

    # -- ending ---------------------------------------------------------------------------------------------------------

    def try_eof(self):
        """Half-close: the end goes after everything sent before it."""
        if self.end_sent:
            return DONE
        self.need_sending()
        if self.long_keep is not None:
            self.want = WRITE
            return BLOCKED
        while aw_has_room(&self.out.ring, 0) <= 0:
            if not self.room_came(0):
                return BLOCKED
        self.put_end()
        return DONE

    cdef int put_end(self) except -1:
        aw_commit(&self.out.ring, END, 0)
        self.end_sent = True
        self.publish()
        return 0

    @property
    def takes_nothing(self):
        """Whether the peer closes, or has closed: it takes no more messages. Behind its end, that is known for certain."""
        return self.out is not None and bool(aw_closed(self.out.ring.control))

    def finish_steps(self, timeout):
        """Generator: the end, after what was sent; and say that nothing is taken here any more."""
        cdef double end = time.monotonic() + timeout
        cdef Outgoing out = self.out
        cdef Incoming inc = self.inc
        cdef int room
        if out is None:
            return
        if self.long_keep is not None:
            self.adopt_output()
        # Said before the doorbell is armed: a thread that still receives sleeps on the same bell, and gives back a token
        # that was meant for us.
        self.waits_for_room += 1
        try:
            while not self.end_sent and not self.broken and not self.gone:
                room = aw_has_room(&out.ring, 0)
                if room > 0:
                    # First: whoever has seen the end must not be able to send into a channel that takes nothing.
                    aw_set_closed(inc.ring.control)
                    self.put_end()
                    break
                if room < 0:
                    self.spoiled(self.nonsense("the peer's cursor makes no sense"))
                if aw_closed(out.ring.control):
                    break
                if not aw_sleep_to_send(&out.ring, 0) and not (yield from self.sign_steps(end, False)):
                    return
        finally:
            self.waits_for_room -= 1
        aw_set_closed(inc.ring.control)
        self.ending = True
        self.ring_peer()

    def sign_steps(self, double end, bint reading):
        """Generator: wait until the peer rings, or goes. False: the time is up, or this side was dropped meanwhile."""
        watched = [(fd, READ) for fd in (self.sock, self.death, self.wake_fd) if fd >= 0]
        self.waiters += 1                        # who drops this side meanwhile leaves the descriptors to us
        try:
            ready = yield Wait(watched, max(0.0, end - time.monotonic()))
        finally:
            self.waiters -= 1
            if self.closed:
                self.drop_wake_fd()
                if self.doomed and self.waiters == 0:
                    self.close_now()
        if not ready or self.closed:
            return False
        # As in `sleep`: another thread shares the bell, so empty it first and look at that one after.
        self.put_back(False)
        self.rung()
        if (self.waits_for_room and not aw_room_wanted(self.out.ring.control) if reading else
                self.waits_for_room > 1 or self.waits_for_data and not aw_data_wanted(self.inc.ring.control)):
            self.put_back(True)
        return True

    def drain_steps(self, timeout):
        """Generator: drop what still comes, until the peer closes too or the deadline passes."""
        cdef double end = time.monotonic() + timeout
        cdef bint first = True
        cdef Outgoing out = self.out
        cdef Incoming inc = self.inc
        if out is None or not self.ending:
            return
        self.waits_for_data = True
        try:
            # Each wait, and each copy without the GIL, may end with another thread's abort.
            while not self.broken and not self.gone and not aw_closed(out.ring.control):
                if not first and time.monotonic() >= end:
                    return
                first = False
                self.turns = 0
                self.drop_all()
                if self.closed:
                    return
                if aw_sleep_for_data(&inc.ring) or aw_closed(out.ring.control):
                    yield Wait([], 0.0)          # more is here; others get a turn first
                    if self.closed:
                        return
                elif not (yield from self.sign_steps(end, True)):
                    return
        finally:
            self.waits_for_data = False
        if self.gone and not self.broken and not aw_closed(out.ring.control):
            self.drop_all()
            if not self.closed and not self.ended:
                self.lose()

    cdef int drop_all(self) except -1:
        """Take and drop what is here."""
        cdef Incoming inc = self.inc
        cdef aw_record record
        cdef int r
        cdef Py_ssize_t count = 0
        self.returned = None
        while count < 4096:
            r = aw_peek(&inc.ring, &record)
            if r == 0:
                break
            if r < 0:
                self.spoiled(self.nonsense("the peer's ring makes no sense"))
            count += 1
            if record.kind == INLINE:
                self.drop_incoming(inc)
                aw_advance(&inc.ring, record.length)
                aw_release_records(&inc.ring)
                self.slot.drops += 1
            elif self.long_record(inc, &record):
                self.drop_incoming(inc)
                self.slot.drops += 1
        if aw_room_was_wanted(&inc.ring, 1):
            self.ring_peer()
        return 0

    def detach_state(self):
        raise Unsupported("its memory is sealed for this process: nobody else can ever write to it",
                          address=str(self.address), operation="detach", advice="connect again from the other process")

    def verdict(self):
        if isinstance(self.failure, PeerLost) and self.missing() and not self.peer_closed:
            self.raise_failure()

    def release(self):
        if self.closed and self.sock < 0:
            return
        self.closed = True
        if self.sock >= 0 and self.generation == fork_generation():
            # The peer sees the end at once, also where a thread is inside poll(2) with this socket, or a forked child holds
            # it open. What was published stays readable.
            c_shutdown(self.sock, SHUT_RDWR)
        if self.out is not None:
            self.missing()                       # the last word on what was taken
            self.peer_closed = aw_closed(self.out.ring.control)
        if self.waiters:
            self.doomed = True
        else:
            self.close_now()

    def close_now(self):
        """Close the descriptors, and let go of the memory."""
        cdef int sock = self.sock, death = self.death
        self.doomed = False
        # Forgotten before they are closed: close(2) runs without the GIL, and another thread may release too.
        self.sock = self.death = self.death_fd = self.read_fd = self.write_fd = -1
        if self.out is not None:
            self.out.waker = None
        if self.inc is not None:
            self.inc.sock = -1
        self.long_keep = self.body = self.half = None
        self.out = self.inc = None
        if sock >= 0:
            os.close(sock)
        if death >= 0:
            os.close(death)
