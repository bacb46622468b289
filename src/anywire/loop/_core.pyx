# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, auto_pickle=False
"""The core of the loop: ready queue, timers, watched descriptors, and the turn that runs them.

Owns what is done for each callback, each timer and each report. What is done once per connection or per loop is the
standard library's, of which `anywire.loop.Loop` is made together with `Core`; so the methods here have its names and its
rules. A turn is, in the order of the standard loop:

    1. flush what was corked    2. look at the descriptors, and sleep if nothing else is to be done
    3. run the callbacks that were ready before    4. deliver the reports    5. run the timers that were due

A look costs a system call, so while callbacks go on making callbacks it is done every LOOK seconds only. Whoever adds
something from elsewhere (another thread, a signal handler) writes to an eventfd, and only while the loop sleeps: that it
does is said before the GIL is given up, and everybody who adds something holds the GIL.

Called on the loop's thread, `call_soon_threadsafe` and the cancelling of its handles excepted. What can go wrong: a
callback raises (the loop's exception handler gets it; SystemExit and KeyboardInterrupt end the run, and what was ready
stays so); the process forks (the child's copy refuses with RuntimeError and changes nothing of the parent's).
"""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject, PyTypeObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint64_t

from anywire.engine._figures cimport LoopFigures, Meter
from anywire.engine._pollers cimport Poller, Pollers
from anywire.engine._timers cimport monotonic
from anywire.engine._wakeup cimport Wakeup, aw_drain, aw_wake
from anywire.engine.conditions cimport ERROR, HANGUP, ONESHOT, READ, WRITE
from anywire.engine.demultiplexers._base cimport Demultiplexer

import asyncio
import os
import sys
import threading
from asyncio import Future, Task, base_events, format_helpers
from collections import deque
from socket import socket as Socket

cdef extern from "<sys/socket.h>":
    int MSG_DONTWAIT
    Py_ssize_t recv(int fd, void* buffer, size_t size, int flags)

cdef extern from "Python.h":
    PyObject* PyObject_Call(object callable, object args, PyObject* kwargs) noexcept
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) noexcept
    int PyContext_Exit(object context) noexcept
    Py_ssize_t Py_REFCNT(object object) noexcept
    void PyObject_GC_Track(PyObject* object) noexcept
    void PyObject_GC_UnTrack(PyObject* object) noexcept
    bint PyObject_GC_IsTracked(object object) noexcept

cdef extern from "anywire/loop/fast_methods.h":
    ctypedef object (*aw_fast)(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names)
    ctypedef struct PyMethodDef:
        const char* ml_name
    int aw_replace_method(PyTypeObject* type, PyMethodDef* definition, aw_fast function) except -1
    tuple aw_tuple(PyObject** args, Py_ssize_t count)

cdef extern from *:
    """
    /* Gives a name to "an exception is set", for Cython's try. */
    static int anywire_raised(void) { return -1; }
    static void anywire_drop(PyObject *object) { Py_DECREF(object); }
    """
    int raised "anywire_raised"() except -1
    void drop "anywire_drop"(PyObject* object)

cdef enum:
    NOTED = 64                      # slow callbacks that are remembered

cdef double LOOK = 50e-6            # seconds between looks at the descriptors while callbacks are ready

cdef unsigned int _generation = 0

FORKED = "this event loop belongs to the parent process; make a new one in the child, or start the child by spawn"


def _count_fork():
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


def _described(callback, args, debug):
    if sys.version_info >= (3, 13):
        return format_helpers._format_callback_source(callback, args, debug=debug)
    return format_helpers._format_callback_source(callback, args)


# Both handles say that they are the standard ones when isinstance() asks: a class of C can't derive from those. What
# follows is as asyncio.Handle, whose own functions make the text of repr().

@cython.final
@cython.freelist(512)
cdef class Handle:
    """A callback that will be called soon; asyncio.Handle to isinstance(). Made by the loop only."""

    @property
    def __class__(self):
        return asyncio.Handle

    def cancel(self):
        """Don't call it. Does nothing once it has been called."""
        if not self._cancelled:
            self._cancelled = True
            if self._loop is not None and self._loop._debug:    # None: the garbage collector was here
                self.shown = repr(self)
            self._callback = None
            self._args = None

    def cancelled(self):
        """Whether `cancel` was called."""
        return bool(self._cancelled)

    def get_context(self):
        """The context in which it is called."""
        settle(self)
        return self._context

    def _run(self):
        if not self._cancelled and self._loop is not None:
            self._loop.execute(self, self._callback, self._args, self._context)

    def _repr_info(self):
        return asyncio.Handle._repr_info(self)

    def __repr__(self):
        return self.shown or f"<{' '.join(self._repr_info())}>"


