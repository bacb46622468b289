# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, auto_pickle=False
"""What is to be called, and when: the ready queue, the timers, and how others make a sleeping loop look at them.

`Schedule` is the second of the classes that a loop is made of (see `_core`, whose turn says when `run_ready` and `run_due`
are called). Its methods have the names and the rules of asyncio's.

Whoever adds something from elsewhere (another thread, a signal handler) writes to an eventfd, and only while the loop
sleeps: that it does is said before the GIL is given up, and everybody who adds something holds the GIL.

Called on the loop's thread, `call_soon_threadsafe` excepted. What can go wrong: the loop is closed, or the process forks (the
child's copy refuses with RuntimeError).
"""
cimport cython
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport uint32_t

from anywire.engine._timers cimport TimerQueue, monotonic
from anywire.engine._wakeup cimport aw_drain, aw_heard, aw_wake
from anywire.engine._watches cimport Watcher
from anywire.engine.conditions cimport EDGE
from anywire.loop._handles cimport Caller, Handle, TimerHandle, context_of, fill, keep_unseen, remember_caller, settle

import os

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object object) noexcept

cdef extern from "anywire/loop/fast_methods.h":
    ctypedef object (*aw_fast)(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names)
    ctypedef struct PyMethodDef:
        const char* ml_name
    int aw_replace_method(PyTypeObject* type, PyMethodDef* definition, aw_fast function) except -1
    tuple aw_tuple(PyObject** args, Py_ssize_t count)

cdef unsigned int _generation = 0

FORKED = "this event loop belongs to the parent process; make a new one in the child, or start the child by spawn"


def _count_fork():
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


def _run_other(handle):
    # A handle of the standard library's own, as it makes them for signals.
    if not handle._cancelled:
        handle._run()


cdef class Waker(Watcher):
    """The eventfd by which others end the loop's sleep."""

    cdef int ready(self, uint32_t conditions) except -1:
        # A level-triggered one must be read, a system call for each time the loop is woken.
        if self.trigger & EDGE:
            aw_heard(&self.wakeup.c)
        else:
            aw_drain(&self.wakeup.c)
        return 0


cdef class Schedule(Caller):
    """The callbacks and timers of a loop."""

    def __cinit__(self, *args, **options):
        self._closed = True         # until all is here, for __del__
        self.timers = TimerQueue()
        self.due = []
        self.generation = _generation

    cdef int check(self) except -1:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        if self.generation != _generation:
            raise RuntimeError(FORKED)
        return 0

    cdef bint forked(self) noexcept:
        return self.generation != _generation

    # ---- the ready queue -----------------------------------------------------------------------------------------

    cdef Handle soon(self, object callback, tuple args, object context):
        cdef Handle handle = Handle.__new__(Handle)
        fill(handle, self, callback, args, context)
        if self.began == 0 or self._debug:
            settle(handle)
            if self._debug:
                remember_caller(handle)
        if self.tail is None:
            self.head = handle
        else:
            self.tail.next = handle
        self.tail = handle
        self.ready_count += 1
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
        fill(handle, self, callback, args, context)
        self.timers.add_timer(handle, when)
        if self.began == 0 or self._debug:
            settle(handle)
            if self._debug:
                remember_caller(handle)
        else:
            keep_unseen(handle)
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

    # ---- calling them --------------------------------------------------------------------------------------------

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
            if Py_REFCNT(handle) > 1:
                settle(handle)
                context_of(handle)                     # who holds it may ask for it
            if not handle._cancelled:
                self.execute(handle, handle._callback, handle._args, handle.surroundings)
        return 0

    cdef int run_due(self) except -1:
        cdef TimerHandle handle
        cdef list due = self.due
        while due:
            handle = due.pop()
            if Py_REFCNT(handle) > 1:
                settle(handle)
                context_of(handle)
            elif handle.unseen:
                handle.unseen = False
                self.unseen -= 1
            if not handle._cancelled:
                self.calls += 1
                self.execute(handle, handle._callback, handle._args, handle.surroundings)
        return 0

    cdef int settle_all(self) except -1:
        """The loop has stopped running: the garbage collector sees all that waits."""
        cdef Handle handle = self.head
        cdef TimerHandle timer
        cdef Py_ssize_t place = self.timers.size()
        while handle is not None:
            settle(handle)
            handle = handle.next
        for timer in self.due:
            settle(timer)
        while self.unseen and place > 0:            # from the end: there are those that came last
            place -= 1
            settle(<TimerHandle> self.timers.timers[place])
        return 0

    cdef int drop_all(self) except -1:
        """Nobody calls what waits any more."""
        cdef Handle handle
        while self.head is not None:
            handle = self.head
            self.head = handle.next
            handle.next = None
            settle(handle)
        self.tail = None
        self.ready_count = 0
        self.due = []
        # One by one: their owners may still cancel them, when the garbage collector has cleared the queue.
        while self.timers.size():
            self.timers.take_out(self.timers.size() - 1)
        return 0


