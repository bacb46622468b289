# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""An end of `mq://`: it receives from one message queue of the system, or sends into one, or both. One message of the queue
is one message, its bytes unchanged.

The async front tries, and waits for the queue's descriptor. So does the blocking one with a time-out; without, it waits in
mq_receive(3) and mq_send(3), which hand a message over directly and are one call instead of three. Both fronts; a thread may
receive while another sends.

What can go wrong: a message over the queue's size (`TooLarge`); an end that only sends, or only receives (`Unsupported`).
Nobody is seen at the other end, so there is no loss and no end but this one: the listener that is closed ends its channel
when the queue is empty.
"""
from anywire.contract.endpoint cimport BLOCKED, DONE, READ, WRITE, MessageEndpoint, hold

import errno
import os
import select

from anywire.contract.errors import ChannelClosed, EndOfChannel, TooLarge, Unsupported
from anywire.ipc import mqueue_limits

WAYS = "reply=true makes it two-way, by a second queue"


cdef class QueueEndpoint(MessageEndpoint):
    """An end over the open queues `receiver` and `sender` (either may be None), which it closes with itself.

    Parameters: `max_message`, the largest to send and receive, in bytes; `priority`, of all that is sent; `ends`, `no_more`
    will be called: the end when the queue is empty; `on_release`, called once."""

    cdef readonly object receiver
    cdef readonly object sender
    cdef readonly int priority
    cdef bint over                       # the listener was closed
    cdef bint interrupted                # threads of the blocking front are to leave the calls they are in
    cdef int event                       # readable when it was
    cdef object watch                    # epoll of the receiver and the event: what the front waits for
    cdef object on_release

    def __init__(self, receiver, sender, Py_ssize_t max_message=16 << 20, *, int priority=0, bint ends=False, on_release=None, address=None, peer=None,
                 wire=None):
        self.receiver, self.sender = receiver, sender
        self.priority = priority
        self.on_release = on_release
        self.event = -1
        self.peer, self.wire = peer, wire
        self.set_label(address)
        self.max_message = min(max_message, <Py_ssize_t> (sender if sender is not None else receiver).message_size)
        if sender is not None:
            self.write_fd = sender.fileno()
        if receiver is not None:
            self.read_fd = receiver.fileno()
        if ends:
            self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self.watch = select.epoll(2)
            self.watch.register(self.event, select.EPOLLIN)
            self.watch.register(self.read_fd, select.EPOLLIN)
            self.read_fd = self.watch.fileno()

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        if self.broken:
            self.raise_failure()
        if self.sender is None:
            raise Unsupported("this end of a queue only receives", address=str(self.address), operation="send", advice=WAYS)
        keep = hold(data, &p, &n)
        if n > self.max_message:
            if self.max_message < <Py_ssize_t> self.sender.message_size:
                raise TooLarge(n, self.max_message, address=str(self.address), operation="send")
            raise TooLarge(n, self.max_message, address=str(self.address), operation="send", option="message_size",
                           advice=mqueue_limits.advice_for(n))
        try:
            if block and not self.interrupted:
                sent = self.sender._send_until_nudged(keep, self.priority)
            else:
                sent = self.sender._try_send(keep, self.priority)
        except OSError as error:
            self.refuse_closed(error, "send")
        if not sent:
            self.want = WRITE
            return BLOCKED
        self.sent += 1
        self.slot.messages_sent += 1
        self.slot.bytes_sent += n
        return DONE

    cdef int refuse_closed(self, object error, str operation) except -1:
        if error.errno == errno.EBADF:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation=operation) from None
        raise OSError(error.errno, f"{operation} {self.address}: {error.strerror}") from None

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef object take_message(self, bint block):
        if self.broken:
            self.raise_failure()
        if self.receiver is None:
            raise Unsupported("this end of a queue only sends", address=str(self.address), operation="recv", advice=WAYS)
        try:
            if block and not self.over and not self.interrupted:
                found = self.receiver._recv_until_nudged()
            elif (pair := self.receiver._try_recv()) is not None:
                found = pair[0]
            else:
                found = None
        except OSError as error:
            self.refuse_closed(error, "recv")
        if found is None:
            if self.over:
                raise EndOfChannel("the listener was closed and the queue is empty", address=str(self.address),
                                   operation="recv", unconfirmed=self.sent)
            self.want = READ
            return None
        if len(found) > self.max_message:
            self.slot.drops += 1
            raise TooLarge(len(found), self.max_message, address=str(self.address), operation="recv",
                           advice="it was dropped; raise max_message= here, or send it in parts")
        self.slot.messages_received += 1
        self.slot.bytes_received += len(found)
        return found

    # -- moving to another process --------------------------------------------------------------------------------------

    def detach_state(self):
        """(kind, descriptors, state): copies of the queues' descriptors, which share the lock that this end holds."""
        if self.event >= 0:
            raise Unsupported("the listener's end of a queue stays with its listener", address=str(self.address),
                              operation="detach", advice="close it and detach the listener: what was not received is in the queue")
        fds = []
        try:
            for queue in (self.receiver, self.sender):
                if queue is not None:
                    fds.append(os.dup(queue.fileno()))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        state = {"receives": self.receiver is not None, "max_message": self.max_message, "priority": self.priority,
                 "sent": self.sent}
        self.release()
        return "queues", fds, state

    def restore_state(self, state):
        """Go on where `detach_state` stopped in another process."""
        self.sent = state["sent"]

    # -- ending ---------------------------------------------------------------------------------------------------------

    def no_more(self):
        """The listener is closed: what is in the queue is still received, then comes the end."""
        self.over = True
        if self.event >= 0:
            os.eventfd_write(self.event, 1)
        self.receiver._nudge()

    def interrupt(self):
        self.interrupted = True
        for queue in (self.receiver, self.sender):
            if queue is not None:
                queue._nudge()
        MessageEndpoint.interrupt(self)

    def refuse(self):
        """Nobody here may write: the message that came goes, for it would only bring this connection again."""
        try:
            if self.receiver is not None and self.receiver._try_recv() is not None:
                self.slot.drops += 1
        finally:
            self.release()

    def release(self):
        """What was not received stays in the queue."""
        if self.closed:
            return
        self.closed = True
        self.read_fd = self.write_fd = -1
        for queue in (self.receiver, self.sender):
            if queue is not None:
                queue.close()
        if self.event >= 0:
            self.watch.close()
            os.close(self.event)
            self.event = -1
        callback, self.on_release = self.on_release, None
        if callback is not None:
            callback()
