# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""TLS on the loop: asyncio's own SSLProtocol, with what is done per record in C.

`TLSProtocol` is a subclass of `asyncio.sslproto.SSLProtocol`. All that belongs to the connection is the standard class's: its
states, the handshake and the end with their time-outs, `start_tls`, the water marks, what is logged. Of it this replaces the
way of the bytes. A native transport gives what it received to the `TLSLayer`, which has libssl decrypt it straight into the
`bytes`, the buffer or the StreamReader that the application gets; what the application writes is encrypted at once, and all of
one turn leaves in one send. In any other state than the quiet middle of a connection, the standard methods do it, on the same
engine (`_tls_engine`).

`tls_protocol` makes the standard class's own objects instead where the engine can't be used: another Python or OpenSSL than
those known, a context with a message callback, SSLObjects of another class, or ANYWIRE_TLS=memorybio in the environment.
On the loop's thread.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.string cimport memcpy
from anywire.engine._awaiting cimport Waiter
from anywire.loop._streams cimport deliver, direct, feed, fields_of, stream_of, waiting_in
from anywire.loop._tls_engine cimport AGAIN, CLOSED, DONE, FAILED, Engine, Outcome
from anywire.loop._connection cimport Layer
from anywire.loop._transport cimport BUFFERED, PLAIN, STREAM, StreamTransport

import ssl
from asyncio import sslproto

from anywire.loop._stream_writer import quick
from anywire.loop._tls_engine import Incoming, Outgoing, problem

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject** bytes, Py_ssize_t size) except -1
    PyObject* new_bytes "PyBytes_FromStringAndSize"(const char* start, Py_ssize_t size) except NULL

cdef enum:
    SMALL = 8192             # what is about as large is decrypted in this module's room, and copied to its exact size
    LARGE = 65536            # so much is not held back for the end of the turn
    RECORD = 16384           # the largest record's content (RFC 8446, 5.1)

cdef char plain[SMALL]       # under the GIL, and no Python code runs while it is used

cdef object WRAPPED = sslproto.SSLProtocolState.WRAPPED
cdef object FLUSHING = sslproto.SSLProtocolState.FLUSHING
cdef object AGAIN_ERRORS = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLSyscallError)


