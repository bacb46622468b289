# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The memory of a shared-memory connection: made and sealed by its sender, checked and mapped by its receiver.

A side's data is a ring and a *pool*, of which *extents* are lent for large messages: `Outgoing` lends them and takes them
back, `Incoming` reads and returns them. `ShmLoan` is an extent that the application writes to, `View` one that it reads.

Everything happens under the GIL. What can go wrong: there is no memory (OSError, MemoryError); the peer's memory is not what
it announced, or it returns what it does not have (BadFrame).
"""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memmove
from anywire.contract.endpoint cimport Loan, fork_generation
from anywire.wires._ring cimport (AW_RING_MAGIC, AW_RING_VERSION, aw_awake_with_room, aw_control, aw_echo, aw_next_return,
                                  aw_return, aw_room_was_wanted, aw_set_echo)

import fcntl
import gc
import os

from anywire.contract.errors import BadFrame

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
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t c_send "send"(int fd, const void* p, size_t n, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void* p, size_t n)

F_SEAL_FUTURE_WRITE = 0x10                       # fcntl(2), Linux 5.1; not in every version of the standard library
DATA_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
CONTROL_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

VERSION = AW_RING_VERSION
"""Version of the memory's layout: both sides must have the same."""

cdef enum:
    CONTROL_BYTES = 4096
    POPULATE = 1 << 20             # bytes of the pool that are made real at a time
    TURN = 1 << 21                 # bytes at the front of the pool that are lent in turn: see Outgoing.lend


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
    if not _told_of_collections:
        _told_of_collections = True
        gc.callbacks.append(_of_collections)
    return 0


@cython.no_gc                      # as for ShmLoan; neither refers to anything that refers back
cdef class View:
    """A message in place. Made with its one memoryview; when no export is left the extent goes back."""

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