# The same methods for ordinary calls: positional arguments and perhaps a context, no debug mode. All else is as above. They
# stand in the class that loops derive from, since with each call the interpreter goes along a loop's bases to the method's.

cdef PyMethodDef _soon_method, _threadsafe_method, _later_method
_soon_method.ml_name = "call_soon"
_threadsafe_method.ml_name = "call_soon_threadsafe"
_later_method.ml_name = "call_later"
cdef object _call_soon = Schedule.__dict__["call_soon"]
cdef object _call_soon_threadsafe = Schedule.__dict__["call_soon_threadsafe"]
cdef object _call_later = Schedule.__dict__["call_later"]


cdef inline bint ordinary(Schedule schedule, Py_ssize_t count, Py_ssize_t least, PyObject* names) except -1:
    if schedule._debug or count < least:
        return False
    return names == NULL or (len(<tuple> names) == 1 and <str> (<tuple> names)[0] == "context")


cdef inline int alive(Schedule schedule) except -1:
    return schedule.check() if schedule._closed or schedule.generation != _generation else 0


cdef object in_full(object method, PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef tuple given = aw_tuple(args, count)
    if names == NULL:
        return method(<object> self, *given)
    return method(<object> self, *given, **dict(zip(<tuple> names, aw_tuple(args + count, len(<tuple> names)))))


cdef object fast_call_soon(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Schedule schedule = <Schedule> self
    if not ordinary(schedule, count, 1, names):
        return in_full(_call_soon, self, args, count, names)
    alive(schedule)
    return schedule.soon(<object> args[0], aw_tuple(args + 1, count - 1), None if names == NULL else <object> args[count])


cdef object fast_call_soon_threadsafe(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Schedule schedule = <Schedule> self
    cdef Handle handle
    if not ordinary(schedule, count, 1, names):
        return in_full(_call_soon_threadsafe, self, args, count, names)
    alive(schedule)
    handle = schedule.soon(<object> args[0], aw_tuple(args + 1, count - 1), None if names == NULL else <object> args[count])
    if schedule.sleeping:
        schedule.wake()
    return handle


cdef object fast_call_later(PyObject* self, PyObject** args, Py_ssize_t count, PyObject* names):
    cdef Schedule schedule = <Schedule> self
    if not ordinary(schedule, count, 2, names) or <object> args[0] is None:
        return in_full(_call_later, self, args, count, names)
    alive(schedule)
    return schedule.at(monotonic() + <double> <object> args[0], <object> args[1], aw_tuple(args + 2, count - 2),
                   None if names == NULL else <object> args[count])


cdef int install_quick_calls(object kind) except -1:
    aw_replace_method(<PyTypeObject*> kind, &_soon_method, fast_call_soon)
    aw_replace_method(<PyTypeObject*> kind, &_threadsafe_method, fast_call_soon_threadsafe)
    aw_replace_method(<PyTypeObject*> kind, &_later_method, fast_call_later)
    return 0
