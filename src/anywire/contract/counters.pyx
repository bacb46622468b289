# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The process's counters: one page in a memfd, written without locks, readable from outside.

Owns: the page (docs/design/counters.md draws it), its free list, and its life over a fork. Endpoints claim a slot and add
to its fields with plain stores; other processes read them with `counters_page`, also while this one is blocked or
stopped. A 64-bit field is always whole; a set of fields may be a few instructions apart.

Called with the GIL held, from any thread: the GIL is what keeps claim, release and the additions apart.

What can go wrong: nothing that a caller sees, for counting must never break a connection. Without a descriptor to spare
the page is private memory that nobody outside can read (`page_fd()` is -1); without even that, or with all slots taken,
everything counts in one shared overflow slot.

Why a slot per connection and no shared counters: additions then need no atomic instruction and no lock, and a reader
sees which connection waits. Why released slots go into a totals slot: so that sums never go back.
"""
from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from anywire.engine._figures cimport LOOP, offer

from anywire.contract import counters_page
from anywire.contract.counters_page import NoCounters, Page, Reader, Stats, open_page

__all__ = ["NoCounters", "OwnSlot", "Page", "Reader", "Stats", "count_connect_retry", "layout", "open_page", "page_fd",
           "snapshot"]

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <pthread.h>
    #include <stddef.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static int anywire_page_memfd(void) {
        /* By number: older C libraries have no memfd_create(3). NOEXEC_SEAL (8) is demanded by vm.memfd_noexec=2 and
           unknown before Linux 6.3. CLOEXEC 1, ALLOW_SEALING 2. */
        int high, fd = (int) syscall(SYS_memfd_create, "anywire-counters", 1 | 2 | 8);
        if (fd < 0) fd = (int) syscall(SYS_memfd_create, "anywire-counters", 1 | 2);
        if (fd >= 0 && fd < 3) {
            /* The program was started without standard input or output: their numbers are not ours. */
            high = fcntl(fd, F_DUPFD_CLOEXEC, 3);
            close(fd);
            fd = high;
        }
        return fd;
    }

    static int anywire_page_seal(int fd) {
        return fcntl(fd, 1033 /* F_ADD_SEALS */, 1 | 2 | 4 /* SEAL, SHRINK, GROW */);
    }

    static void anywire_store_state(unsigned int* state, unsigned int value) {
        __atomic_store_n(state, value, __ATOMIC_RELEASE);
    }

    static unsigned long long anywire_clock_ns(int clock) {
        struct timespec t;
        clock_gettime(clock, &t);
        return (unsigned long long) t.tv_sec * 1000000000ull + (unsigned long long) t.tv_nsec;
    }

    static int anywire_same_file(int fd, unsigned long long device, unsigned long long inode) {
        struct stat s;
        return fstat(fd, &s) == 0 && s.st_dev == device && s.st_ino == inode;
    }

    static void anywire_identity(int fd, unsigned long long* device, unsigned long long* inode) {
        struct stat s;
        *device = *inode = 0;
        if (fstat(fd, &s) == 0) { *device = s.st_dev; *inode = s.st_ino; }
    }
    """
    int anywire_page_memfd() noexcept nogil
    int anywire_page_seal(int fd) noexcept nogil
    void anywire_store_state(uint32_t* state, uint32_t value) noexcept nogil
    uint64_t anywire_clock_ns(int clock) noexcept nogil
    bint anywire_same_file(int fd, unsigned long long device, unsigned long long inode) noexcept nogil
    void anywire_identity(int fd, unsigned long long* device, unsigned long long* inode) noexcept nogil
    int CLOCK_REALTIME, CLOCK_MONOTONIC
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE
    void* MAP_FAILED
    void* mmap(void* address, size_t length, int protection, int flags, int fd, long offset) noexcept nogil
    int munmap(void* address, size_t length) noexcept nogil
    int ftruncate(int fd, long length) noexcept nogil
    int close(int fd) noexcept nogil
    int getpid() noexcept nogil
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil) noexcept nogil

