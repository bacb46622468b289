# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, binding=False
"""Waiting in an event loop, without a Future or a Task for each message.

An operation (`Awaited`: one receive, one send) is what the caller awaits: a coroutine for asyncio, but an object of its own,
so that one which can finish at once costs little more than a call. When it must wait it yields a `Waiter`: the few methods
of a Future that asyncio's Task uses. Who finds the wait over steps the task directly (`wake`), without a trip through the
ready queue. The wake-up carries nothing: the operation looks again for itself when its task goes on.

Used on the thread of the loop. What can go wrong: the task is cancelled (the operation is thrown into, and has to leave
everything as if it had never waited); the task's context is just running (then the loop steps it in its turn).
"""
cimport cython
from cpython.object cimport PyObject

from asyncio import CancelledError, Future, InvalidStateError, Task

cdef extern from "Python.h":
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    void drop "Py_DECREF"(PyObject* object)
    ctypedef PyObject* (*PyCFunction)(PyObject*, PyObject*) noexcept
    bint PyCFunction_CheckExact(object callable) noexcept
    PyCFunction PyCFunction_GetFunction(object callable) noexcept

cdef extern from *:
    """
    typedef int (*anywire_send)(PyObject*, PyObject*, PyObject**);
    static int anywire_install(PyObject* type, anywire_send f) {
        PyTypeObject* t = (PyTypeObject*) type;
        if (t->tp_as_async == NULL) { PyErr_SetString(PyExc_SystemError, "no async slots"); return -1; }
        t->tp_as_async->am_send = (sendfunc) f;       /* PyIter_Send() then needs no StopIteration per result */
        PyType_Modified(t);
        return 0;
    }
    """
    ctypedef int (*anywire_send)(PyObject*, PyObject*, PyObject**) except -1
    int anywire_install(object type, anywire_send f) except -1


class _NoLoop:
    """The loop of DONE, which is nobody's."""

    def get_debug(self):
        return False


# A Task's wake-up asks the future that it is given for its result. Of a Future it reads that in C; of anything else it
# looks the method up by a name that it makes anew each time, which costs more than the whole step of the task.
cdef object DONE = Future(loop=_NoLoop())
DONE.set_result(None)

cdef PyCFunction wakeup = NULL              # of asyncio's Task in C, once it was seen


cdef bint is_wakeup(object callback) except -1:
    """Whether it is the wake-up of a Task in C, to which any future that is done says the same."""
    global wakeup
    if not PyCFunction_CheckExact(callback):
        return False
    if wakeup == NULL and type(callback.__self__) is Task and callback.__name__ == "task_wakeup":
        wakeup = PyCFunction_GetFunction(callback)
    return wakeup != NULL and PyCFunction_GetFunction(callback) == wakeup


cdef int am_send(PyObject* self, PyObject* argument, PyObject** result) except -1:
    return (<Awaited> self).step(result)


cdef int install(object kind) except -1:
    """Give a class of operations the am_send slot, which Cython has no syntax for, and which classes don't inherit."""
    return anywire_install(kind, am_send)


@cython.final
@cython.freelist(64)
cdef class Waiter:
    """What a waiting operation yields to its Task: just enough of a Future."""

    def get_loop(self):
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        self.callback = callback
        self.context = context
        if self.woken:
            self.wake_soon()

    def remove_done_callback(self, callback):
        if self.callback is None:
            return 0
        self.callback = None
        return 1

    def done(self):
        return self.woken

    def cancelled(self):
        return isinstance(self.failure, CancelledError)

    def result(self):
        if self.failure is not None:
            raise self.failure

    def exception(self):
        return self.failure

    def cancel(self, msg=None):
        if self.woken:
            return False
        self.failure = CancelledError() if msg is None else CancelledError(msg)
        self.wake_soon()
        return True

    def set_result(self, result):
        if self.woken:
            raise InvalidStateError("invalid state")
        self.wake_soon()

    def set_exception(self, exception):
        if self.woken:
            raise InvalidStateError("invalid state")
        self.failure = exception() if isinstance(exception, type) else exception
        self.wake_soon()

    cdef int reset(self) except -1:
        """Before it is yielded, each time."""
        self.woken = False
        self.failure = None
        self.callback = None
        self.context = None
        self._asyncio_future_blocking = True
        return 0

    cdef int wake(self) except -1:
        """Step the waiting task now. Only from a callback or a report of the loop, where no other task is running."""
        cdef object callback = self.callback, context = self.context
        if self.woken:
            return 0
        if callback is None or context is None:
            return self.wake_soon()
        try:
            PyContext_Enter(context)
        except RuntimeError:           # this very context is running: the loop must do it in its turn
            return self.wake_soon()
        self.woken = True
        self.callback = None
        try:
            if self.failure is None and is_wakeup(callback):
                callback(DONE)
            else:
                callback(self)
        finally:
            PyContext_Exit(context)
        return 0

    cdef int wake_soon(self) except -1:
        cdef object callback = self.callback
        self.woken = True
        if callback is not None:
            self.callback = None
            self.loop.call_soon(callback, self, context=self.context)
        return 0


cdef class Awaited:
    """An awaitable that is a coroutine for asyncio: `asyncio.create_task` and `wait_for` take it. Await it once.

    A class of operations defines `step`, which PyIter_Send calls, and `finish`, which is called when it is thrown into or
    closed; and is given to `install`."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        cdef PyObject* result = NULL
        cdef int status = self.step(&result)
        out = <object> result
        drop(result)
        if status == NEXT:
            return out
        raise StopIteration(out)

    def throw(self, kind, value=None, traceback=None):
        self.finish()
        if isinstance(kind, BaseException):
            raise kind
        if value is None:
            value = kind()
        elif not isinstance(value, BaseException):
            value = kind(value)
        raise value if traceback is None else value.with_traceback(traceback)

    def close(self):
        self.finish()

    cdef int step(self, PyObject** result) except -1:
        """RETURN with the value it was awaited for, or NEXT with the waiter to be yielded; a new reference."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    cdef int finish(self) except -1:
        self.state = FINISHED
        return 0


install(Awaited)
