# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The async channel: messages, for every wire.

Everything a user does with a message connection in a coroutine is here once; what differs by wire is the endpoint below.
Runs on its event loop's thread; a send awaited in a task of another thread's loop is passed over to it.
"""
cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from anywire.contract.endpoint cimport BLOCKED, DONE, READ, Loan, MessageEndpoint
from anywire.contract.endpoint cimport fork_generation as generation
from anywire.contract.front cimport GIVE_WAY, MUST_WAIT, Front, ReceiveOperation, sending, unused
from anywire.engine._awaiting cimport install

from anywire.contract.errors import EndOfChannel
from anywire.contract.loans import loan_array

cdef object _GIVE_WAY = GIVE_WAY
cdef object _MUST_WAIT = MUST_WAIT

cdef enum:
    MESSAGE, VIEW, INTO, BATCH, ITERATE, FDS     # what a receive gives
    ONE = 0                                      # modes of a send, as in front.pyx
    MANY = 1
    CALL = 2
    MOST_TURNS = 64


@cython.no_gc_clear                              # the collector would drop the view's object and leave it exported
cdef class Receive(ReceiveOperation):
    cdef int mode
    cdef Py_ssize_t limit
    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef object attempt(self):
        cdef MessageEndpoint end = self.front.end
        cdef object message
        cdef Py_ssize_t n
        if end.turns >= MOST_TURNS:
            end.turns = 0
            return _GIVE_WAY                     # others get a turn before the next system call
        if self.mode == INTO:
            n = end.next_message_into(<char*> self.view.buf, self.view.len, False)
            if n < 0:
                end.slot.recv_waits += 1
                return _MUST_WAIT
            return n
        if self.mode == ITERATE:
            try:
                message = end.next_message(False)
            except EndOfChannel:
                raise StopAsyncIteration from None
        elif self.mode == VIEW:
            message = end.next_view(False)
        elif self.mode == FDS:
            message = end.next_fds_message(False)
        else:
            message = end.next_message(False)
        if message is None:
            end.slot.recv_waits += 1
            return _MUST_WAIT
        if end.unread_output:
            self.front.watch(2)                  # a confirmation that went only in part
        if self.mode == BATCH:
            return end.next_messages(message, self.limit)
        return message

    cdef int leave(self) except -1:
        if self.mode == INTO:
            self.front.end.stop_into()
            self.let_go()
        return ReceiveOperation.leave(self)

    cdef int let_go(self) except -1:
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)
        return 0


install(Receive)


cdef class Channel(Front):
    """A connection that carries messages, for coroutines. Made by `anywire.connect` and given to handlers by `serve`.

    One receiver at a time; any number of senders, which take turns. Every awaited method may be cancelled without losing
    a message. See docs/design/interfaces.md for the whole contract."""

    cdef inline Receive receive(self, int mode, object timeout):
        cdef Receive op = <Receive> self.spare_reader
        if op is not None and unused(op):
            self.spare_reader = None
            op.state = 0
        else:
            op = Receive.__new__(Receive)
        op.front = self
        op.mode = mode
        op.timeout = timeout
        return op

    @property
    def max_message(self):
        """The largest message this side receives, in bytes."""
        return self.end.max_message

    def recv(self, *, bint copy=True, timeout=None):
        """The next message as bytes; with `copy=False` a read-only memoryview, in place where the wire allows.

        Parameters: `timeout`, seconds, None for ever.
        Raises EndOfChannel, PeerLost, BadFrame, TooLarge, TimedOut, Busy, ChannelClosed, Forked.
        Cancelling (or a time-out) takes nothing: the message stays for the next call."""
        return self.receive(MESSAGE if copy else VIEW, timeout)

    def recv_into(self, buffer, *, timeout=None):
        """Receive the next message into a writable buffer; its size in bytes. Large ones go there straight from the kernel.

        Raises BufferError when it does not fit (the message stays), and what `recv` raises. After a cancellation the
        buffer is never touched again."""
        cdef Receive op
        op = self.receive(INTO, timeout)
        op.state = 2                             # not to be reported as forgotten if this raises
        PyObject_GetBuffer(buffer, &op.view, PyBUF_WRITABLE)
        op.held = True
        op.state = 0
        return op

    def recv_many(self, Py_ssize_t limit=1024, *, timeout=None):
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        cdef Receive op
        if limit < 1:
            raise ValueError(f"recv_many needs a limit of at least 1, not {limit}")
        op = self.receive(BATCH, timeout)
        op.limit = limit
        return op

    def recv_fds(self, *, timeout=None):
        """The next message with the descriptors that came with it: (bytes, list of int). Unix sockets only.

        The descriptors are yours to close. Raises Unsupported on other wires, and what `recv` raises."""
        need_fds(self.end, "recv_fds")
        return self.receive(FDS, timeout)

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.receive(ITERATE, None)

    def send(self, data, *, timeout=None):
        """Send one message: any contiguous buffer, or a Loan. Waits while the peer is slow (back-pressure).

        Parameters: `timeout`, seconds to wait for room, None for ever.
        Raises TooLarge, PeerLost, ChannelClosed, TimedOut, Forked. Cancelled, it went whole or not at all."""
        if isinstance(data, Loan):
            return self.send_loan(data, timeout)
        return sending(self, data, ONE, timeout)

    async def send_loan(self, Loan loan, timeout):
        await sending(self, loan, ONE, timeout)
        loan.sent = True

    def send_many(self, messages, *, timeout=None):
        """Send messages in order, many in one system call. Cancelled, a first part of them went, each whole."""
        return sending(self, list(messages), MANY, timeout)

    def send_fds(self, fds, message=b"", *, timeout=None):
        """Send descriptors (numbers or objects with fileno()) with a message. Unix sockets only; at most 253 at once.

        The descriptors stay yours. Raises Unsupported on other wires, ValueError, and what `send` raises."""
        need_fds(self.end, "send_fds")
        fds = list(fds)
        return sending(self, lambda: self.end.put_fds(fds, message, False), CALL, timeout)

    def try_send(self, data):
        """Send without waiting: True when the message was taken, False when there is no room now."""
        cdef int status
        self.check("try_send")
        self.need_here("try_send")
        if self.senders is not None and self.senders:
            return False
        status = self.end.put_message(data, False)
        if status == BLOCKED:
            return False
        if status != DONE:
            if self.end.adopt_output():
                return False
            self.watch(2)
        if isinstance(data, Loan):
            (<Loan> data).sent = True
        return True

    def send_eof(self, *, timeout=None):
        """Half-close: the peer's receives end after what was sent; it may still send. Raises Unsupported where none is."""
        return sending(self, self.end.try_eof, CALL, timeout)

    def loan(self, Py_ssize_t nbytes):
        """Writable memory of `nbytes` bytes for one message: fill it, then `send(loan)`. On shared memory nothing is copied.

        When the wire's pool has no place now the loan is private memory, and its `send` copies, and waits like any other."""
        self.check("loan")
        return self.end.make_loan(nbytes)

    def loan_array(self, shape, dtype="uint8"):
        """As `loan`, as an uninitialised NumPy array: fill it, then `send(array)`. On shared memory nothing is copied.

        Parameters: `shape` and `dtype` as in numpy.empty. After the send the array still shows the memory that the peer now
        reads: leave it alone. Needs the extra anywire[numpy]; raises TypeError for a dtype that holds Python objects."""
        return loan_array(self.loan, shape, dtype)


cdef int need_fds(MessageEndpoint end, str operation) except -1:
    if not hasattr(end, "take_fds_message") or not getattr(end, "carries_fds", False):
        from anywire.contract.errors import Unsupported
        raise Unsupported("this wire carries no descriptors; Unix sockets do", address=str(end.address),
                          operation=operation)
    return 0