cdef class TLSLayer(Layer):
    """The way of the bytes of one TLSProtocol."""

    cdef int received(self, const char* start, Py_ssize_t size) except -1:
        """Ciphertext from the loop, in a report of the descriptor."""
        cdef object protocol = self.protocol
        cdef Engine engine = self.engine
        if self.state is not WRAPPED or self.app_reading_paused:
            engine.keep(start, size)
            protocol.buffer_updated(0)
            return 0
        try:
            engine.tls.window = start
            engine.tls.window_size = size
            try:
                self.read(True)
            finally:
                engine.keep_window()
            if len(self.backlog):
                protocol._do_write()
            elif engine.tls.out_size and not self.ssl_writing_paused:
                self.pass_on(True)                     # an answer of libssl's own, to a key update
            if self.app_writing_paused:
                protocol._control_app_writing()
            if engine.tls.kept_size or self.ssl_reading_paused:
                protocol._control_ssl_reading()
        except Exception as error:
            protocol._fatal_error(error, "Fatal error on SSL protocol")
        return 0

    # ---- reading ---------------------------------------------------------------------------------------------------

    cdef int read(self, bint from_the_loop) except -1:
        """Give the application all that can be decrypted now. `from_the_loop`: no task is running."""
        cdef object app = self.app_protocol, reader
        if app is not self.app:
            self.take(app)
        if self.kind == BUFFERED:
            return self.read_buffered()
        if self.kind == STREAM:
            reader = self.reader()
            if reader is not None:
                return self.read_stream(reader, from_the_loop)
        return self.read_plain()

    cdef int take(self, object app) except -1:
        self.app = app
        self.kind = PLAIN
        self.reader = None
        if self.protocol._app_protocol_is_buffer:
            self.kind = BUFFERED
        else:
            self.reader = stream_of(app)
            if self.reader is not None:
                self.kind = STREAM
        return 0

    cdef int read_plain(self) except -1:
        cdef Outcome outcome = AGAIN
        cdef object data = self.decrypt(&outcome)
        if data is not None:
            self.app.data_received(data)
        return self.finish(outcome)

    cdef int read_stream(self, object reader, bint from_the_loop) except -1:
        cdef Outcome outcome = AGAIN
        cdef object data = self.decrypt(&outcome)
        cdef Waiter waiter
        cdef dict fields
        if data is not None:
            fields = fields_of(reader)
            waiter = waiting_in(fields) if from_the_loop else None
            if direct(fields, waiter) >= PyBytes_GET_SIZE(data):
                deliver(fields, waiter, data)
            else:
                feed(reader, fields, waiter, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        return self.finish(outcome)

    cdef int read_buffered(self) except -1:
        cdef object protocol = self.protocol, app = self.app, room
        cdef Engine engine = self.engine
        cdef Outcome outcome = AGAIN
        cdef Py_buffer view
        cdef size_t filled, got
        while True:
            room = app.get_buffer(engine.tls.kept_size + engine.tls.window_size)
            PyObject_GetBuffer(room, &view, PyBUF_WRITABLE)
            try:
                if view.len == 0:
                    raise RuntimeError("get_buffer() returned an empty buffer")
                filled = 0
                while True:
                    got = 0
                    outcome = engine.read(<char*> view.buf + filled, view.len - filled, &got)
                    filled += got
                    if outcome != DONE or filled == <size_t> view.len:
                        break
                    if not engine.has_more():
                        outcome = AGAIN
                        break
                if outcome == FAILED:
                    outcome = self.say_error()
            finally:
                PyBuffer_Release(&view)
            room = None                                # the application may resize it in buffer_updated
            if filled:
                app.buffer_updated(filled)
            if outcome != DONE:
                return self.finish(outcome)
            if not engine.has_more() or self.app_reading_paused:
                return 0
            if self.state is not WRAPPED and self.state is not FLUSHING:
                return 0
            if self.app_protocol is not app:
                protocol._loop.call_soon(protocol._do_read)
                return 0

    cdef object decrypt(self, Outcome* outcome):
        """All that can be decrypted now as bytes, or None. What ended it is in `outcome`, and an error in `failure`."""
        cdef Engine engine = self.engine
        cdef PyObject* large = NULL
        cdef object data = None
        cdef size_t filled = 0, got, size = engine.expected()
        cdef char* room = plain
        if size <= SMALL:
            size = SMALL
        else:
            large = new_bytes(NULL, size)
            room = PyBytes_AS_STRING(<object> large)
        while True:
            if filled == size:                         # the estimate was too low
                size = filled + RECORD + engine.expected()
                if large == NULL:
                    large = new_bytes(NULL, size)
                    memcpy(PyBytes_AS_STRING(<object> large), plain, filled)
                else:
                    _PyBytes_Resize(&large, size)
                room = PyBytes_AS_STRING(<object> large)
            got = 0
            outcome[0] = engine.read(room + filled, size - filled, &got)
            filled += got
            if outcome[0] != DONE:
                break
            if not engine.has_more():
                outcome[0] = AGAIN
                break
        if large != NULL:
            if filled < size:
                _PyBytes_Resize(&large, filled)
            data = <object> large
            Py_DECREF(data)
        elif filled:
            data = PyBytes_FromStringAndSize(plain, filled)
        if outcome[0] == FAILED:
            outcome[0] = self.say_error()
        return data if filled else None

    cdef Outcome say_error(self):
        """Have Python's ssl raise what libssl's error queue says, into `failure`."""
        try:
            data = self.engine.sslobj.read(1)
        except AGAIN_ERRORS:
            return AGAIN
        except Exception as error:
            self.failure = error
            return FAILED
        if not data:
            return CLOSED
        self.failure = ssl.SSLError("libssl went on after an error; what it decrypted is not to be trusted")
        return FAILED

    cdef int finish(self, Outcome outcome) except -1:
        """What comes after the last byte: nothing, an error, or the peer's close_notify."""
        cdef object protocol = self.protocol
        if outcome == FAILED:
            error, self.failure = self.failure, None
            raise error
        if outcome == CLOSED and protocol is not None:
            protocol._call_eof_received()
            protocol._start_shutdown()
        return 0

    # ---- writing ---------------------------------------------------------------------------------------------------

    cdef int write(self, object protocol, object data) except -1:
        """`SSLProtocol._write_appdata` of one piece that is not empty."""
        cdef Py_buffer view
        if self.state is not WRAPPED or len(self.backlog):
            protocol._write_appdata((data,))
            return 0
        try:
            if PyBytes_CheckExact(data):
                self.encrypt(protocol, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            else:
                if isinstance(data, memoryview) and not data.c_contiguous:
                    data = bytes(data)
                PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
                try:
                    self.encrypt(protocol, <const char*> view.buf, view.len)
                finally:
                    PyBuffer_Release(&view)
            if not self.ssl_writing_paused:
                self.pass_on(True)
            if self.ssl_writing_paused or self.app_writing_paused or self.no_water:
                protocol._control_app_writing()
        except Exception as error:
            protocol._fatal_error(error, "Fatal error on SSL protocol")
        return 0

    cdef int encrypt(self, object protocol, const char* start, size_t size) except -1:
        """Into the engine's output; what libssl can't take now, into the protocol's backlog."""
        cdef Engine engine = self.engine
        cdef Outcome outcome
        cdef size_t written
        engine.reserve(size)
        while size:
            written = 0
            outcome = engine.write(start, size, &written)
            start += written
            size -= written
            if outcome == DONE:
                continue
            rest = PyBytes_FromStringAndSize(start, size)
            if outcome == FAILED:
                try:
                    written = engine.sslobj.write(rest)
                except AGAIN_ERRORS:
                    pass
                else:
                    start += written
                    size -= written
                    continue
            protocol._write_backlog.append(rest)
            protocol._write_buffer_size += size
            return 0
        return 0

    cdef int pass_on(self, bint soon) except -1:
        """Give the transport what is encrypted: at the end of the turn if it is little and may come `soon`."""
        cdef StreamTransport native = self.native
        cdef size_t size = self.engine.tls.out_size
        if size == 0:
            return 0
        if native is None:
            transport = self.protocol._transport if self.protocol is not None else None
            data = self.engine.take_out()
            if transport is not None:
                transport.write(data)
            return 0
        if soon and native.wait_a_little(size):
            if not native.held:
                native.hold()
            return 0
        return self.spill()

    cdef int spill(self) except -1:
        cdef StreamTransport native = self.native
        cdef Engine engine = self.engine
        if engine.tls.out_size == 0:
            return 0
        try:
            if native is not None and not native.conn_lost and not native.eof_written:
                native.send_or_queue(None, engine.tls.out, engine.tls.out_size)
        finally:
            engine.sent()
        return 0

    cdef object above(self):
        return self.app_protocol


class _Transport(sslproto._SSLProtocolTransport):
    """What the application gets: the standard class, whose `write` is quick."""

    def write(self, data):
        cdef TLSLayer layer
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data: expecting a bytes-like instance, got {type(data).__name__}")
        if data:
            protocol = self._ssl_protocol
            layer = protocol._layer                    # not kept here: what outlives the connection would keep its context
            layer.write(protocol, data)

    write.__doc__ = sslproto._SSLProtocolTransport.write.__doc__


_Transport.__name__ = _Transport.__qualname__ = "_SSLProtocolTransport"


def of_the_layer(name):
    """An attribute of the TLSProtocol that is kept in its layer."""
    return property(
        lambda self: getattr(self._layer, name), lambda self, value: setattr(self._layer, name, value), doc=name)


class TLSProtocol(sslproto.SSLProtocol):
    """The standard library's SSLProtocol on an engine of ours. Made by `tls_protocol`.

    Raises LookupError when the context's SSLObject is of an unknown kind.
    """

    # What is looked at for each record is the layer's.
    _state = of_the_layer("state")
    _app_protocol = of_the_layer("app_protocol")
    _app_reading_paused = of_the_layer("app_reading_paused")
    _app_writing_paused = of_the_layer("app_writing_paused")
    _ssl_reading_paused = of_the_layer("ssl_reading_paused")
    _ssl_writing_paused = of_the_layer("ssl_writing_paused")

    max_size = 0                 # else each has 256 KiB from the beginning, for transports that are not ours

    def __init__(self, loop, app_protocol, sslcontext, *arguments, **options):
        cdef TLSLayer layer = TLSLayer.__new__(TLSLayer)
        self._layer = layer
        super().__init__(loop, app_protocol, sslcontext, *arguments, **options)
        self.max_size = sslproto.SSLProtocol.max_size
        layer.backlog = self._write_backlog
        try:
            layer.engine = Engine(self._sslobj, self._sslcontext)
        except LookupError:
            self._app_transport._closed = True         # it never was one
            raise
        self._incoming = Incoming(layer.engine)
        self._outgoing = Outgoing(layer.engine)

    def _get_app_transport(self):
        if self._app_transport is None:
            if self._app_transport_created:
                raise RuntimeError("Creating _SSLProtocolTransport twice")
            self._app_transport = _Transport(self._loop, self)
            self._app_transport_created = True
        return self._app_transport

    def connection_made(self, transport):
        cdef TLSLayer layer = self._layer
        cdef StreamTransport native
        layer.protocol = self
        if type(transport) is StreamTransport:
            native = transport
            if native.protocol is self:
                layer.native = native
                native.put_layer(layer)
        super().connection_made(transport)

    def connection_lost(self, exc):
        cdef TLSLayer layer = self._layer
        try:
            super().connection_lost(exc)
        finally:
            layer.protocol = layer.app = layer.reader = layer.native = None

    def _on_handshake_complete(self, handshake_exc):
        """The standard method; a server's handler of streams gets a quick writer."""
        protocol = self._app_protocol
        if handshake_exc is not None or self._app_state is not sslproto.AppProtocolState.STATE_INIT or \
                stream_of(protocol) is None or protocol._client_connected_cb is None:
            super()._on_handshake_complete(handshake_exc)
            return
        handler = protocol._client_connected_cb
        protocol._client_connected_cb = lambda reader, writer: handler(reader, quick(writer))
        try:
            super()._on_handshake_complete(handshake_exc)
        finally:
            protocol._client_connected_cb = handler

    def _abort(self, *arguments):
        (<TLSLayer> self._layer).spill()               # it would be in the kernel if it had not been held back
        super()._abort(*arguments)

    def _get_write_buffer_size(self):
        """What is held back for the end of the turn is the transport's, as if it were written to it already."""
        size = self._write_buffer_size
        if self._ssl_writing_paused:
            size += self._outgoing.pending
        return size

    def _set_write_buffer_limits(self, high=None, low=None):
        super()._set_write_buffer_limits(high, low)
        (<TLSLayer> self._layer).no_water = self._outgoing_high_water == 0

    def _process_outgoing(self):
        if not self._ssl_writing_paused:
            (<TLSLayer> self._layer).pass_on(False)
        self._control_app_writing()

    def _do_read__buffered(self):
        (<TLSLayer> self._layer).read(False)

    def _do_read__copied(self):
        (<TLSLayer> self._layer).read(False)


def tls_protocol(loop, app_protocol, sslcontext, *arguments, **options):
    """An SSLProtocol, with the arguments of that class: a quick one if this process and this context allow."""
    if problem() is None and suits(sslcontext):
        try:
            return TLSProtocol(loop, app_protocol, sslcontext, *arguments, **options)
        except LookupError:
            pass
    return sslproto.SSLProtocol(loop, app_protocol, sslcontext, *arguments, **options)


cdef bint suits(object context) except -1:
    """Whether nobody is called for each record: a message callback may raise, which only Python's own reading finds."""
    if not context:
        return True                                    # the standard class makes one
    return isinstance(context, ssl.SSLContext) and context._msg_callback is None and \
        context.sslobject_class is ssl.SSLObject
