# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Direct use of the libssl that Python's `ssl` has loaded, for what is done per record.

An `Engine` is made for an `ssl.SSLObject` of `SSLContext.wrap_bio`. It takes the `SSL` out of that object, after it has made
sure that it is one (`ssl_of`), and gives it a BIO of ours (`libssl.h`) in the place of the two MemoryBIOs. So the SSLObject goes
on working, for the handshake, the end and all that is asked of it; reading and writing needs no call into Python, no copy
into a MemoryBIO, and no bytes object in between. `Incoming` and `Outgoing` are what the MemoryBIOs were, for code that knows
those.

Errors are raised by Python: after a FAILED, `SSLObject.read` (or `.write`) finds libssl's error queue as it is, and says what it
would have said. `problem()` tells why all this can't be done in this process; then nobody makes an Engine.

On one thread at a time, with the GIL held also while a record is decrypted (some microseconds).
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from libc.stdlib cimport free

import os
import ssl
import sys

cdef extern from *:
    """
    /* The front of PySSLSocket in Modules/_ssl.c of CPython 3.11, 3.12 and 3.13. */
    typedef struct {
        PyObject_HEAD
        PyObject *Socket;               /* NULL for those of wrap_bio */
        aw_ssl *ssl;
        PyObject *ctx;                  /* the SSLContext */
    } aw_ssl_socket;
    #ifdef Py_GIL_DISABLED
    #define AW_GIL_DISABLED 1
    #else
    #define AW_GIL_DISABLED 0
    #endif
    """
    ctypedef struct aw_ssl_socket:
        PyObject* Socket
        aw_ssl* ssl
        PyObject* ctx
    bint AW_GIL_DISABLED

cdef extern from "anywire/loop/libssl.h" nogil:
    ctypedef struct functions:
        int (*SSL_read_ex)(aw_ssl*, void*, size_t, size_t*)
        int (*SSL_write_ex)(aw_ssl*, const void*, size_t, size_t*)
        int (*SSL_get_error)(const aw_ssl*, int)
        int (*SSL_pending)(const aw_ssl*)
        int (*SSL_get_shutdown)(const aw_ssl*)
        void (*SSL_set_bio)(aw_ssl*, aw_bio*, aw_bio*)
        void* (*SSL_get_ex_data)(const aw_ssl*, int)
        int (*BIO_free)(aw_bio*)
        int (*BIO_up_ref)(aw_bio*)
        unsigned long (*ERR_peek_error)()
        void (*ERR_clear_error)()
    functions aw_libssl
    int AW_SSL_ERROR_WANT_READ, AW_SSL_ERROR_WANT_WRITE, AW_SSL_ERROR_ZERO_RETURN, AW_SSL_RECEIVED_SHUTDOWN
    const char* aw_libssl_load(const char* path, unsigned long version)
    aw_bio* aw_bio_new(aw_tls** tls)

cdef enum:
    SMALL = 4096             # room for output that a connection keeps while it has none
    LARGE = 1 << 18          # room that is kept for the next connection that needs it

cdef char* spare = NULL      # such room: the one that was used last, so it is in the processor's cache
cdef size_t spare_capacity = 0

cdef str trouble = None      # why there is no direct way
cdef bint looked = False


cdef str look():
    """Find the functions. None, or why they can't be used."""
    import _ssl

    if os.environ.get("ANYWIRE_TLS") == "memorybio":
        return "ANYWIRE_TLS=memorybio"
    if sys.implementation.name != "cpython" or not (3, 11) <= sys.version_info[:2] <= (3, 13) or AW_GIL_DISABLED:
        return "the objects of this Python's ssl module aren't known"
    if not ssl.OPENSSL_VERSION.startswith("OpenSSL ") or not 0x10101000 <= ssl.OPENSSL_VERSION_NUMBER < 0x40000000:
        return f"{ssl.OPENSSL_VERSION} isn't known"
    path = getattr(_ssl, "__file__", None)
    if path is None:
        return "_ssl is part of the interpreter"
    if _ssl._SSLSocket.__basicsize__ < <Py_ssize_t> sizeof(aw_ssl_socket):
        return "the objects of this Python's ssl module aren't known"
    cdef bytes name = os.fsencode(path)
    cdef const char* wrong = aw_libssl_load(name, ssl.OPENSSL_VERSION_NUMBER)
    return None if wrong == NULL else wrong.decode()


def problem():
    """Why TLS connections go through MemoryBIO in this process; None when they don't."""
    global trouble, looked
    if not looked:
        trouble = look()
        looked = True
    return trouble


cdef aw_ssl* ssl_of(object sslobj, object context) except NULL:
    """The SSL of an SSLObject. LookupError: it isn't of the kind that is known."""
    import _ssl

    cdef aw_ssl_socket* front
    if problem() is not None:
        raise LookupError(trouble)
    if type(sslobj) is ssl.SSLObject and type(sslobj._sslobj) is _ssl._SSLSocket:
        front = <aw_ssl_socket*> <PyObject*> sslobj._sslobj
        if front.Socket == NULL and front.ssl != NULL and front.ctx == <PyObject*> context and \
                aw_libssl.SSL_get_ex_data(front.ssl, 0) == <void*> front:
            return front.ssl
    raise LookupError("this SSLObject has no SSL that is known to be one")


