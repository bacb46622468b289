# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""One writer, up to 64 readers: each message is written once, and all read it in place.

To a reader it is a connection as any other (`_shm.pyx`): the writer's data, mapped read-only, a control page, a socket as
doorbell and sign of life; it begins where the writer was when it joined. The writer shows the same data to every reader,
with a control page for each (`ipc/broadcast.h`), so nobody can disturb another reader, and what one writes is checked as any
peer's is.

Large messages lie in extents of the writer's pool, each with the set of readers that have it. The writer waits for the
slowest reader when the ring is full, or the pool of messages that somebody has not read yet; whom it waits for too long it
drops. When the pool is full of what readers have in hand, messages go through the ring in parts: so a reader that keeps memory
for long makes nobody wait. A dropped reader is told by a word in its control
page, at which it looks after it copied and before it hands out. Memory that the program of a dropped reader, or of one that
left, still has in hand is not used again before it comes back or that process dies.

Used by `patterns/shared.py`, `put` by one thread at a time; everything under the GIL, but for copies of large messages.
What can go wrong: a reader dies or stalls (dropped), breaks the rules (dropped, nobody else notices), no memory for the
pool (parts).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from anywire.contract.endpoint cimport BLOCKED, Loan, MessageEndpoint, fork_generation, hold
from anywire.contract.heap cimport keep_heap
from anywire.wires._ring cimport (AW_RECORD, AW_RETURNS, aw_commit, aw_consumer, aw_has_data, aw_next_return, aw_producer,
                                  aw_publish, aw_record, aw_room_was_wanted, aw_see_tail, aw_slot, aw_space)
from anywire.wires._shm cimport ShmEndpoint
from anywire.wires._shm_memory cimport Incoming, Outgoing

import os
import time
import weakref

from anywire.contract.errors import BadFrame, Forked, PeerLost, TooLarge, TooSlow, Unsupported

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLIN
    int c_poll "poll"(pollfd* fds, unsigned long n, int timeout)

cdef enum:
    INLINE = 0                     # kinds of records, as in _shm
    EXTENT = 1
    PART_FIRST = 6                 # a message in parts begins: u64 total, bytes
    PART = 7                       # ... goes on: bytes

MOST_READERS = 64
"""Readers of one broadcast: bits of a word."""
GONE = 0xFFFFFFFF
"""Why a reader was dropped, if not for stalling: then it is the writer's patience in milliseconds."""


@cython.no_gc                      # a collection would drop `owner` first, and the extent would never come back
cdef class PooledLoan(Loan):
    """A loan in a broadcast's pool: `put` shows it to all readers without copying."""

    def __dealloc__(self):
        cdef uint32_t i
        if self.owner is not None:
            i = self.owner.find(self.unit)
            if i < self.owner.count and self.owner.extents[i].loan == <void*> self:
                self.owner.extents[i].loan = NULL
                if self.owner.extents[i].at == 0:        # else it goes when the readers have given it back
                    self.owner.free(i)


cdef class Lent:
    """A message that the writer may read while it puts it, and that nobody changes meanwhile: a loan, or what lies in one."""

    def __len__(self):
        return self.n

    def __bytes__(self):
        return PyBytes_FromStringAndSize(self.p, self.n)


cdef bint is_alike(const char* p, Py_ssize_t n, bytes prefix) noexcept:
    """Whether these bytes could be taken for something of the prefix's kind."""
    return prefix is not None and n == len(prefix) and n >= 16 and memcmp(p, PyBytes_AS_STRING(prefix), 16) == 0