cdef struct Header:
    char magic[8]
    uint32_t version
    uint32_t header_size
    uint32_t slot_size
    uint32_t slot_count
    uint32_t pid
    uint32_t used
    uint64_t started_realtime_ns
    uint64_t started_monotonic_ns
    uint64_t claims
    uint64_t releases
    uint64_t overflows
    uint32_t clock
    uint32_t reserved
    uint64_t connect_retries

cdef enum:
    HEADER_SIZE = 4096
    SLOT_COUNT = 65536
    PAGE_SIZE = HEADER_SIZE + SLOT_COUNT * 256
    FREE = 0
    USED = 1

cdef Header* _header = NULL        # the page; NULL until the first use, and again in a forked child
cdef Slot* _slots = NULL
cdef uint64_t _free = 0            # index of the first released slot; 0: none (slot 0 is never released)
cdef int _fd = -1
cdef unsigned long long _device = 0, _inode = 0
cdef Slot _last_resort             # no page at all: something to write to


cdef void _forget_page() noexcept nogil:
    # pthread_atfork(3), in the child: inherited objects hold pointers into the parent's page and may go on counting, at
    # least until they are collected. They get private memory at the same place; the parent's page is left alone, and the
    # child makes its own at its first use. Only system calls are made here, as fork(2) asks of multi-threaded programs.
    global _header, _slots, _free, _fd
    if _header == NULL:
        return
    if _fd >= 0:
        mmap(_header, PAGE_SIZE, PROT_READ | PROT_WRITE,
             MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        # Somebody may have closed our number (closefrom in a daemon) and opened something else under it.
        if anywire_same_file(_fd, _device, _inode):
            close(_fd)
    _header = NULL
    _slots = NULL
    _free = 0
    _fd = -1


pthread_atfork(NULL, NULL, _forget_page)


cdef bint _need_page() noexcept:
    """Make the page unless there is one. Sparse: pages that nobody touched cost nothing."""
    global _header, _slots, _fd, _device, _inode
    cdef void* memory = MAP_FAILED
    cdef int fd
    if _header != NULL:
        return True
    fd = anywire_page_memfd()
    if fd >= 0:
        if ftruncate(fd, PAGE_SIZE) == 0 and anywire_page_seal(fd) == 0:
            memory = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0)
        if memory == MAP_FAILED:
            close(fd)
            fd = -1
    if memory == MAP_FAILED:
        memory = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if memory == MAP_FAILED:
            return False
    _fd = fd
    if fd >= 0:
        anywire_identity(fd, &_device, &_inode)
    _header = <Header*> memory
    _slots = <Slot*> (<char*> memory + HEADER_SIZE)
    _header.version = counters_page.VERSION
    _header.header_size = HEADER_SIZE
    _header.slot_size = sizeof(Slot)
    _header.slot_count = SLOT_COUNT
    _header.pid = getpid()
    _header.clock = CLOCK_MONOTONIC
    _header.started_realtime_ns = anywire_clock_ns(CLOCK_REALTIME)
    _header.started_monotonic_ns = anywire_clock_ns(CLOCK_MONOTONIC)
    _open_slot(&_slots[0], TOTALS, b"")
    _open_slot(&_slots[1], OVERFLOW, b"")
    _header.used = 2
    # The magic comes last: who sees it may read the rest.
    memcpy(_header.magic, b"anywctr\0", 8)
    return True


cdef void _open_slot(Slot* slot, unsigned int kind, bytes address) noexcept:
    slot.kind = kind
    slot.opened_ns = anywire_clock_ns(CLOCK_MONOTONIC)
    slot.generation += 1
    _put_text(slot.address, sizeof(slot.address), address)
    anywire_store_state(&slot.state, USED)


cdef void _put_text(char* place, size_t size, bytes text) noexcept:
    cdef size_t length = len(text)
    if length > size:
        length = size
    memcpy(place, <const char*> text, length)
    memset(place + length, 0, size - length)


cdef inline bint _shared(const Slot* slot) noexcept:
    """Not one owner's: the overflow slot, the last resort, or a slot of before a fork."""
    return (_slots == NULL or <uintptr_t> slot < <uintptr_t> (_slots + 2)
            or <uintptr_t> slot >= <uintptr_t> (_slots + SLOT_COUNT))


