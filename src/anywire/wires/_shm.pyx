# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Messages through shared memory: one ring each way, a pool for large messages, a socket as doorbell and sign of life.

`shm.py` makes the memory known to both sides; this module creates and maps it, and moves messages. The ring itself is
`ipc/ring.h`. Small messages lie in the ring; larger ones in *extents* of the sender's pool, which the ring refers to and
the receiver gives back. Messages longer than a piece are shown piece by piece, so that both sides copy at the same time.

Each side writes its own data only: the other maps it read-only, and the control page holds nothing that could lead either
astray, because every value from there is loaded once and checked. A peer that breaks the rules gets `BadFrame`.

The doorbell is one byte on the Unix socket by which the two met, sent only to a side that said it sleeps. A socket, and not
an eventfd(2): the blocking mode of an eventfd belongs to both who hold it, so a hostile peer could make our write wait for
ever; the socket must be watched anyway, for its end; and so an endpoint is one descriptor in the event loop (the peer's
pidfd beside it, for a socket that a forked child of the peer keeps open).

Called by the fronts, on the loop's thread, or on the blocking front by one receiving and one sending thread at a time.
Waiting releases the GIL, copies of large pieces too; everything else happens under it.

What can go wrong: the peer dies (what it published is handed out, then `PeerLost`), memory runs out (`MemoryError` from
`loan`, a send waits), the peer writes nonsense (`BadFrame`).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memmove
from anywire.contract cimport counters
from anywire.contract.endpoint cimport (BLOCKED, DONE, PARTIAL, READ, WRITE, Loan, MessageEndpoint, fork_generation, hold)
from anywire.contract.heap cimport keep_heap

import fcntl
import gc
import os
import time

from anywire.contract.errors import BadFrame, ChannelClosed, EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.contract.waits import Wait

cdef extern from *:
    """
    #include "anywire/ipc/ring.h"
    #include <time.h>
    #if defined(__x86_64__) || defined(__i386__)
    #define aw_relax() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define aw_relax() __asm__ __volatile__("isb")
    #else
    #define aw_relax() ((void) 0)
    #endif
    static inline uint64_t aw_load(const _Atomic uint64_t *p) { return atomic_load_explicit(p, memory_order_relaxed); }
    static inline uint64_t aw_taken(aw_control *c) { return aw_load(&c->taken); }
    static inline uint64_t aw_echo(aw_control *c) { return aw_load(&c->echo); }
    static inline void aw_set_echo(aw_control *c, uint64_t v) {
        atomic_store_explicit(&c->echo, v, memory_order_release);
    }
    static inline int aw_closed(aw_control *c) { return atomic_load_explicit(&c->closed, memory_order_acquire) != 0; }
    static inline void aw_set_closed(aw_control *c) { atomic_store_explicit(&c->closed, 1, memory_order_release); }
    static inline int aw_data_wanted(aw_control *c) {
        return atomic_load_explicit(&c->data_wanted, memory_order_relaxed) != 0;
    }
    static inline int aw_room_wanted(aw_control *c) {
        return atomic_load_explicit(&c->room_wanted, memory_order_relaxed) != 0;
    }
    /* What a sender waits for: room for a record of `need` bytes, or, for AW_AN_EXTENT, that some extent comes back. */
    #define AW_AN_EXTENT UINT64_MAX
    static inline int aw_can_send(aw_producer *p, uint64_t need) {
        return need == AW_AN_EXTENT ? aw_load(&p->control->returned) != p->returned_seen : aw_has_room(p, need) != 0;
    }
    static inline int aw_ready(aw_consumer *c, aw_producer *p, uint64_t need) {
        return c != NULL ? aw_has_data(c) != 0 : aw_can_send(p, need);
    }
    /* As aw_sleep_for_room, for either. */
    static inline int aw_sleep_to_send(aw_producer *p, uint64_t need) {
        return aw_sleep_for_room(p, need == AW_AN_EXTENT ? p->size : need) < 0 || aw_can_send(p, need);
    }
    static inline uint64_t aw_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
    }
    /* A clock that costs a few nanoseconds and moves once a millisecond or so. */
    static inline uint64_t aw_tick(void) {
    #if defined(__x86_64__) || defined(__i386__)
        return __builtin_ia32_rdtsc() >> 21;
    #else
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
        return (uint64_t) t.tv_sec * 1000000000u + (uint64_t) t.tv_nsec;
    #endif
    }
    /* Look for data, or for room, `ns` nanoseconds long: 1 there is some (or nonsense: the caller finds out), 0 time is up. */
    static int aw_spin(aw_consumer *c, aw_producer *p, uint64_t need, uint64_t ns) {
        uint64_t end = aw_now() + ns;
        for (;;) {
            for (int i = 0; i < 32; i++) {
                if (aw_ready(c, p, need))
                    return 1;
                aw_relax();
            }
            if (aw_now() >= end)
                return 0;
        }
    }
    /* The same without a clock, for about a microsecond. */
    static int aw_glance(aw_consumer *c, aw_producer *p, uint64_t need) {
        for (int i = 0; i < 40; i++) {
            if (aw_ready(c, p, need))
                return 1;
            aw_relax();
        }
        return 0;
    }
    """
    uint64_t aw_taken(aw_control* c) nogil
    uint64_t aw_echo(aw_control* c) nogil
    void aw_set_echo(aw_control* c, uint64_t v) nogil
    int aw_closed(aw_control* c) nogil
    void aw_set_closed(aw_control* c) nogil
    int aw_data_wanted(aw_control* c) nogil
    int aw_room_wanted(aw_control* c) nogil
    uint64_t AW_AN_EXTENT
    int aw_can_send(aw_producer* p, uint64_t need) nogil
    int aw_sleep_to_send(aw_producer* p, uint64_t need) nogil
    uint64_t aw_now() nogil
    uint64_t aw_tick() nogil
    int aw_spin(aw_consumer* c, aw_producer* p, uint64_t need, uint64_t ns) nogil
    int aw_glance(aw_consumer* c, aw_producer* p, uint64_t need) nogil

