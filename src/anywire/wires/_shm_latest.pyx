# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""A broadcast of mode latest: the writer waits for nobody, and who is behind loses the oldest messages.

The memory is that of `_shm_broadcast.pyx`; what differs is who gives way. The writer keeps the last `depth` messages, or
as many as its ring, its pool and `depth_bytes` hold, and writes over older ones whoever has not read them. A reader looks
after each copy whether that happened, goes on at the oldest message that is kept, and knows from the messages' numbers how
many it lost (`ipc/latest.h`).

Large messages that a reader copies, or has in hand, are pinned: the writer passes that memory over. The last quarter of the
pool can't be pinned. It is used when the rest is full of what readers keep, and read by copying. So a new message always
has a place, if it is not larger than a quarter of the pool, and a reader that keeps memory, is stopped, or lies, costs
the others at most a copy.

Used by `patterns/shared.py`, threads as for `_shm_broadcast.pyx`. What can go wrong: no memory for the pool (messages that
are too large for the ring are lost for all readers, which are told).
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from anywire.contract.endpoint cimport Loan, fork_generation, hold
from anywire.contract.heap cimport keep_heap
from anywire.wires._ring cimport (aw_advance, aw_consumer, aw_count_taken, aw_producer, aw_record, aw_release_records,
                                  aw_space)
from anywire.wires._shm cimport ShmEndpoint
from anywire.wires._shm_broadcast cimport (NOGIL_COPY, UNIT, Broadcast, BroadcastReader, Lent, Seat, aw_fence, aw_drop,
                                           aw_let_begin, aw_was_asleep, is_alike)
from anywire.wires._shm_memory cimport Incoming, Outgoing

import os

from anywire.contract.errors import BadFrame

cdef extern from "anywire/ipc/latest.h" nogil:
    enum:
        AW_NUMBER, AW_PINS
    void aw_put_words(char* to, const char* p, uint64_t n)
    void aw_get_words(char* to, const char* p, uint64_t n)
    void aw_let_begin_latest(aw_producer* p, uint64_t at, uint64_t number)
    void aw_raise_floor(aw_producer* p, uint64_t floor)
    void aw_commit_latest(aw_producer* p, uint32_t kind, uint64_t number, const char* data, uint64_t length)
    void aw_publish_latest(aw_producer* p, uint64_t oldest)
    void aw_tell_over(aw_producer* p, uint64_t nbytes)
    uint32_t aw_pins_used(aw_producer* p)
    uint32_t aw_pin_of(aw_producer* p, uint32_t pin)
    uint64_t aw_lost_by(aw_producer* p)
    uint64_t aw_tail_of(aw_producer* p)
    int aw_latest_look(aw_consumer* c)
    int aw_latest_peek(aw_consumer* c, aw_record* record, uint64_t* number)
    int aw_latest_valid(aw_consumer* c, uint64_t at)
    void aw_pin(aw_consumer* c, uint32_t pin, uint32_t unit)
    void aw_unpin(aw_consumer* c, uint32_t pin)
    uint64_t aw_first(aw_consumer* c)
    uint64_t aw_over(aw_consumer* c)
    void aw_tell_lost(aw_consumer* c, uint64_t count)

cdef enum:                         # kinds of records; all begin with the message's number
    NUMBERED = 8                   # the message
    PINNABLE = 9                   # u64 offset in the pool, u64 length: a message that lies there
    COPY_ONLY = 10                 # the same, where nothing can be pinned
    ALIKE = 16                     # besides one of these: it looks like what the publisher says itself, and is not

SAYINGS = 3
"""What a reader of mode latest is told when it connects: its first message, what it gets for lost ones (their number in the
last eight bytes), and what comes before a message that looks like one of these. All of one length."""


cdef struct Kept:
    uint64_t at                    # where its record begins
    uint64_t nbytes
    int64_t unit                   # of its extent, -1: none


