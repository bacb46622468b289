# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The standard library's StreamReader, fed and read as it would be by itself, with fewer calls and copies.

asyncio is neither patched nor replaced. A connection whose protocol is exactly `asyncio.StreamReaderProtocol` with exactly an
`asyncio.StreamReader`, none of whose methods somebody has changed, is served directly: `feed` does what
`StreamReader.feed_data` does (CPython 3.11 to 3.13), and the reader becomes an instance of a subclass of its own class whose
`read`, `readexactly`, `readuntil` and `readline` are native. All other methods, and the reader's state, are the standard
ones, so that both can be mixed.

A read gives an awaitable that is a coroutine for asyncio. If it must wait, it does so by a `Waiter`, which the StreamReader has
where it keeps its Future. When enough bytes come while it waits and none are buffered, they are made into the result at once
and the task goes on within the report of the descriptor: no buffer, no Future, no turn of the loop between. When not enough
come, the task is not woken. Bytes that were promised to a task which is cancelled before it runs go back to the front of the
reader's buffer. On the loop's thread.
"""
cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_CheckExact, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_WarnEx
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy
from anywire.engine._awaiting cimport (
    FINISHED, NEW, NEXT, RETURN, RUNNING, Awaited, Waiter, an_exception_is_set, install)
from anywire.loop._core cimport Core

from asyncio import IncompleteReadError, LimitOverrunError
from asyncio.streams import StreamReader, StreamReaderProtocol

cdef extern from "Python.h":
    """
    #include <string.h>      /* memmem(3) is there because Python.h asks for all of the C library */
    """
    Py_ssize_t Py_REFCNT(object object) noexcept
    dict PyObject_GenericGetDict(object object, void* context)
    long PyLong_AsLongAndOverflow(object n, int* overflow) noexcept
    void* memmem(const void* in_, size_t size, const void* what, size_t length) noexcept nogil

cdef enum:
    SOME, EXACTLY, UNTIL, LINE          # what a ReadOperation reads

cdef ReadOperation spare = None         # the last one that is over
cdef tuple NAMES = ("read", "readexactly", "readuntil", "readline")


@cython.final
cdef class ReadOperation(Awaited):
    """`StreamReader.read(n)` and `readexactly(n)` for n > 0, `readuntil(separator)`, `readline()`."""

    @property
    def __name__(self):
        return NAMES[self.kind]

    @property
    def __qualname__(self):
        return f"StreamReader.{NAMES[self.kind]}"

    def __dealloc__(self):
        if self.state == NEW:
            PyErr_WarnEx(RuntimeWarning, f"coroutine 'StreamReader.{NAMES[self.kind]}' was never awaited".encode(), 1)

    cdef int proceed(self, PyObject** result) except -1:
        cdef object value
        cdef Waiter waiter = self.waiter
        cdef bint again = False
        if self.state == NEW:
            self.state = RUNNING
            error = self.fields["_exception"]
            if error is not None:
                raise error
        elif self.state == FINISHED:
            raise RuntimeError("cannot reuse already awaited coroutine")
        else:
            waiter.owner = None
            if self.fields["_waiter"] is waiter:
                self.fields["_waiter"] = None
            if waiter.failure is not None:
                raise waiter.failure
            again = True
        value = self.value
        if value is None:
            value = self.attempt()
        if value is None:
            if again and self.fields["_exception"] is not None:
                raise self.fields["_exception"]    # lost after it was woken: nobody would wake it again
            value = self.wait()
            Py_INCREF(value)
            result[0] = <PyObject*> value
            return NEXT
        self.rest()
        Py_INCREF(value)
        result[0] = <PyObject*> value
        return RETURN

    cdef int failed(self) except -1:
        try:
            an_exception_is_set()
        except BaseException:
            if self.state != FINISHED:
                self.rest()
            raise

    cdef object wait(self):
        cdef dict fields = self.fields
        cdef Waiter waiter
        if fields["_waiter"] is not None:
            raise RuntimeError(f"{NAMES[min(self.kind, <int> UNTIL)]}() called while another coroutine is already waiting for "
                               "incoming data")
        if fields["_paused"]:
            fields["_paused"] = False
            fields["_transport"].resume_reading()
        waiter = self.waiter = take_waiter(fields["_loop"])
        waiter.owner = self
        fields["_waiter"] = waiter
        return waiter.sleep()

    cdef object attempt(self):
        """The result, of what is buffered; or None."""
        cdef dict fields = self.fields
        cdef Py_ssize_t size = PyByteArray_GET_SIZE(fields["_buffer"])
        if self.kind == SOME:
            return self.take(min(self.most, size)) if size or fields["_eof"] else None
        if self.kind == EXACTLY:
            if size >= self.most:
                return self.take(self.most)
            return self.partial(self.most) if fields["_eof"] else None
        return self.attempt_until()

    cdef object attempt_until(self):
        """As StreamReader.readuntil and readline: where the separator begins must not be beyond the reader's limit."""
        cdef dict fields = self.fields
        cdef Py_ssize_t limit = fields["_limit"], length = PyBytes_GET_SIZE(self.separator), found
        found = self.find(fields["_buffer"])
        if found < 0:
            if self.searched > limit:
                return self.over_limit(False, self.searched)
            return self.partial(None) if fields["_eof"] else None
        if found > limit:
            return self.over_limit(True, found)
        return self.take(found + length)

    cdef Py_ssize_t find(self, object buffer) except -2:
        """Where the separator begins in the buffer; -1: nowhere, and `searched` says how far that is known."""
        cdef Py_ssize_t size = PyByteArray_GET_SIZE(buffer), length = PyBytes_GET_SIZE(self.separator)
        cdef char* start = PyByteArray_AS_STRING(buffer)
        cdef char* place
        if self.searched > size:
            self.searched = 0                      # another task has taken what was there
        place = <char*> memmem(start + self.searched, size - self.searched, PyBytes_AS_STRING(self.separator), length)
        if place != NULL:
            return place - start
        if size - self.searched >= length:
            self.searched = size + 1 - length
        return -1

    cdef object take(self, Py_ssize_t n):
        """`n` bytes from the front of the reader's buffer."""
        cdef dict fields = self.fields
        cdef object buffer = fields["_buffer"], data
        data = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer), n)
        if n:
            del buffer[:n]
        if fields["_paused"]:
            self.reader._maybe_resume_transport()
        return data

    cdef object partial(self, object expected):
        """The end came too early: what is there goes with the error, or is the last line."""
        cdef object buffer = self.fields["_buffer"]
        data = bytes(buffer)
        buffer.clear()
        if self.kind == LINE:
            return data
        raise IncompleteReadError(data, expected)

    cdef object over_limit(self, bint found, Py_ssize_t consumed):
        cdef dict fields = self.fields
        cdef str text = ("Separator is found, but chunk is longer than limit" if found else
                         "Separator is not found, and chunk exceed the limit")
        if self.kind == UNTIL:
            raise LimitOverrunError(text, consumed)
        if found:
            del fields["_buffer"][:consumed + PyBytes_GET_SIZE(self.separator)]
        else:
            fields["_buffer"].clear()
        self.reader._maybe_resume_transport()
        raise ValueError(text)

    # While it waits, when bytes come:

    cdef Py_ssize_t enough(self, const char* start, Py_ssize_t size) except -1:
        """How many of these bytes are its result, when nothing is buffered; 0: they are too few, or too many."""
        cdef const char* place
        if self.kind == SOME:
            return min(size, self.most)
        if self.kind == EXACTLY:
            return self.most if size >= self.most else 0
        place = <const char*> memmem(start, size, PyBytes_AS_STRING(self.separator), PyBytes_GET_SIZE(self.separator))
        if place == NULL or place - start > <Py_ssize_t> self.fields["_limit"]:
            return 0
        return place - start + PyBytes_GET_SIZE(self.separator)

    cdef bint satisfied(self) except -1:
        """Whether what is buffered ends its wait."""
        cdef object buffer = self.fields["_buffer"]
        if self.kind == SOME:
            return True
        if self.kind == EXACTLY:
            return PyByteArray_GET_SIZE(buffer) >= self.most
        return self.find(buffer) >= 0 or self.searched > <Py_ssize_t> self.fields["_limit"]

    cdef int finish(self) except -1:
        cdef Waiter waiter = self.waiter
        if self.state == RUNNING and waiter is not None:
            waiter.owner = None
            if self.fields["_waiter"] is waiter:
                self.fields["_waiter"] = None
            if self.value is not None:             # promised, and not taken
                self.fields["_buffer"][:0] = self.value
        return self.rest()

    cdef int rest(self) except -1:
        """It is over; the object is used again for the next read, when nobody else has it any more."""
        global spare
        self.state = FINISHED
        if self.waiter is not None:
            keep_waiter(self.waiter)
            self.waiter = None
        self.reader = self.fields = self.value = self.separator = None
        spare = self
        return 0


