/* Copies of a context that are made only when somebody can see them.

   Each callback has a copy of the context in which it was asked for. All that is copied is a reference to the context's
   variables, a map that is never changed (a hash array mapped trie, PEP 567). So a handle keeps just the map, and the loop
   puts it into one context of its own for the time of the call: no object is made for it, and none is dropped.

   CPython has no functions for that. The fields of its 3.11 to 3.13 are used, after a trial of all that is expected of them;
   where one fails, each handle has a copy by PyContext_CopyCurrent(). All of this needs the GIL. */
#ifndef ANYWIRE_CONTEXTS_H
#define ANYWIRE_CONTEXTS_H

#include <Python.h>

typedef struct {
    PyObject_HEAD
    PyObject *previous;                 /* the thread's current one from before it was entered; borrowed */
    PyObject *variables;
    PyObject *weakrefs;
    int entered;
} aw_context;

static int aw_is_map(PyObject *object)
{
    return object != NULL && strcmp(Py_TYPE(object)->tp_name, "hamt") == 0;
}

/* Have `context` hold these variables. It must not be entered: who has entered it remembers what it looked up. */
static inline void aw_put_variables(PyObject *context, PyObject *variables)
{
    PyObject *former = ((aw_context *) context)->variables;
    if (former == variables)
        return;
    Py_INCREF(variables);
    ((aw_context *) context)->variables = variables;
    Py_XDECREF(former);                 /* may run anything */
}

#if !defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
/* Set a variable in `outer`, enter `inner` with what `outer` holds, and see it there. 1: all was as expected; 0: it was not;
   -1: an exception is set. */
static int aw_try_contexts(PyObject *outer, PyObject *inner, PyObject *variable)
{
    aw_context *context = (aw_context *) outer;
    PyObject *before = PyThreadState_Get()->context, *empty = context->variables, *token, *copy, *seen = NULL;
    int right = aw_is_map(empty) && context->previous == NULL && context->weakrefs == NULL && context->entered == 0;
    if (!right)
        return 0;
    if (PyContext_Enter(outer) < 0)
        return -1;
    right = PyThreadState_Get()->context == outer && context->previous == before && context->entered == 1;
    token = PyContextVar_Set(variable, variable);
    copy = PyContext_CopyCurrent();
    right = right && token != NULL && copy != NULL && aw_is_map(context->variables) && context->variables != empty
        && ((aw_context *) copy)->variables == context->variables;
    Py_XDECREF(token);
    if (PyContext_Exit(outer) < 0)
        right = -1;
    if (right == 1 && (context->entered != 0 || PyThreadState_Get()->context != before))
        right = 0;
    if (right == 1) {
        aw_put_variables(inner, context->variables);
        if (PyContext_Enter(inner) < 0)
            right = -1;
        else if (PyContextVar_Get(variable, Py_None, &seen) < 0 || seen != variable)
            right = 0;
        if (right >= 0 && PyContext_Exit(inner) < 0)
            right = -1;
        aw_put_variables(inner, empty);
        Py_XDECREF(seen);
    }
    Py_XDECREF(copy);
    return PyErr_Occurred() ? -1 : right;
}

/* The variables of an empty context, which are the same for all; or None, if the fields are not as expected. A new reference,
   or NULL with an exception. */
static PyObject *aw_know_contexts(void)
{
    PyObject *outer, *inner, *variable, *found = NULL;
    int right = -1;
    if (PyContext_Type.tp_basicsize != sizeof(aw_context))
        Py_RETURN_NONE;
    outer = PyContext_New();
    inner = PyContext_New();
    variable = PyContextVar_New("anywire", NULL);
    if (outer != NULL && inner != NULL && variable != NULL)
        right = aw_try_contexts(outer, inner, variable);
    if (right >= 0) {
        found = right ? ((aw_context *) inner)->variables : Py_None;
        Py_INCREF(found);
    }
    Py_XDECREF(outer);
    Py_XDECREF(inner);
    Py_XDECREF(variable);
    return found;
}

/* The current context's variables, or these if the thread has never had one. A new reference. */
static inline PyObject *aw_current_variables(PyObject *none)
{
    PyObject *context = PyThreadState_Get()->context;
    PyObject *variables = context == NULL ? none : ((aw_context *) context)->variables;
    Py_INCREF(variables);
    return variables;
}
#else
static PyObject *aw_know_contexts(void)
{
    Py_RETURN_NONE;
}

static inline PyObject *aw_current_variables(PyObject *none)
{
    Py_INCREF(none);                    /* not called: nobody knows contexts here */
    return none;
}
#endif

#endif
