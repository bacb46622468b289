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

from asyncio import CancelledError, Future, InvalidStateError
from contextvars import Context

cdef extern from "Python.h":
    int PyContext_Enter(object context) noexcept
    int PyContext_Exit(object context) noexcept
    PyObject* PyObject_CallOneArg(object callable, object argument) noexcept
    void PyErr_Clear() noexcept
    void drop "Py_DECREF"(PyObject* object)

cdef extern from "anywire/engine/futures.h":
    bint aw_know_future(object future, object callback, object context, object blocking) noexcept
    void aw_forget_future() noexcept
    int aw_block(object future) except -1
    PyObject* aw_sleeper(object future) noexcept
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
    future, callback, context = Future(loop=_NoLoop()), object(), Context()
    aw_forget_future()
    for _ in range(2):
        future.add_done_callback(callback, context=context)
        if not wanted or not aw_know_future(future, callback, context, vars(Future)["_asyncio_future_blocking"]):
            aw_forget_future()
            return False
        aw_let_sleeper_go(future)
        if future._callbacks or future.done():
            aw_forget_future()
            return False
    return True


_know_futures()


cdef int am_send(PyObject* self, PyObject* argument, PyObject** result) except -1:
    return (<Awaited> self).step(result)


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

    cdef bint asleep(self) except -1:
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
        if aw_sleeper(future) == NULL:             # cancelled; or nobody waits yet; or one can't see who does
            return self.wake_soon()
        context = <object> aw_sleepers_context(future)
        if PyContext_Enter(context) < 0:           # this very context is running: the loop must do it in its turn
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
        return 0

    cdef int wake_soon(self) except -1:
        """Let the loop step it in its next turn. Meanwhile it may still be cancelled: so the Future is done, and says so."""
        self.woken = True
        if not self.future.done():
            self.future.set_result(None)
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
        """RETURN with the value it was awaited for, or NEXT with the Future to be yielded; a new reference."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    cdef int finish(self) except -1:
        self.state = FINISHED
        return 0


install(Awaited)