install(ReadOperation)


# A waiter belongs to its loop, and so it is there that it is kept for the next read.

cdef Waiter take_waiter(object loop):
    cdef Waiter waiter = None
    if isinstance(loop, Core):
        waiter = (<Core> loop).spare_waiter
    if waiter is not None:
        (<Core> loop).spare_waiter = None
        return waiter
    waiter = Waiter.__new__(Waiter)
    waiter.loop = loop
    return waiter


cdef int keep_waiter(Waiter waiter) except -1:
    if isinstance(waiter.loop, Core):
        (<Core> waiter.loop).spare_waiter = waiter
    return 0

_standard_read = StreamReader.read
_standard_readexactly = StreamReader.readexactly
_standard_readuntil = StreamReader.readuntil


cdef Py_ssize_t size_of(object n) noexcept:
    """`n`, if it is an int that a native read takes; else 0."""
    cdef int overflow = 0
    cdef long size = PyLong_AsLongAndOverflow(n, &overflow) if type(n) is int else 0
    return size if size > 0 and not overflow else 0


cdef ReadOperation reading(object reader, int kind, Py_ssize_t most, bytes separator):
    global spare
    cdef ReadOperation operation = spare
    if operation is not None and Py_REFCNT(operation) == 2:
        spare = None
        operation.state = NEW
        operation.searched = 0
    else:
        operation = ReadOperation.__new__(ReadOperation)
    operation.reader = reader
    operation.fields = PyObject_GenericGetDict(reader, NULL)
    operation.kind = kind
    operation.most = most
    operation.separator = separator
    return operation


