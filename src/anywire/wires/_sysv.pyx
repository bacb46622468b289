# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""An end of `sysv://`: it receives from one System V queue, or sends into one, or both. One message of the queue is one
message, its bytes unchanged; the type that messages have there is this end's own.

Such a queue has no descriptor. The blocking front waits inside msgrcv(2) and msgsnd(2), on the thread that calls. The async
front waits for a bell that helpers' threads ring (`_sysv_waiting.pyx`): one waits for a message, one sends the message for
which there was no room. That one is told to the front as begun (PARTIAL), so a sender that gives up ends it, and then it went
whole or not at all, and for certain.

Both fronts; a thread may receive while another sends. What can go wrong: a message that the queue can't hold (`TooLarge`,
which says how to raise the limit); an end that only sends, or only receives (`Unsupported`); the queue was removed
(`PeerLost`); no permission. Nobody is seen at the other end, so there is no end but this one: the listener that is closed
ends its channel when the queue is empty.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from libc.errno cimport E2BIG, EACCES, EAGAIN, EIDRM, EINTR, EINVAL, ENOMSG, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from anywire.contract cimport counters
from anywire.contract.endpoint cimport BLOCKED, DONE, PARTIAL, READ, WRITE, MessageEndpoint, fork_generation, hold
from anywire.ipc._system cimport deadline, fail, left
from anywire.ipc._interrupt cimport Interrupt, interrupting_signal, known_signal
from anywire.wires._sysv_waiting cimport ANYWIRE_FAILED, ANYWIRE_SENT, ANYWIRE_TAKEN, Helper

import os

from anywire.contract.errors import ChannelClosed, EndOfChannel, PeerLost, TooLarge, Unsupported
from anywire.ipc.sysv import _calls
from anywire.ipc.sysv.kernel_limits import explain, largest_message
from anywire.ipc.sysv.keys import space

cdef extern from "anywire/wires/sysv_waiting.h" nogil:
    int anywire_own_thread(unsigned int generation, int number)
    void anywire_enter(int* inside, int thread)
    int anywire_inside(int* inside)
    ssize_t anywire_receive_inside(int* inside, int id, void* message, size_t size, long type)
    int anywire_send_inside(int* inside, int id, const void* message, size_t size)
    void anywire_signal(int thread, int number)
    void anywire_ring(int bell)
    bint anywire_gone(int id)

cdef extern from "<sys/msg.h>" nogil:
    int IPC_NOWAIT, MSG_NOERROR
    ssize_t msgrcv(int id, void* message, size_t size, long type, int flags)
    int msgsnd(int id, const void* message, size_t size, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* p, size_t n)
    int c_close "close"(int fd)
    int usleep(unsigned int microseconds)

WAYS = "reply=true makes it two-way, by a second queue"

cdef enum:
    ROOM = 8192                          # bytes of a buffer at first: kernel.msgmax, unless somebody raised it
    TRIES = 1000                         # signals, about a millisecond apart, to end a call of another thread



cdef struct Message:
    long type
    char data[8]


