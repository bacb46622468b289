# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True, embedsignature=True
"""Frames: bytes in, whole messages out, and headers for the other direction. No I/O (in the manner of h11).

Owned by one framed endpoint, used under the GIL on whatever thread that endpoint runs on; never blocks.

What can go wrong: a peer may send anything. A length over the limit raises `TooLarge`, an unknown kind `BadFrame`; after
either the decoder must not be fed again. Memory follows what really came, never what a header announces: a message may
take at once 64 KiB, or four times what has arrived of it, or the size of the largest message that this connection has
already delivered whole, whichever is most.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from anywire.contract.heap cimport keep_heap

from anywire.contract.errors import BadFrame, TooLarge

cdef extern from "Python.h":
    PyObject* c_bytes "PyBytes_FromStringAndSize"(const char* p, Py_ssize_t n) except NULL
    int _PyBytes_Resize(PyObject** bytes, Py_ssize_t n) except -1
    char* c_bytes_data "PyBytes_AS_STRING"(PyObject* bytes) noexcept

cdef extern from "<endian.h>" nogil:
    uint32_t htole32(uint32_t)
    uint32_t le32toh(uint32_t)
    uint64_t htole64(uint64_t)
    uint64_t le64toh(uint64_t)

cdef enum:
    FREELY = 65536          # bytes that one header may allocate without further evidence


cdef inline uint32_t load32(const char* p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return le32toh(v)


cdef inline void store32(char* p, uint32_t v) noexcept nogil:
    v = htole32(v)
    memcpy(p, &v, 4)


cdef int write_header(char* out, uint64_t size, uint32_t confirmed) noexcept nogil:
    """The header of a message of `size` bytes; returns the header's length (8 or 16)."""
    cdef uint64_t large
    store32(out + 4, confirmed)
    if size < <uint64_t> FIRST_KIND:
        store32(out, <uint32_t> size)
        return 8
    store32(out, <uint32_t> LARGE)
    large = htole64(size)
    memcpy(out + 8, &large, 8)
    return 16


cdef int write_kind(char* out, uint32_t kind, uint32_t confirmed) noexcept nogil:
    store32(out, kind)
    store32(out + 4, confirmed)
    return 8


cdef int write_descriptors(char* out, uint32_t size, uint32_t confirmed, uint32_t count) noexcept nogil:
    store32(out, <uint32_t> DESCRIPTORS)
    store32(out + 4, confirmed)
    store32(out + 8, size)
    store32(out + 12, count)
    return 16


def encode(message, int confirmed=0):
    """The frame of one message as bytes: for tests, captures and tools; channels write header and message apart.

    >>> encode(b"hi").hex(" ")
    '02 00 00 00 00 00 00 00 68 69'
    """
    cdef char head[LONGEST_HEADER]
    cdef int n = write_header(head, len(message), confirmed)
    return PyBytes_FromStringAndSize(head, n) + bytes(message)


def encode_kind(name, int confirmed=0):
    """The frame of a kind without a message: "end", "close" or "confirm"."""
    cdef char head[LONGEST_HEADER]
    cdef uint32_t kind = {"end": END, "close": CLOSE, "confirm": CONFIRM}[name]
    return PyBytes_FromStringAndSize(head, write_kind(head, kind, confirmed))


class WithDescriptors:
    """A message that announced descriptors: `message`, and `count` of them to take from the socket."""

    __slots__ = ("message", "count")

    def __init__(self, message, count):
        self.message = message
        self.count = count


