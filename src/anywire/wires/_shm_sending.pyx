# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Sending through shared memory: small messages into the ring, larger ones into the pool, long ones piece by piece.

A message of more than PIECE bytes is shown to the receiver piece by piece, so that both sides copy at the same time. Nothing
here waits, but for short looks on the blocking front (`lend_soon`, `keep_warm`).

Called by the fronts, by one sending thread at a time. Copies of large pieces release the GIL; so another thread may close the
channel meanwhile, and every step behind such a copy looks.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy
from anywire.contract.endpoint cimport BLOCKED, DONE, PARTIAL, WRITE, Loan, fork_generation, hold
from anywire.wires._ring cimport (AW_AN_EXTENT, aw_awake_with_room, aw_can_send, aw_closed, aw_commit, aw_has_room, aw_now,
                                  aw_producer, aw_sleep_to_send, aw_slot, aw_spin, aw_tick)
from anywire.wires._shm_end cimport ABANDONED, ADAPTIVE, EXTENT, FIRST, FLURRY, INLINE, LONGEST_SPIN, NEXT, NOGIL_COPY, SLEEP, ShmEnd
from anywire.wires._shm_memory cimport UNIT, Outgoing, ShmLoan

from anywire.contract.errors import BadFrame, ChannelClosed, TooLarge

cdef enum:
    PIECE = 262144                 # bytes of a long message that are copied, and shown, at a time
    WARM = 3 << 20                 # bytes under way from which on a sender first looks for some to return: see keep_warm
    IN_VAIN = 1024                 # long messages at most that go without such a look after looks in vain

cdef uint64_t COPIED = 8           # bytes that one CPU copies in a nanosecond, about
cdef uint64_t COPIED_FAR = 2       # ... and at least, where two CPUs share no cache


