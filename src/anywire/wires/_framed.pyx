# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The framed endpoint: messages over any byte endpoint, for every stream wire and both fronts.

Sits between a channel (which waits) and a byte endpoint (which moves bytes); the frames themselves are `framing.codec`.
Runs on the front's thread; on the blocking front one thread may receive while another sends, which is why a confirmation
is only written when nobody else is writing.

What can go wrong: the peer ends without an end frame (`PeerLost`), breaks the protocol (`BadFrame`, `TooLarge`), or both
after messages that are still here: those are handed out first, then the error, again and again.
"""
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from anywire.contract cimport counters
from anywire.contract.endpoint cimport AGAIN, BLOCKED, DONE, PARTIAL, READ, SCRATCH, WRITE, BytePump, hold, iovec
from anywire.framing.codec cimport (CLOSE, CONFIRM, END, LONGEST_HEADER, Decoder, write_descriptors, write_header,
                                    write_kind)

import copy
import errno
import time

from anywire.contract.errors import AnywireError, BadFrame, ChannelClosed, EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.contract.waits import Wait
from anywire.framing.codec import WithDescriptors

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)
    unsigned long FIONREAD

cdef object _WithDescriptors = WithDescriptors

cdef enum:
    CONFIRM_MESSAGES = 256         # so many messages, or so many bytes, are confirmed once all that came was taken
    CONFIRM_BYTES = 1 << 20
    LATEST_MESSAGES = 65536        # ... and so many even when more waits
    LATEST_BYTES = 64 << 20
    DRAIN_TURNS = 16               # reads in a row while a closing channel drains
    GATHER = 65536                 # bytes of small frames that leave in one system call
    MOST_DRAINED = 64 << 20


cdef class FramedEndpoint(BytePump):
    """Messages of at most `max_message` bytes here, `peer_limit` there. `confirms` is False on a one-way wire."""

    def __init__(self, below, Py_ssize_t max_message=16 << 20, Py_ssize_t peer_limit=16 << 20, *, bint confirms=True,
                 bint descriptors=False, address=None):
        BytePump.__init__(self, below, address)
        self.max_message = max_message
        self.peer_limit = peer_limit
        self.confirms = confirms
        self.confirm_at = CONFIRM_MESSAGES
        self.confirm_at_bytes = CONFIRM_BYTES
        self.decoder = Decoder(max_message, descriptors=descriptors)
        if descriptors:
            self.carrier = below
            self.carrier.keep_fds = True

    @property
    def unconfirmed(self):
        return self.missing()

    cdef uint64_t missing(self) noexcept:
        # A blocking send may be confirmed before it has returned and was counted.
        return self.sent - self.decoder.confirmed if self.sent > self.decoder.confirmed else 0

    @property
    def carries_fds(self):
        """Whether descriptors can go with messages (the byte endpoint below is a Unix socket)."""
        return getattr(self.bytes, "carries_fds", False)

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int need_sending(self) except -1:
        if self.broken:
            self.raise_failure()
        if self.end_sent:
            raise ChannelClosed("send_eof() was called", address=str(self.address), operation="send")
        if self.decoder.closed:
            missing = self.missing()
            raise ChannelClosed(f"the peer closed the channel; {missing} sent messages are unconfirmed",
                                address=str(self.address), operation="send", by_peer=True, unconfirmed=missing)
        if self.write_fd < 0:
            raise Unsupported("this end of a one-way wire can only receive", address=str(self.address),
                              operation="send")
        return 0

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef int size, status
        cdef char head[LONGEST_HEADER]
        cdef uint32_t confirmed
        if self.broken or self.end_sent or self.decoder.closed or self.write_fd < 0:
            self.need_sending()
        keep = hold(data, &p, &n)
        if n > self.peer_limit:
            raise TooLarge(n, self.peer_limit, address=str(self.address), operation="send")
        confirmed = <uint32_t> min(self.to_confirm, <uint64_t> 0xFFFFFFFF)
        size = write_header(head, n, confirmed)
        self.going = 1
        try:
            status = self.emit(head, size, p, n, keep, block)
        except BaseException:
            if self.begun and not self.broken:
                self.went(1, n, confirmed)       # interrupted in mid-message: the rest was adopted, so it goes whole
            raise
        finally:
            self.going = 0
        if status != BLOCKED:
            self.went(1, n, confirmed)
        return status

    cdef int went(self, Py_ssize_t count, Py_ssize_t nbytes, uint32_t confirmed) except -1:
        """Count messages whose first bytes are on the wire."""
        self.to_confirm -= confirmed
        self.to_confirm_bytes = 0
        self.sent += count
        self.slot.messages_sent += count
        self.slot.bytes_sent += nbytes
        return 0

    def put_fds(self, fds, message, bint block):
        """Send `message` and descriptors with its first byte. Returns DONE, BLOCKED or PARTIAL as put_message."""
        cdef const char* p
        cdef Py_ssize_t n
        cdef int size, status
        cdef char head[LONGEST_HEADER]
        cdef uint32_t confirmed
        self.need_sending()
        fds = list(fds)
        keep = hold(message, &p, &n)
        if n > min(self.peer_limit, <Py_ssize_t> 0xFFFFFFEF):
            raise TooLarge(n, self.peer_limit, address=str(self.address), operation="send_fds")
        if self.flush_output(block) != DONE:
            return BLOCKED
        confirmed = <uint32_t> min(self.to_confirm, <uint64_t> 0xFFFFFFFF)
        size = write_descriptors(head, <uint32_t> n, confirmed, <uint32_t> len(fds))
        if fds:
            self.bytes.give_fds(fds)
        self.going = 1
        try:
            status = self.emit(head, size, p, n, keep, False)
        finally:
            self.going = 0
        if status != BLOCKED:
            self.went(1, n, confirmed)
        elif fds:
            self.bytes.give_fds(())
        return status

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        """Small messages are gathered into one buffer and leave in one system call; large ones go one by one."""
        cdef Py_ssize_t i = start, n, count = len(data), first, done, total
        cdef const char* p
        cdef char* gather
        cdef size_t used
        cdef uint32_t confirmed
        cdef iovec v
        self.need_sending()
        self.put_status = DONE
        if self.output_pending() and self.flush_output(block) != DONE:
            self.put_status = BLOCKED
            return start
        gather = <char*> PyMem_RawMalloc(GATHER)
        if gather == NULL:
            raise MemoryError()
        try:
            while i < count:
                used = 0
                first = i
                total = 0
                confirmed = <uint32_t> min(self.to_confirm, <uint64_t> 0xFFFFFFFF)
                while i < count:
                    keep = hold(data[i], &p, &n)
                    if n > self.peer_limit:
                        if i > first:
                            break          # what lies before it goes first, then it raises
                        raise TooLarge(n, self.peer_limit, address=str(self.address), operation="send_many")
                    if used + n + LONGEST_HEADER > GATHER:
                        break
                    used += write_header(gather + used, n, confirmed if i == first else 0)
                    memcpy(gather + used, p, n)
                    used += n
                    total += n
                    i += 1
                if i == first:             # too large to gather
                    self.put_status = self.put_message(data[i], block)
                    if self.put_status == BLOCKED:
                        return i
                    i += 1
                    if self.put_status == PARTIAL:
                        return i
                    continue
                v.iov_base = gather
                v.iov_len = used
                if self.writing:           # as in emit()
                    self.want = WRITE
                    self.put_status = BLOCKED
                    return first
                self.writing = True
                self.turns += 1
                self.going = i - first
                try:
                    done = self.bytes.write(&v, 1, block)
                except OSError as error:
                    self.on_io_error(error)
                finally:
                    self.writing = False
                    self.going = 0
                if done == AGAIN:
                    self.want = self.bytes.want
                    self.put_status = BLOCKED
                    return first
                self.went(i - first, total, confirmed)
                if <size_t> done < used:
                    self.rest = gather
                    self.rest_size = used
                    self.rest_sent = done
                    gather = NULL
                    self.want = WRITE
                    self.put_status = PARTIAL
                    if not block:
                        return i
                    self.unread_output = True    # if a signal ends this: the next operation goes on
                    PyErr_CheckSignals()         # it may have ended this call early, with a count
                    self.put_status = self.flush_output(True)
                    if self.put_status != DONE:
                        self.put_status = PARTIAL
                        return i
                    gather = <char*> PyMem_RawMalloc(GATHER)
                    if gather == NULL:
                        raise MemoryError()
            return i
        finally:
            PyMem_RawFree(gather)

    cdef int send_kind(self, uint32_t kind) except -1:
        cdef char head[LONGEST_HEADER]
        cdef uint32_t confirmed = <uint32_t> min(self.to_confirm, <uint64_t> 0xFFFFFFFF) if self.confirms else 0
        cdef int size = write_kind(head, kind, confirmed)
        cdef int status = self.emit(head, size, NULL, 0, b"", False)
        if status != BLOCKED:
            self.to_confirm -= confirmed
            self.to_confirm_bytes = 0
        return status

    cdef int confirm_now(self) except -1:
        """Best effort: when it can't be written now, a later header or the next threshold carries it."""
        if self.writing or self.output_pending() or self.broken or self.end_sent and self.closed or self.write_fd < 0:
            self.to_confirm_bytes = 0
            return 0
        try:
            if self.send_kind(<uint32_t> CONFIRM) == PARTIAL:
                self.adopt_output()
        except (AnywireError, OSError):
            pass                   # the next operation meets the loss itself
        self.to_confirm_bytes = 0
        return 0

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef object take_message(self, bint block):
        self.confirm_due()
        while True:
            if self.decoder.ready_count:
                return self.hand_over()
            if self.more(block) == AGAIN:
                return None

    cdef object hand_over(self):
        cdef object message
        cdef Py_ssize_t n
        if type(self.decoder.peek()) is _WithDescriptors:
            if self.carrier is None or len(self.carrier.arrived) < self.decoder.fds_due:
                self.raise_failure()       # they never came: `more` noticed
            raise Unsupported("the next message carries descriptors: take it with recv_fds()",
                              address=str(self.address), operation="recv")
        message = self.decoder.pop()
        n = PyBytes_GET_SIZE(message)
        self.delivered(n)
        return message

    cdef int delivered(self, Py_ssize_t n) except -1:
        self.slot.messages_received += 1
        self.slot.bytes_received += n
        self.slot.queue_depth = self.decoder.ready_count
        if self.confirms:
            self.to_confirm += 1
            self.to_confirm_bytes += n
        return 0

    cdef bint more_is_here(self) noexcept:
        """Whether the kernel holds bytes to read: FIONREAD, ioctl_tty(2), which sockets and pipes have too."""
        cdef int count = 0
        return ioctl(self.read_fd, FIONREAD, &count) == 0 and count > 0

    cdef int confirm_due(self) except -1:
        """Called when the receiver comes back for more: an answer sent meanwhile would have confirmed in its header."""
        if self.to_confirm_bytes >= self.confirm_at_bytes or self.to_confirm >= self.confirm_at:
            # A confirmation that meets a killed peer makes its kernel answer with a reset, and the reset destroys what
            # that kernel still had to send (RFC 9293 3.10.7). So first take what is there, within reason.
            if not self.more_is_here() or self.to_confirm_bytes >= LATEST_BYTES or self.to_confirm >= LATEST_MESSAGES:
                self.confirm_now()
            self.confirm_at = self.to_confirm + CONFIRM_MESSAGES
            self.confirm_at_bytes = self.to_confirm_bytes + CONFIRM_BYTES
        return 0

    def take_fds_message(self, bint block):
        """The next message with its descriptors: (message, [fd, ...]), or None when nothing is here now."""
        self.confirm_due()
        while True:
            if self.decoder.ready_count:
                if type(self.decoder.peek()) is not _WithDescriptors or len(self.carrier.arrived) < self.decoder.fds_due:
                    return self.hand_over(), []
                wrapped = self.decoder.pop()
                self.decoder.fds_due -= wrapped.count
                self.delivered(len(wrapped.message))
                return wrapped.message, self.bytes.take_fds(wrapped.count)
            if self.more(block) == AGAIN:
                return None

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Py_ssize_t n
        self.confirm_due()
        while True:
            if self.decoder.target_done >= 0:
                n = self.decoder.target_done
                self.decoder.target_done = -1
                self.delivered(n)
                return n
            if self.decoder.ready_count:
                self.decoder.drop_target()
                message = self.decoder.peek()
                n = len(message) if type(message) is not _WithDescriptors else 0
                if n > size:
                    raise BufferError(f"recv_into {self.address}: the next message has {n} bytes and the buffer {size}; "
                                      "the message stays queued")
                message = self.hand_over()
                memcpy(p, PyBytes_AS_STRING(message), n)
                return n
            self.decoder.set_target(p, size)
            if self.more(block) == AGAIN:
                return -1

    cdef int stop_into(self) except -1:
        if self.decoder.target != NULL or self.decoder.to_target:
            self.decoder.drop_target()
        return 0

    cdef int more(self, bint block) except -1:
        """Read once and decode; AGAIN when nothing is here now. Raises what follows the last whole message."""
        cdef char* p
        cdef Py_ssize_t n, got
        if self.decoder.ended and not self.ending:
            self.raise_end()
        if self.broken:
            self.raise_failure()
        if self.read_fd < 0:
            raise Unsupported("this end of a one-way wire can only send", address=str(self.address), operation="recv")
        if self.decoder.direct(&p, &n):
            self.bytes.whole = block
            got = self.read_at(p, n, block)
            if got > 0:
                self.decoder.advance(got)
                if block and got < n:
                    PyErr_CheckSignals()     # a signal ends recv(2) early with a count, not with EINTR: signal(7)
                return 0
        else:
            self.bytes.whole = False
            got = self.fill(&p, self.decoder.ahead(SCRATCH), block)
        if got == AGAIN:
            if self.to_confirm >= CONFIRM_MESSAGES or self.to_confirm_bytes >= CONFIRM_BYTES:
                self.confirm_now()
            return AGAIN
        if got == 0:
            inside = self.decoder.inside
            return self.lost(f"the connection ended {inside}" if inside else "the connection ended without an end frame",
                             None)
        try:
            self.decoder.eat(p, got)
            if self.carrier is not None:
                if len(self.carrier.arrived) < self.decoder.fds_due:
                    raise BadFrame(f"{self.decoder.fds_due} descriptors were announced, and "
                                   f"{len(self.carrier.arrived)} came", received=p[:min(got, 32)])
                if self.decoder.head_have == 0 and len(self.carrier.arrived) > self.decoder.fds_due:
                    self.carrier.keep_first(self.decoder.fds_due)
            if self.decoder.confirmed > self.sent + self.going:
                raise BadFrame("the peer confirmed more messages than were sent", received=p[:min(got, 48)])
        except AnywireError as error:
            # Whole messages that came before the bad bytes are handed out first; then this error, again and again.
            error.address = str(self.address)
            error.operation = error.operation or "recv"
            counters.lost(self.slot, str(error.what).encode("utf-8", "replace"))
            self.fail(error)
            self.bytes.interrupt()
        self.confirmed = self.slot.confirmed = min(self.sent, self.decoder.confirmed)
        self.slot.queue_depth = self.decoder.ready_count
        if self.slot.queue_depth > self.slot.queue_high:
            self.slot.queue_high = self.slot.queue_depth
        return 0

    cdef int raise_end(self) except -1:
        if self.to_confirm and not self.end_sent:
            self.confirm_now()       # no answer need ever come after the peer's end, and its close() waits for this
        raise EndOfChannel(address=str(self.address), operation="recv",
                           unconfirmed=self.missing())

    cdef int lost(self, object reason, object cause) except -1:
        self.fail(PeerLost(reason, address=str(self.address), operation="use",
                           unconfirmed=self.missing()))
        counters.lost(self.slot, reason.encode())
        if self.decoder.ready_count == 0:
            self.raise_failure()
        return 0

    cdef int on_io_error(self, object error) except -1:
        """The kernel says that the peer is gone. What it sent before, confirmations too, is still to be read."""
        cdef Py_ssize_t drained = 0, got
        cdef char* p
        cdef bint was_reading = self.reading
        if error.errno == errno.ETOOMANYREFS:
            raise error              # this user has too many descriptors on their way (unix(7)); the connection is well
        reason = error.strerror or str(error)
        if not was_reading and self.read_fd >= 0 and not self.decoder.closed and not self.broken:
            self.fail(PeerLost(reason, address=str(self.address), operation="use",   # no second loss report from within,
                               unconfirmed=self.sent - self.confirmed))              # and what other threads are told now
            try:
                while drained < MOST_DRAINED:
                    self.drained = False
                    got = self.fill(&p, SCRATCH, False)
                    if got <= 0:
                        break
                    self.decoder.eat(p, got)
                    drained += got
            except (AnywireError, OSError):
                pass
            self.broken = False
        self.confirmed = min(self.decoder.confirmed, self.sent)
        if self.decoder.closed:
            self.need_sending()
        self.fail(PeerLost(reason, address=str(self.address), operation="use", unconfirmed=self.sent - self.confirmed))
        self.slot.confirmed = self.confirmed
        counters.lost(self.slot, reason.encode("utf-8", "replace"), error.errno or 0)
        raise copy.copy(self.failure) from error

    # -- moving to another process --------------------------------------------------------------------------------------

    def detach_state(self):
        """(kind, descriptors, state): everything another process needs to go on where this one stops."""
        if self.output_pending():
            raise ChannelClosed("a message is still being written", address=str(self.address), operation="detach")
        kind, fds = self.bytes.detach_state()
        state = {"max_message": self.max_message, "peer_limit": self.peer_limit, "confirms": self.confirms,
                 "sent": self.sent, "to_confirm": self.to_confirm, "end_sent": self.end_sent,
                 "decoder": self.decoder.detach_state()}
        self.release()
        return kind, fds, state

    def restore_state(self, state):
        """Go on where `detach_state` stopped in another process."""
        self.sent = state["sent"]
        self.to_confirm = state["to_confirm"]
        self.end_sent = state["end_sent"]
        self.decoder.restore_state(*state["decoder"])

    # -- ending ---------------------------------------------------------------------------------------------------------

    def try_eof(self):
        """Half-close: the end frame goes after everything sent before it. DONE, BLOCKED or PARTIAL."""
        if self.end_sent:
            return DONE
        self.need_sending()
        if self.wire is not None and not self.wire.traits(self.address).promises("half_close"):
            raise Unsupported("this wire has no half-close; close() ends it", address=str(self.address),
                              operation="send_eof")
        cdef int status = self.send_kind(<uint32_t> END)
        if status != BLOCKED:
            self.end_sent = True
        return status

    def finish_steps(self, timeout):
        """Generator: what was sent, then the close frame, then the half-close below."""
        cdef double end = time.monotonic() + timeout
        cdef int status
        if self.write_fd < 0:
            return
        yield from self.flush_steps(timeout)
        while not self.broken and not self.output_pending():
            try:
                status = self.send_kind(<uint32_t> CLOSE)
            except PeerLost:
                # On one way nothing tells that the reader closed first. If it took all that was sent, nothing is lost.
                self.all_taken = self.read_fd < 0 and self.bytes.unread() == 0
                raise
            if status != BLOCKED:
                self.end_sent = True
                yield from self.flush_steps(max(0.0, end - time.monotonic()))
                if not self.output_pending():
                    yield from self.taken_steps(max(0.0, end - time.monotonic()))
                    self.bytes.shutdown_write()
                    self.write_fd = self.bytes.write_fd          # a pipe's is closed by that
                return
            if not (yield Wait([(self.write_fd, self.want)], max(0.0, end - time.monotonic()))):
                return

    def taken_steps(self, timeout):
        """Generator: on one way nothing comes back, but a pipe tells how much was not read yet. Wait until all was; a
        reader that leaves or dies before that is a loss."""
        cdef double end = time.monotonic() + timeout, pause = 0.0005, left
        if self.read_fd >= 0:
            return
        while self.bytes.unread() > 0:
            left = end - time.monotonic()
            if left <= 0:
                return
            # A write end becomes "readable" by an error only: nobody reads any more (poll(2), POLLERR).
            if (yield Wait([(self.write_fd, READ)], min(pause, left))) and self.bytes.unread() > 0:
                self.lost("the reader left before it had read everything", None)
            pause = min(pause * 2, 0.05)

    def drain_steps(self, timeout):
        """Generator: drop what still comes, up to the peer's close frame or the deadline."""
        cdef double end = time.monotonic() + timeout
        cdef bint first = True
        if not self.confirms or not self.end_sent:
            return
        self.ending = True                   # after the peer's end its confirmations and its close still follow
        while self.read_fd >= 0 and not self.decoder.closed:
            if not first and time.monotonic() >= end:        # a peer may never stop sending
                return
            first = False
            while self.decoder.ready_count:
                self.decoder.pop()
                self.slot.drops += 1
            if self.broken:
                return
            self.drained = False
            if self.more(False) == AGAIN or self.turns >= DRAIN_TURNS:
                self.turns = 0               # in a flood, too, the loop's other tasks get a turn
                if not (yield Wait([(self.read_fd, self.want)], max(0.0, end - time.monotonic()))):
                    return

    def verdict(self):
        if isinstance(self.failure, PeerLost) and self.missing() and not self.decoder.closed and not self.all_taken:
            self.raise_failure()