class _StreamReader(StreamReader):
    """A StreamReader of the standard library whose reading is native. What is unusual it leaves to the standard methods."""

    def read(self, n=-1):
        cdef Py_ssize_t size = size_of(n)
        return reading(self, SOME, size, None) if size else _standard_read(self, n)

    def readexactly(self, n):
        cdef Py_ssize_t size = size_of(n)
        return reading(self, EXACTLY, size, None) if size else _standard_readexactly(self, n)

    def readuntil(self, separator=b"\n"):
        if type(separator) is not bytes or not separator:
            return _standard_readuntil(self, separator)
        return reading(self, UNTIL, 0, separator)

    def readline(self):
        return reading(self, LINE, 0, b"\n")


for _method in (_StreamReader.read, _StreamReader.readexactly, _StreamReader.readuntil, _StreamReader.readline):
    _method.__doc__ = getattr(StreamReader, _method.__name__).__doc__


_StreamReader.__name__ = _StreamReader.__qualname__ = "StreamReader"

# What they were when this module was loaded: a changed class is left to its own methods.
cdef tuple ORIGINALS = tuple(
    (kind, name, getattr(kind, name)) for kind, names in (
        (StreamReader, ("feed_data", "_wakeup_waiter", "read", "readexactly", "readuntil", "readline", "_wait_for_data",
                        "_maybe_resume_transport")),
        (StreamReaderProtocol, ("data_received", "_stream_reader")),
    ) for name in names)


