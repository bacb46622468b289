# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Fragments: messages of many writers in one FIFO. Sans-I/O.

A write of at most PIPE_BUF bytes to a FIFO is never interleaved with others (pipe(7)), a larger one may be. So a larger
message goes in fragments of that size, each with its writer's number, and the reader puts the messages together, however
the fragments of several writers are mixed. No lock, so a stopped writer holds nobody up. Used by the FIFO wire on the
thread of its front.

    fragment   0  4  magic 'a' 'w' 'F' 01          4  2  bytes of the message in this fragment, at most 4072
               6  2  flags: 1 first, 2 last        8  8  the writer's number, drawn at random
              16  8  first fragment: length of the message; others: place of this one in the message
              24     the bytes                     (little-endian)

A writer that comes says so by a fragment with no flags and no bytes.

What can go wrong: bytes that are no fragment (another program wrote into the FIFO): they are passed over up to the next
fragment. A message over the limit, or one whose writer died in mid-message, is passed over. Each is noted in `problems`;
the messages of the others come through.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from collections import deque

cdef extern from "<string.h>" nogil:
    void* memmem(const void* haystack, size_t n, const void* needle, size_t m)

cdef enum:
    FIRST = 1
    LAST = 2
    SAMPLE = 32                            # bytes of foreign input shown in a problem
    MOST_UNFINISHED = 4096                 # messages here in part: anybody can begin some and never end them

cdef const char* MAGIC = b"awF\x01"


cdef inline uint64_t load(const char* p, int size) noexcept:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value |= <uint64_t> <unsigned char> p[i] << (8 * i)
    return value


cdef inline void store(char* p, uint64_t value, int size) noexcept:
    cdef int i
    for i in range(size):
        p[i] = <char> (value >> (8 * i) & 0xFF)


cdef int write_fragment_header(char* h, uint64_t writer, size_t n, uint64_t place, int flags) noexcept:
    memcpy(h, MAGIC, 4)
    store(h + 4, n, 2)
    store(h + 6, flags, 2)
    store(h + 8, writer, 8)
    store(h + 16, place, 8)
    return FRAGMENT_HEADER


cdef bytes cut(uint64_t writer, const char* p, size_t n):
    """All fragments of one message. Each but the last has ATOM bytes, so a multiple of ATOM always lies between two."""
    cdef size_t count = max(<size_t> 1, (n + FRAGMENT_ROOM - 1) // FRAGMENT_ROOM), i, done = 0, part
    cdef bytes out = PyBytes_FromStringAndSize(NULL, n + count * FRAGMENT_HEADER)
    cdef char* o = PyBytes_AS_STRING(out)
    for i in range(count):
        part = min(<size_t> FRAGMENT_ROOM, n - done)
        o += write_fragment_header(o, writer, part, n if i == 0 else done,
                                   (FIRST if i == 0 else 0) | (LAST if i == count - 1 else 0))
        if part:
            memcpy(o, p + done, part)
        o += part
        done += part
    return out


def fragments_of(uint64_t writer, bytes message):
    """The bytes that carry `message` into a FIFO: write them in pieces of 4096.

    >>> fragments_of(7, b"hi")
    b'awF\\x01\\x02\\x00\\x03\\x00\\x07\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00hi'
    """
    return cut(writer, PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message))


cdef class Partial:
    """A message of which the last fragment has not come."""


cdef class Fragments:
    """Puts messages of at most `max_message` bytes together from the fragments of any number of writers."""

    def __init__(self, Py_ssize_t max_message):
        self.max_message = max_message
        self.ready = deque()
        self.problems = []
        self.partials = {}
        self.tail = b""

    def feed(self, bytes data):
        """Take bytes as they come; whole messages go to `ready`."""
        self.eat(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    def idle(self):
        """The writers whose message has not grown since the last call: they may be dead."""
        cdef Partial partial
        cdef list out = []
        self.began = False
        for writer, partial in self.partials.items():
            if not partial.grown:
                out.append(writer)
            partial.grown = False
        return out

    def forget(self, uint64_t writer):
        """This writer is dead: its unfinished message, if there is one, will never be whole."""
        cdef Partial partial = self.partials.pop(writer, None)
        if partial is not None and partial.data is not None:
            self.problems.append((f"a writer died when {PyByteArray_GET_SIZE(partial.data)} of {partial.total} bytes of "
                                  "its message had come", b""))

    @property
    def unfinished(self):
        """How many messages are here in part."""
        return len(self.partials)

    cdef int eat(self, const char* p, size_t n) except -1:
        cdef size_t have, need
        cdef const char* q
        cdef bytes joined
        if self.tail:
            joined = self.tail + p[:n]
            self.tail = b""
            return self.eat(PyBytes_AS_STRING(joined), PyBytes_GET_SIZE(joined))
        while n >= FRAGMENT_HEADER:
            if load(p, 4) != load(MAGIC, 4) or load(p + 4, 2) > FRAGMENT_ROOM or load(p + 6, 2) > 3:
                if not self.lost_place:
                    self.lost_place = True
                    self.problems.append(("what is no message of ours came through the FIFO", p[:min(n, <size_t> SAMPLE)]))
                q = <const char*> memmem(p + 1, n - 1, MAGIC, 4)
                if q == NULL:
                    q = p + n - 3          # the magic may be cut at the end
                n -= q - p
                p = q
                continue
            need = FRAGMENT_HEADER + load(p + 4, 2)
            if n < need:
                break
            self.lost_place = False
            self.take_fragment(p)
            p += need
            n -= need
        if n:
            self.tail = p[:n]
        return 0

    cdef int take_fragment(self, const char* p) except -1:
        cdef size_t n = load(p + 4, 2)
        cdef int flags = <int> load(p + 6, 2)
        cdef uint64_t place = load(p + 16, 8)
        cdef Partial partial
        cdef Py_ssize_t have
        writer = load(p + 8, 8)
        partial = self.partials.get(writer)
        if flags & FIRST:
            if partial is not None:
                self.forget(writer)
            if place > <uint64_t> self.max_message:
                self.problems.append((f"a message of {place} bytes is over the limit of {self.max_message}: raise "
                                      "max_message= of the reader", b""))
                if flags & LAST:
                    return 0
            elif flags & LAST:
                if place == n:
                    self.ready.append(p[FRAGMENT_HEADER:FRAGMENT_HEADER + n])
                else:
                    self.problems.append(("a fragment contradicts itself", p[:FRAGMENT_HEADER]))
                return 0
            if len(self.partials) >= MOST_UNFINISHED:
                self.problems.append((f"more than {MOST_UNFINISHED} writers had begun a message and not ended it", b""))
                return 0
            partial = Partial.__new__(Partial)
            partial.total = place
            partial.data = bytearray() if place <= <uint64_t> self.max_message else None
            self.partials[writer] = partial
            self.began = True
            have = 0
        elif partial is None:
            return 0                       # the rest of a message whose start was not for us
        else:
            have = PyByteArray_GET_SIZE(partial.data) if partial.data is not None else 0
            if partial.data is not None and place != <uint64_t> have:
                self.forget(writer)
                return 0
        partial.grown = True
        if partial.data is not None:
            if have + n > partial.total or flags & LAST and have + n != partial.total:
                self.forget(writer)
                return 0
            PyByteArray_Resize(partial.data, have + n)
            memcpy(PyByteArray_AS_STRING(partial.data) + have, p + FRAGMENT_HEADER, n)
        if flags & LAST:
            del self.partials[writer]
            if partial.data is not None:
                self.ready.append(bytes(partial.data))
        return 0