cdef class Engine:
    """The SSL of an SSLObject that was just made, and the memory on both sides of it.

    Args:
        sslobj: an `ssl.SSLObject`, from whose `wrap_bio` on nothing was done with it.
        context: its SSLContext.

    LookupError: it is another kind of object. Then it is as it was.
    """

    def __init__(self, sslobj, context):
        self.ssl = ssl_of(sslobj, context)
        self.sslobj = sslobj
        self.socket = sslobj._sslobj
        self.bio = aw_bio_new(&self.tls)
        if self.bio == NULL:
            raise MemoryError()
        aw_libssl.BIO_up_ref(self.bio)                 # one for libssl, one for this object
        aw_libssl.SSL_set_bio(self.ssl, self.bio, self.bio)

    def __dealloc__(self):
        if self.bio != NULL:
            aw_libssl.BIO_free(self.bio)               # and `tls` with the last of them

    cdef Outcome read(self, char* room, size_t size, size_t* got) noexcept:
        """Decrypt up to `size` > 0 bytes: of one record."""
        if aw_libssl.ERR_peek_error():                 # of somebody else: it would be taken for ours
            aw_libssl.ERR_clear_error()
        if aw_libssl.SSL_read_ex(self.ssl, room, size, got):
            return DONE
        cdef int error = aw_libssl.SSL_get_error(self.ssl, 0)
        if error == AW_SSL_ERROR_WANT_READ or error == AW_SSL_ERROR_WANT_WRITE:
            return AGAIN
        if error == AW_SSL_ERROR_ZERO_RETURN and aw_libssl.SSL_get_shutdown(self.ssl) == AW_SSL_RECEIVED_SHUTDOWN:
            return CLOSED
        return FAILED

    cdef Outcome write(self, const char* start, size_t size, size_t* written) noexcept:
        if aw_libssl.ERR_peek_error():
            aw_libssl.ERR_clear_error()
        if aw_libssl.SSL_write_ex(self.ssl, start, size, written):
            return DONE
        cdef int error = aw_libssl.SSL_get_error(self.ssl, 0)
        if error == AW_SSL_ERROR_WANT_READ or error == AW_SSL_ERROR_WANT_WRITE:
            return AGAIN
        return FAILED

    cdef bint has_more(self) noexcept:
        return self.tls.window_size or self.tls.kept_size or aw_libssl.SSL_pending(self.ssl) > 0

    cdef size_t expected(self) noexcept:
        return self.tls.window_size + self.tls.kept_size + self.tls.inside + aw_libssl.SSL_pending(self.ssl)

    cdef int keep(self, const char* start, size_t size) except -1:
        if size and aw_tls_keep(self.tls, start, size) < 0:
            raise MemoryError()
        return 0

    cdef int keep_window(self) except -1:
        """What is left in the caller's room is copied, for he needs it back."""
        cdef size_t size = self.tls.window_size
        self.tls.window_size = 0
        return self.keep(self.tls.window, size)

    cdef int reserve(self, size_t size) except -1:
        """Room for what `size` bytes are encrypted to: 16 KiB and at most 256 bytes more a record (RFC 8446, 5.2)."""
        global spare, spare_capacity
        size += (size // 16384 + 1) * 256
        if self.tls.out == NULL and size > SMALL and size <= spare_capacity:
            self.tls.out, self.tls.out_capacity = spare, spare_capacity
            spare, spare_capacity = NULL, 0
        if aw_tls_reserve(self.tls, size) < 0:
            raise MemoryError()
        return 0

    cdef int sent(self) noexcept:
        global spare, spare_capacity
        cdef aw_tls* tls = self.tls
        tls.out_size = 0
        if tls.out_capacity <= SMALL:
            return 0
        if tls.out_capacity <= LARGE and tls.out_capacity > spare_capacity:
            tls.out, spare = spare, tls.out
            tls.out_capacity, spare_capacity = spare_capacity, tls.out_capacity
        free(tls.out)
        tls.out = NULL
        tls.out_capacity = 0
        return 0

    cdef bytes take_out(self):
        cdef bytes data = PyBytes_FromStringAndSize(self.tls.out, self.tls.out_size)
        self.sent()
        return data


cdef class Incoming:
    """Ciphertext that came: what `ssl.MemoryBIO` is to who writes into it."""
    cdef Engine engine

    def __init__(self, Engine engine not None):
        self.engine = engine

    @property
    def pending(self):
        return self.engine.tls.kept_size + self.engine.tls.window_size

    def write(self, data):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.engine.keep_window()
            self.engine.keep(<const char*> view.buf, view.len)
            return view.len
        finally:
            PyBuffer_Release(&view)


cdef class Outgoing:
    """Ciphertext that is to be sent: what `ssl.MemoryBIO` is to who reads from it."""
    cdef Engine engine

    def __init__(self, Engine engine not None):
        self.engine = engine

    @property
    def pending(self):
        return self.engine.tls.out_size

    def read(self):
        return self.engine.take_out()