cdef Slot* claim(unsigned int kind, bytes address) noexcept:
    """A slot of one's own until `release`, all zero, named after `address` (cut to 64 bytes)."""
    global _free
    cdef Slot* slot
    if not _need_page():
        return &_last_resort
    _header.claims += 1
    if _free:
        slot = &_slots[_free]
        _free = slot.next_free
        slot.next_free = 0
    elif _header.used < SLOT_COUNT:
        slot = &_slots[_header.used]
        _header.used += 1
    else:
        _header.overflows += 1
        return &_slots[1]
    _open_slot(slot, kind, address)
    return slot


cdef void* _claim_figures(unsigned int kind, bytes address) noexcept:
    """A slot for a loop or a connection of one, whose figures are others than those of the shared overflow slot."""
    cdef Slot* slot = claim(kind, address)
    if _shared(slot):
        release(slot)
        return NULL
    return slot


cdef void _release_figures(void* slot) noexcept:
    release(<Slot*> slot)


cdef void release(Slot* slot) noexcept:
    """Give a slot back; what a channel, stream or listener counted goes on to the totals."""
    global _free
    cdef uint32_t generation
    if slot == NULL or _slots == NULL:
        return
    if slot == &_slots[1]:
        _header.releases += 1
    if _shared(slot) or slot.state != USED:
        return
    _header.releases += 1
    if slot.kind < LOOP:
        _add_to_totals(slot)
    generation = slot.generation
    anywire_store_state(&slot.state, FREE)
    memset(slot, 0, sizeof(Slot))
    slot.generation = generation
    slot.next_free = _free
    _free = slot - _slots


cdef void _add_to_totals(const Slot* slot) noexcept:
    cdef Slot* totals = &_slots[0]
    totals.messages_sent += slot.messages_sent
    totals.messages_received += slot.messages_received
    totals.bytes_sent += slot.bytes_sent
    totals.bytes_received += slot.bytes_received
    totals.send_waits += slot.send_waits
    totals.recv_waits += slot.recv_waits
    totals.send_wait_ns += slot.send_wait_ns
    totals.queue_high = max(totals.queue_high, slot.queue_high)
    totals.drops += slot.drops
    totals.connects += slot.connects
    totals.accepts += slot.accepts
    totals.accept_errors += slot.accept_errors
    totals.confirmed += slot.confirmed
    totals.losses += slot.losses
    totals.handler_errors += slot.handler_errors
    if slot.losses:
        totals.loss_code = slot.loss_code
        memcpy(totals.loss_text, slot.loss_text, sizeof(slot.loss_text))


offer(_claim_figures, _release_figures)


cdef void set_label(Slot* slot, bytes address) noexcept:
    if slot != NULL and not _shared(slot):
        _put_text(slot.address, sizeof(slot.address), address)


cdef void set_kind(Slot* slot, unsigned int kind) noexcept:
    if slot != NULL and not _shared(slot):
        slot.kind = kind


cdef void lost(Slot* slot, bytes reason, unsigned int code=0) noexcept:
    """Count a loss with its reason (cut to 32 bytes) and, if the kernel gave one, its errno."""
    if slot == NULL:
        return
    slot.losses += 1
    slot.loss_code = code
    _put_text(slot.loss_text, sizeof(slot.loss_text), reason)


cdef object read_slot(const Slot* slot):
    """The numbers of one slot as `Stats`. All zero for NULL."""
    cdef Slot empty
    cdef Py_ssize_t index = 0
    if slot == NULL:
        memset(&empty, 0, sizeof(empty))
        slot = &empty
    elif not _shared(slot):
        index = slot - _slots
    return counters_page.read_slot(PyMemoryView_FromMemory(<char*> slot, sizeof(Slot), PyBUF_READ), 0, index)


def page_fd():
    """The descriptor of this process's page, which is made if there is none yet. -1: nobody outside can read it.

    The descriptor stays this module's: do not close it; duplicate it to hand it on.
    """
    _need_page()
    return _fd


def count_connect_retry():
    """Count an attempt to connect that failed and will be made again. There is no connection yet, hence no slot."""
    if _need_page():
        _header.connect_retries += 1