cdef extern from "<sys/mman.h>" nogil:
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_SHARED, MAP_FIXED, MAP_NORESERVE, MAP_POPULATE
    void* MAP_FAILED
    void* mmap(void* address, size_t n, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t n)
    int madvise(void* address, size_t n, int advice)

cdef extern from *:
    """
    #ifndef MADV_POPULATE_READ                   /* Linux 5.14; missing in older headers */
    #define MADV_POPULATE_READ 22
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    int MADV_POPULATE_READ, MADV_POPULATE_WRITE

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK
    ssize_t c_send "send"(int fd, const void* p, size_t n, int flags)
    ssize_t c_recv "recv"(int fd, void* p, size_t n, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int SHUT_RDWR

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
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

F_SEAL_FUTURE_WRITE = 0x10                       # fcntl(2), Linux 5.1; not in every version of the standard library
DATA_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
CONTROL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

VERSION = AW_RING_VERSION
"""Version of the memory's layout: both sides must have the same."""

cdef enum:
    UNIT = 4096                    # bytes: extents begin and end at multiples of it
    CONTROL_BYTES = 4096
    PIECE = 262144                 # bytes of a long message that are copied, and shown, at a time
    NOGIL_COPY = 65536             # bytes from which on a copy releases the GIL
    POPULATE = 1 << 20             # bytes of the pool that are made real at a time
    TURN = 1 << 21                 # bytes at the front of the pool that are lent in turn: see Outgoing.lend
    WARM = 3 << 20                 # bytes under way from which on a sender first looks for some to return: see keep_warm
    IN_VAIN = 1024                 # long messages at most that go without such a look after looks in vain
    MOST_PIECES = 4096             # records without a message that a receive takes in one turn
    FLURRY = 8                     # messages that count as one turn of a front (64 turns, then others get one)

cdef enum:                         # kinds of records
    INLINE = 0                     # a message
    EXTENT = 1                     # a message in the pool: u64 offset, u64 length
    FIRST = 2                      # a long message begins: u64 offset, u64 length, u64 total, u64 contiguous
    NEXT = 3                       # ... goes on: u64 offset, u64 length
    ABANDONED = 4                  # ... does not go on: the sender gave up
    END = 5                        # no more messages

cdef enum:                         # `waiting`
    SLEEP, ADAPTIVE, SPIN

cdef uint64_t COPIED = 8           # bytes that one CPU copies in a nanosecond, about
cdef uint64_t COPIED_FAR = 2       # ... and at least, where two CPUs share no cache
cdef uint64_t LONGEST_SPIN = 60000 # nanoseconds; sleeping and waking costs about 45 microseconds
WAITING = {"sleep": SLEEP, "adaptive": ADAPTIVE, "spin": SPIN}


