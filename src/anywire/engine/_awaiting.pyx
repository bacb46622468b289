# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, binding=False
"""Waiting in an event loop, without making a Future or a Task for each message.

An operation (`Awaited`: one receive, one send) is what the caller awaits: a coroutine for asyncio, but an object of its own,
so that one which can finish at once costs little more than a call. When it must wait it yields the Future of a `Waiter`. Who
finds the wait over takes the task's wake-up out of that Future and steps the task directly (`wake`), without a trip through
the ready queue; so the Future stays pending and is yielded again the next time. The wake-up carries nothing: the operation
looks again for itself when its task goes on.

Used on the thread of the loop. What can go wrong: the task is cancelled (the Future is, and the operation is thrown into; it
has to leave everything as if it had never waited); the task's context is just running (then the loop steps it in its turn).
"""
cimport cython
from cpython.object cimport PyObject

from asyncio import CancelledError, Future, InvalidStateError, Task
from contextvars import Context

cdef extern from "Python.h":
    int PyContext_Enter(object context) noexcept
    int PyContext_Exit(object context) noexcept
    PyObject* PyObject_CallOneArg(object callable, object argument) noexcept
    void PyErr_Clear() noexcept
    ctypedef PyObject* (*PyCFunction)(PyObject*, PyObject*) noexcept
    bint PyCFunction_CheckExact(PyObject* callable) noexcept
    PyCFunction PyCFunction_GET_FUNCTION(PyObject* callable) noexcept
    void drop "Py_DECREF"(PyObject* object)

cdef extern from "anywire/engine/futures.h":
    bint aw_know_future(object future, object callback, object context, object blocking) noexcept
    bint aw_know_others(object future) noexcept
    void aw_note_others(object future) noexcept
    void aw_forget_future() noexcept
    int aw_block(object future) except -1
    PyObject* aw_sleeper(object future) noexcept
    bint aw_alone(object future) noexcept
    PyObject* aw_sleepers_context(object future) noexcept
    void aw_let_sleeper_go(object future)

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


# What a task that is woken asks for its result. Of a Future of asyncio's own it reads that in C.
cdef object DONE = Future(loop=_NoLoop())
DONE.set_result(None)


def _know_futures(bint wanted=True):
    """Find out where a Future has who waits for it. Returns whether that is known now; for tests, `wanted` False forgets."""
    aw_forget_future()
    if not wanted:
        return False
    future, callback, context = Future(loop=_NoLoop()), object(), Context()
    future.add_done_callback(callback, context=context)
    if not aw_know_future(future, callback, context, vars(Future)["_asyncio_future_blocking"]):
        return False
    aw_note_others(future)
    future.add_done_callback(callback, context=context)
    known = aw_know_others(future) and not aw_alone(future)
    future = Future(loop=_NoLoop())
    for _ in range(2):
        future.add_done_callback(callback, context=context)
        known = known and aw_sleeper(future) == <PyObject*> callback and aw_alone(future)
        if known:
            aw_let_sleeper_go(future)
            known = not future._callbacks and not future.done() and aw_sleeper(future) == NULL
    if not known:
        aw_forget_future()
    return known


_know_futures()

cdef PyCFunction wakeup = NULL              # of asyncio's Task in C, once it was seen


cdef bint is_wakeup(PyObject* callback) except -1:
    """Whether it is the wake-up of a Task in C, to which any Future that is done says the same."""
    global wakeup
    if not PyCFunction_CheckExact(callback):
        return False
    if wakeup == NULL and type((<object> callback).__self__) is Task and (<object> callback).__name__ == "task_wakeup":
        wakeup = PyCFunction_GET_FUNCTION(callback)
    return PyCFunction_GET_FUNCTION(callback) == wakeup


cdef int proceed(Awaited operation, PyObject** result) except -1:
    return operation.proceed(result)


# The same, for who looks whether an exception is set.
cdef int (*quietly_proceed)(Awaited operation, PyObject** result) noexcept
quietly_proceed = <int (*)(Awaited, PyObject**) noexcept> proceed


