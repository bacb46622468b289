# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The two ends of a FIFO with many writers: messages in fragments that the kernel never interleaves (`framing.fragments`).

A writer only sends and the reader only receives; nothing comes back, so all that was sent counts as unconfirmed. Both
fronts, on the front's thread.

What can go wrong: the reader is gone (EPIPE: PeerLost); foreign bytes, messages over the limit and writers that die in
mid-message, which cost the reader that message only: logged, and counted as drops.
"""
from libc.stdint cimport uint64_t
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from anywire.contract cimport counters
from anywire.contract.endpoint cimport AGAIN, BLOCKED, DONE, PARTIAL, SCRATCH, BytePump, copy_message, hold, iovec
from anywire.framing.fragments cimport ATOM, FRAGMENT_HEADER, FRAGMENT_ROOM, Fragments, cut, write_fragment_header
from anywire.wires._descriptor cimport PipeBytes

import logging
import os

from anywire.contract.errors import EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.ipc import fifo

log = logging.getLogger("anywire")

cdef enum:
    WHOLE = 3                              # flags of a message that is one fragment
    MOST_REFUSED = 4 << 20                 # bytes dropped at once: more than a pipe holds, and not for ever in a flood


cdef class AtomicPipe(PipeBytes):
    """A FIFO's write end that is written in pieces of at most PIPE_BUF bytes: each goes whole or not at all (pipe(7))."""

    cdef Py_ssize_t write(self, iovec* iov, int count, bint block) except -1:
        cdef Py_ssize_t done = 0, r
        cdef iovec v
        if count > 1 or iov[0].iov_len <= ATOM:
            return PipeBytes.write(self, iov, count, block)
        while done < <Py_ssize_t> iov[0].iov_len:
            v.iov_base = <char*> iov[0].iov_base + done
            v.iov_len = min(<size_t> ATOM, iov[0].iov_len - done)
            r = PipeBytes.write(self, &v, 1, block)
            if r == AGAIN:
                return done if done else AGAIN
            done += r
        return done


cdef class FifoWriter(BytePump):
    """Sends whole messages of at most `max_message` bytes into a FIFO, among other writers. `writer`: its number there."""

    cdef readonly uint64_t writer

    def __init__(self, AtomicPipe below, uint64_t writer, Py_ssize_t max_message, *, address=None):
        BytePump.__init__(self, below, address)
        self.writer = writer
        self.max_message = max_message

    def say_hello(self):
        """Tell the reader that a writer has come: a fragment without a message, if there is room at all."""
        cdef char head[FRAGMENT_HEADER]
        write_fragment_header(head, self.writer, 0, 0, 0)
        if self.emit(head, FRAGMENT_HEADER, NULL, 0, b"", False) == BLOCKED:
            return                         # then the reader has enough to read

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        cdef int status
        cdef char head[FRAGMENT_HEADER]
        cdef bytes pieces
        if self.broken:
            self.raise_failure()
        keep = hold(data, &p, &n)
        if n > self.max_message:
            raise TooLarge(n, self.max_message, address=str(self.address), operation="send")
        if n <= FRAGMENT_ROOM:
            write_fragment_header(head, self.writer, n, n, WHOLE)
            status = self.emit(head, FRAGMENT_HEADER, p, n, keep, block)
        else:
            pieces = cut(self.writer, p, n)
            status = self.emit(NULL, 0, PyBytes_AS_STRING(pieces), PyBytes_GET_SIZE(pieces), pieces, block)
        if status != BLOCKED:
            self.sent += 1
            self.slot.messages_sent += 1
            self.slot.bytes_sent += n
        return status

    cdef Py_ssize_t put_messages(self, list data, Py_ssize_t start, bint block) except -1:
        """Several small messages leave in one write, as many as fit into PIPE_BUF."""
        cdef Py_ssize_t i = start, n, count = len(data), first, total
        cdef const char* p
        cdef char atom[ATOM]
        cdef size_t used
        self.put_status = DONE
        while i < count:
            first = i
            used = total = 0
            while i < count:
                keep = hold(data[i], &p, &n)
                if n > self.max_message or used + n + FRAGMENT_HEADER > ATOM:
                    break
                used += write_fragment_header(atom + used, self.writer, n, n, WHOLE)
                if n:
                    memcpy(atom + used, p, n)
                used += n
                total += n
                i += 1
            if i - first < 2:
                self.put_status = self.put_message(data[first], block)
                if self.put_status == BLOCKED:
                    return first
                i = first + 1
                if self.put_status == PARTIAL:
                    return i
                continue
            if self.broken:
                self.raise_failure()
            if self.emit(NULL, 0, atom, used, b"", block) == BLOCKED:        # all of it or nothing: never PARTIAL
                self.put_status = BLOCKED
                return first
            self.sent += i - first
            self.slot.messages_sent += i - first
            self.slot.bytes_sent += total
        return i

    cdef object take_message(self, bint block):
        raise Unsupported("this end of a FIFO only sends", address=str(self.address), operation="recv", advice=WAYS)

    def finish_steps(self, timeout):
        """Generator: write what earlier sends left over. There is no end mark: the reader has other writers."""
        yield from self.flush_steps(timeout)

    def verdict(self):
        if isinstance(self.failure, PeerLost) and self.sent:
            self.raise_failure()