cdef class Seat(Outgoing):
    """What one reader sees: the broadcast's data, and a control page of its own."""

    def __cinit__(self, *args):
        self.bit = self.watch = -1

    def __init__(self, Broadcast owner):
        self.owner = owner
        self.share(owner.memory)

    def __dealloc__(self):
        if self.watch >= 0:
            os.close(self.watch)

    @property
    def greeting(self):
        """What the reader is told when it has joined."""
        return self.owner.greeting

    cdef bint lives(self) noexcept:
        """Whether its process may still look at memory that it has."""
        cdef pollfd p
        if self.watch < 0:
            return self.end is None or not self.end.gone
        p.fd = self.watch
        p.events = POLLIN
        return c_poll(&p, 1, 0) <= 0


cdef class Broadcast:
    """The writer's side."""

    def __init__(self, size_t ring_size, size_t pool_size, bytes greeting):
        """Memory for a ring and a pool of so many bytes. Raises OSError."""
        self.memory = Outgoing(ring_size, pool_size)
        self.memory.ring.head = self.memory.ring.tail_seen = ring_size      # not 0, which means "not joined"
        self.greeting = greeting
        self.generation = fork_generation()
        self.inline_limit = min(<Py_ssize_t> (ring_size // 8), 65536)
        self.readers = []
        self.lingering = []
        self.bad = []
        self.waiting = weakref.WeakSet()

    def close(self):
        """Nothing is written any more: so nobody's memory is written over."""
        cdef Seat seat
        self.over = True
        self.memory.close_descriptors()
        for seat in self.lingering:
            self.vacate(seat)
        self.lingering = []
        self.when_room = self.when_full = self.when_bad = None

    # -- who reads ------------------------------------------------------------------------------------------------------

    def admit(self):
        """A Seat for one more reader, None when all are taken."""
        self.collect()
        if self.over or len(self.readers) + len(self.lingering) + len(self.waiting) >= MOST_READERS:
            self.refused += 1
            return None
        seat = Seat(self)
        self.waiting.add(seat)
        return seat

    def has(self, endpoint):
        """Whether this connection is a reader's."""
        return isinstance(endpoint, SeatedEndpoint) and (<SeatedEndpoint> endpoint).seat is not None \
            and (<SeatedEndpoint> endpoint).seat.owner is self

    def join(self, SeatedEndpoint endpoint):
        """From now on it gets every message."""
        cdef Seat seat = endpoint.seat, other
        cdef uint64_t taken = 0
        self.waiting.discard(seat)
        for other in self.readers + self.lingering:
            taken |= <uint64_t> 1 << other.bit
        seat.bit = 0
        while taken >> seat.bit & 1:
            seat.bit += 1
        self.readers.append(seat)
        self.let_begin(seat)
        aw_publish(&seat.ring)
        aw_fence()
        if aw_was_asleep(&seat.ring):
            seat.end.ring_peer()

    cdef int let_begin(self, Seat seat) except -1:
        aw_let_begin(&seat.ring, self.memory.ring.head)
        return 0

    def remove(self, SeatedEndpoint endpoint, uint32_t why=GONE):
        """Wait for this reader no more. Safe to call twice."""
        cdef Seat seat = endpoint.seat
        if seat is None:
            return
        self.waiting.discard(seat)
        if seat in self.readers:
            self.readers.remove(seat)
            self.let_go(seat, why)
            if not self.readers:
                self.rest = None

    cdef int let_go(self, Seat seat, uint32_t why) except -1:
        cdef uint64_t bit = <uint64_t> 1 << seat.bit
        cdef uint32_t i
        cdef bint honest, held = False
        if not self.over:
            aw_drop(&seat.ring, why)
            aw_fence()
            if seat.end is not None:
                seat.end.ring_peer()
        honest = aw_see_tail(&seat.ring) == 0 and self.take_returns(seat)
        for i in range(self.memory.count):
            # What it has not read yet it will not hand out: see aw_still_kept.
            if self.memory.extents[i].readers & bit:
                if honest and self.memory.extents[i].at < seat.ring.tail_seen:
                    held = True
                else:
                    self.memory.extents[i].readers &= ~bit
        if held and seat.end is not None and seat.end.death >= 0:
            seat.watch = os.dup(seat.end.death)
        if held and seat.lives():
            self.lingering.append(seat)
        else:
            self.vacate(seat)
        self.free_extents()
        return 0

    cdef int vacate(self, Seat seat) except -1:
        """It has nothing any more."""
        cdef uint32_t i
        for i in range(self.memory.count):
            self.memory.extents[i].readers &= ~(<uint64_t> 1 << seat.bit)
        seat.bit = -1
        return 0

    cdef void free_extents(self) noexcept:
        cdef uint32_t i = self.memory.count
        while i:
            i -= 1
            if (self.memory.extents[i].readers == 0 and not self.memory.extents[i].flying
                    and (self.memory.extents[i].loan == NULL or self.is_over(i))):
                self.memory.free(i)

    cdef bint is_over(self, uint32_t i) noexcept:
        """Whether the loan of this extent was sent, and nobody can write to it any more."""
        cdef PooledLoan loan = <PooledLoan> self.memory.extents[i].loan
        if not loan.sent or loan.exports:
            return False
        loan.owner = None                        # kept by somebody, but it can't be opened again
        return True

    cdef bint take_returns(self, Seat seat) except -1:
        """Take back what a reader has returned. False: it returned what it does not have."""
        cdef uint64_t bit = <uint64_t> 1 << seat.bit
        cdef uint32_t unit, i
        cdef int r, count
        cdef bint honest = True
        for count in range(AW_RETURNS):          # no more can be on their way; a hostile reader may say so for ever
            r = aw_next_return(&seat.ring, &unit)
            if r == 0:
                break
            i = self.memory.find(unit) if r > 0 else self.memory.count
            if i == self.memory.count or not self.memory.extents[i].readers & bit:
                honest = False
            else:
                self.memory.extents[i].readers &= ~bit
        return honest

    cdef int collect(self) except -1:
        """Take back what all have returned."""
        cdef Seat seat
        cdef uint64_t held = 0
        cdef uint32_t i
        for seat in list(self.readers):
            if not self.take_returns(seat):
                self.expel(seat, "a subscriber returned memory that it does not have")
        for seat in self.lingering:
            self.take_returns(seat)              # also what was taken from it when it went
        if self.lingering:
            for i in range(self.memory.count):
                held |= self.memory.extents[i].readers
            for seat in list(self.lingering):
                if not held >> seat.bit & 1 or not seat.lives():
                    self.lingering.remove(seat)
                    self.vacate(seat)
        self.free_extents()
        return 0

    cdef int expel(self, Seat seat, str what) except -1:
        """A reader broke the rules: nothing that it says counts any more."""
        end = seat.end
        if seat in self.readers:
            self.readers.remove(seat)
            aw_drop(&seat.ring, GONE)
            aw_fence()
            self.vacate(seat)
            self.free_extents()
            self.complain(end, BadFrame(what, received=b""))
        return 0

    cdef int complain(self, object end, object error) except -1:
        if end is not None:
            error.address = str(end.address)
            error.operation = "publish"
            self.bad.append((end, error))
            if self.when_bad is not None:
                self.when_bad()
        return 0

    def take_bad(self):
        """(endpoint, error) of readers that broke the rules (removed already), or have met a message over their limit
        (TooLarge; they still read up to it)."""
        bad, self.bad = self.bad, []
        return bad

    def stalled(self, double patience, bint anew=False):
        """The endpoints of readers that the writer has waited for `patience` seconds without their reading anything, and the
        seconds until the next one may be one (None: it waits for nobody). `anew`: their time begins now."""
        cdef double now = time.monotonic(), left = -1
        cdef Seat seat
        out = []
        for seat in list(self.readers):
            if seat.since == 0:
                continue
            if aw_see_tail(&seat.ring) < 0:
                self.expel(seat, "a subscriber's cursor makes no sense")
            elif not self.gates(seat):
                seat.since = 0
            else:
                if anew or seat.ring.tail_seen != seat.waited_at:
                    seat.waited_at = seat.ring.tail_seen
                    seat.since = now
                if now - seat.since >= patience:
                    out.append(seat.end)
                elif left < 0 or seat.since + patience - now < left:
                    left = seat.since + patience - now
        return out, None if left < 0 else max(left, 0.001)

    cdef int rang(self) except -1:
        """On the loop's thread: a reader rang, or went."""
        if self.starved:
            self.starved = False
            if self.when_room is not None:
                self.when_room()
        return 0

    # -- writing --------------------------------------------------------------------------------------------------------

    cdef int look(self) except -1:
        """See how far everybody is."""
        cdef Seat seat
        cdef uint64_t head = self.memory.ring.head, behind = 0
        cdef list lost = None
        for seat in self.readers:
            if aw_see_tail(&seat.ring) < 0:
                lost = [seat] if lost is None else lost + [seat]
            elif head - seat.ring.tail_seen > behind:
                behind = head - seat.ring.tail_seen
        if lost is not None:
            for seat in lost:
                self.expel(seat, "a subscriber's cursor makes no sense")
        self.memory.ring.tail_seen = head - behind
        return 0

    cdef bint room(self, uint64_t need) noexcept:
        return self.memory.ring.head + need - self.memory.ring.tail_seen <= self.memory.ring.size

    cdef bint has_room(self, uint64_t need) except -1:
        """Whether everybody has room for `need` bytes. If not, those in whom there is none will ring when there is."""
        cdef aw_producer* ring = &self.memory.ring
        cdef Seat seat
        cdef double now
        if self.room(need):
            return True
        self.look()
        if self.room(need):
            return True
        for seat in self.readers:
            if ring.head + need - seat.ring.tail_seen > ring.size:
                aw_want_room(&seat.ring)
        aw_fence()
        self.look()
        if self.room(need):                      # flags that stay set cost one token without a cause
            return True
        self.need = need
        self.starve()
        return False

    cdef bint gates(self, Seat seat) noexcept:
        """Whether the writer waits for this reader."""
        cdef aw_producer* ring = &self.memory.ring
        return ring.head + self.need - seat.ring.tail_seen > ring.size or (self.wants_place and self.leaves_unread(seat))

    cdef bint leaves_unread(self, Seat seat) noexcept:
        """Whether something in the pool has not been read by this reader yet."""
        cdef uint64_t bit = <uint64_t> 1 << seat.bit
        cdef uint32_t i
        for i in range(self.memory.count):
            if self.memory.extents[i].readers & bit and self.memory.extents[i].at >= seat.ring.tail_seen:
                return True
        return False

    cdef int starve(self) except -1:
        """The writer waits: from now on for those who are in its way."""
        cdef Seat seat
        cdef double now = time.monotonic()
        self.starved = True
        for seat in self.readers:
            if self.gates(seat) and (seat.since == 0 or seat.waited_at != seat.ring.tail_seen):
                seat.since = now
                seat.waited_at = seat.ring.tail_seen
        if self.when_full is not None:
            self.when_full()
        return 0

    cdef Py_ssize_t place(self, size_t n) except -3:
        """A place in the pool for a message of `n` bytes: its unit, -1 there will be none soon, -2 wait."""
        cdef Py_ssize_t unit = -1
        cdef Seat seat, last = None
        if n > self.memory.pool_size // 4:
            return -1
        try:
            self.collect()
            unit = self.lend(n)
            if unit >= 0:
                return unit
            self.look()
            for seat in self.readers:
                if self.leaves_unread(seat) and (last is None or seat.ring.tail_seen < last.ring.tail_seen):
                    last = seat
            if last is None:
                return -1
            # The last one only: what the others give back before is of no use. It rings when it reads such a message, or
            # gives one back, and goes when it does neither for long.
            aw_want_room(&last.ring)
            aw_fence()
            self.look()
            self.collect()
            unit = self.lend(n)
        except MemoryError:
            return -1
        if unit >= 0:
            return unit
        self.need = 0
        self.wants_place = True
        self.starve()
        return -2

    cdef Py_ssize_t lend(self, size_t n) except -2:
        """As Outgoing.lend. It stays while it is `flying`: others may come for memory, join or go before it is shown."""
        cdef Py_ssize_t unit = self.memory.lend(n)
        cdef uint32_t i
        if unit >= 0:
            i = self.memory.find(<uint32_t> unit)
            self.memory.extents[i].flying = True
            self.memory.extents[i].readers = self.memory.extents[i].at = 0
        return unit

    def loan(self, Py_ssize_t nbytes):
        """Memory in the pool for one message; private memory when there is no place now (then `put` copies). Any thread."""
        cdef PooledLoan loan
        cdef Py_ssize_t unit = -1
        cdef uint32_t i
        self.need_own()
        if nbytes < 0:
            raise ValueError(f"a loan needs a size of at least 0 bytes, not {nbytes}")
        if not self.over:
            self.collect()
            unit = self.lend(nbytes)
        if unit < 0:
            return Loan(nbytes)
        loan = PooledLoan.__new__(PooledLoan, nbytes, False)
        loan.owner = self.memory
        loan.unit = <uint32_t> unit
        loan.memory = self.memory.pool + <size_t> unit * UNIT
        i = self.memory.find(loan.unit)
        self.memory.extents[i].flying = False
        self.memory.extents[i].loan = <void*> loan
        return loan

    def lent(self, message):
        """What to `put` for a loan, or for what lies in one; None for anything else, which must be copied first."""
        cdef Lent lent
        cdef const char* p
        cdef Py_ssize_t n
        keep = hold(message, &p, &n)
        if not isinstance(message, Loan) and self.of_loan(p, n) < 0:
            return None
        lent = Lent.__new__(Lent)
        lent.keep = keep
        lent.p = p
        lent.n = n
        return lent

    cdef Py_ssize_t of_loan(self, const char* p, Py_ssize_t n) noexcept:
        """The place of the extent that begins at `p`, if it is lent to the program and was not shown; else -1."""
        cdef Outgoing memory = self.memory
        cdef uint32_t i
        if not memory.pool <= p < memory.pool + memory.pool_size or (p - memory.pool) % UNIT:
            return -1
        i = memory.find(<uint32_t> ((p - memory.pool) // UNIT))
        if (i == memory.count or memory.extents[i].loan == NULL or memory.extents[i].flying or memory.extents[i].at
                or <size_t> n > <size_t> memory.extents[i].count * UNIT):
            return -1
        return i

    cdef int need_own(self) except -1:
        if self.generation != fork_generation():
            raise Forked("this publisher was opened by the parent process", operation="send",
                         advice="open a new one in the child")
        return 0

    cdef int show(self) except -1:
        """Everybody may read what was committed."""
        cdef Seat seat
        for seat in self.readers:
            seat.ring.head = self.memory.ring.head
            aw_publish(&seat.ring)
        aw_fence()
        for seat in self.readers:
            if aw_was_asleep(&seat.ring) and seat.end is not None:
                seat.end.ring_peer()
        return 0

    cdef void commit(self, uint32_t kind, const char* p, Py_ssize_t n) noexcept:
        memcpy(aw_slot(&self.memory.ring), p, n)
        aw_commit(&self.memory.ring, kind, <uint32_t> n)

    cdef int count(self, Py_ssize_t n) except -1:
        """A message of `n` bytes goes: count it. For whom is it too large?"""
        cdef Seat seat
        for seat in self.readers:
            seat.end.slot.messages_sent += 1
            seat.end.slot.bytes_sent += n
            if not seat.narrow and n > seat.end.peer_limit:
                seat.narrow = True
                self.complain(seat.end, TooLarge(n, seat.end.peer_limit))
        return 0

    def put(self, data, bytes prefix=None):
        """Show a message to all readers: False when there is no room now. `data` is bytes, or Lent.

        `prefix`: what goes right before a message of its length that begins with the same 16 bytes."""
        cdef const char* p
        cdef Py_ssize_t n, unit = -1
        cdef uint64_t need, first = 0
        cdef bint in_place = False
        self.need_own()
        if isinstance(data, Lent):
            p = (<Lent> data).p
            n = (<Lent> data).n
            in_place = self.of_loan(p, n) >= 0
        else:
            keep = hold(data, &p, &n)
        if not self.readers:
            return True
        if self.rest is not None and not self.pump():
            return False
        need = aw_space(n if n <= self.inline_limit and not in_place else 16)
        if is_alike(p, n, prefix):
            first = aw_space(n)
        self.wants_place = False
        if not self.has_room(need + first):
            return False
        if in_place:
            unit = (p - self.memory.pool) // UNIT
        elif n > self.inline_limit:
            unit = self.place(n)
            if unit == -2:
                return False
        self.count(n)
        if first:
            self.commit(INLINE, PyBytes_AS_STRING(prefix), n)
        if in_place:
            self.show_extent(n, <uint32_t> unit)
        elif n <= self.inline_limit:
            self.commit(INLINE, p, n)
            self.show()
        elif unit >= 0:
            self.put_extent(p, n, <uint32_t> unit)
        else:
            self.rest = data if isinstance(data, bytes) else bytes(data)
            self.rest_done = 0
            self.pump()
        return True

    def put_many(self, list messages, Py_ssize_t start, bytes prefix=None):
        """Put messages from this one on: the place of the first that found no room. Small ones are shown together, so
        that a reader that sleeps is woken once."""
        cdef Py_ssize_t i = start, n, count = len(messages)
        cdef const char* p
        cdef aw_producer* ring = &self.memory.ring
        cdef uint64_t shown = ring.head
        self.need_own()
        if not self.readers:
            return count
        try:
            while i < count:
                data = messages[i]
                n = len(data)
                if type(data) is not bytes or n > self.inline_limit or self.rest is not None:
                    p = NULL
                else:
                    p = PyBytes_AS_STRING(data)
                if p == NULL or is_alike(p, n, prefix) or not self.room(aw_space(n)):
                    if ring.head != shown:
                        self.show()              # before anybody is waited for
                    shown = ring.head
                    if not self.put(data, prefix):
                        break
                    shown = ring.head
                else:
                    self.count(n)
                    self.commit(INLINE, p, n)
                    if ring.head - shown > ring.size // 4:
                        self.show()              # they may begin
                        shown = ring.head
                i += 1
        finally:
            if ring.head != shown:
                self.show()
        return i

    cdef int put_extent(self, const char* p, size_t n, uint32_t unit) except -1:
        cdef char* to = self.memory.pool + <size_t> unit * UNIT
        if n >= NOGIL_COPY:
            with nogil:
                memcpy(to, p, n)
        else:
            memcpy(to, p, n)
        return self.show_extent(n, unit)

    cdef int show_extent(self, size_t n, uint32_t unit) except -1:
        """Show a message that lies in the pool."""
        cdef uint64_t readers = 0, words[2]
        cdef uint32_t i = self.memory.find(unit)
        cdef Seat seat
        for seat in self.readers:
            readers |= <uint64_t> 1 << seat.bit
        self.memory.extents[i].flying = False
        self.memory.extents[i].readers = readers
        self.memory.extents[i].at = self.memory.ring.head
        if readers == 0:
            self.free_extents()
            return 0
        words[0] = <uint64_t> unit * UNIT
        words[1] = n
        self.commit(EXTENT, <const char*> words, 16)
        return self.show()

    def pump(self):
        """Go on with a message that goes in parts. True: nothing is left of it."""
        cdef const char* p
        cdef Py_ssize_t n
        cdef uint64_t part, head
        if self.rest is None:
            return True
        keep = hold(self.rest, &p, &n)
        while self.rest is not None:
            head = 8 if self.rest_done == 0 else 0
            part = min(<uint64_t> n - self.rest_done, <uint64_t> self.inline_limit)
            if not self.has_room(aw_space(head + part)):
                return False
            if self.rest is None:
                break
            if head:
                memcpy(aw_slot(&self.memory.ring), &n, 8)
            memcpy(aw_slot(&self.memory.ring) + head, p + self.rest_done, part)
            aw_commit(&self.memory.ring, PART_FIRST if head else PART, <uint32_t> (head + part))
            self.rest_done += part
            if self.rest_done == <uint64_t> n:
                self.rest = None
            self.show()
        return True

    @property
    def lost(self):
        """Nobody loses anything."""
        return 0

    def behind(self):
        """How far readers are behind is not counted: the ring bounds it."""
        return 0, 0

    def memory_held(self):
        """Extents of the pool in use: for tests and tools."""
        self.collect()
        return self.memory.count


cdef class SeatedEndpoint(ShmEndpoint):
    """The writer's end of a reader's connection: it hears what the reader says, and goes when it goes."""

    def complete(self, Outgoing out, Incoming inc, int death, Py_ssize_t peer_limit, waiting, spin_us, bint alone):
        self.seat = <Seat?> out
        self.seat.end = self
        ShmEndpoint.complete(self, out, inc, death, peer_limit, waiting, spin_us, alone)

    cdef int rung(self) except -1:
        ShmEndpoint.rung(self)
        if self.seat is not None:
            self.seat.owner.rang()
        return 0

    cdef bint set_polled(self, bint polled) noexcept:
        return False                             # a reader says little

    # What it is sent goes through `Broadcast.put`.

    cdef int put_message(self, object data, bint block) except -1:
        return BLOCKED

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        self.put_status = BLOCKED
        return start

    cdef bint put_quick(self, bytes data) except -1:
        return False

    def make_loan(self, Py_ssize_t nbytes):
        return Loan(nbytes)

    def try_eof(self):
        raise Unsupported("a broadcast's readers end together", address=str(self.address), operation="send_eof")

    def finish_steps(self, timeout):
        """Generator: say that nothing is taken here any more."""
        self.end_sent = True
        yield from ShmEndpoint.finish_steps(self, timeout)

    def close_now(self):
        cdef Seat seat = self.seat
        if seat is not None:
            seat.owner.remove(self)
            seat.end = self.seat = None
        ShmEndpoint.close_now(self)


cdef class BroadcastReader(ShmEndpoint):
    """A reader's end: `recv` brings the greeting first, then every message from the one after it joined."""

    def begin(self, bytes greeting):
        """What the first `recv` brings, when the writer let this reader join."""
        self.greeting = greeting

    cdef bint set_polled(self, bint polled) noexcept:
        return False                             # it is told by the doorbell alone that it was dropped

    cdef int need_kept(self) except -1:
        """Raise if this reader was dropped: what was copied before this call may be torn."""
        cdef uint32_t why = aw_dropped(&self.inc.ring) if self.inc is not None else 0
        if why == 0:
            return 0
        self.drop_incoming(self.inc)
        if not self.broken:
            where = {"address": str(self.address), "operation": "recv"}
            self.fail(PeerLost("the publisher dropped this subscriber", **where) if why == GONE
                      else TooSlow(why / 1000, **where))
            self.gone = True
            self.shut()
        self.raise_failure()

    cdef int spoiled(self, object error) except -1:
        self.need_kept()
        return ShmEndpoint.spoiled(self, error)

    cdef int too_large(self, uint64_t n) except -1:
        self.need_kept()
        return ShmEndpoint.too_large(self, n)

    cdef bint nothing_here(self, Incoming inc, int r) except -1:
        self.need_kept()
        return ShmEndpoint.nothing_here(self, inc, r)

    cdef object wait_to_join(self):
        """The greeting, or None while the writer has not answered."""
        cdef Incoming inc = self.inc
        cdef uint64_t start
        cdef int r
        while True:
            if inc is None:
                self.need_open_here()
            r = aw_has_data(&inc.ring)           # `head` first: it is stored last
            start = aw_start(&inc.ring)
            if start:
                if start % AW_RECORD:
                    self.spoiled(self.nonsense("the publisher's cursor makes no sense"))
                aw_begin(&inc.ring, start)
                self.joined = True
                return self.greeting
            if r != 0:
                self.spoiled(self.nonsense("the publisher writes before this subscriber has joined"))
            if not self.nothing_here(inc, 0):
                return None

    cdef object take_message(self, bint block):
        cdef object message
        if self.broken:
            self.raise_failure()
        if not self.joined:
            return self.wait_to_join()
        message = ShmEndpoint.take_message(self, block)
        if message is not None:
            self.need_kept()
        return message

    cdef object take_quick(self):
        cdef object message
        if not self.joined or self.broken:
            return None
        message = ShmEndpoint.take_quick(self)
        if message is not None and aw_dropped(&self.inc.ring):
            return None                          # the usual way says why
        return message

    cdef list next_messages(self, object first, Py_ssize_t limit):
        cdef list out
        if not self.joined or self.broken:
            return [first]
        out = ShmEndpoint.next_messages(self, first, limit)
        if self.inc is not None and aw_dropped(&self.inc.ring):
            return [first]                       # which was looked at before
        return out

    cdef object take_view(self, bint block):
        cdef object view
        if self.broken:
            self.raise_failure()
        if not self.joined:
            message = self.wait_to_join()
            return None if message is None else memoryview(message)
        view = ShmEndpoint.take_view(self, block)
        if view is not None and self.inc is not None and aw_still_kept(&self.inc.ring):
            view.release()
            self.need_kept()
        return view

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        return MessageEndpoint.take_message_into(self, p, size, block)

    cdef bint long_record(self, Incoming inc, aw_record* record, Py_ssize_t room=-1) except -1:
        cdef uint32_t kind = record.kind, length = record.length
        cdef bint whole
        if kind == PART_FIRST:
            self.drop_incoming(inc)
            if length <= 8:
                self.spoiled(self.nonsense("a message in parts begins with nothing"))
            memcpy(&self.total, record.data, 8)
            if self.total > <uint64_t> self.max_message:
                self.too_large(self.total)
            self.contiguous = False
            self.got = self.copied = 0
            self.body = None
            self.incoming = True
            self.take_part(record.data + 8, length - 8)
        elif kind == PART:
            if self.incoming:                    # else it began before this reader joined
                if self.contiguous:
                    self.spoiled(self.nonsense("a message goes on in parts that did not begin so"))
                self.take_part(record.data, length)
        else:
            whole = ShmEndpoint.long_record(self, inc, record, room)
            # The writer may wait until all that is in its pool was read, and the next recv may be hours away.
            if kind == EXTENT and aw_room_was_wanted(&inc.ring, 1):
                self.ring_peer()
            return whole
        self.consumed(inc, length)
        return self.incoming and self.got == self.total

    cdef int take_part(self, const char* p, uint64_t n) except -1:
        if n == 0 or n > self.total - self.got:
            self.spoiled(self.nonsense("a message in parts is longer than it said"))
        if self.body is None:
            keep_heap()
            self.body = PyBytes_FromStringAndSize(NULL, self.total)
        memcpy(PyBytes_AS_STRING(self.body) + self.got, p, n)
        self.got += n
        self.copied = self.got
        return 0

    cdef int drop_all(self) except -1:
        return ShmEndpoint.drop_all(self) if self.joined and not self.broken else 0