@cython.final
cdef class TimerHandle(Timer):
    """A callback that will be called at some time; asyncio.TimerHandle to isinstance(). Made by the loop only."""

    @property
    def __class__(self):
        return asyncio.TimerHandle

    def cancel(self):
        """Don't call it. Nothing is left of it in the loop."""
        if not self._cancelled:
            self._cancelled = True
            if self.place >= 0 and self.queue is not None:
                self.queue.cancel_timer(self)
                self.left()
            if self._loop is not None and self._loop._debug:    # None: the garbage collector was here
                self.shown = repr(self)
            self._callback = None
            self._args = None

    def cancelled(self):
        """Whether `cancel` was called."""
        return bool(self._cancelled)

    def when(self):
        """When it is called, in seconds of the loop's time()."""
        return (<Timer> self).when

    cdef int left(self) except -1:
        settle_timer(self)
        return 0

    def get_context(self):
        """The context in which it is called."""
        settle_timer(self)
        return self._context

    @property
    def _when(self):
        return (<Timer> self).when

    @property
    def _scheduled(self):
        return self.place >= 0

    def _run(self):
        if not self._cancelled and self._loop is not None:
            self._loop.execute(self, self._callback, self._args, self._context)

    def _repr_info(self):
        info = asyncio.Handle._repr_info(self)
        info.insert(2 if self._cancelled else 1, f"when={(<Timer> self).when}")
        return info

    def __repr__(self):
        return self.shown or f"<{' '.join(self._repr_info())}>"

    def __hash__(self):
        return hash((<Timer> self).when)

    def __eq__(self, other):
        if not isinstance(other, asyncio.TimerHandle):
            return NotImplemented
        return (self._when == other._when and self._callback == other._callback and self._args == other._args
                and self.cancelled() == other.cancelled())

    def __lt__(self, other):
        return self._when < other._when if isinstance(other, asyncio.TimerHandle) else NotImplemented

    def __le__(self, other):
        return self._when < other._when or self == other if isinstance(other, asyncio.TimerHandle) else NotImplemented

    def __gt__(self, other):
        return self._when > other._when if isinstance(other, asyncio.TimerHandle) else NotImplemented

    def __ge__(self, other):
        return self._when > other._when or self == other if isinstance(other, asyncio.TimerHandle) else NotImplemented


# What waits in a running loop is alive, so the garbage collector need not look at it: handles in the ready queue, timers,
# and the contexts made for them, are untracked there. A hundred thousand callbacks would else be traversed again and
# again. Who is known to others when it leaves its queue, or when the loop stops running, is tracked again.

cdef inline void hide(Handle handle, bint context) noexcept:
    PyObject_GC_UnTrack(<PyObject*> handle)
    if context:
        handle.hidden = True
        PyObject_GC_UnTrack(<PyObject*> handle._context)


cdef inline void show_context(Handle handle) noexcept:
    # Also of a handle that will be gone: the context's own end expects it tracked.
    if handle.hidden:
        handle.hidden = False
        PyObject_GC_Track(<PyObject*> handle._context)


cdef inline void settle(Handle handle) noexcept:
    if not PyObject_GC_IsTracked(handle):
        PyObject_GC_Track(<PyObject*> handle)
    show_context(handle)


cdef inline void hide_timer(TimerHandle handle, bint context) noexcept:
    handle.unseen = True
    handle._loop.unseen += 1
    PyObject_GC_UnTrack(<PyObject*> handle)
    if context:
        handle.hidden = True
        PyObject_GC_UnTrack(<PyObject*> handle._context)


cdef inline void show_timer_context(TimerHandle handle) noexcept:
    if handle.unseen:
        handle.unseen = False
        handle._loop.unseen -= 1
        if handle.hidden:
            handle.hidden = False
            PyObject_GC_Track(<PyObject*> handle._context)


cdef inline void settle_timer(TimerHandle handle) noexcept:
    if not PyObject_GC_IsTracked(handle):
        PyObject_GC_Track(<PyObject*> handle)
    show_timer_context(handle)


cdef inline void settle_either(object handle) noexcept:
    if type(handle) is Handle:
        settle(handle)
    elif type(handle) is TimerHandle:
        settle_timer(handle)


