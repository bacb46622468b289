# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The standard library's StreamWriter on a native transport: `write` without a detour, `drain` that costs little when it
need not wait.

As with the reader (`_streams`), an instance of exactly `asyncio.StreamWriter` becomes one of a subclass of its own class; all
that is not fast here is the standard library's method. Only writers that a server's handler gets are: those of
`open_connection` are made where the loop doesn't see them. On the loop's thread.
"""
cimport cython
from cpython.exc cimport PyErr_WarnEx
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from anywire.engine._awaiting cimport FINISHED, NEW, RETURN, RUNNING, Awaited, install
from anywire.loop._streams cimport fields_of
from anywire.loop._transport cimport StreamTransport

from asyncio.streams import StreamReaderProtocol, StreamWriter

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object object) noexcept
    int PyIter_Send(object iterator, object value, PyObject** result) except -1

cdef DrainOperation spare = None        # the last one that is over

_standard_drain = StreamWriter.drain
_standard_write = StreamWriter.write


@cython.final
cdef class DrainOperation(Awaited):
    """`StreamWriter.drain()`: looks, and is done, or becomes the standard coroutine."""
    cdef object writer, coroutine

    __name__ = "drain"
    __qualname__ = "StreamWriter.drain"

    def __dealloc__(self):
        if self.state == NEW:
            PyErr_WarnEx(RuntimeWarning, "coroutine 'StreamWriter.drain' was never awaited", 1)

    cdef int proceed(self, PyObject** result) except -1:
        if self.state == NEW:
            if self.nothing_to_wait_for():
                self.rest()
                Py_INCREF(None)
                result[0] = <PyObject*> None
                return RETURN
            self.coroutine = _standard_drain(self.writer)
            self.state = RUNNING
        elif self.state == FINISHED:
            raise RuntimeError("cannot reuse already awaited coroutine")
        return self.went_on(PyIter_Send(self.coroutine, None, result))

    cdef int rest(self) except -1:
        """It is over; the object is used again for the next one, when nobody else has it any more."""
        global spare
        self.state = FINISHED
        self.writer = None
        spare = self
        return 0

    cdef int went_on(self, int status) except -1:
        if status == RETURN:
            self.state = FINISHED
        return status

    cdef bint nothing_to_wait_for(self) except -1:
        cdef dict fields = fields_of(self.writer)
        cdef object transport = fields["_transport"], protocol = fields["_protocol"], reader
        cdef StreamTransport native
        if type(transport) is StreamTransport:
            native = transport
            if native.closing or native.protocol_paused or native.protocol is not protocol:
                return False
        elif type(protocol) is not StreamReaderProtocol or protocol._paused or protocol._connection_lost or \
                transport.is_closing():                # TLS
            return False
        reader = fields["_reader"]
        return reader is None or reader._exception is None

    def throw(self, *error):
        if self.state != RUNNING:
            return Awaited.throw(self, *error)
        return self.coroutine.throw(*error)

    def close(self):
        if self.state == RUNNING:
            self.coroutine.close()
        self.state = FINISHED


install(DrainOperation)


class _StreamWriter(StreamWriter):
    """A StreamWriter of the standard library whose `write` and `drain` are native."""

    def write(self, data):
        transport = self._transport
        if type(transport) is StreamTransport:
            (<StreamTransport> transport).put(data)
        else:
            transport.write(data)

    def drain(self):
        global spare
        cdef DrainOperation operation = spare
        if operation is not None and Py_REFCNT(operation) == 2:
            spare = None
            operation.state = NEW
        else:
            operation = DrainOperation.__new__(DrainOperation)
        operation.writer = self
        return operation

    write.__doc__ = StreamWriter.write.__doc__
    drain.__doc__ = StreamWriter.drain.__doc__


_StreamWriter.__name__ = _StreamWriter.__qualname__ = "StreamWriter"


def quick(writer):
    """Make a StreamWriter quick, where it is exactly the standard one; returns it."""
    if type(writer) is StreamWriter and StreamWriter.drain is _standard_drain and StreamWriter.write is _standard_write:
        writer.__class__ = _StreamWriter
    return writer