cdef int am_send(PyObject* self, PyObject* argument, PyObject** result) except -1:
    cdef int status
    result[0] = NULL
    status = quietly_proceed(<Awaited> self, result)
    return (<Awaited> self).failed() if status < 0 else status


cdef int install(object kind) except -1:
    """Give a class of operations the am_send slot, which Cython has no syntax for, and which classes don't inherit."""
    return anywire_install(kind, am_send)


@cython.final
@cython.freelist(64)
cdef class Waiter:
    """What an operation waits by: its methods are those of a Future that others call who find it (a StreamReader has one
    where it keeps its Future)."""

    def done(self):
        return not self.asleep()

    def cancelled(self):
        return isinstance(self.failure, CancelledError) or self.future is not None and self.future.cancelled()

    def cancel(self, msg=None):
        return self.asleep() and self.future.cancel(msg)

    def set_result(self, result):
        if not self.asleep():
            raise InvalidStateError("invalid state")
        self.wake_soon()

    def set_exception(self, exception):
        if not self.asleep():
            raise InvalidStateError("invalid state")
        self.failure = exception() if isinstance(exception, type) else exception
        self.wake_soon()

    cdef object sleep(self):
        """The Future to be yielded, each time."""
        if not self.fresh:
            self.future = Future(loop=self.loop)
        self.fresh = self.woken = False
        self.failure = None
        aw_block(self.future)
        return self.future

    cdef bint asleep(self) noexcept:
        """Whether its task waits, and is not to go on already: it was not woken, and not cancelled."""
        return not self.woken and self.future is not None and (
            aw_sleeper(self.future) != NULL or not self.future.done())

    cdef object sleeper(self):
        """What is called when it is woken, for who wants to know the task."""
        return None if self.future is None or aw_sleeper(self.future) == NULL else <object> aw_sleeper(self.future)

    cdef int wake(self) except -1:
        """Step the waiting task now. Only from a callback or a report of the loop, where no other task is running."""
        cdef object future = self.future, callback, context
        cdef PyObject* result
        if self.woken:
            return 0
        # None is there where it was cancelled, or nobody waits yet, or one can't see who does.
        if aw_sleeper(future) == NULL or not aw_alone(future) or not is_wakeup(aw_sleeper(future)):
            return self.wake_soon()
        context = <object> aw_sleepers_context(future)
        if PyContext_Enter(context) < 0:           # it is entered already (loops were nested): not from here
            PyErr_Clear()
            return self.wake_soon()
        # From here on nobody can cancel the wait and be told that this was in time: the task goes on at once.
        callback = <object> aw_sleeper(future)
        aw_let_sleeper_go(future)
        self.woken = self.fresh = True
        result = PyObject_CallOneArg(callback, DONE)
        PyContext_Exit(context)
        if result == NULL:
            return an_exception_is_set()
        drop(result)
        if self.woken and aw_sleeper(future) != NULL:
            # It was not the operation that waited for the Future, but somebody who had it from the operation.
            self.fresh = False
            future.set_result(None)
        return 0

    cdef int wake_soon(self) except -1:
        """Let the loop step it in its next turn. Meanwhile it may still be cancelled: so the Future is done, and says so."""
        self.woken = True
        if not self.future.done():
            self.future.set_result(None)
        return 0


cdef class Awaited:
    """An awaitable that is a coroutine for asyncio: `asyncio.create_task` and `wait_for` take it. Await it once.

    A class of operations defines `proceed`, which goes on until it has a result or must wait, `failed` for what that raises,
    and `finish`, which is called when it is thrown into or closed; and is given to `install`."""

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        cdef PyObject* result = NULL
        cdef int status = am_send(<PyObject*> self, NULL, &result)
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

    cdef int proceed(self, PyObject** result) except -1:
        """RETURN with the value it was awaited for, or NEXT with the Future to be yielded; a new reference."""
        raise NotImplementedError(f"{type(self).__name__} has no way to proceed")

    cdef int failed(self) except -1:
        """`proceed` has raised: an exception is set."""
        return an_exception_is_set()

    cdef int finish(self) except -1:
        self.state = FINISHED
        return 0


install(Awaited)
