# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Waiting in an event loop, without making a Future or a Task for each message.

An *operation* (one `recv`, one `send`) is an `Awaited` of the engine (see `engine/_awaiting.pyx`): it tries first, and waits by
a *waiter*, which the reader callback of the loop wakes. The wake-up never carries the message: a task that is cancelled after
it was woken has taken nothing.

Everything here runs on the loop's thread. A send or a close that is awaited in another thread's loop is passed over to it; a
receive is refused there, because a message that was taken here could not be given back when that task is cancelled.

What can go wrong: cancellation at any await (an operation that is thrown into leaves the queues as if it had never waited,
except that a message half written goes whole); the loop closing under us; a peer that never lets go (time-outs).
"""
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.exc cimport PyErr_WarnEx
from libc.stdint cimport uint32_t
from anywire.contract.endpoint cimport BLOCKED, DONE, PARTIAL, READ, WRITE, MessageEndpoint, RawEndpoint
from anywire.contract.endpoint cimport fork_generation as generation, monotonic_ns
from anywire.engine._awaiting cimport (
    FINISHED, NEW, NEXT, RETURN, RUNNING, Awaited, Waiter, an_exception_is_set, install)
from anywire.engine._pollers cimport Poller
from anywire.engine._watches cimport Watcher
from anywire.engine.conditions cimport ERROR, HANGUP

import asyncio
from collections import deque

from anywire.contract.errors import AnywireError, Busy, ChannelClosed, TimedOut

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object object) noexcept
    unsigned long PyThread_get_thread_ident() noexcept

cdef enum:
    MOST_TURNS = 64          # system calls in a row before others get a turn
    ONE = 0                  # modes of a send
    MANY = 1
    CALL = 2

GIVE_WAY = object()          # results of an attempt besides the value itself
MUST_WAIT = object()


cdef class Operation(Awaited):
    """One awaited operation. Await it once; `asyncio.create_task` and `wait_for` take it as a coroutine."""

    def __dealloc__(self):
        if self.state == NEW and self.front is not None:
            PyErr_WarnEx(RuntimeWarning, "an operation of a channel or stream was never awaited, so it did nothing", 1)

    cdef int proceed(self, PyObject** result) except -1:
        cdef object value
        if self.state == NEW:
            self.state = RUNNING
            self.enter()
        elif self.state == FINISHED:
            raise RuntimeError("this operation was already awaited")
        elif self.waiter is not None and self.waiter.failure is not None:
            raise self.waiter.failure
        value = self.attempt()
        if value is MUST_WAIT:
            value = self.wait()
        elif value is GIVE_WAY:
            value = None
        else:
            self.finish()
            Py_INCREF(value)
            result[0] = <PyObject*> value
            return RETURN
        Py_INCREF(value)
        result[0] = <PyObject*> value
        return NEXT

    cdef int failed(self) except -1:
        try:
            an_exception_is_set()
        except BaseException as error:
            if self.state != FINISHED:
                name_operation(error, self.name())   # before it forgets whose it is
                self.finish()
            raise

    cdef object wait(self):
        cdef object future
        if self.waiter is None:
            self.waiter = self.front.take_waiter()
        future = self.waiter.sleep()
        self.mask = self.front.end.want
        self.front.watch(self.mask)
        if self.front.end.again:
            self.front.end.again = False
            self.front._notified()
        if self.timeout is not None and self.timer is None:
            self.timer = self.front.loop.call_later(self.timeout, self.expire)
        if self.front.end.wake_at > 0 and self.mask & READ and self.alarm is None:
            self.alarm = self.front.loop.call_later(
                max(0.0, self.front.end.wake_at - monotonic_ns() * 1e-9), self.ring)
        return future

    def ring(self):
        """The endpoint's own time has come (a callback of the loop): try again."""
        self.alarm = None
        if self.waiting():
            self.waiter.wake()

    def expire(self):
        """The time-out passed (a callback of the loop)."""
        if self.waiting():
            self.waiter.failure = TimedOut(self.timeout, address=str(self.front.end.address), operation=self.name())
            self.waiter.wake()

    def name(self):
        return "operation"

    cdef int enter(self) except -1:
        return self.front.check(self.name())

    cdef object attempt(self):
        return None

    cdef int leave(self) except -1:
        return 0

    cdef int finish(self) except -1:
        cdef Waiter waiter
        if self.state == FINISHED:
            return 0
        if self.state == RUNNING:
            self.state = FINISHED
            self.leave()
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
            if self.alarm is not None:
                self.alarm.cancel()
                self.alarm = None
            if self.waiter is not None:
                waiter = self.waiter
                self.waiter = None
                if waiter.failure is None:
                    self.front.spare = waiter
            self.timeout = None
            self.rest()
        else:
            self.state = FINISHED
            self.let_go()
        return 0

    cdef int rest(self) except -1:
        """It is over: the front may use the object again for the next operation, when nobody else has it any more. It
        forgets the front, which it would else keep alive by a cycle."""
        return 0

    cdef int let_go(self) except -1:
        """Give the caller's buffer back: also where the operation never began (a task that is cancelled before its first
        step, a second receiver), for it lives as long as a traceback that it is in."""
        return 0

    cdef bint waiting(self) noexcept:
        return self.state == RUNNING and self.waiter is not None and self.waiter.asleep()


