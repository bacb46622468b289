# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Messages between tasks and threads of one process, without copying.

Two endpoints share two bounded queues. `bytes` and sent loans pass by reference; other buffers are copied once, for their
owner may change them after the send. Everything happens under the GIL; a side that became ready is told through its
front's wake-up (any thread) or, on the blocking front, through the lock that it sleeps on.

What can go wrong: the other side aborts, or is forgotten: `PeerLost`; a full queue makes the sender wait.
"""
from cpython.bytes cimport PyBytes_CheckExact
from anywire.contract cimport counters
from anywire.contract.endpoint cimport BLOCKED, DONE, READ, WRITE, Loan, MessageEndpoint, copy_message, hold

import threading
import time
from collections import deque

from anywire.contract.errors import ChannelClosed, EndOfChannel, PeerLost, TooLarge

cdef enum:
    CAPACITY = 1024            # messages that wait in one direction before the sender does
    CAPACITY_BYTES = 4 << 20   # ... or bytes: the message that passes this mark is the last one taken


cdef class InprocEndpoint(MessageEndpoint):
    """One side of a pair; see `pair`."""

    cdef InprocEndpoint other
    cdef object inbox
    cdef Py_ssize_t inbox_bytes
    cdef bint starved          # the other side found this inbox full and waits for room
    cdef bint ended            # this side sent its end
    cdef bint gone             # this side was released
    cdef bint polite           # this side closes, or was released after its end
    cdef object sleepers       # locks of blocking threads: they wait for anything to change

    def __init__(self):
        self.inbox = deque()
        self.sleepers = []

    cdef object take_message(self, bint block):
        cdef object message
        cdef Py_ssize_t n
        if self.inbox:
            message = self.inbox.popleft()
            n = len(message)
            self.inbox_bytes -= n
            if self.starved and len(self.inbox) <= CAPACITY // 2 and self.inbox_bytes <= CAPACITY_BYTES // 2:
                self.starved = False
                self.tell(self.other)
            self.slot.messages_received += 1
            self.slot.bytes_received += n
            if self.other is not None:
                self.other.confirmed += 1
                self.other.slot.confirmed += 1
                self.other.slot.queue_depth = len(self.inbox)
            return message
        if self.broken:
            self.raise_failure()
        if self.other is None or self.other.ended:
            raise EndOfChannel(address=str(self.address), operation="recv", unconfirmed=self.sent - self.confirmed)
        if self.other.gone:
            counters.lost(self.slot, b"dropped")
            self.fail(PeerLost("the other side dropped the connection without an end", address=str(self.address),
                               operation="recv", unconfirmed=self.sent - self.confirmed))
            self.raise_failure()
        self.want = READ
        return None

    cdef Py_ssize_t take_message_into(self, char* p, Py_ssize_t size, bint block) except -2:
        cdef Py_ssize_t n = -1
        if self.inbox:
            n = copy_message(self.inbox[0], p, size, self.address)
        self.take_message(block)                     # under the GIL all the while: what was copied, or the end, or nothing
        return n

    cdef int put_message(self, object data, bint block) except -1:
        cdef InprocEndpoint other = self.other
        cdef const char* p
        cdef Py_ssize_t n
        if self.broken:
            self.raise_failure()
        if self.ended:
            raise ChannelClosed("send_eof() was called", address=str(self.address), operation="send")
        if other is None or other.gone or other.polite:
            if other is None or other.polite:
                missing = self.sent - self.confirmed
                raise ChannelClosed(f"the peer closed the channel; {missing} sent messages are unconfirmed",
                                    address=str(self.address), operation="send", by_peer=True, unconfirmed=missing)
            self.fail(PeerLost("the other side dropped the connection", address=str(self.address), operation="send",
                               unconfirmed=self.sent - self.confirmed))
            self.raise_failure()
        keep = hold(data, &p, &n)
        if n > other.max_message:
            raise TooLarge(n, other.max_message, address=str(self.address), operation="send")
        if other.full():
            other.starved = True
            self.want = WRITE
            return BLOCKED
        if not PyBytes_CheckExact(data):
            data = p[:n]
        other.inbox.append(data)
        other.inbox_bytes += n
        self.sent += 1
        self.slot.messages_sent += 1
        self.slot.bytes_sent += n
        self.slot.queue_depth = len(other.inbox)
        if self.slot.queue_depth > self.slot.queue_high:
            self.slot.queue_high = self.slot.queue_depth
        self.tell(other)
        return DONE

    cdef int tell(self, InprocEndpoint who) except -1:
        """Something changed for `who`."""
        if who is None:
            return 0
        if who.wakeup is not None:
            who.wakeup()
        if who.sleepers:
            for lock in who.sleepers:
                try:
                    lock.release()
                except RuntimeError:        # told already
                    pass
        return 0

    cdef bint is_ready(self, int mask) except -1:
        cdef InprocEndpoint other = self.other
        if self.closed or self.broken or other is None or other.gone:
            return True
        if mask & READ and (self.inbox or other.ended):
            return True
        return mask & WRITE != 0 and not other.full()

    cdef bint full(self) except -1:
        return self.inbox_bytes >= CAPACITY_BYTES or len(self.inbox) >= CAPACITY

    cdef int wait_ready(self, int mask, double timeout) except -1:
        cdef double end = time.monotonic() + timeout
        lock = threading.Lock()
        lock.acquire()
        self.sleepers.append(lock)
        try:
            while not self.is_ready(mask):
                if timeout < 0:
                    lock.acquire()
                elif not lock.acquire(timeout=max(0.0, end - time.monotonic())):
                    return mask if self.is_ready(mask) else 0
            return mask
        finally:
            self.sleepers.remove(lock)

    def try_eof(self):
        self.ended = True
        self.tell(self.other)
        return DONE

    def finish_steps(self, timeout):
        """Generator: the end goes after what was sent; nothing is to wait for, the queue is the peer's already."""
        self.ended = self.polite = True  # at once: what the other side sends after it saw the end would be lost
        self.tell(self.other)
        return
        yield

    def release(self):
        cdef InprocEndpoint other
        if self.gone:
            return
        self.closed = self.gone = True
        self.polite = self.ended
        self.slot.drops += len(self.inbox)
        self.inbox.clear()
        self.inbox_bytes = 0
        self.tell(self.other)
        self.tell(self)
        self.wakeup = None               # it holds the channel, which holds this
        other = self.other
        if other is not None and other.gone:
            # Both are over: without the circle they, and their counters, go with their channels, not at some later
            # garbage collection.
            other.other = None
            self.other = None

    def interrupt(self):
        self.tell(self)


def pair(address, wire, Py_ssize_t connecting_limit, Py_ssize_t listening_limit, peer):
    """Two connected endpoints: (connecting side, listening side), and the largest message that each receives."""
    cdef InprocEndpoint a = InprocEndpoint(), b = InprocEndpoint()
    cdef InprocEndpoint side
    a.other = b
    b.other = a
    for side in (a, b):
        side.wire = wire
        side.peer = peer
        side.set_label(address)
    a.max_message = connecting_limit
    b.max_message = listening_limit
    return a, b