cdef class ShmSender(ShmEnd):
    """The sending half of a connection."""

    cdef int need_sending(self) except -1:
        if self.broken:
            self.raise_failure()
        if self.end_sent:
            raise ChannelClosed("send_eof() was called", address=str(self.address), operation="send")
        if self.out is None:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation="send")
        if aw_closed(self.out.ring.control):
            missing = self.missing()
            raise ChannelClosed(f"the peer closed the channel; {missing} sent messages are unconfirmed",
                                address=str(self.address), operation="send", by_peer=True, unconfirmed=missing)
        if self.gone:
            self.lose()
            self.raise_failure()
        return 0

    cdef int look_now_and_then(self) except -1:
        if aw_tick() != self.checked:
            self.look()
            if self.gone:
                self.need_sending()
        return 0

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef int status
        if self.broken or self.end_sent or self.gone or self.out is None or aw_closed(self.out.ring.control):
            self.need_sending()
        self.look_now_and_then()
        keep = hold(data, &p, &n)
        if n > self.peer_limit:
            raise TooLarge(n, self.peer_limit, address=str(self.address), operation="send")
        if self.long_keep is not None:           # another sender's long message is under way
            self.want = WRITE
            return BLOCKED
        if n > self.inline_limit or (p >= self.out.pool and p < self.out.pool + self.out.pool_size):
            status = self.put_long(p, n, keep)
        else:
            status = self.put_inline(p, n)
            if status == DONE:
                self.publish()
        return status

    cdef bint put_quick(self, bytes data) except -1:
        cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
        cdef aw_producer* ring
        if (n > self.inline_limit or n > self.peer_limit or self.broken or self.end_sent or self.gone or self.closed
                or self.out is None or self.long_keep is not None or self.generation != fork_generation()):
            return False
        ring = &self.out.ring
        if aw_tick() != self.checked or aw_closed(ring.control) or aw_has_room(ring, n) <= 0:
            return False
        memcpy(aw_slot(ring), PyBytes_AS_STRING(data), n)
        aw_commit(ring, INLINE, <uint32_t> n)
        self.went(n)
        self.publish()
        return True

    cdef int put_inline(self, const char* p, Py_ssize_t n) except -1:
        """Commit a small message; the caller publishes."""
        cdef aw_producer* ring = &self.out.ring
        while aw_has_room(ring, n) <= 0:
            if not self.room_came(n):
                return BLOCKED
        memcpy(aw_slot(ring), p, n)
        aw_commit(ring, INLINE, <uint32_t> n)
        self.went(n)
        return DONE

    cdef void went(self, Py_ssize_t n) noexcept:
        self.sent += 1
        self.slot.messages_sent += 1
        self.slot.bytes_sent += n
        self.flurry += 1
        if self.flurry % FLURRY == 0:
            self.turns += 1

    cdef bint room_came(self, uint64_t need) except -1:
        """There is no room for a record of `need` bytes (AW_AN_EXTENT: no place in the pool). True: now there is. False: wait;
        on the async front, which is going to suspend, the doorbell is armed then."""
        cdef aw_producer* ring = &self.out.ring
        self.want = WRITE
        self.need_room = need
        # The whole ring for an extent: so its cursor is looked at there too, and nonsense in it can't pass for readiness.
        if aw_has_room(ring, ring.size if need == AW_AN_EXTENT else need) < 0:
            self.spoiled(self.nonsense("the peer's cursor makes no sense"))
        if not self.asynchronous:
            return False
        if aw_sleep_to_send(ring, need):
            aw_awake_with_room(ring)
            return True
        if need == AW_AN_EXTENT:
            self.out.waker = self.wakeup
        return False

    cdef bint can_send(self, Outgoing out) noexcept:
        """Whether what a sender waits for is here."""
        return aw_can_send(&out.ring, self.need_room) or (self.need_room == AW_AN_EXTENT and out.frees != self.frees_seen)

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        """Small messages are published together: one store, one look at the peer's doorbell."""
        cdef Py_ssize_t i = start, n, count = len(data)
        cdef const char* p
        self.put_status = DONE
        while i < count:
            if self.broken or self.end_sent or self.gone or self.out is None or aw_closed(self.out.ring.control):
                self.need_sending()
            if aw_tick() != self.checked:
                self.look()
            try:
                while i < count and self.put_status == DONE:
                    keep = hold(data[i], &p, &n)
                    if (n > self.inline_limit or n > self.peer_limit or self.long_keep is not None
                            or (p >= self.out.pool and p < self.out.pool + self.out.pool_size)):
                        break
                    self.put_status = self.put_inline(p, n)
                    if self.put_status == DONE:
                        i += 1
            finally:
                if self.out is not None and self.out.ring.head != self.out.ring.published:
                    self.publish()
            if self.put_status == DONE and i < count:
                self.put_status = self.put_message(data[i], block)
                if self.put_status != BLOCKED:
                    if isinstance(data[i], Loan):
                        (<Loan> data[i]).sent = True
                    i += 1
            if self.put_status != DONE:
                break
        return i

    cdef int put_long(self, const char* p, Py_ssize_t n, object keep) except -1:
        """A message that lies in the pool already, or goes there."""
        cdef Outgoing out = self.out
        cdef uint32_t i
        cdef int status
        self.collect(out)
        if p >= out.pool and p < out.pool + out.pool_size and (p - out.pool) % UNIT == 0:
            i = out.find(<uint32_t> ((p - out.pool) // UNIT))
            if (i < out.count and out.extents[i].loan != NULL and not out.extents[i].flying
                    and <size_t> n <= <size_t> out.extents[i].count * UNIT):
                while aw_has_room(&out.ring, 32) <= 0:
                    if not self.room_came(32):
                        return BLOCKED
                out.extents[i].flying = True
                self.refer(EXTENT, <uint64_t> (p - out.pool), n, 0, False)
                self.went(n)
                return DONE
        if n <= self.inline_limit:               # a part of a loan, say
            status = self.put_inline(p, n)
            if status == DONE:
                self.publish()
            return status
        if not self.asynchronous:
            self.keep_warm(out, n)
        self.long_keep = keep
        self.long_data = p
        self.long_total = n
        self.long_done = 0
        self.long_unit = -1
        try:
            return self.go_on()
        except BaseException:
            self.long_keep = None
            raise

    cdef int keep_warm(self, Outgoing out, size_t n) except -1:
        """Let a receiver that is at work return something, rather than copy to ever further ends of the pool.

        A sender that runs ahead through 64 MiB writes each line to memory, and the receiver fetches it from there; with a
        few MiB under way both find them in a cache: 3-4 x as fast with 1 MiB messages. It's a look, as long as the
        receiver may need for a copy, not a wait: who looked in vain (the receiver does something else) looks less often."""
        cdef uint64_t now, end, frees = out.frees
        cdef bint came
        if out.lent + n <= WARM or n > WARM // 2 or self.waiting == SLEEP or (self.waiting == ADAPTIVE and self.alone):
            return 0
        if self.looks_skipped < self.looks_to_skip:
            self.looks_skipped += 1
            return 0
        self.looks_skipped = 0
        now = aw_now()
        end = now + LONGEST_SPIN + n // COPIED_FAR
        while out.lent + n > WARM and now < end:
            with nogil:
                came = aw_spin(NULL, &out.ring, AW_AN_EXTENT, end - now)
            PyErr_CheckSignals()
            if self.broken or self.closed or self.gone or self.out is not out:
                return 0                         # go_on tells
            if came:
                self.collect(out)
            now = aw_now()
        if out.frees == frees:
            self.looks_to_skip = min(2 * self.looks_to_skip + 1, <uint32_t> IN_VAIN)
        else:
            self.looks_to_skip = 0
        return 0

    cdef int refer(self, uint32_t kind, uint64_t offset, uint64_t length, uint64_t total, bint contiguous) except -1:
        """Publish a record that refers to the pool; the caller saw that there is room for it."""
        cdef aw_producer* ring = &self.out.ring
        cdef uint64_t* words = <uint64_t*> aw_slot(ring)
        words[0] = offset
        words[1] = length
        if kind == FIRST:
            words[2] = total
            words[3] = contiguous
        aw_commit(ring, kind, 32 if kind == FIRST else 16)
        self.publish()
        return 0

    cdef int go_on(self) except -1:
        """Copy the long message to the pool, piece by piece, as far as there is room. DONE, BLOCKED (nothing went), PARTIAL."""
        cdef Outgoing out = self.out
        cdef uint64_t left, n
        cdef Py_ssize_t unit
        cdef char* to
        cdef const char* source
        cdef bint contiguous
        cdef uint32_t kind, i
        cdef object keep = self.long_keep            # as in copy_piece
        while self.long_done < self.long_total:
            if self.gone or self.out is None or aw_closed(out.ring.control):
                self.long_keep = None
                self.need_sending()
            left = self.long_total - self.long_done
            n = min(left, <uint64_t> PIECE)
            if aw_has_room(&out.ring, 32) <= 0:
                if self.room_came(32):
                    continue
                return self.stuck()
            if self.long_done == 0:
                # One extent for all of it where that leaves room for others: then the receiver can have it in place.
                self.long_unit = out.lend(self.long_total) if self.long_total <= out.pool_size // 4 else -1
            contiguous = self.long_unit >= 0
            unit = self.long_unit
            if not contiguous:
                unit = out.lend(n)
                if unit < 0:
                    self.collect(out)
                    unit = out.lend(n)
                if unit < 0:
                    self.frees_seen = out.frees
                    if self.room_came(AW_AN_EXTENT):
                        continue
                    return self.stuck()
            i = out.find(<uint32_t> unit)
            if self.long_done and contiguous and (i == out.count or not out.extents[i].flying):
                self.long_keep = None
                self.spoiled(self.nonsense("the peer returned memory of a message that is not whole yet"))
            out.extents[i].flying = True
            to = out.pool + <size_t> unit * UNIT + (self.long_done if contiguous else 0)
            source = self.long_data + self.long_done
            if n >= NOGIL_COPY:
                with nogil:
                    memcpy(to, source, n)
                if self.out is None:                 # closed meanwhile by another thread
                    self.need_sending()
            else:
                memcpy(to, source, n)
            if self.long_total <= n:
                kind = EXTENT
            else:
                kind = FIRST if self.long_done == 0 else NEXT
            self.refer(kind, <uint64_t> (to - out.pool), n, self.long_total, contiguous)
            self.long_done += n
        self.long_keep = None
        self.went(self.long_total)
        return DONE

    cdef int stuck(self) except -1:
        """The long message must wait."""
        if self.long_done:
            return PARTIAL
        self.long_keep = None
        return BLOCKED

    cdef int collect(self, Outgoing out) except -1:
        """Take back what the peer has returned to the pool."""
        try:
            out.collect()
        except BadFrame as error:
            self.spoiled(error)
        return 0

    cdef bint output_pending(self) noexcept:
        return self.long_keep is not None

    cdef int flush_output(self, bint block) except -1:
        cdef int status
        if self.long_keep is None:
            return DONE
        if self.broken:
            self.long_keep = None
            self.raise_failure()
        self.collect(self.out)
        status = self.go_on()
        return BLOCKED if status == PARTIAL else status

    cdef int adopt_output(self) except -1:
        """The sender gives up in the middle of a long message. The receiver has not handed it out: so it goes not at all (1)."""
        if self.long_keep is None:
            return 0
        self.long_keep = None
        self.abandon_long()
        return 1

    cdef int abandon_long(self) except -1:
        # Any record but NEXT says the same to the receiver; without room now, the next message does.
        if self.out is not None and not self.gone and aw_has_room(&self.out.ring, 0) > 0:
            aw_commit(&self.out.ring, ABANDONED, 0)
            self.publish()
        return 0

    def make_loan(self, Py_ssize_t nbytes):
        """Memory in the pool; private memory when the pool has no place now (then `send` copies, and waits)."""
        cdef ShmLoan loan
        cdef Py_ssize_t unit = -1
        cdef uint64_t frees
        cdef Outgoing out = self.out             # another thread may abort() this channel while we look
        if nbytes < 0:
            raise ValueError(f"a loan needs a size of at least 0 bytes, not {nbytes}")
        if out is not None and not self.broken:
            frees = out.frees
            self.collect(out)
            unit = out.lend(nbytes)
            if unit < 0:
                unit = self.lend_soon(out, nbytes)
            if out.frees != frees:
                out.wake_sender()           # what was collected here rings for nobody again
        if unit < 0:
            self.private_loans += 1
            return Loan(nbytes)
        loan = ShmLoan.__new__(ShmLoan, nbytes, False)
        loan.owner = out
        loan.unit = <uint32_t> unit
        loan.memory = out.pool + <size_t> unit * UNIT
        out.extents[out.find(loan.unit)].loan = <void*> loan
        return loan

    cdef Py_ssize_t lend_soon(self, Outgoing out, size_t nbytes) except -2:
        """As Outgoing.lend, on the blocking front, when the pool is full: the receiver may be about to return something.

        Looks for as long as the copy would take that private memory costs: so it costs twice that at most, and never waits
        for what only this side can give back."""
        cdef uint64_t now, end
        cdef Py_ssize_t unit = -1
        cdef bint came
        if self.asynchronous or self.gone or nbytes > out.pool_size or self.waiting == SLEEP or (
                self.waiting == ADAPTIVE and self.alone):
            return -1
        now = aw_now()
        end = now + nbytes // COPIED
        while unit < 0 and now < end:
            with nogil:
                came = aw_spin(NULL, &out.ring, AW_AN_EXTENT, min(end - now, <uint64_t> 500000))
            PyErr_CheckSignals()
            if self.broken or self.closed or self.out is not out:
                return -1
            if came:
                self.collect(out)
                unit = out.lend(nbytes)
            now = aw_now()
        return unit