cdef bint unused(object operation) noexcept:
    """Whether nobody has a spare operation any more, but the front and the caller of this."""
    return Py_REFCNT(operation) == 2


cdef class ReceiveOperation(Operation):
    """Only one at a time on a channel or stream."""

    def name(self):
        return "recv"

    cdef int enter(self) except -1:
        cdef Front front = self.front
        if front.elsewhere():
            front.need_here(self.name())     # a Python call for the name only where it is needed
        if front.reader is not None:
            self.state = FINISHED            # it never became the reader, so it has nothing to leave
            self.let_go()
            raise Busy("another task is already receiving here; one receiver at a time",
                       address=str(front.end.address), operation=self.name())
        if front.closing or front.end.closed or front.end.generation != generation():
            front.check(self.name())
        front.reader = self
        return 0

    cdef int leave(self) except -1:
        if self.front.reader is self:
            self.front.reader = None
        return 0

    cdef int rest(self) except -1:
        self.front.spare_reader = self
        self.front = None
        return 0


cdef class SendOperation(Operation):
    """Senders take turns in the order in which they came."""

    def name(self):
        return "write" if isinstance(self.front.end, RawEndpoint) else "send"

    cdef int enter(self) except -1:
        return 0                             # `attempt` looks at each turn whether the channel is open

    cdef object attempt(self):
        cdef Front front = self.front
        cdef MessageEndpoint end = front.end
        cdef int status
        if not self.queued:
            if front.closing or end.closed or end.generation != generation():
                front.check("send")
            if end.turns >= MOST_TURNS:
                end.turns = 0
                return GIVE_WAY
            if front.senders is not None and front.senders:
                return self.queue()
        elif front.senders[0] is not self:
            return MUST_WAIT
        if self.partial:
            status = end.flush_output(False)
        elif self.mode == ONE:
            status = end.put_message(self.data, False)
        elif self.mode == MANY:
            self.index = end.put_messages(self.data, self.index, False)
            status = end.put_status
            if status == DONE and self.index < len(<list> self.data):
                status = BLOCKED
        else:
            status = self.data()
        if status == DONE:
            if self.partial and self.mode == MANY and self.index < len(<list> self.data):
                self.partial = False
                return self.attempt()
            self.partial = False
            return None
        if status == PARTIAL:
            self.partial = True
        end.slot.send_waits += 1
        return self.queue()

    cdef object queue(self):
        cdef Front front = self.front
        if not self.queued:
            if front.senders is None:
                front.senders = deque()
            front.senders.append(self)
            self.queued = True
            self.since = monotonic_ns()
        return MUST_WAIT

    cdef int leave(self) except -1:
        cdef Front front = self.front
        if self.partial:
            # Cancelled in mid-message: what is left is copied and written in the background.
            self.partial = False
            front.end.adopt_output()
            if not front.closing and not front.end.closed:
                front.watch(WRITE)
                if front.end.doorbell:
                    front._notified()        # its bell may have rung already: look whether there is room
        if self.queued:
            self.queued = False
            front.end.slot.send_wait_ns += monotonic_ns() - self.since
            front.senders.remove(self)
            if front.senders and (front.end.write_fd < 0 or front.end.doorbell):
                front._notified()            # no level-triggered descriptor will tell the next sender
        return 0

    cdef int rest(self) except -1:
        self.data = None
        self.front.spare_sender = self
        self.front = None
        return 0