cdef class Region:
    """Mapped memory, unmapped when nobody refers to it any more."""

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)


cdef Region map_control(int fd):
    cdef Region region = Region.__new__(Region)
    cdef void* p = mmap(NULL, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0)
    if p == MAP_FAILED:
        PyErr_SetFromErrno(OSError)
    region.base = <char*> p
    region.length = CONTROL_BYTES
    return region


cdef Region map_data(int fd, size_t ring, size_t pool, int protection):
    """The ring twice, one behind the other, and then the pool."""
    cdef Region region = Region.__new__(Region)
    cdef size_t length = 2 * ring + pool
    cdef char* p = <char*> mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if p == <char*> MAP_FAILED:
        PyErr_SetFromErrno(OSError)
    region.base = p
    region.length = length
    if (mmap(p, ring, protection, MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, 0) == MAP_FAILED
            or mmap(p + ring, ring + pool, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED
            or madvise(p + ring, ring, MADV_POPULATE_READ) != 0):
        PyErr_SetFromErrno(OSError)
    return region


cdef class Outgoing:
    """What this side sends through: its data and control memory. Created here, sealed, then shown to the peer."""

    def __cinit__(self):
        self.data_fd = self.control_fd = self.bell = -1

    def __init__(self, size_t ring_size, size_t pool_size):
        """Create memory for a ring and a pool of so many bytes. Raises OSError when there is none."""
        self.ring_size = ring_size
        self.pool_size = pool_size
        self.data_fd = os.memfd_create("anywire-shm-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.data_fd, ring_size + pool_size)
        os.posix_fallocate(self.data_fd, 0, ring_size)      # no memory shows here, not as SIGBUS at the first touch
        self.data_region = map_data(self.data_fd, ring_size, pool_size, PROT_READ | PROT_WRITE)
        fcntl.fcntl(self.data_fd, fcntl.F_ADD_SEALS, DATA_SEALS)
        self.make_control()

    cdef int make_control(self) except -1:
        """A control page for the data that is there."""
        cdef aw_control* control
        self.nonce = int.from_bytes(os.urandom(8), "little")
        self.control_fd = os.memfd_create("anywire-shm-control", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.control_fd, CONTROL_BYTES)
        os.posix_fallocate(self.control_fd, 0, CONTROL_BYTES)
        self.control_region = map_control(self.control_fd)
        fcntl.fcntl(self.control_fd, fcntl.F_ADD_SEALS, CONTROL_SEALS)
        control = <aw_control*> self.control_region.base
        control.magic = AW_RING_MAGIC
        control.version = AW_RING_VERSION
        control.nonce = self.nonce
        self.ring.data = self.data_region.base
        self.ring.control = control
        self.ring.size = self.ring_size
        self.pool = self.data_region.base + 2 * self.ring_size
        return 0

    cdef int share(self, Outgoing other) except -1:
        """Show another peer the data of `other`: the same memory, a control page of its own."""
        self.ring_size = other.ring_size
        self.pool_size = other.pool_size
        self.data_fd = os.dup(other.data_fd)
        self.data_region = other.data_region
        return self.make_control()

    def __dealloc__(self):
        self.close_descriptors()

    cpdef close_descriptors(self):
        """The peer has them: the memory lives as long as a mapping does."""
        if self.data_fd >= 0:
            os.close(self.data_fd)
            self.data_fd = -1
        if self.control_fd >= 0:
            os.close(self.control_fd)
            self.control_fd = -1

    def proven(self):
        """Whether the peer has mapped this memory: it wrote our nonce back through it."""
        return aw_echo(self.ring.control) == <uint64_t> self.nonce

    cdef int collect(self) except -1:
        """Take back what the receiver has returned. -1 with BadFrame when it returned what it does not have."""
        cdef uint32_t unit, i
        cdef int r
        cdef ShmLoan loan
        while True:
            r = aw_next_return(&self.ring, &unit)
            if r == 0:
                return 0
            i = self.find(unit) if r > 0 else self.count
            if i == self.count or not self.extents[i].flying:
                raise BadFrame("the peer returned memory that it does not have", received=b"")
            self.extents[i].flying = False
            if self.extents[i].loan != NULL:
                loan = <ShmLoan> self.extents[i].loan
                if not loan.sent or loan.exports:
                    continue                     # it goes with the loan
                loan.owner = None                # kept by somebody, but it can't be opened again
            self.free(i)

    cdef uint32_t find(self, uint32_t unit) noexcept:
        cdef uint32_t i
        for i in range(self.count):
            if self.extents[i].start == unit:
                return i
        return self.count

    cdef void free(self, uint32_t i) noexcept:
        self.count -= 1
        self.frees += 1
        self.lent -= <size_t> self.extents[i].count * UNIT
        memmove(&self.extents[i], &self.extents[i + 1], (self.count - i) * sizeof(Extent))

    cdef int wake_sender(self) except -1:
        """A place in the pool became free on this side: the peer rings for nobody then."""
        cdef uint64_t one = 1
        if self.bell >= 0:
            # As if the peer had rung: the receiving thread, if it takes the token, sees by the flag whose it was.
            aw_awake_with_room(&self.ring)
            c_write(self.bell, &one, sizeof(one))
        if self.waker is not None:
            waker, self.waker = self.waker, None
            waker()
        return 0

    cdef Py_ssize_t lend(self, size_t nbytes) except -2:
        """An extent for so many bytes: its unit, or -1 when there is no place now. It belongs to nobody yet.

        In turn within the first TURN bytes, else first fit. What the receiver has just read is the slowest memory to
        write: each line must first be taken out of its cache. After TURN bytes, the second-level caches of two CPUs, it
        has left by itself; beyond that the lines have left ours too. benchmarks/native/shm_ring.c with areas from 128 KiB
        to 32 MiB shows it: 64 KiB messages go twice as fast in turn through 2 MiB as through the same place each time.
        """
        cdef uint32_t need = <uint32_t> ((nbytes + UNIT - 1) // UNIT), start, i
        cdef size_t end
        if self.count == MOST_EXTENTS or nbytes > self.pool_size:
            return -1
        if need == 0:
            need = 1
        start = self.fit(self.turn, need, &i)
        end = (<size_t> start + need) * UNIT
        if self.turn and end > min(<size_t> TURN, self.pool_size):
            start = self.fit(0, need, &i)
            end = (<size_t> start + need) * UNIT
        if end > self.pool_size:
            return -1
        self.turn = start + need if end < <size_t> TURN else 0
        if end > self.real:
            self.make_real(end)
        memmove(&self.extents[i + 1], &self.extents[i], (self.count - i) * sizeof(Extent))
        self.lent += <size_t> need * UNIT
        self.extents[i].start = start
        self.extents[i].count = need
        self.extents[i].loan = NULL
        self.extents[i].flying = False
        self.count += 1
        return start

    cdef uint32_t fit(self, uint32_t start, uint32_t need, uint32_t* place) noexcept:
        """The first unit from `start` on with `need` free ones behind it, and the place of an extent there."""
        cdef uint32_t i = 0
        while i < self.count and (self.extents[i].start < start or self.extents[i].start - start < need):
            start = max(start, self.extents[i].start + self.extents[i].count)
            i += 1
        place[0] = i
        return start

    cdef int make_real(self, size_t end) except -1:
        """Memory for the pool up to `end`. It stays: what is lent beyond the first turn lies as far in front as it can."""
        end = min((end + POPULATE - 1) // POPULATE * POPULATE, self.pool_size)
        if madvise(self.pool + self.real, end - self.real, MADV_POPULATE_WRITE) != 0:
            raise MemoryError(f"the system has no memory for {end - self.real} more bytes of the pool: {os.strerror(errno)}")
        self.real = end
        return 0


cdef class Incoming:
    """What the peer sends through, mapped here: its data read-only, its control page to answer in."""

    def __cinit__(self):
        self.sock = -1
        self.generation = fork_generation()

    def __init__(self, int data_fd, int control_fd, size_t ring_size, size_t pool_size, nonce):
        """Map a peer's memory after checking its seals and size. Raises BadFrame, OSError."""
        cdef aw_control* control
        for fd, seals, size, what in ((data_fd, DATA_SEALS, ring_size + pool_size, "data"),
                                      (control_fd, CONTROL_SEALS, CONTROL_BYTES, "control")):
            try:
                have = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            except OSError as error:
                raise BadFrame(f"the peer's {what} memory is no memfd: {error.strerror}", received=b"") from None
            if have & seals != seals:
                raise BadFrame(f"the peer's {what} memory has seals {have:#x} and needs {seals:#x}", received=b"")
            stat = os.fstat(fd)
            if stat.st_size != size:
                raise BadFrame(f"the peer's {what} memory has {stat.st_size} bytes and announced {size}", received=b"")
        self.data_region = map_data(data_fd, ring_size, pool_size, PROT_READ)
        self.control_region = map_control(control_fd)
        control = <aw_control*> self.control_region.base
        if control.magic != AW_RING_MAGIC or control.version != AW_RING_VERSION or control.nonce != <uint64_t> nonce:
            raise BadFrame("the peer's memory is not what it announced", received=b"")
        aw_set_echo(control, <uint64_t> nonce)
        self.ring.data = self.data_region.base
        self.ring.control = control
        self.ring.size = ring_size
        self.pool_size = pool_size
        self.pool = self.data_region.base + 2 * ring_size

    cdef int need_extent(self, uint64_t offset, uint64_t length) except -1:
        """The peer says that a message lies there: check it, and that the memory is there (a hole would mean SIGBUS)."""
        cdef size_t begin, end, step
        if offset % UNIT or offset >= self.pool_size or length > self.pool_size - offset:
            raise BadFrame(f"the peer refers to {length} bytes at {offset} of a pool of {self.pool_size}", received=b"")
        end = offset + length
        if end > self.real:
            step = min((end + POPULATE - 1) // POPULATE * POPULATE, self.pool_size)
            # Only what is referred to: a peer must not be able to make us fill a pool of terabytes by naming its end.
            begin = min(self.real, offset)
            if offset - begin > POPULATE:
                begin = offset
            if madvise(<void*> (self.pool + begin), step - begin, MADV_POPULATE_READ) != 0:
                raise BadFrame("the peer refers to memory that is not there", received=b"")
            if begin <= self.real:
                self.real = step
        return 0

    cdef void give_back(self, uint32_t unit) noexcept:
        """The sender may use this extent again. In a forked child nothing happens: the parent has the message still."""
        if self.generation != fork_generation():
            return
        aw_return(&self.ring, unit)
        if aw_room_was_wanted(&self.ring, 1) and self.sock >= 0:
            c_send(self.sock, b"!", 1, MSG_DONTWAIT | MSG_NOSIGNAL)


@cython.no_gc                      # a collection would drop `owner` first, and the extent would never come back
cdef class ShmLoan(Loan):
    """A loan in the pool: `send` shows it to the peer without copying."""

    cdef Outgoing owner
    cdef uint32_t unit

    def __dealloc__(self):
        cdef uint32_t i
        if self.owner is not None:
            i = self.owner.find(self.unit)
            if i < self.owner.count:
                self.owner.extents[i].loan = NULL
                if not self.owner.extents[i].flying:
                    self.owner.free(i)
                    self.owner.wake_sender()


cdef bint _collecting = False      # the garbage collector is at work: what goes now was forgotten
cdef bint _told_of_collections = False


def _of_collections(phase, info):
    global _collecting
    _collecting = phase == "start"


cdef int hear_of_collections() except -1:
    global _told_of_collections
    _told_of_collections = True
    gc.callbacks.append(_of_collections)
    return 0


@cython.no_gc                      # as for ShmLoan; neither refers to anything that refers back
cdef class View:
    """A message in place. Made with its one memoryview; when no export is left the extent goes back."""

    cdef Incoming owner
    cdef char* memory
    cdef Py_ssize_t nbytes, exports
    cdef uint32_t unit

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.memory == NULL:
            raise BufferError("this message's memory went back to its sender")
        PyBuffer_FillInfo(view, self, self.memory, self.nbytes, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1
        if self.exports == 0 and self.memory != NULL:
            self.memory = NULL
            self.owner.views -= 1
            if _collecting:
                self.owner.forgotten += 1
            self.owner.give_back(self.unit)


cdef class ShmEndpoint(MessageEndpoint):
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
        self.budget = LONGEST_SPIN // 2
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

    cdef int look_now_and_then(self) except -1:
        if aw_tick() != self.checked:
            self.look()
            if self.gone:
                self.need_sending()
        return 0

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

    # -- sending --------------------------------------------------------------------------------------------------------

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

    # -- receiving ------------------------------------------------------------------------------------------------------

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
        r = aw_sleep_for_data(&inc.ring)
        if r:
            aw_awake_with_data(&inc.ring)
            return True
        return False

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
                if not _told_of_collections:
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
        cdef uint64_t end = 0, now, ns
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
                r = self.spin(c, p, end, timeout)
                if r != 0:
                    return mask if r > 0 else 0
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