cdef class SysvEndpoint(MessageEndpoint):
    """An end over the queues of these ids, each -1 if there is none.

    Parameters: `max_message`, the largest to send and receive, in bytes; `type`, of what is sent; `wanted`, of what is
    received, as msgrcv's; `early`, the type of an empty message that was taken already, 0 for none; `client`: it sends into
    a listener's queue and may have the second one for itself; `lock`, the socket whose name says so, closed with this end;
    `on_end`, called with False at the end of a listener's channel, and with True once it is released."""

    cdef readonly int recv_id
    cdef readonly int send_id
    cdef public long type
    cdef readonly long wanted
    cdef bint client
    cdef bint over                       # the listener was closed
    cdef bint interrupted                # threads of the blocking front are to leave the calls they are in
    cdef bint gathering                  # what is here now is wanted, and nobody waits for more
    cdef bint still                      # the bell rang, but not for a message
    cdef long early
    cdef int bell
    cdef object on_end
    cdef object lock
    cdef Helper coming                   # waits for a message
    cdef Helper going                    # waits for room, and sends
    cdef Message* inbox
    cdef Message* outbox
    cdef size_t inbox_room, outbox_room  # bytes of a message that they hold
    cdef size_t pending                  # bytes in the outbox, if `waiting`
    cdef bint waiting                    # the outbox has a message for which there was no room
    cdef Py_ssize_t limit                # max_message as it was given
    cdef int receiving, sending          # which thread is inside a call there; 0: none

    def __init__(self, int recv_id, int send_id, Py_ssize_t max_message=16 << 20, *, long type=1, long wanted=0, long early=0,
                 bint client=False, lock=None, on_end=None, address=None, peer=None, wire=None):
        self.bell = -1
        self.recv_id, self.send_id = recv_id, send_id
        self.type, self.wanted, self.early = type, wanted, early
        self.client = client
        self.peer, self.wire = peer, wire
        self.set_label(address)
        self.limit = max_message
        self.max_message = min(max_message, largest(send_id if send_id >= 0 else recv_id))
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.read_fd = self.write_fd = self.bell
        self.doorbell = True
        self.on_end = on_end
        self.lock = lock

    def __cinit__(self, *args, **keywords):
        self.bell = -1

    def __dealloc__(self):
        self.let_go()
        if self.bell >= 0:
            c_close(self.bell)
        PyMem_RawFree(self.inbox)
        PyMem_RawFree(self.outbox)

    # -- sending --------------------------------------------------------------------------------------------------------

    cdef int put_message(self, object data, bint block) except -1:
        cdef const char* p
        cdef Py_ssize_t n
        if self.broken:
            self.raise_failure()
        if self.send_id < 0:
            raise Unsupported("this end of a queue only receives", address=str(self.address), operation="send", advice=WAYS)
        self.want = WRITE
        if self.waiting:
            return BLOCKED
        keep = hold(data, &p, &n)
        if n > self.max_message:
            self.need_room(n)
        if self.outbox is NULL or <size_t> n > self.outbox_room:
            self.outbox_room = grow(&self.outbox, max(n, <Py_ssize_t> ROOM))
        self.outbox.type = self.type
        if n:
            memcpy(self.outbox.data, p, n)
        self.pending = n
        if self.post():
            return DONE
        self.waiting = True
        if block:
            return DONE if self.flush_output(True) == DONE else PARTIAL
        self.again = self.asynchronous       # who is going to wait looks once more, and then asks the helper
        return PARTIAL

    cdef int need_room(self, Py_ssize_t n) except -1:
        """Raise why a message is too large, if it still is: the limits of the system may have been raised."""
        cdef Py_ssize_t now = largest(self.send_id)
        self.max_message = min(self.limit, now)
        if n <= self.max_message:
            return 0
        if n > self.limit:
            raise TooLarge(n, self.limit, address=str(self.address), operation="send")
        if n > largest_message() >= 0:
            raise TooLarge(n, now, address=str(self.address), operation="send", option="kernel.msgmax",
                           advice=f"{explain('msgmax')}; or send it in parts")
        raise TooLarge(n, now, address=str(self.address), operation="send", option="max_bytes",
                       advice=f"the queue holds {now} bytes in all; make it with a larger max_bytes= ({explain('msgmnb')})")

    cdef bint post(self) except -1:
        """Send what is in the outbox. False: there is no room now."""
        if msgsnd(self.send_id, self.outbox, self.pending, IPC_NOWAIT) == 0:
            self.posted()
            return True
        if errno == EAGAIN:
            return False
        self.waiting = False
        self.failed(errno, "send")

    cdef void posted(self) noexcept:
        self.waiting = False
        self.sent += 1
        self.slot.messages_sent += 1
        self.slot.bytes_sent += self.pending

    cdef int flush_output(self, bint block) except -1:
        cdef int outcome
        if not self.waiting:
            return DONE
        self.want = WRITE
        if self.asynchronous:
            if self.going is None:
                self.going = Helper(self.bell)
            if self.going.busy():
                return BLOCKED
            outcome = self.going.end()
            if outcome == ANYWIRE_SENT:
                self.posted()
                return DONE
            if outcome == ANYWIRE_FAILED:
                self.waiting = False
                self.failed(self.going.state.error, "send")
            if self.post():
                return DONE
            self.going.send(self.send_id, self.outbox, self.pending)
            return BLOCKED
        while not self.post():
            if not block or self.interrupted or self.closed:
                return BLOCKED
            if self.wait_for_room(-1):
                return DONE
        return DONE

    cdef bint wait_for_room(self, int64_t until) except -1:
        """Blocking front: send what is in the outbox when there is room. False: the time is up, or the channel closes."""
        cdef Interrupt interrupt = None
        cdef int done, e
        if until >= 0:
            interrupt = Interrupt()
            interrupt.begin(until)
        try:
            while not self.interrupted and not self.closed:
                anywire_enter(&self.sending, self.own_thread())
                with nogil:
                    done = anywire_send_inside(&self.sending, self.send_id, self.outbox, self.pending)
                    e = errno
                if done == 0:
                    self.posted()
                    return True
                if e != EINTR:
                    self.waiting = False
                    self.failed(e, "send")
                PyErr_CheckSignals()
                if until >= 0 and left(until) == 0:
                    return False
            return False
        finally:
            if interrupt is not None:
                interrupt.end()

    cdef int own_thread(self) except -1:
        return anywire_own_thread(fork_generation(), known_signal())

    cdef int adopt_output(self) except -1:
        if not self.waiting:
            return 0
        self.again = False
        if self.going is not None and self.going.end() == ANYWIRE_SENT:
            self.posted()
            return 0
        self.waiting = False
        return 1

    cdef bint output_pending(self) noexcept:
        return self.waiting

    # -- receiving ------------------------------------------------------------------------------------------------------

    cdef object take_message(self, bint block):
        cdef ssize_t n
        cdef int e
        cdef bint wait = block
        if self.broken:
            self.raise_failure()
        if self.recv_id < 0:
            raise Unsupported("this end of a queue only sends", address=str(self.address), operation="recv", advice=WAYS)
        if self.coming is not None and self.coming.used:
            if self.still and self.coming.busy():
                self.still = False
                self.want = READ
                return None
            if self.coming.end() == ANYWIRE_TAKEN:
                self.early = self.coming.state.taken
        self.still = False
        if self.early:
            self.early = 0
            return self.received(b"")
        if self.inbox is NULL:
            self.inbox_room = grow(&self.inbox, ROOM)
        if block and self.client and anywire_gone(self.send_id):
            wait = False
        while True:
            if wait and not self.over and not self.interrupted and not self.closed:
                anywire_enter(&self.receiving, self.own_thread())
                with nogil:
                    n = anywire_receive_inside(&self.receiving, self.recv_id, self.inbox, self.inbox_room, self.wanted)
                    e = errno
            else:
                n = msgrcv(self.recv_id, self.inbox, self.inbox_room, self.wanted, IPC_NOWAIT)
                e = errno
            if n >= 0:
                break
            if e == ENOMSG:
                return self.nothing_here()
            if e == E2BIG:
                self.inbox_room = grow(&self.inbox, 8 * self.inbox_room)     # memory that is not touched costs nothing
            elif e != EINTR:
                self.failed(e, "recv")
            else:
                PyErr_CheckSignals()
                if self.interrupted or self.closed:
                    self.want = READ
                    return None
        if n > self.limit:
            self.slot.drops += 1
            raise TooLarge(n, self.limit, address=str(self.address), operation="recv",
                           advice="it was dropped; raise max_message= here, or send it in parts")
        return self.received(PyBytes_FromStringAndSize(self.inbox.data, n))

    cdef object received(self, bytes message):
        self.slot.messages_received += 1
        self.slot.bytes_received += len(message)
        return message

    cdef object nothing_here(self):
        if self.over:
            self.ended()
        if self.client and anywire_gone(self.send_id):
            # The listener left answers, and this end had them all.
            self.failed(EIDRM, "recv")
        if self.asynchronous and not self.gathering:
            if self.coming is None:
                self.coming = Helper(self.bell)
            self.coming.wait_for_message(self.recv_id, self.wanted)
        self.want = READ

    cdef int ended(self) except -1:
        if self.on_end is not None:
            self.on_end(False)
        raise EndOfChannel("the listener was closed and the queue is empty", address=str(self.address), operation="recv",
                           unconfirmed=self.sent)

    cdef list next_messages(self, object first, Py_ssize_t limit):
        self.gathering = True
        try:
            return MessageEndpoint.next_messages(self, first, limit)
        finally:
            self.gathering = False

    cdef int wait_for_message(self, int64_t until) except -1:
        """Blocking front: 0 when the time is up."""
        cdef Interrupt interrupt = None
        cdef Message empty
        cdef ssize_t n
        cdef int e
        if until >= 0:
            interrupt = Interrupt()
            interrupt.begin(until)
        try:
            while not self.early and not self.over and not self.interrupted and not self.closed:
                anywire_enter(&self.receiving, self.own_thread())
                with nogil:
                    n = anywire_receive_inside(&self.receiving, self.recv_id, &empty, 0, self.wanted)
                    e = errno
                if n >= 0:
                    self.early = empty.type
                elif e != EINTR:
                    break                    # there is one, or it can't be received, as the next attempt will tell
                else:
                    PyErr_CheckSignals()
                    if until >= 0 and left(until) == 0:
                        return 0
            return 1
        finally:
            if interrupt is not None:
                interrupt.end()

    # -- waiting --------------------------------------------------------------------------------------------------------

    cdef int wait_ready(self, int mask, double timeout) except -1:
        cdef int64_t until
        if self.closed:
            raise ChannelClosed("it was closed on this side", address=str(self.address), operation="wait")
        if self.interrupted:
            with nogil:
                usleep(100)                  # for the thread that closes it, and has not come to that yet
            return mask
        if timeout == 0:
            return 0
        until = -1 if timeout < 0 else deadline(timeout)
        if mask == WRITE:
            return mask if not self.waiting or self.wait_for_room(until) or self.interrupted or self.closed else 0
        return mask if self.wait_for_message(until) else 0

    cdef int rung(self) except -1:
        cdef uint64_t count
        if self.bell >= 0 and self.generation == fork_generation():
            c_read(self.bell, &count, sizeof(count))
        self.turns = 0
        self.still = not self.over and self.coming is not None and self.coming.busy()

    def interrupt(self):
        self.interrupted = True
        self.wake(&self.receiving)
        self.wake(&self.sending)

    cdef int wake(self, int* inside) except -1:
        """Make a thread of the blocking front leave the call it is in; it has been told why it should."""
        cdef int thread, tries = 0
        while tries < TRIES and self.generation == fork_generation():
            thread = anywire_inside(inside)
            if thread == 0:
                break
            anywire_signal(thread, interrupting_signal())
            with nogil:
                usleep(50 if tries < 10 else 1000)
            tries += 1
        return 0

    # -- failing --------------------------------------------------------------------------------------------------------

    cdef int failed(self, int e, str operation) except -1:
        """Raise what this number means here."""
        cdef int id = self.send_id if operation == "send" else self.recv_id
        if e == EIDRM or (e == EINVAL and anywire_gone(id)):
            if self.over and operation == "recv":
                self.ended()
            if not self.broken:
                reason = "the queue was removed"
                self.fail(PeerLost(reason, address=str(self.address), operation=operation, unconfirmed=self.sent))
                counters.lost(self.slot, reason.encode(), EIDRM)
            return self.raise_failure()
        if e == EINVAL and operation == "send":
            self.need_room(self.pending)
        if e == EACCES:
            fail(e, None, f"{operation} {self.address}: the queue's mode does not let this user {operation}")
        return fail(e, None, f"{operation} {self.address}")

    # -- moving to another process --------------------------------------------------------------------------------------

    def detach_state(self):
        """(kind, descriptors, state): the queues' ids, which mean the same to all of an IPC namespace, and the lock.

        A handle has a descriptor at least, and a queue has none: the bell goes along."""
        if self.on_end is not None:
            raise Unsupported("the listener's end of a queue stays with its listener", address=str(self.address),
                              operation="detach", advice="close it and detach the listener: what was not received is in the queue")
        if self.waiting:
            raise ChannelClosed("a message is still being written", address=str(self.address), operation="detach")
        fds = [os.dup(self.bell)]
        try:
            if self.lock is not None:
                fds.append(os.dup(self.lock.fileno()))
        except BaseException:
            os.close(fds[0])
            raise
        if self.coming is not None and self.coming.used and self.coming.end() == ANYWIRE_TAKEN:
            self.early = self.coming.state.taken
        state = {"recv_id": self.recv_id, "send_id": self.send_id, "type": self.type, "early": self.early,
                 "client": self.client, "max_message": self.limit, "sent": self.sent, "space": space()}
        self.early = 0                       # it goes along, and not back into the queue
        self.client = False                  # nothing has ended: a queue of answers stays
        self.release()
        return "sysv", fds, state

    def restore_state(self, state):
        """Go on where `detach_state` stopped in another process."""
        self.sent = state["sent"]

    # -- ending ---------------------------------------------------------------------------------------------------------

    def no_more(self):
        """The listener is closed: what is in the queue is still received, then comes the end."""
        self.over = True
        if self.bell >= 0:
            anywire_ring(self.bell)
        self.wake(&self.receiving)

    def refuse(self):
        """Nobody here may write: the message that came goes, for it would only bring this connection again."""
        cdef Message none
        if self.early or msgrcv(self.recv_id, &none, 0, self.wanted, IPC_NOWAIT | MSG_NOERROR) >= 0:
            self.early = 0
            self.slot.drops += 1
        self.release()

    cdef void let_go(self) noexcept:
        """End the threads. An empty message that was taken and not handed out goes back, as the newest."""
        cdef Message empty
        if self.generation != fork_generation():
            return
        if self.coming is not None:
            if self.coming.end() == ANYWIRE_TAKEN:
                self.early = self.coming.state.taken
            self.coming.quit()
        if self.going is not None:
            if self.going.end() == ANYWIRE_SENT:
                self.posted()
            self.going.quit()
        if self.early:
            empty.type = self.early
            self.early = 0
            msgsnd(self.recv_id, &empty, 0, IPC_NOWAIT)

    def release(self):
        """What was not received stays in the queue."""
        if self.closed:
            return
        self.closed = True
        self.read_fd = self.write_fd = -1
        self.let_go()
        bell, self.bell = self.bell, -1
        if bell >= 0:
            os.close(bell)
        if self.client and self.recv_id >= 0 and self.generation == fork_generation() and anywire_gone(self.send_id):
            try:
                _calls.msg_remove(self.recv_id)          # the listener left it to who reads it
            except OSError:
                pass
        lock, self.lock = self.lock, None
        if lock is not None:
            lock.close()
        callback, self.on_end = self.on_end, None
        if callback is not None:
            callback(True)


cdef size_t grow(Message** box, size_t size) except 0:
    cdef void* room = PyMem_RawRealloc(box[0], sizeof(long) + size)
    if room is NULL:
        raise MemoryError()
    box[0] = <Message*> room
    return size


cdef Py_ssize_t largest(int id) except -1:
    """Bytes of the largest message that this queue will ever take."""
    cdef Py_ssize_t most = largest_message()
    if most < 0:
        most = ROOM
    try:
        return min(most, <Py_ssize_t> _calls.msg_status_any(id)[8])
    except OSError:
        return most
