# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The async stream: bytes, for every stream wire. Names follow asyncio; cancelling any read loses no byte.

Runs on its event loop's thread.
"""
cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_GET_SIZE
from anywire.contract.endpoint cimport SCRATCH, WRITE, RawEndpoint
from anywire.contract.front cimport GIVE_WAY, MUST_WAIT, Front, ReceiveOperation, sending, unused
from anywire.engine._awaiting cimport install

from anywire.contract.errors import EndOfChannel, TooLarge

cdef object _GIVE_WAY = GIVE_WAY
cdef object _MUST_WAIT = MUST_WAIT

cdef enum:
    SOME, INTO, EXACTLY, UNTIL, ITERATE
    ONE = 0
    MANY = 1
    CALL = 2
    MOST_TURNS = 64


@cython.no_gc_clear                              # the collector would drop the view's object and leave it exported
cdef class Read(ReceiveOperation):
    cdef int mode
    cdef Py_ssize_t size, have
    cdef bytearray collected
    cdef bytes separator
    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def name(self):
        return "read"

    cdef object attempt(self):
        cdef RawEndpoint end = <RawEndpoint> self.front.end
        cdef Py_ssize_t n
        cdef object data
        while True:
            if end.turns >= MOST_TURNS:
                end.turns = 0
                return _GIVE_WAY
            if self.mode == SOME or self.mode == ITERATE:
                data = end.read_bytes(self.size, False)
                if data is None:
                    break
                if self.mode == ITERATE and not data:
                    raise StopAsyncIteration
                return data
            if self.mode == INTO:
                n = end.read_raw_into(<char*> self.view.buf, self.view.len, False)
                if n < 0:
                    break
                return n
            if self.mode == EXACTLY:
                if self.have == self.size:
                    return bytes(self.collected)
                n = end.read_raw_into(PyByteArray_AS_STRING(self.collected) + self.have, self.size - self.have, False)
                if n < 0:
                    break
                if n == 0:
                    raise EndOfChannel(f"the stream ended after {self.have} of {self.size} bytes",
                                       address=str(end.address), operation="read_exactly")
                self.have += n
                continue
            data = end.read_bytes(SCRATCH, False)
            if data is None:
                break
            if not data:
                raise EndOfChannel(f"the stream ended before the separator; {len(self.collected)} bytes came",
                                   address=str(end.address), operation="read_until")
            n = max(0, len(self.collected) - len(self.separator) + 1)
            self.collected += data
            n = self.collected.find(self.separator, n)
            if 0 <= n <= self.size - len(self.separator):
                n += len(self.separator)
                data = bytes(self.collected[:n])
                end.push_back(self.collected[n:])
                self.collected = bytearray()
                return data
            if len(self.collected) > self.size:
                n = len(self.collected)
                raise TooLarge(n, self.size, address=str(end.address), operation="read_until", option="limit")
        end.slot.recv_waits += 1
        return _MUST_WAIT

    cdef int leave(self) except -1:
        self.let_go()
        if self.mode == EXACTLY and self.have < self.size:
            (<RawEndpoint> self.front.end).push_back(self.collected[:self.have])   # cancelled: nothing was read
        elif self.mode == UNTIL and self.collected:
            (<RawEndpoint> self.front.end).push_back(self.collected)
        return ReceiveOperation.leave(self)

    cdef int rest(self) except -1:
        self.collected = None
        return ReceiveOperation.rest(self)

    cdef int let_go(self) except -1:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)
        return 0


install(Read)


cdef class Stream(Front):
    """A connection that carries bytes, for coroutines. Made by `anywire.connect_stream` and `serve_stream`.

    One reader at a time; any number of writers, which take turns."""

    cdef Read reading(self, int mode, Py_ssize_t size):
        cdef Read op = <Read> self.spare_reader
        if op is not None and unused(op):
            self.spare_reader = None
            op.state = op.have = 0
        else:
            op = Read.__new__(Read)
        op.front = self
        op.mode = mode
        op.size = size
        return op

    def read(self, Py_ssize_t n=SCRATCH, *, timeout=None):
        """At least one byte and at most `n` (and 256 KiB): what is here. b"" at the end of the stream.

        Raises PeerLost, TimedOut, Busy, ChannelClosed, Forked. `timeout` in seconds."""
        cdef Read op
        if n < 1:
            raise ValueError(f"read needs at least 1 byte, not {n}")
        op = self.reading(SOME, n)
        op.timeout = timeout
        return op

    def read_into(self, buffer, *, timeout=None):
        """Read into a writable buffer; the number of bytes, 0 at the end. After a cancellation it is never touched."""
        cdef Read op = self.reading(INTO, 0)
        op.timeout = timeout
        op.state = 2
        PyObject_GetBuffer(buffer, &op.view, PyBUF_WRITABLE)
        op.held = True
        op.state = 0
        return op

    def read_exactly(self, Py_ssize_t n, *, timeout=None):
        """Exactly `n` bytes. Raises EndOfChannel when the stream ends before (what came can still be read)."""
        cdef Read op
        if n < 0:
            raise ValueError(f"read_exactly needs at least 0 bytes, not {n}")
        op = self.reading(EXACTLY, n)
        op.timeout = timeout
        op.collected = bytearray(n)
        return op

    def read_until(self, bytes separator=b"\n", *, Py_ssize_t limit=65536, timeout=None):
        """Bytes up to and with `separator`. At most `limit` bytes, else TooLarge (they stay)."""
        cdef Read op
        if not separator:
            raise ValueError("read_until needs a separator of at least one byte")
        op = self.reading(UNTIL, limit)
        op.timeout = timeout
        op.separator = separator
        op.collected = bytearray()
        return op

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.reading(ITERATE, SCRATCH)

    def write(self, data, *, timeout=None):
        """Write all of `data` (any contiguous buffer); waits while the peer is slow. Cancelled, it goes whole or not at all."""
        return sending(self, data, ONE, timeout)

    def write_many(self, parts, *, timeout=None):
        """Write buffers in order."""
        return sending(self, list(parts), MANY, timeout)

    def write_eof(self, *, timeout=None):
        """Half-close: the peer reads the end after what was written. Raises Unsupported where the wire has none."""
        return sending(self, self._end_writing, CALL, timeout)

    def _end_writing(self):
        """One attempt at the half-close (internal). A pipe's write end is closed by it, so nobody may watch it then."""
        cdef int status
        self.unwatch(WRITE)
        status = self.end.try_eof()
        if self.senders:
            self.watch(WRITE)
        return status