def _run_other(handle):
    # A handle of the standard library's own, as it makes them for signals.
    if not handle._cancelled:
        handle._run()


cdef class Corked(Watcher):
    """A watcher that can be flushed before the loop sleeps."""

    cdef int flush(self) except -1:
        return 0


cdef class Callbacks(Watcher):
    """The reader and the writer of one descriptor (add_reader, add_writer), and who waits for it (sock_recv and others).

    For those who only wait it is watched ONESHOT, and stays here when they have gone: waiting again costs one system call
    instead of two, and nothing is reported meanwhile.
    """

    cdef Core core
    cdef Handle reader, writer
    cdef list waiting               # futures for whom it is to become readable

    cdef int ready(self, uint32_t conditions) except -1:
        cdef Handle handle
        cdef list waiting = self.waiting
        if waiting is not None and conditions & (READ | HANGUP | ERROR):
            self.waiting = None
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        handle = self.reader
        if handle is not None and conditions & (READ | HANGUP | ERROR):
            self.core.calls += 1
            self.core.execute(handle, handle._callback, handle._args, handle._context)
        # The reader may have removed the writer.
        handle = self.writer
        if handle is not None and conditions & (WRITE | HANGUP | ERROR):
            self.core.calls += 1
            self.core.execute(handle, handle._callback, handle._args, handle._context)
        return 0


cdef class Waker(Watcher):
    """The eventfd by which others end the loop's sleep."""

    cdef Wakeup wakeup

    cdef int ready(self, uint32_t conditions) except -1:
        aw_drain(&self.wakeup.c)
        return 0


cdef int number_of(object fd) except -1:
    """The descriptor's number, as selectors finds it."""
    cdef long number
    if isinstance(fd, int):
        number = fd
    else:
        try:
            number = int(fd.fileno())
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"Invalid file object: {fd!r}") from None
    if number < 0 or number > 0x7FFFFFFF:
        raise ValueError(f"Invalid file descriptor: {number}")
    return <int> number


