# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The standard library's StreamReader, fed and read as it would be by itself, with fewer calls and copies.

asyncio is neither patched nor replaced. A connection whose protocol is exactly `asyncio.StreamReaderProtocol` with exactly an
`asyncio.StreamReader`, none of whose methods somebody has changed, is served directly: `feed` does what
`StreamReader.feed_data` does (CPython 3.11 to 3.13), and the reader becomes an instance of a subclass of its own class whose
`read` is native. All other methods, and the reader's state, are the standard ones, so that both can be mixed.

`read(n)` gives an awaitable that is a coroutine for asyncio. If it must wait, it yields a `ReadWaiter`, the few methods of a
Future that a Task and the StreamReader use. When bytes come while it waits and none are buffered, they are made into the
result at once and the task goes on within the report of the descriptor: no buffer, no Future, no turn of the loop between.
Bytes that were promised to a task which is cancelled before it runs go back to the front of the reader's buffer.
On the loop's thread.
"""
cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_CheckExact, PyByteArray_GET_SIZE, PyByteArray_Resize
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_WarnEx
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.string cimport memcpy

import asyncio
from asyncio import CancelledError
from asyncio.streams import StreamReader, StreamReaderProtocol

cdef extern from "Python.h":
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    void drop "Py_DECREF"(PyObject* object)

cdef extern from *:
    """
    typedef int (*anywire_stream_send)(PyObject*, PyObject*, PyObject**);
    static int anywire_stream_install(PyObject* type, anywire_stream_send f) {
        PyTypeObject* t = (PyTypeObject*) type;
        if (t->tp_as_async == NULL) { PyErr_SetString(PyExc_SystemError, "no async slots"); return -1; }
        t->tp_as_async->am_send = (sendfunc) f;       /* PyIter_Send() then needs no StopIteration per result */
        PyType_Modified(t);
        return 0;
    }
    """
    ctypedef int (*anywire_stream_send)(PyObject*, PyObject*, PyObject**) except -1
    int anywire_stream_install(object type, anywire_stream_send f) except -1

cdef enum:
    NEW, WAITING, FINISHED


cdef int am_send(PyObject* self, PyObject* argument, PyObject** result) except -1:
    return (<Operation> self).step(result)


cdef int install(object kind) except -1:
    """Give a class of operations the am_send slot, which Cython has no syntax for."""
    return anywire_stream_install(kind, am_send)


@cython.freelist(64)
cdef class ReadWaiter:
    """What a waiting `read` yields to its Task, and what the StreamReader has as its `_waiter`."""

    def get_loop(self):
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        self.callback = callback
        self.context = context
        if self.woken:
            self.wake_soon()

    def remove_done_callback(self, callback):
        if self.callback is None:
            return 0
        self.callback = None
        return 1

    def done(self):
        return self.woken

    def cancelled(self):
        return isinstance(self.failure, CancelledError)

    def result(self):
        if self.failure is not None:
            raise self.failure

    def exception(self):
        return self.failure

    def cancel(self, msg=None):
        if self.woken:
            return False
        self.failure = CancelledError() if msg is None else CancelledError(msg)
        self.wake_soon()
        return True

    def set_result(self, result):
        if self.woken:
            raise asyncio.InvalidStateError("invalid state")
        self.wake_soon()

    def set_exception(self, exception):
        if self.woken:
            raise asyncio.InvalidStateError("invalid state")
        self.failure = exception() if isinstance(exception, type) else exception
        self.wake_soon()

    cdef int wake(self) except -1:
        """Let the task go on now. Only from a report of the loop, where no other task is running."""
        cdef object callback = self.callback, context = self.context
        if callback is None or context is None:
            return self.wake_soon()
        try:
            PyContext_Enter(context)
        except RuntimeError:                       # this very context is running: the loop must do it in its turn
            return self.wake_soon()
        self.woken = True
        self.callback = None
        try:
            callback(self)
        finally:
            PyContext_Exit(context)
        return 0

    cdef int wake_soon(self) except -1:
        cdef object callback = self.callback
        self.woken = True
        if callback is not None:
            self.callback = None
            self.loop.call_soon(callback, self, context=self.context)
        return 0


cdef class Operation:
    """An awaitable that is a coroutine for asyncio, and costs little more than a call when it need not wait."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        cdef PyObject* result = NULL
        cdef int r = self.step(&result)
        out = <object> result
        drop(result)
        if r == NEXT:
            return out
        raise StopIteration(out)

    def throw(self, kind, value=None, traceback=None):
        self.finish()
        if isinstance(kind, BaseException):
            raise kind
        if value is None:
            value = kind()
        elif not isinstance(value, BaseException):
            value = kind(value)
        raise value if traceback is None else value.with_traceback(traceback)

    def close(self):
        self.finish()

    cdef int step(self, PyObject** result) except -1:
        return RETURN

    cdef int finish(self) except -1:
        self.state = FINISHED
        return 0