cdef object stream_of(object protocol):
    """The weak reference to the protocol's StreamReader, where all is the standard library's own; else None."""
    if type(protocol) is not StreamReaderProtocol:
        return None
    reference = protocol._stream_reader_wr
    reader = reference() if reference is not None else None
    if type(reader) is _StreamReader:
        return reference
    if type(reader) is not StreamReader:
        return None
    own = (vars(protocol), vars(reader))
    for kind, name, original in ORIGINALS:
        if getattr(kind, name) is not original or name in own[0] or name in own[1]:
            return None
    reader.__class__ = _StreamReader
    return reference


# The reader's state is read in its dictionary, where it is for everybody: an attribute costs several times as much.

cdef dict fields_of(object reader):
    return PyObject_GenericGetDict(reader, NULL)


# Only the waiter is held by who wakes it, so that nobody but its task has the operation, which then serves for the next read.

cdef Waiter waiting_in(dict fields):
    """The waiter of the native read that waits, or None: nobody does, or something else."""
    cdef object waiter = fields["_waiter"]
    if type(waiter) is not Waiter or (<Waiter> waiter).owner is None or not (<Waiter> waiter).asleep():
        return None
    return <Waiter> waiter


cdef Py_ssize_t direct(dict fields, Waiter waiter) except -1:
    """Up to which size a `bytes` can become its result as it is; 0 if what is buffered comes first."""
    if waiter is None or (<ReadOperation> waiter.owner).kind != SOME or fields["_buffer"] or fields["_eof"]:
        return 0
    return (<ReadOperation> waiter.owner).most


cdef int deliver(dict fields, Waiter waiter, object data) except -1:
    """Hand its result to the read that waits, and let its task go on."""
    (<ReadOperation> waiter.owner).value = data
    fields["_waiter"] = None
    return waiter.wake()


cdef int buffer(dict fields, const char* start, Py_ssize_t size, bint pause) except -1:
    """Append to the reader's buffer, and stop the transport when there is too much."""
    cdef object room = fields["_buffer"]
    cdef Py_ssize_t before = PyByteArray_GET_SIZE(room)
    PyByteArray_Resize(room, before + size)
    memcpy(PyByteArray_AS_STRING(room) + before, start, size)
    if pause and before + size > 2 * fields["_limit"] and not fields["_paused"] and fields["_transport"] is not None:
        fields["_transport"].pause_reading()
        fields["_paused"] = True
    return 0


cdef int feed(object reader, dict fields, Waiter waiter, const char* start, Py_ssize_t size) except -1:
    """`StreamReader.feed_data` of the `size` > 0 bytes at `start`; the native read of `waiter` waits for them, or None."""
    cdef object other
    cdef Py_ssize_t enough = 0
    if fields["_eof"] or not PyByteArray_CheckExact(fields["_buffer"]):
        reader.feed_data(PyBytes_FromStringAndSize(start, size))
        return 0
    if waiter is not None:
        if PyByteArray_GET_SIZE(fields["_buffer"]) == 0:
            enough = (<ReadOperation> waiter.owner).enough(start, size)
        if enough:
            if enough < size:
                buffer(fields, start + enough, size - enough, True)
            return deliver(fields, waiter, PyBytes_FromStringAndSize(start, enough))
        buffer(fields, start, size, False)
        if (<ReadOperation> waiter.owner).satisfied():
            buffer(fields, start, 0, True)         # it may be more than it takes
            fields["_waiter"] = None
            waiter.wake()
        return 0
    buffer(fields, start, size, True)
    other = fields["_waiter"]
    if other is not None:
        fields["_waiter"] = None
        if not other.cancelled():
            other.set_result(None)
    return 0