install(SendOperation)


cdef object sending(Front front, object data, int mode, object timeout):
    """A send to be awaited. Made without __init__, whose arguments would cost a tuple."""
    cdef SendOperation op
    if front.elsewhere():
        return sending_elsewhere(front, data, mode, timeout)
    op = front.spare_sender
    if op is not None and unused(op):
        front.spare_sender = None
        op.state = NEW
        op.index = 0
    else:
        op = SendOperation.__new__(SendOperation)
    op.front = front
    op.data = data
    op.mode = mode
    op.timeout = timeout
    return op


cdef object sending_elsewhere(Front front, object data, int mode, object timeout):
    """A send from another thread's loop. Not part of `sending`, where its closure would be made for every send."""
    # Cancelled there, it may still be under way here for a moment: so it gets bytes that nobody changes.
    data = data if mode == CALL else [unchanging(one) for one in data] if mode == MANY else unchanging(data)
    return pass_over(front.loop, lambda: sending(front, data, mode, timeout))


cdef object unchanging(object data):
    return data if isinstance(data, (bytes, str)) else bytes(memoryview(data))


cdef class Watched(Watcher):
    """A descriptor of a connection, in our own loop."""

    cdef int ready(self, uint32_t conditions) except -1:
        cdef Front front = self.front
        try:
            if front.end.doorbell:
                front.rung()
                return 0
            if conditions & (READ | HANGUP | ERROR) and front.watching_read and front.end.read_fd == self.fd:
                front.readable()
            if conditions & (WRITE | HANGUP | ERROR) and front.watching_write and front.end.write_fd == self.fd:
                front.writable()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            front.report(error)
        return 0


cdef class Seen(Poller):
    """A connection that our own loop looks at while it polls, so that its peer need not ring."""

    cdef bint here(self) noexcept:
        cdef Front front = self.front
        return front.reader is not None and front.reader.waiting() and front.end.something_here()

    cdef bint arm(self) noexcept:
        cdef Front front = self.front
        return front.reader is not None and front.reader.waiting() and front.end.arm()

    cdef int ready(self) except -1:
        try:
            self.front.here()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.front.report(error)
        return 0


