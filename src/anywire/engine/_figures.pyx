# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Where a loop shows its figures: slots of memory that somebody above has, and that other processes may read.

The engine and the loop know nothing of the page of counters. Whoever has it offers slots once (`offer`); loops that were
made before get theirs then, later ones at once. Until somebody offers, and where there is no memory, a loop has no place
and stores nothing.

Called with the GIL held, from any thread; a slot is written by the thread that runs its loop. What can go wrong: nothing
that a loop sees. A slot that was inherited over a fork stays mapped, as private memory.
"""
from libc.string cimport memcpy, memset

from weakref import WeakSet

cdef Claim _claim = NULL
cdef Release _release = NULL

_without = WeakSet()                # meters of loops that were made before anybody offered


cdef int offer(Claim claim, Release release) except -1:
    """Give all loops slots from here."""
    global _claim, _release
    _claim = claim
    _release = release
    for meter in list(_without):
        (<Meter> meter).place()
    _without.clear()
    return 0


cdef void put_text(char* place, size_t size, object text, bint end) noexcept:
    """Text in UTF-8, cut to `size` bytes, zeros behind; `end`: what is too long keeps its end."""
    cdef bytes raw = str(text).encode("utf-8", "replace")
    cdef size_t length = len(raw), skip = 0
    if length > size:
        skip = length - size if end else 0
        length = size
    memcpy(place, <const char*> raw + skip, length)
    memset(place + length, 0, size - length)


cdef str shown(object address):
    """A socket's address as people write it."""
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "surrogateescape")
    if isinstance(address, str):
        return "@" + address[1:] if address.startswith("\0") else address
    return ""


cdef TransportFigures* claim_transport(object local, object peer) noexcept:
    """A slot for a connection between these two addresses, as sockets name them."""
    cdef TransportFigures* slot
    if _claim == NULL:
        return NULL
    slot = <TransportFigures*> _claim(TRANSPORT, shown(peer).encode("utf-8", "replace"))
    if slot != NULL:
        put_text(slot.local, sizeof(slot.local), shown(local), True)
    return slot


cdef void release_figures(void* slot) noexcept:
    if slot != NULL and _release != NULL:
        _release(slot)


cdef class Meter:
    """One loop's place. Made, placed and left by the loop."""

    def __cinit__(self):
        if not self.place():
            _without.add(self)

    def __dealloc__(self):
        release_figures(self.at)

    cdef int place(self) except -1:
        """Take a slot if there is one. Returns whether it has one."""
        if self.at == NULL and _claim != NULL:
            self.at = <LoopFigures*> _claim(LOOP, b"")
            if self.at != NULL and self.name is not None:
                self.called(self.name)
        return self.at != NULL

    cdef int leave(self) except -1:
        """The loop is closed."""
        cdef LoopFigures* at = self.at
        self.at = NULL
        _without.discard(self)
        release_figures(at)
        return 0

    cdef int called(self, object name) except -1:
        """The loop runs in the thread of this name."""
        self.name = name
        if self.at != NULL:
            put_text(self.at.name, sizeof(self.at.name), name, False)
        return 0

    cdef int slow(self, object culprit, double seconds) except -1:
        """A callback took so long. The text comes first: who sees the new count finds it."""
        if self.at != NULL:
            put_text(self.at.culprit, sizeof(self.at.culprit), culprit, False)
            self.at.slow_ns = <uint64_t> (seconds * 1e9)
            self.at.slow += 1
        return 0


def layout():
    """The offset of each field as the C compiler placed it, to compare with the documented ones (a test does)."""
    cdef LoopFigures loop
    cdef TransportFigures transport
    cdef char* p = <char*> &loop
    cdef char* q = <char*> &transport
    return {
        "loop": {
            "state": <char*> &loop.state - p, "generation": <char*> &loop.generation - p, "kind": <char*> &loop.kind - p,
            "reserved": <char*> &loop.reserved - p, "opened_ns": <char*> &loop.opened_ns - p,
            "began_ns": <char*> &loop.began_ns - p, "ran_ns": <char*> &loop.ran_ns - p,
            "slept_ns": <char*> &loop.slept_ns - p, "asleep_ns": <char*> &loop.asleep_ns - p,
            "looked_ns": <char*> &loop.looked_ns - p, "turns": <char*> &loop.turns - p,
            "callbacks": <char*> &loop.callbacks - p, "polls": <char*> &loop.polls - p,
            "sleeps": <char*> &loop.sleeps - p, "wakeups": <char*> &loop.wakeups - p, "ready": <char*> &loop.ready - p,
            "ready_most": <char*> &loop.ready_most - p, "timers": <char*> &loop.timers - p,
            "watched": <char*> &loop.watched - p, "slow": <char*> &loop.slow - p, "slow_ns": <char*> &loop.slow_ns - p,
            "next_free": <char*> &loop.next_free - p, "name": <char*> &loop.name - p,
            "culprit": <char*> &loop.culprit - p,
        },
        "transport": {
            "state": <char*> &transport.state - q, "generation": <char*> &transport.generation - q,
            "kind": <char*> &transport.kind - q, "paused": <char*> &transport.paused - q,
            "opened_ns": <char*> &transport.opened_ns - q, "bytes_received": <char*> &transport.bytes_received - q,
            "bytes_sent": <char*> &transport.bytes_sent - q, "queued": <char*> &transport.queued - q,
            "queued_most": <char*> &transport.queued_most - q,
            "reading_pauses": <char*> &transport.reading_pauses - q,
            "writing_pauses": <char*> &transport.writing_pauses - q, "unused": <char*> &transport.unused - q,
            "next_free": <char*> &transport.next_free - q, "local": <char*> &transport.local - q,
            "address": <char*> &transport.address - q,
        },
    }
