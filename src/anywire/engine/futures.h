/* Who waits for an asyncio Future, read where asyncio's C code keeps it.

   A Task that waits for a Future of exactly asyncio's own type does so without a call into Python: it puts its wake-up and its
   context into two fields. There is no function to take them out again without a list and a tuple, so they are read in the
   fields; where those are, is found out by looking for what a trial has put there. Where that fails `aw_sleeper` finds
   nobody, and the Future has to be completed, which wakes the task in the loop's next turn.

   Every function needs the GIL. */
#ifndef ANYWIRE_FUTURES_H
#define ANYWIRE_FUTURES_H

#include <Python.h>

static PyTypeObject *aw_future_type = NULL;     /* that of the fields; NULL: they aren't known */
static Py_ssize_t aw_callback_at, aw_context_at, aw_others_at;
static PyObject *aw_noted[64];                  /* the words of a Future before it got a second callback */
static setter aw_set_blocking = NULL;
static void *aw_set_blocking_closure = NULL;

static inline PyObject **aw_field(PyObject *object, Py_ssize_t offset)
{
    return (PyObject **) ((char *) object + offset);
}

/* Where `value` is in the object; -1: nowhere, or in more than one place. */
static Py_ssize_t aw_find_field(PyObject *object, PyObject *value)
{
    Py_ssize_t offset, found = -1;
    for (offset = sizeof(PyObject); offset + (Py_ssize_t) sizeof(PyObject *) <= Py_TYPE(object)->tp_basicsize;
         offset += sizeof(PyObject *)) {
        if (*aw_field(object, offset) != value)
            continue;
        if (found >= 0)
            return -1;
        found = offset;
    }
    return found;
}

/* Learn the fields from a Future to which exactly this callback was added, with this context, and the descriptor of
   `_asyncio_future_blocking`. 1: they are known. */
static int aw_know_future(PyObject *future, PyObject *callback, PyObject *context, PyObject *blocking)
{
    if (Py_TYPE(blocking) != &PyGetSetDescr_Type || Py_TYPE(future)->tp_itemsize != 0)
        return 0;
    aw_callback_at = aw_find_field(future, callback);
    aw_context_at = aw_find_field(future, context);
    if (aw_callback_at < 0 || aw_context_at < 0)
        return 0;
    aw_set_blocking = ((PyGetSetDescrObject *) blocking)->d_getset->set;
    aw_set_blocking_closure = ((PyGetSetDescrObject *) blocking)->d_getset->closure;
    if (aw_set_blocking == NULL)
        return 0;
    aw_future_type = Py_TYPE(future);
    return 1;
}

/* Before and after a second callback is added: the list of those is where there was nothing. 1: that is known. */
static void aw_note_others(PyObject *future)
{
    Py_ssize_t size = Py_TYPE(future)->tp_basicsize;
    memset(aw_noted, 0, sizeof(aw_noted));
    memcpy(aw_noted, future, size < (Py_ssize_t) sizeof(aw_noted) ? (size_t) size : sizeof(aw_noted));
}

static int aw_know_others(PyObject *future)
{
    Py_ssize_t offset, found = -1;
    for (offset = sizeof(PyObject); offset + (Py_ssize_t) sizeof(PyObject *) <= Py_TYPE(future)->tp_basicsize
         && offset < (Py_ssize_t) sizeof(aw_noted); offset += sizeof(PyObject *)) {
        if (*aw_field(future, offset) == aw_noted[offset / sizeof(PyObject *)])
            continue;
        if (found >= 0 || aw_noted[offset / sizeof(PyObject *)] != NULL)
            return 0;
        found = offset;
    }
    aw_others_at = found;
    return found >= 0;
}

static void aw_forget_future(void)
{
    aw_future_type = NULL;
}

/* Before it is yielded to a Task. -1: an exception is set. */
static inline int aw_block(PyObject *future)
{
    if (Py_TYPE(future) == aw_future_type)
        return aw_set_blocking(future, Py_True, aw_set_blocking_closure);
    return PyObject_SetAttrString(future, "_asyncio_future_blocking", Py_True);
}

/* What is to be called when the future is done, if one only waits for it: borrowed; or NULL. */
static inline PyObject *aw_sleeper(PyObject *future)
{
    return Py_TYPE(future) == aw_future_type ? *aw_field(future, aw_callback_at) : NULL;
}

/* Whether nobody else waits for it; where there is a sleeper. */
static inline int aw_alone(PyObject *future)
{
    return *aw_field(future, aw_others_at) == NULL;
}

/* The context for that; borrowed. */
static inline PyObject *aw_sleepers_context(PyObject *future)
{
    return *aw_field(future, aw_context_at);
}

/* Nobody waits for it any more. The caller has references of his own to both. */
static inline void aw_let_sleeper_go(PyObject *future)
{
    Py_CLEAR(*aw_field(future, aw_callback_at));
    Py_CLEAR(*aw_field(future, aw_context_at));
}

#endif