WAYS = "reply=true makes a FIFO two-way"


cdef class FifoReader(BytePump):
    """Receives the messages of all writers of a FIFO.

    `below`: its read end, and a write end that keeps it from ending while no writer is there. `fragments`: what is here
    already. `on_release()` is called once, when this end is closed."""

    cdef readonly Fragments fragments
    cdef object on_release
    cdef uint64_t consumed                 # bytes read so far
    cdef dict dead                         # writers that died in mid-message: what must be read until theirs was read

    def __init__(self, PipeBytes below, Fragments fragments, on_release, *, address=None):
        BytePump.__init__(self, below, address)
        self.write_fd = -1
        self.fragments = fragments
        self.max_message = fragments.max_message
        self.on_release = on_release
        self.dead = {}

    cdef int put_message(self, object data, bint block) except -1:
        raise Unsupported("this end of a FIFO only receives", address=str(self.address), operation="send", advice=WAYS)

    cdef object take_message(self, bint block):
        while not self.fragments.ready:
            if self.more(block) == AGAIN:
                return None
        message = self.fragments.ready.popleft()
        self.delivered(len(message))
        return message

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Py_ssize_t n
        while not self.fragments.ready:
            if self.more(block) == AGAIN:
                return -1
        n = copy_message(self.fragments.ready[0], p, size, self.address)
        self.fragments.ready.popleft()
        self.delivered(n)
        return n

    cdef int delivered(self, Py_ssize_t n) except -1:
        self.slot.messages_received += 1
        self.slot.bytes_received += n
        self.slot.queue_depth = len(self.fragments.ready)
        return 0

    cdef int more(self, bint block) except -1:
        cdef char* p
        cdef Py_ssize_t got
        if self.broken:
            self.raise_failure()
        got = self.fill(&p, SCRATCH, block)
        if got == AGAIN:
            return AGAIN
        if got == 0:
            raise EndOfChannel("the listener was closed and the last writer is gone", address=str(self.address),
                               operation="recv")
        self.consumed += got
        self.fragments.eat(p, got)
        if self.fragments.began and self.fragments.unfinished > 1:
            self.look_for_dead()
        if self.dead:
            for writer in [writer for writer, until in self.dead.items() if self.consumed >= <uint64_t> until]:
                del self.dead[writer]
                self.fragments.forget(writer)
        if self.fragments.problems:
            self.report()
        self.slot.queue_depth = len(self.fragments.ready)
        if self.slot.queue_depth > self.slot.queue_high:
            self.slot.queue_high = self.slot.queue_depth
        return 0

    cdef int look_for_dead(self) except -1:
        """Which unfinished messages belong to writers that are gone? Their last bytes may still be in the FIFO."""
        for writer in self.fragments.idle():
            if writer not in self.dead and not fifo.is_writer_alive(self.bytes.read_fd, writer):
                self.dead[writer] = self.consumed + fifo.pending(self.bytes.read_fd)
        return 0

    cdef int report(self) except -1:
        problems = self.fragments.problems[:]
        self.fragments.problems.clear()
        for reason, sample in problems:
            self.slot.drops += 1
            counters.lost(self.slot, reason.encode()[:64])
            log.warning("%s: %s%s; it was passed over", self.address, reason, f" ({sample!r})" if sample else "")
        return 0

    def no_more_writers(self):
        """The listener is closed: when the writers that are connected have gone, this is the end."""
        fd, self.bytes.write_fd = self.bytes.write_fd, -1
        if fd >= 0:
            os.close(fd)

    def refuse(self):
        """Nobody here may write: drop what waits, for it would only bring this connection again."""
        cdef char* p
        cdef Py_ssize_t got, left = MOST_REFUSED
        while left > 0 and not self.broken:
            got = self.fill(&p, SCRATCH, False)
            if got <= 0:
                break
            left -= got
            self.fragments.eat(p, got)
            self.slot.drops += len(self.fragments.ready)
            self.fragments.ready.clear()
            self.fragments.problems.clear()
        self.fragments.ready.clear()
        self.release()

    def release(self):
        callback, self.on_release = self.on_release, None
        BytePump.release(self)
        if callback is not None:
            callback()
