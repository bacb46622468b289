# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, auto_pickle=False
"""Handles of callbacks, and what calls them: in their context, with their errors caught, and timed if somebody asked for it.

`Handle` and `TimerHandle` are asyncio's to whoever looks: both say so when isinstance() asks, because a class of C can't
derive from those, and asyncio.Handle's own functions make the text of repr(). They have no base in common (a timer derives
from the engine's), so what they share is written once for either, as fused functions: here, and in the .pxd where a loop uses
it too. `Caller` is the part of a loop that they know, and the first of the classes that a loop is made of (see `_core`).

On the loop's thread, `cancel` excepted where the handle is call_soon_threadsafe's. What can go wrong: a callback raises (the
loop's exception handler gets it; SystemExit and KeyboardInterrupt end the run).
"""
cimport cython
from cpython.object cimport PyObject, PyTypeObject

from anywire.engine._awaiting cimport an_exception_is_set
from anywire.engine._timers cimport Timer, monotonic

import asyncio
import sys
from asyncio import Task, base_events, format_helpers
from collections import deque

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(object object) noexcept
    PyObject* PyObject_Call(object callable, object args, PyObject* kwargs) noexcept
    int PyContext_Enter(object context) noexcept
    int PyContext_Exit(object context) noexcept

cdef extern from "anywire/loop/uncounted.h":
    void aw_leave_uncounted(PyTypeObject* type) noexcept

cdef extern from *:
    """
    static void anywire_drop(PyObject *object) { Py_DECREF(object); }
    """
    void drop "anywire_drop"(PyObject* object)

cdef enum:
    NOTED = 64                      # slow callbacks that are remembered


def _described(callback, args, debug):
    if sys.version_info >= (3, 13):
        return format_helpers._format_callback_source(callback, args, debug=debug)
    return format_helpers._format_callback_source(callback, args)


cdef object calling_stack():
    return format_helpers.extract_stack(sys._getframe())


# ---- what both handles do ----------------------------------------------------------------------------------------

cdef inline int forget(AnyHandle handle) except -1:
    """What cancelling does to any handle. The text of repr() is kept in debug mode, for what it names goes."""
    handle._cancelled = True
    if handle._loop is not None and handle._loop._debug:    # None: the garbage collector was here
        handle.shown = repr(handle)
    handle._callback = None
    handle._args = None
    return 0


cdef inline object shown_context(AnyHandle handle):
    settle(handle)
    return context_of(handle)


cdef inline int run(AnyHandle handle) except -1:
    if not handle._cancelled and handle._loop is not None:
        handle._loop.execute(handle, handle._callback, handle._args, context_of(handle))
    return 0


cdef inline object text_of(AnyHandle handle):
    return handle.shown or f"<{' '.join(handle._repr_info())}>"


@cython.final
cdef class Handle:
    """A callback that will be called soon; asyncio.Handle to isinstance(). Made by the loop only."""

    @property
    def __class__(self):
        return asyncio.Handle

    def cancel(self):
        """Don't call it. Does nothing once it has been called."""
        if not self._cancelled:
            forget(self)

    def cancelled(self):
        """Whether `cancel` was called."""
        return bool(self._cancelled)

    def get_context(self):
        """The context in which it is called."""
        return shown_context(self)

    @property
    def _context(self):
        return shown_context(self)

    def _run(self):
        run(self)

    def _repr_info(self):
        return asyncio.Handle._repr_info(self)

    def __repr__(self):
        return text_of(self)


@cython.final
cdef class TimerHandle(Timer):
    """A callback that will be called at some time; asyncio.TimerHandle to isinstance(). Made by the loop only."""

    @property
    def __class__(self):
        return asyncio.TimerHandle

    def cancel(self):
        """Don't call it. Nothing is left of it in the loop."""
        if not self._cancelled:
            if self.place >= 0 and self.queue is not None:
                self.queue.cancel_timer(self)
                self.left()
            forget(self)

    def cancelled(self):
        """Whether `cancel` was called."""
        return bool(self._cancelled)

    def when(self):
        """When it is called, in seconds of the loop's time()."""
        return (<Timer> self).when

    cdef int left(self) except -1:
        settle(self)
        return 0

    def get_context(self):
        """The context in which it is called."""
        return shown_context(self)

    @property
    def _context(self):
        return shown_context(self)

    @property
    def _when(self):
        return (<Timer> self).when

    @property
    def _scheduled(self):
        return self.place >= 0

    def _run(self):
        run(self)

    def _repr_info(self):
        info = asyncio.Handle._repr_info(self)
        info.insert(2 if self._cancelled else 1, f"when={(<Timer> self).when}")
        return info

    def __repr__(self):
        return text_of(self)

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


cdef object settle_either(object handle):
    """Others will know it. Returns its context."""
    return shown_context(<Handle> handle) if type(handle) is Handle else shown_context(<TimerHandle> handle)


cdef int give_context(object handle, object context) except -1:
    if type(handle) is Handle:
        (<Handle> handle).surroundings = context
    else:
        (<TimerHandle> handle).surroundings = context
    return 0


aw_leave_uncounted(<PyTypeObject*> Handle)
aw_leave_uncounted(<PyTypeObject*> TimerHandle)
cdef object NO_VARIABLES = aw_know_contexts()


def _copy_contexts_at_once(bint at_once):
    """For tests: whether loops that are made from now on do without contexts.h, as on a Python whose fields aren't known."""
    global NO_VARIABLES
    NO_VARIABLES = None if at_once else aw_know_contexts()


cdef class Caller:
    """What a handle knows of its loop: how a callback is called, and how long it took."""

    def __cinit__(self, *args, **options):
        self.no_variables = NO_VARIABLES
        self.spare = PyContext_New()
        self.slow = -1
        self.slow_calls = deque(maxlen=NOTED)

    @property
    def _measures(self):
        return self.slow >= 0 or bool(self._debug)

    cdef int execute(self, object handle, object callback, tuple args, object surroundings) except -1:
        cdef PyObject* result
        if self.slow >= 0 or self._debug:
            return self.measured(handle, callback, args)
        if self.no_variables is not None and not PyContext_CheckExact(surroundings):
            return self.execute_in_spare(handle, callback, args, surroundings)
        if PyContext_Enter(surroundings) < 0:
            return self.failed(handle)
        result = PyObject_Call(callback, args, NULL)
        PyContext_Exit(surroundings)
        if result == NULL:
            return self.failed(handle)
        drop(result)
        return 0

    cdef int execute_in_spare(self, object handle, object callback, tuple args, object variables) except -1:
        """Nobody has seen the handle's context, and when the call is over and nobody has kept it, the next one gets it."""
        cdef object context = self.spare
        cdef PyObject* result
        if Py_REFCNT(context) > 2:                     # kept, or entered: a callback runs callbacks
            context = self.spare = PyContext_New()
        aw_put_variables(context, variables)
        if PyContext_Enter(context) < 0:
            return self.failed(handle)
        result = PyObject_Call(callback, args, NULL)
        PyContext_Exit(context)
        if result == NULL:
            give_context(handle, context)
            self.spare = None                          # of which there are more than two references, too
            return self.failed(handle)
        drop(result)
        if Py_REFCNT(context) == 2:
            aw_put_variables(context, self.no_variables)
        return 0

    cdef int measured(self, object handle, object callback, tuple args) except -1:
        cdef PyObject* result = NULL
        cdef object context = settle_either(handle)
        cdef double began = monotonic(), took
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
            an_exception_is_set()
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