def snapshot(pid=None):
    """All counters of this process, or of another one of this user, as a `Page`.

    Works while that process is blocked or stopped: nothing is asked of it. Raises NoCounters (a LookupError) if the
    process has no page (it opened no channel), PermissionError if the kernel does not let this user look.
    """
    if pid is not None:
        with open_page(pid) as reader:
            return reader.read()
    if not _need_page():
        raise NoCounters("this process has no memory for a counters page")
    return counters_page.read_page(PyMemoryView_FromMemory(<char*> _header, PAGE_SIZE, PyBUF_READ))


def layout():
    """The offset of each field as the C compiler placed it, to compare with the documented ones (a test does)."""
    cdef Slot* s = &_last_resort
    cdef char* p = <char*> s
    cdef Header h
    cdef char* q = <char*> &h
    header = {
        "magic": <char*> &h.magic - q, "version": <char*> &h.version - q, "header_size": <char*> &h.header_size - q,
        "slot_size": <char*> &h.slot_size - q, "slot_count": <char*> &h.slot_count - q, "pid": <char*> &h.pid - q,
        "used": <char*> &h.used - q, "started_realtime_ns": <char*> &h.started_realtime_ns - q,
        "started_monotonic_ns": <char*> &h.started_monotonic_ns - q, "claims": <char*> &h.claims - q,
        "releases": <char*> &h.releases - q, "overflows": <char*> &h.overflows - q, "clock": <char*> &h.clock - q,
        "reserved": <char*> &h.reserved - q, "connect_retries": <char*> &h.connect_retries - q,
    }
    slot = {
        "state": <char*> &s.state - p, "generation": <char*> &s.generation - p, "kind": <char*> &s.kind - p,
        "loss_code": <char*> &s.loss_code - p, "opened_ns": <char*> &s.opened_ns - p,
        "messages_sent": <char*> &s.messages_sent - p, "messages_received": <char*> &s.messages_received - p,
        "bytes_sent": <char*> &s.bytes_sent - p, "bytes_received": <char*> &s.bytes_received - p,
        "send_waits": <char*> &s.send_waits - p, "recv_waits": <char*> &s.recv_waits - p,
        "send_wait_ns": <char*> &s.send_wait_ns - p, "queue_depth": <char*> &s.queue_depth - p,
        "queue_high": <char*> &s.queue_high - p, "drops": <char*> &s.drops - p, "connects": <char*> &s.connects - p,
        "accepts": <char*> &s.accepts - p, "accept_errors": <char*> &s.accept_errors - p,
        "confirmed": <char*> &s.confirmed - p, "losses": <char*> &s.losses - p,
        "handler_errors": <char*> &s.handler_errors - p, "next_free": <char*> &s.next_free - p,
        "loss_text": <char*> &s.loss_text - p, "address": <char*> &s.address - p,
    }
    return {"header": header, "slot": slot, "header_size": HEADER_SIZE, "slot_size": sizeof(Slot),
            "slot_count": SLOT_COUNT}


cdef class OwnSlot:
    """One slot, held by code written in Python: a listener's, a server's. Released by `release()` or when collected.

    `kind`: one of `counters_page.CHANNEL`, `STREAM`, `LISTENER`. Any thread.

    >>> slot = OwnSlot(5, "tcp://127.0.0.1:9000")
    >>> slot.add("accepts")
    >>> slot.stats().accepts
    1
    """

    cdef Slot* slot

    def __cinit__(self, unsigned int kind, address=""):
        self.slot = claim(kind, str(address).encode("utf-8", "surrogateescape"))

    def __dealloc__(self):
        release(self.slot)

    def add(self, str field, long long count=1):
        """Add to a counter by its name in `Stats`."""
        cdef int index = counters_page.COUNTERS.index(field)
        if self.slot != NULL:
            (&self.slot.messages_sent)[index] += <uint64_t> count

    def lost(self, str reason, unsigned int code=0):
        """Count a loss with its reason."""
        lost(self.slot, reason.encode("utf-8", "replace"), code)

    def set_label(self, address):
        """Name the slot after an address that became known later."""
        set_label(self.slot, str(address).encode("utf-8", "surrogateescape"))

    def stats(self):
        """What the slot counted so far; all zero after `release()`."""
        return read_slot(self.slot)

    def release(self):
        """Give the slot back. Safe to call twice."""
        cdef Slot* slot = self.slot
        self.slot = NULL
        release(slot)