cdef class Decoder:
    """Collects whole messages of at most `limit` bytes from fragments of any size.

    >>> d = Decoder(100)
    >>> d.feed(encode(b"one") + encode(b"two")[:9])
    [b'one']
    >>> d.feed(b"wo")
    [b'two']
    """

    def __cinit__(self, Py_ssize_t limit=16 << 20, *, bint descriptors=False):
        self.limit = limit
        self.fds_allowed = descriptors
        self.ready = NULL
        self.body = NULL
        self.target = NULL
        self.target_done = -1
        self.head_need = HEADER
        self.fds = -1

    def __dealloc__(self):
        while self.ready_count:
            self.ready_count -= 1
            Py_DECREF(<object> self.ready[self.ready_head])
            self.ready_head = (self.ready_head + 1) & (self.ready_size - 1)
        free(self.ready)
        Py_XDECREF(self.body)

    # -- the Python face: tests, fuzzing, tools -------------------------------------------------------------------------

    def feed(self, data):
        """Take bytes; return the messages that became whole. Raises TooLarge or BadFrame."""
        cdef const unsigned char[::1] view = memoryview(data).cast("B") if data else None
        if data:
            self.eat(<const char*> &view[0], view.shape[0])
        out = []
        while self.ready_count:
            out.append(self.pop())
        return out

    @property
    def inside(self):
        """Where the bytes end: "" between frames, else what is incomplete, for the error that a loss raises."""
        if self.in_body:
            return f"inside a message: {self.body_have} of {self.body_size} bytes came"
        if self.head_have:
            return f"inside a frame header: {self.head_have} of {self.head_need} bytes came"
        return ""

    @property
    def allocated(self):
        """Bytes allocated for the message being collected."""
        return self.body_room if self.body != NULL else 0

    def detach_state(self):
        """What has come and was not handed out, as bytes to decode again, and the counts: (bytes, confirmed, ended, closed)."""
        out = []
        while self.ready_count:
            message = self.pop()
            if type(message) is WithDescriptors:
                raise BadFrame("a message with descriptors waits: take it with recv_fds() before detach()")
            out.append(encode(message))
        cdef char head[LONGEST_HEADER]
        if self.in_body:
            if self.fds >= 0:
                raise BadFrame("a message with descriptors is under way: take it with recv_fds() before detach()")
            out.append(PyBytes_FromStringAndSize(head, write_header(head, self.body_size, 0)))
            out.append(PyBytes_FromStringAndSize(self.body_data, <Py_ssize_t> self.body_have))
        else:
            out.append(PyBytes_FromStringAndSize(self.head, self.head_have))
        return b"".join(out), self.confirmed, self.ended, self.closed

    def restore_state(self, data, confirmed, ended, closed):
        """Take over from another decoder's `detach_state`."""
        cdef bytes d = data
        self.eat(PyBytes_AS_STRING(d), len(d))
        self.confirmed = confirmed
        self.ended = ended
        self.closed = closed

    # -- the C face -----------------------------------------------------------------------------------------------------

    cdef int eat(self, const char* p, Py_ssize_t n) except -1:
        cdef const char* end = p + n
        cdef Py_ssize_t part
        cdef uint32_t size
        cdef PyObject* message
        while p < end:
            if self.in_body:
                part = end - p
                if <uint64_t> part > self.body_size - self.body_have:
                    part = <Py_ssize_t> (self.body_size - self.body_have)
                if self.body_have + part > self.body_room:
                    self.room_for(self.body_have + part)
                memcpy(self.body_data + self.body_have, p, part)
                p += part
                self.body_have += part
                if self.body_have == self.body_size:
                    self.body_done()
                continue
            if self.head_have == 0 and end - p >= HEADER:
                size = load32(p)
                if size < <uint32_t> FIRST_KIND and <Py_ssize_t> size <= end - p - HEADER and not self.ended \
                        and <Py_ssize_t> size <= self.limit and self.target == NULL:
                    # the common case: a whole message lies in front of us
                    self.confirmed += load32(p + 4)
                    message = c_bytes(p + HEADER, size)
                    self.push(message, size)
                    self.last = size
                    p += HEADER + size
                    continue
                if size < <uint32_t> FIRST_KIND or size >= <uint32_t> CONFIRM and size != <uint32_t> LARGE:
                    self.header_done(p, end - p - HEADER)
                    p += HEADER
                    continue
            part = min(end - p, <Py_ssize_t> (self.head_need - self.head_have))
            memcpy(self.head + self.head_have, p, part)
            p += part
            self.head_have += <int> part
            if self.head_have == HEADER and self.head_need == HEADER:
                size = load32(self.head)
                if size == <uint32_t> LARGE or size == <uint32_t> DESCRIPTORS:
                    self.head_need = LONGEST_HEADER
                    continue
            if self.head_have == self.head_need:
                self.head_have = 0
                self.head_need = HEADER
                self.header_done(self.head, end - p)
        return 0

    cdef int header_done(self, const char* h, Py_ssize_t available) except -1:
        cdef uint32_t kind = load32(h)
        cdef uint64_t size
        if self.closed or self.ended and kind != <uint32_t> CONFIRM and kind != <uint32_t> CLOSE:
            raise BadFrame("a frame came after the end frame", received=h[:HEADER])
        self.confirmed += load32(h + 4)
        self.fds = -1
        if kind < <uint32_t> FIRST_KIND:
            self.start_body(kind, available)
        elif kind == <uint32_t> END:
            self.ended = True
        elif kind == <uint32_t> CLOSE:
            self.ended = self.closed = True
        elif kind == <uint32_t> LARGE:
            memcpy(&size, h + 8, 8)
            size = le64toh(size)
            if size < <uint64_t> FIRST_KIND:
                raise BadFrame(f"a large frame of only {size} bytes", received=h[:LONGEST_HEADER])
            self.start_body(size, available)
        elif kind == <uint32_t> CONFIRM:
            pass
        elif kind == <uint32_t> DESCRIPTORS:
            self.fds = load32(h + 12)
            if not self.fds_allowed:
                raise BadFrame("descriptors were announced on a wire that carries none", received=h[:LONGEST_HEADER])
            if self.fds > 253:
                raise BadFrame(f"{self.fds} descriptors in one message; the kernel passes at most 253",
                               received=h[:LONGEST_HEADER])
            self.fds_due += self.fds
            self.start_body(load32(h + 8), available)
        else:
            raise BadFrame(f"unknown frame kind {kind:#010x}", received=h[:HEADER])
        return 0

    cdef int start_body(self, uint64_t size, Py_ssize_t available) except -1:
        if size > <uint64_t> self.limit:
            raise TooLarge(size, self.limit, operation="receive")
        self.body_size = size
        self.body_have = 0
        self.in_body = True
        if self.target != NULL and self.fds < 0 and self.ready_count == 0 and self.target_done < 0 \
                and size <= <uint64_t> self.target_size:
            self.to_target = True
            self.body_data = self.target
            self.body_room = size
        else:
            self.body_room = min(size, max(<uint64_t> FREELY, max(self.largest, <uint64_t> available)))
            if self.body_room >= <uint64_t> FREELY:
                keep_heap()
            self.body = c_bytes(NULL, <Py_ssize_t> self.body_room)
            self.body_data = c_bytes_data(self.body)
        if size == 0:
            self.body_done()
        return 0

    cdef int room_for(self, uint64_t n) except -1:
        """Grow the body's memory to hold at least `n` bytes, at most four times what came (realloc moves pages, not bytes)."""
        cdef uint64_t room = min(self.body_size, max(4 * self.body_have, n))
        if _PyBytes_Resize(&self.body, <Py_ssize_t> room) < 0:
            self.body = NULL
            raise MemoryError(f"no memory for a message of {self.body_size} bytes")
        self.body_room = room
        self.body_data = c_bytes_data(self.body)
        return 0

    cdef int body_done(self) except -1:
        cdef PyObject* message = self.body
        self.in_body = False
        self.body = NULL
        self.largest = max(self.largest, self.body_size)
        self.last = self.body_size
        if self.to_target:
            self.to_target = False
            self.target = NULL
            self.target_done = <Py_ssize_t> self.body_size
            self.received += 1
            return 0
        if self.fds >= 0:
            wrapped = WithDescriptors(<object> message, self.fds)
            Py_DECREF(<object> message)
            Py_INCREF(wrapped)
            message = <PyObject*> wrapped
            self.fds = -1
        return self.push(message, <Py_ssize_t> self.body_size)

    cdef int push(self, PyObject* message, Py_ssize_t n) except -1:
        """Append an owned reference to the ring."""
        cdef Py_ssize_t size, i
        cdef PyObject** ring
        if self.ready_count == self.ready_size:
            size = self.ready_size * 2 if self.ready_size else 8
            ring = <PyObject**> malloc(size * sizeof(PyObject*))
            if ring == NULL:
                Py_DECREF(<object> message)
                raise MemoryError()
            for i in range(self.ready_count):
                ring[i] = self.ready[(self.ready_head + i) & (self.ready_size - 1)]
            free(self.ready)
            self.ready = ring
            self.ready_size = size
            self.ready_head = 0
        self.ready[(self.ready_head + self.ready_count) & (self.ready_size - 1)] = message
        self.ready_count += 1
        self.ready_bytes += n
        self.received += 1
        return 0

    cdef object peek(self):
        return <object> self.ready[self.ready_head]

    cdef object pop(self):
        cdef PyObject* message = self.ready[self.ready_head]
        self.ready_head = (self.ready_head + 1) & (self.ready_size - 1)
        self.ready_count -= 1
        if self.ready_count == 0:
            self.ready_bytes = 0
            self.ready_head = 0
            if self.ready_size > 64:          # an idle connection keeps no large ring
                free(self.ready)
                self.ready = NULL
                self.ready_size = 0
        result = <object> message
        Py_DECREF(result)
        return result

    cdef Py_ssize_t ahead(self, Py_ssize_t most) noexcept:
        """How much to read when nothing can be read directly: after a large message only the next header, so that a
        large one that follows is received where it stays."""
        if self.last >= 2 * FREELY and not self.in_body:
            return self.head_need - self.head_have
        return most

    cdef int direct(self, char** p, Py_ssize_t* n) except -1:
        """Where the next bytes of a large message may be read to directly; 0 when it is better to read ahead."""
        if not self.in_body or self.body_size - self.body_have < <uint64_t> FREELY:
            return 0
        if self.body_have == self.body_room:
            self.room_for(self.body_have + 1)
        p[0] = self.body_data + self.body_have
        n[0] = <Py_ssize_t> (self.body_room - self.body_have)
        return 1

    cdef int advance(self, Py_ssize_t n) except -1:
        """`n` bytes were read to where `direct` pointed."""
        self.body_have += n
        if self.body_have == self.body_size:
            self.body_done()
        return 0

    cdef int set_target(self, char* p, Py_ssize_t n) except -1:
        """The next message, if none has begun, goes straight to `p` when it fits."""
        self.target = p
        self.target_size = n
        self.target_done = -1
        return 0

    cdef int drop_target(self) except -1:
        """The target's owner takes it back: what came so far moves to memory of our own, the rest follows there."""
        cdef char* from_
        self.target = NULL
        if not self.to_target:
            return 0
        self.to_target = False
        from_ = self.body_data
        self.body_room = min(self.body_size, max(<uint64_t> FREELY, 2 * self.body_have))
        self.body = c_bytes(NULL, <Py_ssize_t> self.body_room)
        self.body_data = c_bytes_data(self.body)
        memcpy(self.body_data, from_, self.body_have)
        return 0