cdef class Core:
    """See the module. Without the other half, `Loop`, it has no methods of its own that are public."""

    def __cinit__(self, *args, **options):
        self._closed = True         # until all is here, for __del__
        self.timers = TimerQueue()
        self.pollers = Pollers()
        self.due = []
        self.corked = []
        self.slow = -1
        self.slow_calls = deque(maxlen=NOTED)
        self.generation = _generation

    def _open(self, Demultiplexer demultiplexer not None, double spin, double slow, bint count_transports=False):
        """Called once, before anything else. Times in seconds; `slow` below 0: don't measure callbacks."""
        cdef Waker waker = Waker()
        self.watches = Watches(demultiplexer)
        self.wakeup = waker.wakeup = Wakeup()
        self.watches.add(waker, self.wakeup.fileno(), READ, 0)
        self.spin = spin
        self.slow = slow
        self.count_transports = count_transports
        self.meter = Meter()

    # ---- the ready queue -----------------------------------------------------------------------------------------

    cdef int check(self) except -1:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        if self.generation != _generation:
            raise RuntimeError(FORKED)
        return 0

    cdef inline int push(self, Handle handle) noexcept:
        if self.tail is None:
            self.head = handle
        else:
            self.tail.next = handle
        self.tail = handle
        self.ready_count += 1
        return 0

    cdef Handle soon(self, object callback, tuple args, object context):
        cdef Handle handle = Handle.__new__(Handle)
        handle._loop = self
        handle._callback = callback
        handle._args = args
        handle._context = PyContext_CopyCurrent() if context is None else context
        if self._debug:
            handle._source_traceback = format_helpers.extract_stack(sys._getframe())
        elif self.began:
            hide(handle, context is None)
        self.push(handle)
        return handle

    # The methods that are called most are replaced below by such as need no tuple of their arguments. Not bound by Cython:
    # then the interpreter checks what `self` is, and makes no object for each call.

    @cython.binding(False)
    def call_soon(self, callback, *args, context=None):
        """Call `callback(*args)` in the loop's next turn, in the order of the calls.

        Returns an asyncio.Handle, for `cancel()`. Not thread-safe. RuntimeError: the loop is closed, or the parent's."""
        self.check()
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "call_soon")
        return self.soon(callback, args, context)

    @cython.binding(False)
    def call_soon_threadsafe(self, callback, *args, context=None):
        """As `call_soon`, from any thread and from signal handlers; ends the loop's sleep."""
        cdef Handle handle
        self.check()
        if self._debug:
            self._check_callback(callback, "call_soon_threadsafe")
        handle = self.soon(callback, args, context)
        if self.sleeping:
            self.wake()
        return handle

    def _call_soon(self, callback, args, context):
        return self.soon(callback, tuple(args), context)

    def _add_callback(self, handle):
        if not handle._cancelled:
            self.soon(_run_other, (handle,), None)     # in a context of its own it enters the handle's

    cdef int wake(self) except -1:
        self.sleeping = False       # once is enough: it sees what comes until it has the GIL again
        # An error would be EBADF alone: the loop is closed, and nobody sleeps.
        if self.wakeup.c.read_fd >= 0:
            aw_wake(&self.wakeup.c)
        return 0

    def _write_to_self(self):
        if self.sleeping:
            self.wake()

    # ---- timers --------------------------------------------------------------------------------------------------

    cdef double now(self) noexcept:
        return monotonic()

    def time(self):
        """The loop's clock, in seconds: time.monotonic()."""
        return monotonic()

    cdef TimerHandle at(self, double when, object callback, tuple args, object context):
        cdef TimerHandle handle = TimerHandle.__new__(TimerHandle)
        handle._loop = self
        handle._callback = callback
        handle._args = args
        handle._context = PyContext_CopyCurrent() if context is None else context
        if self._debug:
            handle._source_traceback = format_helpers.extract_stack(sys._getframe())
        self.timers.add_timer(handle, when)
        if self.began and not self._debug:
            hide_timer(handle, context is None)
        return handle

    @cython.binding(False)
    def call_later(self, delay, callback, *args, context=None):
        """Call `callback(*args)` when `delay` seconds have passed, never before.

        Returns an asyncio.TimerHandle, for `cancel()` and `when()`. Equal times keep their order. Not thread-safe.
        ValueError: a delay of NaN. RuntimeError: the loop is closed, or the parent's."""
        if delay is None:
            raise TypeError("delay must not be None")
        self.check()
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "call_later")
        return self.at(monotonic() + <double> delay, callback, args, context)

    @cython.binding(False)
    def call_at(self, when, callback, *args, context=None):
        """As `call_later`, at a time of the loop's time()."""
        if when is None:
            raise TypeError("when cannot be None")
        self.check()
        if self._debug:
            self._check_thread()
            self._check_callback(callback, "call_at")
        return self.at(when, callback, args, context)

    # ---- descriptors ---------------------------------------------------------------------------------------------

    cdef int watch(self, Watcher watcher, int fd, uint32_t conditions) except -1:
        cdef Watcher former
        self.check()
        former = self.watches.of(fd)
        if isinstance(former, Callbacks) and (<Callbacks> former).reader is None and (<Callbacks> former).writer is None:
            self.watches.remove(former)         # left by who waited
        return self.watches.add(watcher, fd, conditions, 0)

    cdef int rewatch(self, Watcher watcher, uint32_t conditions) except -1:
        if self._closed or self.generation != _generation:
            return 0                # the set in the kernel is the parent's, too
        return self.watches.modify(watcher, conditions, 0)

    cdef int unwatch(self, Watcher watcher) except -1:
        if self._closed or self.generation != _generation:
            return 0
        return self.watches.remove(watcher)

    # For what is not of this package, and so has no C functions of it: the wires' driver watches a connection by these.

    @property
    def _measures(self):
        return self.slow >= 0 or bool(self._debug)

    def _watch(self, Watcher watcher not None, int fd, uint32_t conditions):
        self.watch(watcher, fd, conditions)

    def _rewatch(self, Watcher watcher not None, uint32_t conditions):
        self.rewatch(watcher, conditions)

    def _unwatch(self, Watcher watcher not None):
        self.unwatch(watcher)

    def _poll(self, Poller poller not None):
        """Look at it, too, before sleeping; False if this loop doesn't poll, or has enough to look at."""
        return self.spin > 0 and self.pollers.add(poller)

    def _unpoll(self, Poller poller not None):
        self.pollers.remove(poller)

    cdef object set_reader(self, object fd, object callback, tuple args, bint writing):
        cdef int number
        cdef Watcher watcher
        cdef Callbacks callbacks
        cdef Handle handle, former
        self.check()
        number = number_of(fd)
        handle = Handle.__new__(Handle)
        handle._loop = self
        handle._callback = callback
        handle._args = args
        handle._context = PyContext_CopyCurrent()
        if self._debug:
            handle._source_traceback = format_helpers.extract_stack(sys._getframe())
        watcher = self.watches.of(number)
        if watcher is None:
            callbacks = Callbacks.__new__(Callbacks)
            callbacks.core = self
            self.watches.add(callbacks, number, WRITE if writing else READ, 0)
        elif not isinstance(watcher, Callbacks):
            raise RuntimeError(f"File descriptor {number} is used by transport {watcher!r}")
        else:
            callbacks = <Callbacks> watcher
            # Also where nothing changes: the number may be a new descriptor's by now.
            self.watches.modify(
                callbacks, WRITE * (writing or callbacks.writer is not None) |
                READ * (not writing or callbacks.reader is not None or callbacks.waiting is not None), 0)
        if writing:
            former = callbacks.writer
            callbacks.writer = handle
        else:
            former = callbacks.reader
            callbacks.reader = handle
        if former is not None:
            former.cancel()
        return handle

    cdef bint drop_reader(self, object fd, bint writing) except -1:
        cdef int number
        cdef Watcher watcher
        cdef Callbacks callbacks
        cdef Handle former
        if self._closed or self.generation != _generation:
            return False
        try:
            number = number_of(fd)
        except ValueError:
            return False            # closed, so it isn't watched any more
        watcher = self.watches.of(number)
        if watcher is None or not isinstance(watcher, Callbacks):
            return False
        callbacks = <Callbacks> watcher
        if writing:
            former = callbacks.writer
            callbacks.writer = None
        else:
            former = callbacks.reader
            callbacks.reader = None
        if former is None:
            return False
        if callbacks.reader is None and callbacks.writer is None and callbacks.waiting is None:
            self.watches.remove(callbacks)
        elif callbacks.reader is None and callbacks.writer is None:
            self.watches.modify(callbacks, READ, ONESHOT)
        else:
            self.watches.modify(
                callbacks, WRITE * (callbacks.writer is not None) |
                READ * (callbacks.reader is not None or callbacks.waiting is not None), 0)
        former.cancel()
        return True

    def _readable(self, int fd):
        """A future that is done when the descriptor is readable, or was. Whoever waits then tries, and may wait again."""
        cdef Watcher watcher
        cdef Callbacks callbacks
        self.check()
        watcher = self.watches.of(fd)
        if watcher is None:
            callbacks = Callbacks.__new__(Callbacks)
            callbacks.core = self
            self.watches.add(callbacks, fd, READ, ONESHOT)
        elif not isinstance(watcher, Callbacks):
            raise RuntimeError(f"File descriptor {fd} is used by transport {watcher!r}")
        else:
            callbacks = <Callbacks> watcher
            if callbacks.reader is None and callbacks.writer is None:
                self.watches.modify(callbacks, READ, ONESHOT)
            elif not callbacks.conditions & READ:
                self.watches.modify(callbacks, READ | WRITE, 0)
        future = Future(loop=self)
        if callbacks.waiting is None:
            callbacks.waiting = [future]
        else:
            # Without those that were cancelled: the number may be one of a hundred sockets, none of them ever readable.
            callbacks.waiting = [one for one in callbacks.waiting if not one.done()]
            callbacks.waiting.append(future)
        return future

    def _add_reader(self, fd, callback, *args):
        return self.set_reader(fd, callback, args, False)

    def _remove_reader(self, fd):
        return bool(self.drop_reader(fd, False))

    def _add_writer(self, fd, callback, *args):
        return self.set_reader(fd, callback, args, True)

    def _remove_writer(self, fd):
        return bool(self.drop_reader(fd, True))

    def _watched(self, fd):
        """The conditions that a descriptor is watched for, 1 to read and 2 to write, and the two handles; or None."""
        cdef Watcher watcher = self.watches.of(number_of(fd))
        if watcher is None:
            return None
        if isinstance(watcher, Callbacks):
            if (<Callbacks> watcher).reader is None and (<Callbacks> watcher).writer is None:
                return None
            return watcher.conditions, ((<Callbacks> watcher).reader, (<Callbacks> watcher).writer)
        return watcher.conditions & (READ | WRITE), (None, None)

    def _receive(self, sock, Py_ssize_t nbytes):
        """What the socket has, at most `nbytes` bytes; or a future that is done when there may be something."""
        cdef int fd, e
        cdef Py_ssize_t got
        if nbytes < 0:
            raise ValueError("negative buffersize in recv")
        if type(sock) is not Socket:
            try:
                return sock.recv(nbytes)
            except (BlockingIOError, InterruptedError):
                return self._until_readable(sock)
        fd = sock.fileno()
        data = PyBytes_FromStringAndSize(NULL, nbytes)
        while True:
            got = recv(fd, PyBytes_AS_STRING(data), nbytes, MSG_DONTWAIT)
            if got >= 0:
                return data if got == nbytes else PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), got)
            e = errno
            if e == EAGAIN:
                # Who has waited for it here before isn't a transport, and a transport drops what he left.
                return self._readable(fd) if isinstance(self.watches.of(fd), Callbacks) else self._until_readable(sock)
            if e != EINTR:
                raise OSError(e, os.strerror(e))
            PyErr_CheckSignals()

    cdef int flush_later(self, Corked corked) except -1:
        if not corked.corked:
            corked.corked = True
            self.corked.append(corked)
        return 0

    cdef bint last(self) noexcept:
        return self.ready_count == 0 and self.watches.first == self.watches.last and not self.due

    # ---- running -------------------------------------------------------------------------------------------------

    cdef int execute(self, object handle, object callback, tuple args, object context) except -1:
        cdef PyObject* result
        if self.slow >= 0 or self._debug:
            return self.measured(handle, callback, args, context)
        if PyContext_Enter(context) < 0:
            return self.failed(handle)
        result = PyObject_Call(callback, args, NULL)
        PyContext_Exit(context)
        if result == NULL:
            return self.failed(handle)
        drop(result)
        return 0

    cdef int measured(self, object handle, object callback, tuple args, object context) except -1:
        cdef PyObject* result = NULL
        cdef double began = monotonic(), took
        settle_either(handle)
        self._current_handle = handle
        try:
            if PyContext_Enter(context) >= 0:
                result = PyObject_Call(callback, args, NULL)
                PyContext_Exit(context)
            if result == NULL:
                self.failed(handle)
            else:
                drop(result)
            took = monotonic() - began
            if 0 <= self.slow <= took:
                self.note_slow(self.culprit(callback, args), took)
            if self._debug and took >= self.slow_callback_duration:
                base_events.logger.warning("Executing %s took %.3f seconds", base_events._format_handle(handle), took)
        finally:
            self._current_handle = None
        return 0

    cdef int note_slow(self, object culprit, double took) except -1:
        self.slow_calls.append((culprit, took))
        return self.meter.slow(culprit, took)

    cdef int report_took(self, object protocol, object callback, str method, double took) except -1:
        """A transport's report took so long: what it did was call `callback`, or if that is None a protocol's method."""
        cdef bint slow = 0 <= self.slow <= took, long = self._debug and took >= self.slow_callback_duration
        if slow or long:
            if callback is not None:
                culprit = self.culprit(callback, ())
            else:
                culprit = f"{type(protocol).__qualname__}.{method}"
            if slow:
                self.note_slow(culprit, took)
            if long:
                base_events.logger.warning("Executing %s took %.3f seconds", culprit, took)
        return 0

    def culprit(self, callback, args):
        """Who was slow: the name of a task with its coroutine's, or of a function with its place."""
        task = getattr(callback, "__self__", None)
        if isinstance(task, Task):
            return f"{task.get_name()}: {getattr(task.get_coro(), '__qualname__', task.get_coro())}"
        return _described(callback, args, self._debug)

    cdef int failed(self, object handle) except -1:
        """An exception is set: SystemExit and KeyboardInterrupt end the run, the handler gets all others."""
        settle_either(handle)
        try:
            raised()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            report = {
                "message": f"Exception in callback {_described(handle._callback, handle._args, self._debug)}",
                "exception": error,
                "handle": handle,
            }
            if handle._source_traceback:
                report["source_traceback"] = handle._source_traceback
            self.call_exception_handler(report)
        return 0

    cdef int run_ready(self, Py_ssize_t count) except -1:
        cdef Handle handle
        self.calls += count
        while count > 0:
            count -= 1
            handle = self.head
            self.head = handle.next
            handle.next = None
            if self.head is None:
                self.tail = None
            self.ready_count -= 1
            show_context(handle)
            if Py_REFCNT(handle) > 1:
                settle(handle)
            if not handle._cancelled:
                self.execute(handle, handle._callback, handle._args, handle._context)
        return 0

    cdef int run_due(self) except -1:
        cdef TimerHandle handle
        cdef list due = self.due
        while due:
            handle = due.pop()
            if handle.unseen:
                if Py_REFCNT(handle) > 1:
                    settle_timer(handle)
                else:
                    show_timer_context(handle)
            if not handle._cancelled:
                self.calls += 1
                self.execute(handle, handle._callback, handle._args, handle._context)
        return 0

    cdef int flush_all(self) except -1:
        """All of them have their turn, also after one that raises KeyboardInterrupt or SystemExit; then the first such
        exception goes on."""
        cdef list corked = self.corked
        cdef Corked one
        cdef object failure = None
        self.corked = []
        for one in corked:
            one.corked = False
            try:
                one.flush()
            except BaseException as error:
                if failure is None:
                    failure = error
        if failure is not None:
            raise failure
        return 0

    cdef int wait(self, double now) except -1:
        """Sleep until a report, a timer or somebody ends it. Returns how many reports there are."""
        cdef int count = 0
        cdef double end
        cdef bint polling = self.spin > 0 and self.pollers.size() > 0
        # Not for ever: descriptors have their turn, too.
        if polling and now - self.looked < LOOK and self.pollers.glance():
            return 0
        self.show(now, now)
        if self.spin > 0:
            end = now + self.spin
            while now < end:
                count = self.watches.wait(0)
                self.looked = now
                if count:
                    return count
                with nogil:
                    pass            # others may have the GIL
                PyErr_CheckSignals()
                now = monotonic()
                if self.ready_count or self.timers.is_due(now) or (polling and self.pollers.glance()):
                    return 0
            if self.pollers.arm():
                return 0
        self.sleeps += 1
        self.sleeping = True
        try:
            count = self.watches.wait(self.timers.timeout_ns(now))
            self.looked = monotonic()
            return count
        finally:
            self.sleeping = False

    cdef int turn(self, bint look) except -1:
        cdef int count = 0
        cdef double now = monotonic(), before
        cdef Py_ssize_t ready
        cdef list due
        if self.corked:
            self.flush_all()
        if self.ready_count == 0 and not self._stopping and not self.due and not self.timers.is_due(now):
            before = now
            count = self.wait(now)
            now = monotonic()
            self.slept += now - before
            if self.looked >= before:
                self.show(now, 0)
        elif look or now - self.looked >= LOOK:
            self.polls += 1
            count = self.watches.wait(0)
            self.looked = now
            self.show(now, 0)
            PyErr_CheckSignals()
        self.turns += 1
        ready = self.ready_count
        due = self.timers.take_due(now)
        if due is not None:
            self.due = due + self.due if self.due else due
        if ready > self.deepest:
            self.deepest = ready
        if ready:
            self.run_ready(ready)
        if count:
            self.watches.dispatch(count)
        if self.pollers.size():
            self.pollers.deliver()
        if self.due:
            self.run_due()
        return 0

    cdef void show(self, double now, double asleep) noexcept:
        """Bring the figures that others see up to date: with each look, so that callbacks pay nothing for it. `asleep`:
        since when it sleeps, 0 if it doesn't."""
        cdef LoopFigures* figures = self.meter.at
        if figures == NULL:
            return
        figures.began_ns = <uint64_t> (self.began * 1e9)
        figures.ran_ns = <uint64_t> (self.ran * 1e9)
        figures.looked_ns = <uint64_t> (now * 1e9)
        figures.asleep_ns = <uint64_t> (asleep * 1e9)
        figures.slept_ns = <uint64_t> (self.slept * 1e9)
        figures.turns = self.turns
        figures.callbacks = self.calls
        figures.polls = self.polls
        figures.sleeps = self.sleeps
        figures.wakeups = self.wakeup.c.written
        figures.ready = self.ready_count
        figures.ready_most = max(self.deepest, self.ready_count)
        figures.timers = self.timers.size()
        figures.watched = self.watches.count

    def _run_once(self):
        """Turns until somebody calls stop(); the first one looks at the descriptors in any case."""
        cdef bint look = True
        cdef double now
        cdef Handle handle
        cdef TimerHandle timer
        cdef Py_ssize_t place
        self.check()
        self.began = monotonic()
        thread = threading.current_thread()
        self.meter.called(f"{thread.name} {thread.native_id}")
        try:
            while True:
                self.turn(look)
                look = False
                if self._stopping:
                    break
        finally:
            now = monotonic()
            self.ran += now - self.began
            self.began = 0
            self.show(now, 0)
            handle = self.head
            while handle is not None:
                settle(handle)
                handle = handle.next
            for timer in self.due:
                settle_timer(timer)
            place = self.timers.size()
            while self.unseen and place > 0:        # from the end: there are those that came last
                place -= 1
                settle_timer(<TimerHandle> self.timers.timers[place])
            if self.corked:
                self.flush_all()

    # ---- the loop's state ----------------------------------------------------------------------------------------

    def stop(self):
        """End the run after this turn. What is ready now is still called."""
        self._stopping = True

    def is_running(self):
        """Whether it runs."""
        return self._thread_id is not None

    def is_closed(self):
        """Whether it was closed."""
        return bool(self._closed)

    def get_debug(self):
        """Whether debug mode is on."""
        return bool(self._debug)

    def _check_closed(self):
        self.check()

    def create_future(self):
        """A Future of this loop."""
        return Future(loop=self)

    def create_task(self, coro, *, name=None, context=None, **options):
        """Run a coroutine as a task of this loop; the options are those of asyncio.create_task()."""
        self.check()
        if self._task_factory is not None or options:
            return super().create_task(coro, name=name, context=context, **options)
        task = Task(coro, loop=self, name=name, context=context)
        if task._source_traceback:
            task._source_traceback.pop()
        return task

    def _release(self):
        """After the other half has closed: forget all callbacks, release the demultiplexer and the eventfd."""
        cdef Handle handle
        while self.head is not None:
            handle = self.head
            self.head = handle.next
            handle.next = None
            settle(handle)
        self.tail = None
        self.ready_count = 0
        self.due = []
        self.corked = []
        self.pollers = Pollers()
        # One by one: their owners may still cancel them, when the garbage collector has cleared the queue.
        while self.timers.size():
            self.timers.take_out(self.timers.size() - 1)
        self.watches.close()
        self.wakeup.close()
        self.meter.leave()

    def _figures(self):
        """For `Loop.stats`."""
        cdef double now = monotonic()
        return {
            "turns": self.turns, "callbacks": self.calls, "polls": self.polls, "sleeps": self.sleeps,
            "wakeups": self.wakeup.c.written, "ready": self.ready_count, "ready_most": self.deepest,
            "timers": self.timers.size(), "watched": self.watches.count,
            "seconds": self.ran + (now - self.began if self.began else 0), "slept": self.slept,
        }