cdef class LatestBroadcast(Broadcast):
    """The writer's side."""

    cdef readonly bint latest
    cdef size_t main               # bytes of the pool that may be pinned
    cdef uint64_t depth, depth_bytes
    cdef Kept* index               # of the messages from `floor` on, by their numbers
    cdef uint64_t capacity         # of it, a power of two
    cdef uint64_t floor            # numbers: of the first message that is not written over,
    cdef uint64_t oldest           # of the first that who is behind still gets,
    cdef uint64_t number           # and of the next one
    cdef uint64_t floor_at         # where that one begins
    cdef uint64_t shown            # `head` as the readers know it
    cdef uint64_t kept_bytes       # of the messages from `oldest` on
    cdef uint64_t lost_before      # by readers that went

    def __cinit__(self, *args):
        self.latest = True

    def __init__(self, size_t ring_size, size_t pool_size, bytes sayings, uint64_t depth, uint64_t depth_bytes):
        """As for Broadcast. `depth`, `depth_bytes`: messages, and bytes, that are kept for who is behind."""
        cdef uint64_t most = ring_size // 16
        Broadcast.__init__(self, ring_size, pool_size, sayings)
        self.main = pool_size // 4 * 3 // UNIT * UNIT
        self.depth = depth
        self.depth_bytes = depth_bytes
        self.capacity = 16
        while self.capacity < most and self.capacity < depth + depth // 4 + 64:
            self.capacity *= 2
        self.index = <Kept*> PyMem_RawMalloc(self.capacity * sizeof(Kept))
        if self.index == NULL:
            raise MemoryError("no memory for the index of a broadcast")
        self.shown = self.floor_at = self.memory.ring.head

    def __dealloc__(self):
        PyMem_RawFree(self.index)

    # -- who reads ------------------------------------------------------------------------------------------------------

    cdef int let_begin(self, Seat seat) except -1:
        seat.first = self.number
        aw_let_begin_latest(&seat.ring, self.memory.ring.head, self.number)
        aw_let_begin(&seat.ring, self.memory.ring.head)
        return 0

    cdef int let_go(self, Seat seat, uint32_t why) except -1:
        if not self.over:
            aw_drop(&seat.ring, why)
            aw_fence()
            if seat.end is not None:
                seat.end.ring_peer()
        self.lost_before += self.lost_by(seat)
        if seat.end is not None and seat.end.death >= 0:
            seat.watch = os.dup(seat.end.death)
        self.lingering.append(seat)              # until `collect` finds that it has nothing in hand
        return self.collect()

    cdef uint64_t lost_by(self, Seat seat) noexcept:
        return min(aw_lost_by(&seat.ring), self.number - seat.first)

    @property
    def lost(self):
        """Messages that readers were told to have lost, summed over them."""
        cdef Seat seat
        cdef uint64_t lost = self.lost_before
        for seat in self.readers:
            lost += self.lost_by(seat)
        return lost

    def behind(self):
        """(messages, bytes) that are kept and that some reader has not taken yet."""
        cdef Seat seat
        cdef uint64_t tail = self.memory.ring.head, at, number = self.number, nbytes = 0
        for seat in self.readers:
            at = aw_tail_of(&seat.ring)
            if not seat.narrow and at < tail:
                tail = at
        while number > self.oldest and self.index[number - 1 & self.capacity - 1].at >= tail:
            number -= 1
            nbytes += self.index[number & self.capacity - 1].nbytes
        return self.number - number, nbytes

    cdef int collect(self) except -1:
        """Free what nobody reads any more. What the records from `floor` on refer to is `flying`."""
        cdef Seat seat
        cdef Outgoing memory = self.memory
        cdef uint64_t held = 0
        cdef uint32_t i, pin, unit
        for i in range(memory.count):
            memory.extents[i].readers = 0
        aw_fence()                               # after `floor`, and `dropped`, were written: see aw_pin
        for seat in self.readers + self.lingering:
            for pin in range(aw_pins_used(&seat.ring)):
                unit = aw_pin_of(&seat.ring, pin)
                if unit and <size_t> unit * UNIT <= self.main:
                    i = memory.find(unit - 1)
                    if i < memory.count:
                        memory.extents[i].readers |= <uint64_t> 1 << seat.bit
        if self.lingering:
            for i in range(memory.count):
                held |= memory.extents[i].readers
            for seat in list(self.lingering):
                if not held >> seat.bit & 1 or not seat.lives():
                    self.lingering.remove(seat)
                    self.vacate(seat)
        self.free_extents()
        return 0

    # -- what is given up -----------------------------------------------------------------------------------------------

    cdef int raise_floor(self, uint64_t number) except -1:
        """Messages before this one may be written over from now on."""
        cdef Kept* kept
        cdef Seat seat
        cdef uint32_t i
        self.show()                              # so `head` is not before the floor
        while self.floor < number:
            kept = &self.index[self.floor & self.capacity - 1]
            if kept.unit >= 0:
                i = self.memory.find(<uint32_t> kept.unit)
                if i < self.memory.count:
                    self.memory.extents[i].flying = False
            if self.floor == self.oldest:
                self.pass_oldest()
            self.floor += 1
        self.floor_at = self.index[number & self.capacity - 1].at if number < self.number else self.memory.ring.head
        for seat in self.readers:
            aw_raise_floor(&seat.ring, self.floor_at)
        aw_fence()
        return 0

    cdef void pass_oldest(self) noexcept:
        self.kept_bytes -= self.index[self.oldest & self.capacity - 1].nbytes
        self.oldest += 1

    cdef int make_room(self, uint64_t need) except -1:
        """Give up as much as a record of `need` bytes takes, and then some: a reader that goes on at the oldest must have
        time to read it."""
        cdef aw_producer* ring = &self.memory.ring
        cdef uint64_t least = ring.head + need - ring.size, number
        if self.floor_at >= least and self.number - self.floor < self.capacity:
            return 0
        least += ring.size // 4
        number = self.floor
        if self.number - number == self.capacity:
            number += self.capacity // 4
        while number < self.number and self.index[number & self.capacity - 1].at < least:
            number += 1
        return self.raise_floor(number)

    cdef Py_ssize_t lend(self, size_t n) except -2:
        """As Broadcast.lend, in the part of the pool that may be pinned."""
        cdef size_t whole = self.memory.pool_size
        self.memory.pool_size = self.main
        try:
            return Broadcast.lend(self, n)
        finally:
            self.memory.pool_size = whole

    cdef Py_ssize_t place(self, size_t n) except -3:
        """A place in the pool for a message of `n` bytes: its unit, -1: there is none."""
        cdef Py_ssize_t unit
        if n > self.memory.pool_size - self.main:
            return -1
        try:
            if self.oldest > self.floor + self.depth // 4 + 8:       # nobody begins there, and memory is better used again
                self.raise_floor(self.oldest - self.depth // 4 - 8)
            self.collect()
            unit = self.lend(n)
            while unit < 0 and self.give_up(False):
                unit = self.lend(n)
            return unit if unit >= 0 else self.reserve(n)
        except MemoryError:
            return -1

    cdef bint give_up(self, bint reserved) except -1:
        """Give up the oldest message that lies in this part of the pool, and all before it. False: there is none."""
        cdef uint64_t number = self.floor
        cdef int64_t unit
        while number < self.number:
            unit = self.index[number & self.capacity - 1].unit
            number += 1
            if unit >= 0 and (<size_t> unit * UNIT >= self.main) == reserved:
                self.raise_floor(number)
                self.collect()
                return True
        return False

    cdef Py_ssize_t reserve(self, size_t n) except -2:
        """A place where nothing is pinned."""
        cdef Outgoing memory = self.memory
        cdef uint32_t need = <uint32_t> ((n + UNIT - 1) // UNIT), start, i
        while True:
            start = memory.fit(<uint32_t> (self.main // UNIT), need, &i)
            if (<size_t> start + need) * UNIT <= memory.pool_size and memory.count < 512:
                break
            if not self.give_up(True):
                return -1
        if (<size_t> start + need) * UNIT > memory.real:
            memory.make_real((<size_t> start + need) * UNIT)
        memmove(&memory.extents[i + 1], &memory.extents[i], (memory.count - i) * sizeof(memory.extents[0]))
        memory.extents[i].start = start
        memory.extents[i].count = need
        memory.extents[i].loan = NULL
        memory.extents[i].flying = True
        memory.extents[i].readers = memory.extents[i].at = 0
        memory.count += 1
        return start

    # -- writing --------------------------------------------------------------------------------------------------------

    def put(self, data, bytes prefix=None):
        """Show a message to all readers: always True. `data` is bytes, or Lent; `prefix` is as for Broadcast."""
        self.need_own()
        if self.readers:
            self.put_one(data, prefix)
            self.show()
        return True

    def put_many(self, list messages, Py_ssize_t start, bytes prefix=None):
        """Put messages from this one on; they are shown together, or a quarter of the ring at a time."""
        cdef aw_producer* ring = &self.memory.ring
        self.need_own()
        try:
            while self.readers and start < len(messages):
                self.put_one(messages[start], prefix)
                start += 1
                if ring.head - self.shown > ring.size // 4:
                    self.show()
        finally:
            self.show()
        return len(messages)

    cdef int put_one(self, object data, bytes prefix) except -1:
        cdef const char* p
        cdef Py_ssize_t n, unit = -1
        cdef uint64_t words[2]
        cdef uint32_t kind = NUMBERED, i
        cdef char* to
        cdef Kept* kept
        if isinstance(data, Lent):
            p = (<Lent> data).p
            n = (<Lent> data).n
            if self.of_loan(p, n) >= 0:
                unit = (p - self.memory.pool) // UNIT
        else:
            keep = hold(data, &p, &n)
        if unit < 0 and n > self.inline_limit:
            unit = self.place(n)
            if unit >= 0:
                to = self.memory.pool + <size_t> unit * UNIT
                if <size_t> unit * UNIT >= self.main:
                    kind = COPY_ONLY
                    with nogil:
                        aw_put_words(to, p, n)
                elif n >= NOGIL_COPY:
                    with nogil:
                        memcpy(to, p, n)
                else:
                    memcpy(to, p, n)
            elif aw_space(AW_NUMBER + n) > self.memory.ring.size // 2:
                self.make_room(0)
                kept = &self.index[self.number & self.capacity - 1]
                kept.at = self.memory.ring.head
                kept.nbytes = 0
                kept.unit = -1
                self.number += 1                 # a number without a record: all lose it, and are told with the next one
                return 0
        if unit >= 0 and kind == NUMBERED:
            kind = PINNABLE
        self.count(n)
        self.make_room(aw_space(AW_NUMBER + (n if unit < 0 else 16)))
        kept = &self.index[self.number & self.capacity - 1]
        kept.at = self.memory.ring.head
        kept.nbytes = n
        kept.unit = unit
        if unit >= 0:
            i = self.memory.find(<uint32_t> unit)
            self.memory.extents[i].flying = True
            self.memory.extents[i].at = kept.at
            words[0] = <uint64_t> unit * UNIT
            words[1] = n
        aw_commit_latest(&self.memory.ring, kind | ALIKE if is_alike(p, n, prefix) else kind, self.number,
                         <const char*> words if unit >= 0 else p, AW_NUMBER + (16 if unit >= 0 else n))
        self.number += 1
        self.kept_bytes += n
        if prefix is None:
            return 0                             # the publisher's own word, its end: it displaces none of the last messages
        while self.number - self.oldest > 1 and (self.number - self.oldest > self.depth
                                                 or self.kept_bytes > self.depth_bytes):
            self.pass_oldest()
        return 0

    cdef int count(self, Py_ssize_t n) except -1:
        cdef Seat seat
        cdef list narrow = [seat for seat in self.readers if not seat.narrow and n > seat.end.peer_limit]
        if narrow:
            self.show()                          # all before it
        Broadcast.count(self, n)
        for seat in narrow:
            aw_tell_over(&seat.ring, n)
            seat.end.ring_peer()
        return 0

    cdef int show(self) except -1:
        cdef Seat seat
        cdef uint64_t head = self.memory.ring.head, oldest
        if head == self.shown:
            return 0
        oldest = self.index[self.oldest & self.capacity - 1].at if self.oldest < self.number else head
        for seat in self.readers:
            if not seat.narrow:
                seat.ring.head = head
                aw_publish_latest(&seat.ring, oldest)
        self.shown = head
        aw_fence()
        for seat in self.readers:
            if aw_was_asleep(&seat.ring) and seat.end is not None:
                seat.end.ring_peer()
        return 0

    def pump(self):
        """Nothing is ever left over."""
        return True

    def stalled(self, double patience, bint anew=False):
        """Nobody: the writer waits for nobody."""
        return [], None


cdef class LatestIncoming(Incoming):
    """The writer's memory as a reader maps it."""

    cdef uint32_t pins[256]        # AW_PINS: units, plus 1

    cdef int pin(self, uint32_t unit) noexcept:
        """Pin an extent: the pin's number, -1 when all are used."""
        cdef uint32_t i
        for i in range(AW_PINS):
            if self.pins[i] == 0:
                self.pins[i] = unit + 1
                aw_pin(&self.ring, i, unit)
                return i
        return -1

    cdef void give_back(self, uint32_t unit) noexcept:
        cdef uint32_t i
        if self.generation != fork_generation():
            return
        for i in range(AW_PINS):
            if self.pins[i] == unit + 1:
                self.pins[i] = 0
                aw_unpin(&self.ring, i)
                return


cdef class LatestReader(BroadcastReader):
    """A reader's end. Where messages were lost `recv` brings what the writer said for that, and then the next message."""

    cdef bytes told_of_losses, told_of_alikes
    cdef uint64_t number           # of the next message
    cdef list told                 # what comes before the next message
    cdef object held               # the next message, if it was copied already

    def begin(self, bytes greeting):
        """What is told: see SAYINGS."""
        cdef Py_ssize_t n = len(greeting) // SAYINGS
        BroadcastReader.begin(self, greeting[:n])
        self.told_of_losses = greeting[n:n + n]
        self.told_of_alikes = greeting[n + n:]
        self.told = []

    cdef object wait_to_join(self):
        greeting = BroadcastReader.wait_to_join(self)
        if self.joined:
            self.number = aw_first(&self.inc.ring)
        return greeting

    cdef int next_record(self, Incoming inc) except -2:
        """0: nothing is here, 1: `told`, `held` or `incoming` have something, -1: others get a turn first."""
        cdef aw_consumer* c = &inc.ring
        cdef aw_record record
        cdef uint64_t number, at, lost
        cdef int r
        while True:
            r = aw_latest_look(c)
            at = c.tail
            if r == 0:
                aw_release_records(c)
                lost = aw_over(c)
                if lost:
                    self.too_large(lost)
                return 0
            if r < 0:
                self.need_kept()
                lost = aw_over(c)
                if lost:
                    self.too_large(lost)
                self.spoiled(self.nonsense("the publisher's cursors make no sense"))
            if aw_latest_peek(c, &record, &number) > 0:
                r = self.take_record(inc, &record, at)
                if r > 0:
                    break
                if r < 0:
                    self.spoiled(self.nonsense(f"a record of kind {record.kind} with {record.length} bytes"))
            elif aw_latest_valid(c, at):
                self.spoiled(self.nonsense("the publisher's ring makes no sense"))
            self.need_kept()
            if self.enough():                    # written over while it was looked at, again and again
                return -1
        if number < self.number:
            self.drop_incoming(inc)
            self.spoiled(self.nonsense("the publisher's messages go backwards"))
        lost = number - self.number
        self.number = number + 1
        aw_advance(c, record.length)
        aw_release_records(c)
        if lost:
            aw_tell_lost(c, lost)
            self.slot.drops += lost
            self.told.append(self.told_of_losses[:-8] + int(lost).to_bytes(8, "little"))
        if record.kind & ALIKE:
            self.told.append(self.told_of_alikes)
        return 1

    cdef int take_record(self, Incoming inc, aw_record* record, uint64_t at) except -2:
        """1: the message is in `held`, or is `incoming`; 0: it was written over meanwhile; -1: it makes no sense."""
        cdef aw_consumer* c = &inc.ring
        cdef uint64_t words[2]
        cdef uint64_t n = record.length - AW_NUMBER
        cdef uint32_t kind = record.kind & ~<uint32_t> ALIKE
        cdef bint pinned = False
        cdef object body
        if kind == NUMBERED:
            if n > <uint64_t> self.max_message:
                if aw_latest_valid(c, at):
                    self.too_large(n)
                return 0
            body = PyBytes_FromStringAndSize(NULL, n)
            aw_get_words(PyBytes_AS_STRING(body), record.data, n)
            if not aw_latest_valid(c, at):
                return 0
            self.held = body
            return 1
        if (kind != PINNABLE and kind != COPY_ONLY) or n != 16:
            return -1 if aw_latest_valid(c, at) else 0
        aw_get_words(<char*> words, record.data, 16)
        if not aw_latest_valid(c, at):
            return 0
        n = words[1]
        if n > <uint64_t> self.max_message:
            self.too_large(n)
        try:
            inc.need_extent(words[0], n)
        except BadFrame as error:
            self.spoiled(error)
        if kind == PINNABLE:
            pinned = (<LatestIncoming> inc).pin(<uint32_t> (words[0] // UNIT)) >= 0
            if pinned and not aw_latest_valid(c, at):
                inc.give_back(<uint32_t> (words[0] // UNIT))
                return 0
        if pinned:
            self.body = None
            self.copied = 0
            self.base = words[0]
        else:                                    # all pins are used, or there is no pinning: copy, and then look
            keep_heap()
            body = PyBytes_FromStringAndSize(NULL, n)
            aw_get_words(PyBytes_AS_STRING(body), inc.pool + words[0], n)
            if not aw_latest_valid(c, at):
                return 0
            self.body = body
            self.copied = n
        self.contiguous = pinned
        self.total = self.got = n
        self.incoming = True
        return 1

    cdef object told_first(self):
        """What comes before the next message, or None."""
        return self.told.pop(0) if self.told else None

    cdef object held_now(self, Incoming inc):
        """The next message, if it was copied already, or None."""
        cdef object message = self.held
        if message is not None:
            self.held = None
            self.handed_over(inc, len(message))
        return message

    cdef object take_message(self, bint block):
        cdef Incoming inc = self.inc
        cdef object message
        cdef int r
        if self.broken and not self.told and self.held is None:
            self.raise_failure()
        if not self.joined:
            return self.wait_to_join()
        while True:
            if inc is None:
                self.need_open_here()
            message = self.told_first()
            if message is None:
                message = self.held_now(inc)
            if message is not None:
                return message
            if self.incoming:
                return self.finished_copy(inc)
            r = self.next_record(inc)
            if r < 0 or (r == 0 and not self.nothing_here(inc, 0)):
                return None

    cdef object take_quick(self):
        cdef Incoming inc = self.inc
        if (inc is None or not self.joined or self.broken or self.closed or self.incoming or self.returned is not None
                or self.told or self.held is not None or self.generation != fork_generation()):
            return None
        if self.next_record(inc) <= 0 or self.told or self.incoming:
            return None
        return self.held_now(inc)

    cdef list next_messages(self, object first, Py_ssize_t limit):
        """As the base's: one look at the writer's cursors, and one at the floor, for several messages."""
        cdef Incoming inc = self.inc
        cdef aw_consumer* c
        cdef aw_record record
        cdef list out = [first], chunk
        cdef uint64_t number, start
        cdef Py_ssize_t n, nbytes = 0, taken = 0
        while self.returned is not None and len(out) < limit:
            out.append(self.next_message(False))
        if inc is None or not self.joined or self.broken or self.incoming or self.told or self.held is not None:
            return out
        c = &inc.ring
        while len(out) < limit and aw_latest_look(c) > 0:
            start = c.tail
            chunk = []
            n = 0
            while (c.tail != c.head_seen and len(out) + len(chunk) < limit and c.tail - start <= c.size // 16
                    and aw_latest_peek(c, &record, &number) > 0 and record.kind == NUMBERED
                    and number == self.number + <uint64_t> len(chunk)
                    and <Py_ssize_t> record.length - AW_NUMBER <= self.max_message):
                message = PyBytes_FromStringAndSize(NULL, record.length - AW_NUMBER)
                aw_get_words(PyBytes_AS_STRING(message), record.data, record.length - AW_NUMBER)
                chunk.append(message)
                n += record.length - AW_NUMBER
                aw_advance(c, record.length)
            if chunk and not aw_latest_valid(c, start):
                c.tail = start
                chunk = []
            if not chunk:
                break                            # something else is there, or it was written over: the next receive sees
            self.number += len(chunk)
            taken += len(chunk)
            nbytes += n
            out += chunk
        aw_release_records(c)
        if taken:
            aw_count_taken(c, taken)
            self.slot.messages_received += taken
            self.slot.bytes_received += nbytes
            self.turns += 1 + taken // 64
        return out

    cdef object take_view(self, bint block):
        cdef Incoming inc = self.inc
        cdef object message
        cdef int r
        if self.broken and not self.told and self.held is None:
            self.raise_failure()
        if not self.joined:
            message = self.wait_to_join()
            return None if message is None else memoryview(message)
        while True:
            if inc is None:
                self.need_open_here()
            message = self.told_first()
            if message is None:
                message = self.held_now(inc)
            if message is not None:
                return memoryview(message)
            if self.incoming:
                return ShmEndpoint.take_view(self, block)
            r = self.next_record(inc)
            if r < 0 or (r == 0 and not self.nothing_here(inc, 0)):
                return None

    cdef int drop_all(self) except -1:
        if self.inc is not None:
            self.drop_incoming(self.inc)
        self.held = self.returned = None
        self.told = []
        return 0
