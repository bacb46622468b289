# Handles of callbacks, and what calls them.
from cpython.object cimport PyObject

from anywire.engine._figures cimport Meter
from anywire.engine._timers cimport Timer

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    void PyObject_GC_Track(PyObject* object) noexcept
    void PyObject_GC_UnTrack(PyObject* object) noexcept
    bint PyObject_GC_IsTracked(object object) noexcept


cdef class Caller:
    cdef double slow                # seconds from which a callback is noted as slow; below 0: nobody measures
    cdef readonly object slow_calls # deque of (name, seconds)
    cdef Meter meter                # where others see what the loop does
    cdef Py_ssize_t unseen          # timers that the garbage collector doesn't track
    cdef public bint _debug

    # Calls `callback` in its context. What it raises goes to the loop's exception handler, or ends the run.
    cdef int execute(self, object handle, object callback, tuple args, object context) except -1
    cdef int measured(self, object handle, object callback, tuple args, object context) except -1
    cdef int note_slow(self, object culprit, double took) except -1
    cdef int report_took(self, object protocol, object callback, str method, double took) except -1
    cdef int failed(self, object handle) except -1


cdef class Handle:
    cdef object __weakref__
    cdef readonly Caller _loop
    cdef readonly object _callback, _args, _context
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown               # its repr from before it was cancelled, in debug mode
    cdef Handle next                # in the ready queue
    cdef bint hidden                # its context isn't tracked by the garbage collector


cdef class TimerHandle(Timer):
    cdef object __weakref__
    cdef readonly Caller _loop
    cdef readonly object _callback, _args, _context
    cdef readonly bint _cancelled
    cdef readonly object _source_traceback
    cdef object shown
    cdef bint unseen                # it isn't tracked by the garbage collector
    cdef bint hidden                # nor is its context


ctypedef fused AnyHandle:
    Handle
    TimerHandle


cdef object calling_stack()


cdef inline int fill(AnyHandle handle, Caller loop, object callback, tuple args, object context) except -1:
    """Make a new handle one of `callback(*args)`, in `context` or in a copy of the current one."""
    handle._loop = loop
    handle._callback = callback
    handle._args = args
    handle._context = PyContext_CopyCurrent() if context is None else context
    return 0


cdef inline int remember_caller(AnyHandle handle) except -1:
    """For debug mode."""
    handle._source_traceback = calling_stack()
    return 0


# What waits in a running loop is alive, so the garbage collector need not look at it: handles in the ready queue, timers,
# and the contexts made for them, are untracked there. A hundred thousand callbacks would else be traversed again and
# again. Who is known to others when it leaves its queue, or when the loop stops running, is tracked again.

cdef inline void hide(AnyHandle handle, bint context) noexcept:
    if AnyHandle is TimerHandle:
        handle.unseen = True
        handle._loop.unseen += 1
    PyObject_GC_UnTrack(<PyObject*> handle)
    if context:
        handle.hidden = True
        PyObject_GC_UnTrack(<PyObject*> handle._context)


cdef inline void show_context(AnyHandle handle) noexcept:
    # Also of a handle that will be gone: the context's own end expects it tracked.
    if AnyHandle is TimerHandle:
        if not handle.unseen:
            return
        handle.unseen = False
        handle._loop.unseen -= 1
    if handle.hidden:
        handle.hidden = False
        PyObject_GC_Track(<PyObject*> handle._context)


cdef inline void settle(AnyHandle handle) noexcept:
    if not PyObject_GC_IsTracked(handle):
        PyObject_GC_Track(<PyObject*> handle)
    show_context(handle)