# The same methods for ordinary calls: positional arguments and perhaps a context, no debug mode. All else is as above.

cdef PyMethodDef _soon_method, _threadsafe_method, _later_method
_soon_method.ml_name = "call_soon"
_threadsafe_method.ml_name = "call_soon_threadsafe"
_later_method.ml_name = "call_later"
cdef object _call_soon = Core.__dict__["call_soon"]
cdef object _call_soon_threadsafe = Core.__dict__["call_soon_threadsafe"]
cdef object _call_later = Core.__dict__["call_later"]


cdef inline bint ordinary(Core core, Py_ssize_t count, Py_ssize_t least, PyObject* names) except -1:
    if core._debug or count < least:
        return False
    return names == NULL or (len(<tuple> names) == 1 and <str> (<tuple> names)[0] == "context")


cdef object in_full(object method, PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef tuple given = aw_tuple(args, count)
    if names == NULL:
        return method(<object> self, *given)
    return method(<object> self, *given, **dict(zip(<tuple> names, aw_tuple(args + count, len(<tuple> names)))))


cdef object fast_call_soon(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Core core = <Core> self
    if not ordinary(core, count, 1, names):
        return in_full(_call_soon, self, args, count, names)
    core.check()
    return core.soon(<object> args[0], aw_tuple(args + 1, count - 1), None if names == NULL else <object> args[count])


cdef object fast_call_soon_threadsafe(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Core core = <Core> self
    cdef Handle handle
    if not ordinary(core, count, 1, names):
        return in_full(_call_soon_threadsafe, self, args, count, names)
    core.check()
    handle = core.soon(<object> args[0], aw_tuple(args + 1, count - 1), None if names == NULL else <object> args[count])
    if core.sleeping:
        core.wake()
    return handle


cdef object fast_call_later(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Core core = <Core> self
    if not ordinary(core, count, 2, names) or <object> args[0] is None:
        return in_full(_call_later, self, args, count, names)
    core.check()
    return core.at(monotonic() + <double> <object> args[0], <object> args[1], aw_tuple(args + 2, count - 2),
                   None if names == NULL else <object> args[count])


aw_replace_method(<PyTypeObject*> Core, &_soon_method, fast_call_soon)
aw_replace_method(<PyTypeObject*> Core, &_threadsafe_method, fast_call_soon_threadsafe)
aw_replace_method(<PyTypeObject*> Core, &_later_method, fast_call_later)
