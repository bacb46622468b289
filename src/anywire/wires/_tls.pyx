# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""TLS over a connected socket: bytes in and out of `ssl`'s engine, which here reads and writes memory and never a socket.

Why memory and not an SSLSocket: a write that the socket can't take whole must otherwise be repeated with the same data
(SSL_write(3)), also when the caller has given up on it. Here encryption always succeeds; the ciphertext waits in this object.
Of what was encrypted and has not reached the kernel, one byte is not reported as written: so whoever wrote it waits, and
comes again with that byte, when the rest has gone.

Called by framed endpoints and bare streams. The engine releases the GIL, and one thread may receive while another sends:
a lock is around every use of it. For the same reason nothing is decrypted into the shared read area.

What can go wrong: the connection ends without close_notify (RFC 8446 6.1): cut off, by an attacker perhaps, and never taken
for an end; the peer sends an alert; a signal handler raises while a record is in the engine (then the connection fails, for
nobody knows what of it was lost).
"""
from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy
from anywire.contract.endpoint cimport AGAIN, READ, SCRATCH, WRITE, ByteEndpoint, iovec, scratch

import copy
import errno as errors
import ssl
import threading

from anywire.contract.errors import Refused

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, SHUT_RDWR
    ssize_t recv(int fd, void* p, size_t n, int flags)
    ssize_t send(int fd, const void* p, size_t n, int flags)
    int c_shutdown "shutdown"(int fd, int how)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int POLLOUT
    int poll(pollfd* fds, unsigned long n, int timeout)

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef enum:
    RECORD = 16384          # the largest plaintext of one TLS record, RFC 8446 5.1
    CHUNK = 131072          # plaintext encrypted in one go
    FIRST = 64              # bytes of the peer's hello kept for an error that shows them

cdef object WantRead = ssl.SSLWantReadError, ZeroReturn = ssl.SSLZeroReturnError, SSLError = ssl.SSLError


cdef class TlsBytes(ByteEndpoint):
    """One end of a TLS connection over the connected socket `fd`, which it takes over. `handshake_some` comes first.

    Parameters: `context`, an ssl.SSLContext; `server_side`; `server_name`, what the peer's certificate must be for."""

    cdef int fd
    cdef readonly object tls            # ssl.SSLObject: certificate, protocol, cipher
    cdef object engine                  # what it wraps: methods in C, between which no signal handler runs
    cdef object incoming, outgoing      # ssl.MemoryBIO
    cdef object acquire, unlock
    cdef bytes pending                  # ciphertext on its way to the kernel
    cdef Py_ssize_t pending_sent
    cdef int owed                       # bytes encrypted and not yet reported as written: 0 or 1
    cdef bytearray stash                # plaintext decrypted ahead
    cdef char* record                   # plaintext of one record, on its way to the shared read area
    cdef bint dry                       # the engine holds nothing that could be decrypted
    cdef bint established, at_end, closing, shut
    cdef bint cut                       # the socket is at its end
    cdef object failure
    cdef readonly bytes first           # what the peer sent first

    def __init__(self, int fd, context, *, bint server_side, server_name=None, address=None, peer=None, wire=None):
        self.fd = self.read_fd = self.write_fd = fd
        self.interruptible = True
        self.address = address
        self.peer = peer
        self.wire = wire
        self.first = b""
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=server_name)
        self.engine = self.tls._sslobj
        lock = threading.RLock()         # a signal handler may run in the engine, and use this very connection
        self.acquire = lock.acquire
        self.unlock = lock.release

    def __dealloc__(self):
        PyMem_RawFree(self.record)
        if self.fd >= 0:
            c_close(self.fd)

    # -- the handshake --------------------------------------------------------------------------------------------------

    def handshake_some(self):
        """Go on with the handshake: True when it is done, False to wait for `want`. Raises ssl.SSLError, OSError."""
        cdef Py_ssize_t got
        if self.flush() and self.established:
            return True
        if self.pending is not None:
            self.want = WRITE
            return False
        while True:
            try:
                self.engine.do_handshake()
                self.established = True
            except WantRead:
                pass
            except SSLError:
                try:
                    self.flush()                     # the alert that tells the peer why
                except OSError:
                    pass
                raise
            if not self.flush():
                self.want = WRITE
                return False
            if self.established:
                return True
            got = self.feed()
            if got == AGAIN:
                self.want = READ
                return False
            if got == 0:
                raise ConnectionResetError(errors.ECONNRESET, "the peer closed the connection during the TLS handshake")

    def alert_stranger(self):
        """Tell a peer that speaks something else what is spoken here: the alert unexpected_message (RFC 8446 6.2)."""
        send(self.fd, b"\x15\x03\x03\x00\x02\x02\x0a", 7, MSG_DONTWAIT | MSG_NOSIGNAL)

    # -- ciphertext -----------------------------------------------------------------------------------------------------

    cdef Py_ssize_t feed(self) except -1:
        """Read once from the socket into the engine: bytes, 0 at its end, AGAIN."""
        cdef ssize_t r
        cdef int e
        while True:
            r = recv(self.fd, scratch(), SCRATCH, MSG_DONTWAIT)
            e = errno
            if r >= 0:
                break
            if e == EAGAIN:
                return AGAIN
            if e != EINTR:
                PyErr_SetFromErrno(OSError)
                return -1
        self.dry = False
        if r == 0:
            # Not told to the engine: with OP_IGNORE_UNEXPECTED_EOF, which Python sets, it would call this a clean end.
            self.cut = True
            return 0
        if len(self.first) < FIRST and not self.established:
            self.first += scratch()[:min(r, FIRST)]
        self.incoming.write(PyMemoryView_FromMemory(scratch(), r, PyBUF_READ))
        return r

    cdef bint flush(self) except -1:
        """Write ciphertext to the socket; False when some is left because the socket is full."""
        cdef ssize_t r
        cdef int e
        while True:
            if self.pending is None:
                if not self.outgoing.pending:
                    break
                self.pending = self.outgoing.read()
                self.pending_sent = 0
            r = send(self.fd, PyBytes_AS_STRING(self.pending) + self.pending_sent,
                     PyBytes_GET_SIZE(self.pending) - self.pending_sent, MSG_DONTWAIT | MSG_NOSIGNAL)
            e = errno
            if r >= 0:
                self.pending_sent += r
                if self.pending_sent == PyBytes_GET_SIZE(self.pending):
                    self.pending = None
            elif e == EAGAIN:
                return False
            elif e != EINTR:
                PyErr_SetFromErrno(OSError)
                return -1
        if self.closing and not self.shut:
            self.shut = True
            c_shutdown(self.fd, SHUT_WR)
        return True

    # -- plaintext ------------------------------------------------------------------------------------------------------

    cdef Py_ssize_t decrypt(self, char* p, Py_ssize_t n) except -1:
        """Bytes from the engine, 0 at the peer's close_notify, AGAIN when it needs more ciphertext."""
        cdef Py_ssize_t got
        try:
            got = self.engine.read(n, PyMemoryView_FromMemory(p, n, PyBUF_WRITE))
        except WantRead:
            if self.cut:
                self.fail_with("the connection was cut off: it ended without TLS's close_notify")
                self.need_whole()
            self.dry = True
            return AGAIN
        except ZeroReturn:
            got = 0
        except SSLError as error:
            raise self.explained(error) from error
        except BaseException:
            self.fail_with("a signal handler raised while a TLS record was being read")
            raise
        if got == 0:
            self.at_end = True
        elif not self.cut and not self.incoming.pending and not self.engine.pending():
            self.dry = True
        return got

    def explained(self, error):
        """What the engine's error means, as an OSError; later operations raise a copy of it."""
        text = (error.reason or "").replace("_", " ").lower()
        if " alert " in text:
            self.failure = Refused(f"the peer sent the TLS alert {text.partition(' alert ')[2]!r}",
                                   address=str(self.address), operation="use", answered=True, advice=advice_on(text))
        else:
            self.fail_with(f"TLS failed: {text or error}")
        return copy.copy(self.failure)

    cdef int fail_with(self, str reason) except -1:
        self.failure = ConnectionResetError(errors.ECONNRESET, reason)
        return 0

    cdef int need_whole(self) except -1:
        if self.failure is not None:
            raise copy.copy(self.failure)
        return 0

    cdef int read_ahead(self) except -1:
        """Decrypt into the stash all that is here, so that nothing is in the engine."""
        cdef Py_ssize_t got
        cdef char record[RECORD]                     # its own: this may run in a signal handler, inside a read
        while not self.at_end:
            got = self.decrypt(record, RECORD)
            if got <= 0:
                break
            if self.stash is None:
                self.stash = bytearray()
            self.stash += (<char*> record)[:got]
        return 0

    cdef Py_ssize_t read(self, char* p, size_t n, bint block) except -1:
        # Never blocks: the fronts wait for `want`, which a blocking read of the socket alone could not.
        PyErr_CheckSignals()                         # here, where nothing is lost if a handler raises
        self.acquire()
        self.users += 1
        try:
            return self.read_locked(p, <Py_ssize_t> min(n, <size_t> 1 << 30))
        finally:
            self.unlock()
            self.leave()

    cdef Py_ssize_t read_locked(self, char* p, Py_ssize_t n) except -1:
        cdef Py_ssize_t got, total = 0
        cdef bint shared = p == scratch()
        self.want = READ
        if self.stash is not None:
            got = min(n, <Py_ssize_t> len(self.stash))
            memcpy(p, <char*> self.stash, got)
            del self.stash[:got]
            if not self.stash:
                self.stash = None
            return got
        self.need_whole()
        if shared and self.record == NULL:
            self.record = <char*> PyMem_RawMalloc(RECORD)
            if self.record == NULL:
                raise MemoryError()
        while True:
            while not self.dry and not self.at_end and total < n:
                if shared:
                    # The GIL is given up in the engine: the shared area may be written only after it.
                    got = self.decrypt(self.record, min(n, <Py_ssize_t> RECORD))
                    if got > 0:
                        memcpy(p, self.record, got)
                        return got
                else:
                    try:
                        got = self.decrypt(p + total, n - total)
                    except OSError:
                        if total:
                            return total             # what came before goes first; the next call raises it again
                        raise
                    if got > 0:
                        total += got
                if got == 0:
                    break
            if total or self.at_end:
                return total
            try:
                self.flush()                         # an answer to the peer's key update, or what a full socket left
            except OSError:
                self.pending = None                  # the peer is gone; what it sent before is still to be read
            if self.feed() == AGAIN:
                if self.pending is not None:
                    self.want = READ | WRITE
                return AGAIN

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        PyErr_CheckSignals()
        self.acquire()
        self.users += 1
        try:
            return self.write_locked(iov, count)
        except Refused:
            raise
        except OSError:
            # The peer may have said why before it closed: a look at its last words, which stay readable.
            self.last_words()
            raise
        finally:
            self.unlock()
            self.leave()

    cdef int last_words(self) except -1:
        try:
            while self.feed() > 0:
                pass
        except OSError:
            pass
        try:
            self.read_ahead()
        except Refused:
            raise
        except OSError:
            pass
        return 0

    cdef Py_ssize_t write_locked(self, iovec* iov, int count) except -1:
        cdef Py_ssize_t total = 0, done, n
        cdef int i
        cdef char joined[RECORD]
        cdef char* p
        cdef pollfd room
        self.need_whole()
        for i in range(count):
            total += iov[i].iov_len
        if not self.flush():
            self.want = WRITE
            return AGAIN
        done = self.owed
        self.owed = 0
        if total - done == 1 and done == 0:
            # Of a single byte none can be held back: it is taken only when it will go.
            room.fd = self.fd
            room.events = POLLOUT
            if poll(&room, 1, 0) == 0:
                self.want = WRITE
                return AGAIN
        while done < total:
            n = gather(iov, count, done, joined, &p)
            try:
                self.engine.write(PyMemoryView_FromMemory(p, n, PyBUF_READ))
            except WantRead:                         # TLS 1.2 renegotiation, where a context of the user's allows it
                self.want = READ
                return done if done else AGAIN
            except SSLError as error:
                raise self.explained(error) from error
            except BaseException:
                self.fail_with("a signal handler raised while a TLS record was being written")
                raise
            done += n
            if not self.flush():
                if done == 1:
                    break
                self.owed = 1
                return done - 1
        return done

    # -- the end --------------------------------------------------------------------------------------------------------

    def shutdown_write(self):
        """Send close_notify; this side can still read (RFC 8446 6.1). Repeated calls do nothing."""
        if self.fd < 0 or self.closing or self.failure is not None:
            return
        self.acquire()
        self.users += 1
        try:
            # Python's shutdown() also reads; data found there would make it fail, so everything is taken out first.
            self.closing = True
            try:
                self.read_ahead()
                try:
                    self.engine.shutdown()
                except (WantRead, SSLError):
                    pass                             # our close_notify is out; the peer's is still to come
                self.flush()
            except OSError:
                pass                                 # the peer is gone: the next read tells
        finally:
            self.unlock()
            self.leave()

    def interrupt(self):
        if self.fd >= 0:
            c_shutdown(self.fd, SHUT_RDWR)

    def close_now(self):
        cdef int fd = self.fd
        self.fd = self.read_fd = self.write_fd = -1
        if fd >= 0:
            if self.closing:
                # An unread close_notify would turn the end into a reset, which destroys what we sent last (RFC 1122 4.2.2.13).
                recv(fd, scratch(), SCRATCH, MSG_DONTWAIT)
            c_close(fd)


cdef str advice_on(str alert):
    """What to do about a peer's alert (RFC 8446 6.2)."""
    if "certificate required" in alert or "handshake failure" in alert:
        return "the peer may want a certificate: cert= and key= name this side's"
    if "unknown ca" in alert or "certificate" in alert:
        return "the peer did not accept this side's certificate: compare cert= here with ca= there; its log says more"
    if "protocol version" in alert:
        return "the two sides have no TLS version in common"
    return "the peer's log says more"


cdef Py_ssize_t gather(iovec* iov, int count, Py_ssize_t skip, char* joined, char** p) noexcept:
    """The next piece to encrypt after `skip` bytes: a small one joined in one record, a large one where it is."""
    cdef Py_ssize_t n, have = 0
    cdef int i
    for i in range(count):
        n = iov[i].iov_len
        if skip >= n:
            skip -= n
            continue
        n -= skip
        if have == 0 and (n >= RECORD or i == count - 1):
            p[0] = <char*> iov[i].iov_base + skip
            return min(n, <Py_ssize_t> CHUNK)
        n = min(n, RECORD - have)
        memcpy(joined + have, <char*> iov[i].iov_base + skip, n)
        have += n
        skip = 0
        if have == RECORD:
            break
    p[0] = joined
    return have
