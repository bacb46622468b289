# Handles of callbacks, and what calls them.
from cpython.object cimport PyObject

from anywire.engine._figures cimport Meter
from anywire.engine._timers cimport Timer

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    object PyContext_New()
    bint PyContext_CheckExact(object object) noexcept
    void PyObject_GC_Track(PyObject* object) noexcept
    bint PyObject_GC_IsTracked(object object) noexcept

cdef extern from "anywire/loop/contexts.h":
    object aw_know_contexts()
    object aw_current_variables(object none)
    void aw_put_variables(object context, object variables)


cdef class Caller:
    cdef double slow                # seconds from which a callback is noted as slow; below 0: nobody measures
    cdef readonly object slow_calls # deque of (name, seconds)
    cdef Meter meter                # where others see what the loop does
    cdef object no_variables        # of an empty context; None: the fields of contexts aren't known here (contexts.h)
    cdef object spare               # the context for callbacks whose own nobody sees
    cdef Py_ssize_t unseen          # timers that the garbage collector doesn't track
    cdef public bint _debug

    # Calls `callback` in its context, or in the spare one with its variables. What it raises goes to the loop's exception
    # handler, or ends the run.
    cdef int execute(self, object handle, object callback, tuple args, object surroundings) except -1
    cdef int execute_in_spare(self, object handle, object callback, tuple args, object variables) except -1
    cdef int measured(self, object handle, object callback, tuple args) except -1
    cdef int note_slow(self, object culprit, double took) except -1
    cdef int report_took(self, object protocol, object callback, str method, double took) except -1
    cdef int failed(self, object handle) except -1


cdef class Handle:
    cdef object __weakref__
    cdef readonly Caller _loop
    cdef readonly object _callback, _args
    cdef object surroundings        # its context; or the variables of the one that it gets when somebody sees it
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown               # its repr from before it was cancelled, in debug mode
    cdef Handle next                # in the ready queue


cdef class TimerHandle(Timer):
    cdef object __weakref__
    cdef readonly Caller _loop
    cdef readonly object _callback, _args
    cdef object surroundings        # its context; or the variables of the one that it gets when somebody sees it
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown
    cdef bint unseen                # it isn't tracked by the garbage collector


ctypedef fused AnyHandle:
    Handle
    TimerHandle


cdef object calling_stack()


cdef inline int fill(AnyHandle handle, Caller loop, object callback, tuple args, object context) except -1:
    """Make a new handle one of `callback(*args)`, in `context` or in a copy of the current one."""
    if context is not None and not PyContext_CheckExact(context):
        raise TypeError(f"context must be a contextvars.Context, not {type(context).__name__!r}")
    handle._loop = loop
    handle._callback = callback
    handle._args = args
    if context is not None:
        handle.surroundings = context
    elif loop.no_variables is None:
        handle.surroundings = PyContext_CopyCurrent()
    else:
        handle.surroundings = aw_current_variables(loop.no_variables)
    return 0


cdef inline object context_of(AnyHandle handle):
    """The handle's context, which is made now if nobody has seen it before."""
    if handle._loop is not None and handle._loop.no_variables is not None and not PyContext_CheckExact(handle.surroundings):
        context = PyContext_New()
        aw_put_variables(context, handle.surroundings)
        handle.surroundings = context
    return handle.surroundings


cdef inline int remember_caller(AnyHandle handle) except -1:
    """For debug mode."""
    handle._source_traceback = calling_stack()
    return 0


# What waits in a running loop is alive, so the garbage collector need not look at it: handles in the ready queue and timers
# are not tracked there, nor from the beginning (uncounted.h). A hundred thousand callbacks would else be traversed again and
# again. Who is known to others when it leaves its queue, or when the loop stops running, is tracked.

cdef inline void keep_unseen(TimerHandle handle) noexcept:
    handle.unseen = True
    handle._loop.unseen += 1


cdef inline void settle(AnyHandle handle) noexcept:
    if not PyObject_GC_IsTracked(handle):
        PyObject_GC_Track(<PyObject*> handle)
    if AnyHandle is TimerHandle:
        if handle.unseen:
            handle.unseen = False
            handle._loop.unseen -= 1