@cython.final
cdef class ReadOperation(Operation):
    """`StreamReader.read(n)` for n > 0."""

    __name__ = "read"
    __qualname__ = "StreamReader.read"

    def __dealloc__(self):
        if self.state == NEW:
            PyErr_WarnEx(RuntimeWarning, "coroutine 'StreamReader.read' was never awaited", 1)

    cdef int step(self, PyObject** result) except -1:
        cdef object value = None
        cdef ReadWaiter waiter
        if self.state == NEW:
            try:
                value = self.begin()
            except BaseException:
                self.state = FINISHED
                raise
            if self.state == WAITING:
                Py_INCREF(value)
                result[0] = <PyObject*> value
                return NEXT
        elif self.state == WAITING:
            self.state = FINISHED
            waiter = self.waiter
            self.waiter = None
            waiter.operation = None
            if self.reader._waiter is waiter:
                self.reader._waiter = None
            if waiter.failure is not None:
                raise waiter.failure
            value = self.value if self.value is not None else self.take()
        else:
            raise RuntimeError("cannot reuse already awaited coroutine")
        Py_INCREF(value)
        result[0] = <PyObject*> value
        return RETURN

    cdef object begin(self):
        """The bytes that are here, or the waiter to be yielded."""
        cdef object reader = self.reader
        cdef ReadWaiter waiter
        error = reader._exception
        if error is not None:
            raise error
        if reader._buffer or reader._eof:
            self.state = FINISHED
            return self.take()
        if reader._waiter is not None:
            raise RuntimeError("read() called while another coroutine is already waiting for incoming data")
        if reader._paused:
            reader._paused = False
            reader._transport.resume_reading()
        waiter = ReadWaiter.__new__(ReadWaiter)
        waiter.loop = reader._loop
        waiter.operation = self
        waiter._asyncio_future_blocking = True
        reader._waiter = self.waiter = waiter
        self.state = WAITING
        return waiter

    cdef object take(self):
        """Up to `most` bytes from the front of the reader's buffer."""
        cdef object reader = self.reader, buffer = reader._buffer, data
        cdef Py_ssize_t size = PyByteArray_GET_SIZE(buffer), n = min(self.most, size)
        data = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer), n)
        del buffer[:n]
        if reader._paused:
            reader._maybe_resume_transport()
        return data

    cdef int finish(self) except -1:
        cdef ReadWaiter waiter = self.waiter
        if self.state == WAITING:
            self.waiter = None
            waiter.operation = None
            if self.reader._waiter is waiter:
                self.reader._waiter = None
            if self.value is not None:             # promised, and not taken
                self.reader._buffer[:0] = self.value
                self.value = None
        self.state = FINISHED
        return 0


install(Operation)
install(ReadOperation)

_standard_read = StreamReader.read


class _StreamReader(StreamReader):
    """A StreamReader of the standard library whose `read` is native."""

    def read(self, n=-1):
        cdef ReadOperation operation
        if type(n) is not int or n <= 0 or n > 1 << 62:
            return _standard_read(self, n)
        operation = ReadOperation.__new__(ReadOperation)
        operation.reader = self
        operation.most = n
        return operation

    read.__doc__ = StreamReader.read.__doc__


_StreamReader.__name__ = _StreamReader.__qualname__ = "StreamReader"

# What they were when this module was loaded: a changed class is left to its own methods.
cdef tuple ORIGINALS = tuple(
    (kind, name, getattr(kind, name)) for kind, names in (
        (StreamReader, ("feed_data", "_wakeup_waiter", "read", "_wait_for_data", "_maybe_resume_transport")),
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


cdef ReadOperation waiting_in(object reader):
    """The `read` that waits for the very next bytes, or None: another method waits, nobody does, or bytes are buffered."""
    cdef object waiter = reader._waiter
    if type(waiter) is not ReadWaiter or (<ReadWaiter> waiter).woken or reader._buffer or reader._eof:
        return None
    return (<ReadWaiter> waiter).operation


cdef int deliver(object reader, ReadOperation operation, object data) except -1:
    """Hand bytes, no more than it asked for, to the `read` that waits, and let its task go on."""
    operation.value = data
    reader._waiter = None
    return operation.waiter.wake()


cdef int buffer(object reader, const char* start, Py_ssize_t size) except -1:
    """Append to the reader's buffer, and stop the transport when there is too much."""
    cdef object room = reader._buffer
    cdef Py_ssize_t before = PyByteArray_GET_SIZE(room)
    PyByteArray_Resize(room, before + size)
    memcpy(PyByteArray_AS_STRING(room) + before, start, size)
    if before + size > 2 * reader._limit and not reader._paused and reader._transport is not None:
        reader._transport.pause_reading()
        reader._paused = True
    return 0


cdef int feed(object reader, const char* start, Py_ssize_t size) except -1:
    """`StreamReader.feed_data` of the `size` > 0 bytes at `start`."""
    cdef object waiter
    if reader._eof or not PyByteArray_CheckExact(reader._buffer):
        reader.feed_data(PyBytes_FromStringAndSize(start, size))
        return 0
    buffer(reader, start, size)
    waiter = reader._waiter
    if waiter is not None:
        reader._waiter = None
        if not waiter.cancelled():
            waiter.set_result(None)
    return 0