cdef class Front(Face):
    """The waiting half of a channel or stream; not made by users."""

    def __init__(self, MessageEndpoint end, driver):
        self.end = end
        self.driver = driver
        self.loop = driver.loop
        self.watchers = []
        self.thread = PyThread_get_thread_ident()
        if end.doorbell:
            end.set_asynchronous()
        elif end.read_fd < 0 and end.write_fd < 0:
            end.set_wakeup(self._notified)

    # -- readiness ------------------------------------------------------------------------------------------------------

    cdef bint elsewhere(self) noexcept:
        # In a forked child the loop of another thread is gone, and every operation says Forked.
        return PyThread_get_thread_ident() != self.thread and self.end.generation == generation()

    cdef int need_here(self, str operation) except -1:
        if self.elsewhere():
            raise RuntimeError(f"{operation} {self.end.address}: this connection belongs to the event loop of another "
                               "thread; receive in that loop (sends may come from any), or connect with anywire.sync")
        return 0

    cdef Waiter take_waiter(self):
        cdef Waiter waiter = self.spare
        if waiter is None:
            waiter = Waiter.__new__(Waiter)
            waiter.loop = self.loop
        else:
            self.spare = None
        return waiter

    cdef int watch(self, int mask) except -1:
        if self.end.doorbell:
            # Watched from the first wait on: it rings only for those who sleep, so watching costs nothing while none does.
            if not self.watching_read and self.end.read_fd >= 0 and not self.end.hung_up():
                self.watching_read = True
                self.end.set_wakeup(self._notified)      # rung on this side: memory for a sender came back here
                self.watch_fd(self.end.read_fd, READ, self._rung)
                if self.end.death_fd >= 0:
                    self.watch_fd(self.end.death_fd, READ, self._rung)
                if self.driver.native:
                    self.be_seen()
            return 0
        if mask & READ and not self.watching_read and self.end.read_fd >= 0:
            self.watch_fd(self.end.read_fd, READ, self._readable)
            self.watching_read = True
        if mask & WRITE and not self.watching_write and self.end.write_fd >= 0:
            self.watch_fd(self.end.write_fd, WRITE, self._writable)
            self.watching_write = True
        return 0

    cdef int unwatch(self, int mask) except -1:
        if self.end.doorbell:
            if self.watching_read and mask == (READ | WRITE):
                self.watching_read = False
                self.end.set_wakeup(None)
                if self.seen is not None:
                    self.end.set_polled(False)
                    self.loop._unpoll(self.seen)
                    self.seen = None
                self.unwatch_fd(self.end.read_fd, READ)
                if self.end.death_fd >= 0:
                    self.unwatch_fd(self.end.death_fd, READ)
            return 0
        if mask & READ and self.watching_read:
            self.watching_read = False
            self.unwatch_fd(self.end.read_fd, READ)
        if mask & WRITE and self.watching_write:
            self.watching_write = False
            self.unwatch_fd(self.end.write_fd, WRITE)
        return 0

    # On our own loop a connection is watched by an object of its own, which is called without a callback between.

    cdef int watch_fd(self, int fd, int mask, object callback) except -1:
        cdef Watched watched = self.watched_fd(fd)
        if watched is not None:
            self.loop._rewatch(watched, watched.conditions | mask)
        elif self.driver.native:
            watched = Watched.__new__(Watched)
            watched.front = self
            self.loop._watch(watched, fd, mask)
            self.watchers.append(watched)
        elif mask == READ:
            self.driver.watch_read(fd, callback)
        else:
            self.driver.watch_write(fd, callback)
        return 0

    cdef int unwatch_fd(self, int fd, int mask) except -1:
        cdef Watched watched = self.watched_fd(fd)
        if watched is None:
            if mask == READ:
                self.driver.unwatch_read(fd)
            else:
                self.driver.unwatch_write(fd)
        elif watched.conditions & ~mask:
            self.loop._rewatch(watched, watched.conditions & ~mask)
        else:
            self.watchers.remove(watched)
            self.loop._unwatch(watched)
        return 0

    cdef Watched watched_fd(self, int fd):
        cdef Watched watched
        for watched in self.watchers:
            if watched.fd == fd:
                return watched
        return None

    cdef int be_seen(self) except -1:
        """Let the loop look for itself, if it polls and the endpoint can be looked at."""
        cdef Seen seen
        if self.end.set_polled(True):
            seen = Seen.__new__(Seen)
            seen.front = self
            if self.loop._poll(seen):
                self.seen = seen
            else:
                self.end.set_polled(False)
        return 0

    cdef int here(self) except -1:
        """The loop has seen that something is here."""
        self.end.start_turn()
        if self.reader is not None and self.reader.waiting():
            self.reader.waiter.wake()
        return 0

    cdef int report(self, object error) except -1:
        self.loop.call_exception_handler({"message": f"watching {self.end.address} failed", "exception": error})
        return 0

    def _readable(self):
        self.readable()

    def _writable(self):
        self.writable()

    def _rung(self):
        self.rung()

    cdef int readable(self) except -1:
        """The loop says that the descriptor is readable. Level-triggered: with nobody waiting the watch ends."""
        cdef Operation op
        self.end.start_turn()
        if self.reader is not None and self.reader.waiting() and self.reader.mask & READ:
            self.reader.waiter.wake()
            return 0
        if self.senders is not None and self.senders:
            op = <Operation> self.senders[0]
            if op.waiting() and op.mask & READ:
                op.waiter.wake()
                return 0
        self.unwatch(READ)

    cdef int rung(self) except -1:
        """The loop says that the doorbell rang, or that the peer went."""
        self.end.rung()
        if self.end.hung_up():
            self.unwatch(READ | WRITE)
        if self.reader is not None and self.reader.waiting():
            self.reader.waiter.wake()
        self.writable()

    cdef int writable(self) except -1:
        """The loop says that the descriptor is writable."""
        cdef Operation op
        self.end.turns = 0
        if self.end.unread_output:
            try:
                if self.end.flush_output(False) != DONE:
                    return 0
            except (AnywireError, OSError):
                self.end.unread_output = False       # the next operation meets the loss itself
        if self.reader is not None and self.reader.waiting() and self.reader.mask & WRITE:
            self.reader.waiter.wake()
        while self.senders is not None and self.senders:
            op = <Operation> self.senders[0]
            if not op.waiting():
                break
            op.waiter.wake()
            if self.senders and self.senders[0] is op:
                return 0                               # still no room
        if not self.senders and self.watching_write and not self.end.unread_output and not (
                self.reader is not None and self.reader.waiting() and self.reader.mask & WRITE):
            self.unwatch(WRITE)

    def _notified(self):
        """An endpoint without descriptor became ready; called on any thread."""
        if self.notified or self.end.closed:
            return
        self.notified = True
        if PyThread_get_thread_ident() == self.thread:
            self.loop.call_soon(self._ready)
        else:
            try:
                self.loop.call_soon_threadsafe(self._ready)
            except RuntimeError:                     # the loop is closed: nobody is left to wake
                pass

    def _ready(self):
        self.notified = False
        self.end.start_turn()
        if self.reader is not None and self.reader.waiting():
            self.reader.waiter.wake()
        self.writable()

    # -- the end --------------------------------------------------------------------------------------------------------

    def _give_up(self):
        """Wake everyone who waits here: the channel is closing."""
        cdef Operation op
        waiting = list(self.senders or ())
        if self.reader is not None:
            waiting.append(self.reader)
        for op in waiting:
            if isinstance(op, SendOperation) and (<SendOperation> op).partial:
                self.end.adopt_output()
            if op.waiting():
                op.waiter.failure = ChannelClosed("it was closed on this side while this operation waited",
                                                  address=str(self.end.address), operation=op.name())
                op.waiter.wake_soon()

    async def close(self, *, timeout=5.0):
        """End the connection politely: what was sent goes first, then the end, then wait for the peer's end.

        Parameters: `timeout`, seconds to wait for the peer; after them the connection is dropped.
        Raises PeerLost when the peer was lost and messages are unconfirmed. A cancelled close aborts."""
        if self.elsewhere():
            return await pass_over(self.loop, lambda: self.close(timeout=timeout))
        if self.closing or self.end.closed or self._left_to_parent():
            return
        self.closing = True
        self._give_up()
        self.unwatch(READ | WRITE)
        try:
            await self.driver.run(self.end.close_steps(timeout))
        finally:
            self._over()

    def abort(self):
        """Drop the connection at once: no end frame, the peer sees a loss. Safe to call at any time, from any thread."""
        if self.elsewhere() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.abort)
            return
        if self.end.closed or self._left_to_parent():
            return
        self.closing = True
        self._give_up()
        self.unwatch(READ | WRITE)
        self._over()

    def _left_to_parent(self):
        """In a forked child only its copies of the descriptors go. The connection is the parent's, and so is the loop:
        an epoll descriptor is shared, so to stop watching here would stop the parent's watching."""
        if self.end.generation == generation():
            return False
        self.closing = True
        self.end.release()
        return True

    def _over(self):
        self.end.release()
        self.told_over()

    def detach_state(self):
        """(kind, descriptors, state): what `detach` wraps."""
        self.check("detach")
        self.need_here("detach")
        self.end.need_nothing_returned()
        if self.reader is not None or self.senders:
            raise Busy("an operation is under way", address=str(self.end.address), operation="detach")
        self.unwatch(READ | WRITE)
        state = self.end.detach_state()          # refused by some wires: then the channel goes on
        self.closing = True
        return state

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, traceback):
        if kind is None:
            await self.close()
            return
        try:
            await self.close()
        except AnywireError:
            pass                                     # the block's own error matters more


def pass_over(loop, make):
    """Run `make()` (which gives an awaitable) on `loop` from a task of another thread's loop."""
    async def there():
        return await make()
    passed = there()
    try:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(passed, loop))
    except RuntimeError:                             # that loop is closed
        passed.close()
        raise
