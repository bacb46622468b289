/* Methods with `*args` that get their arguments where the caller has them (METH_FASTCALL, PEP 590): Cython gives such a
   method a tuple of all of them first, to cut it into the next one. They stand in the class in front of the methods of
   the same names, which are kept for whatever is not an ordinary call. */
#ifndef ANYWIRE_FAST_METHODS_H
#define ANYWIRE_FAST_METHODS_H

#include <Python.h>

typedef PyObject *(*aw_fast)(PyObject *self, PyObject **args, Py_ssize_t count, PyObject *names);

/* Put `function` in place of the method of that name, of the type or of a base; `def` must stay. -1: an exception is set. */
static int aw_replace_method(PyTypeObject *type, PyMethodDef *def, aw_fast function)
{
    PyObject *former = PyObject_GetAttrString((PyObject *) type, def->ml_name), *made;
    int failed;
    if (former == NULL)
        return -1;
    def->ml_doc = ((PyMethodDescrObject *) former)->d_method->ml_doc;
    Py_DECREF(former);
    def->ml_meth = (PyCFunction) (void (*)(void)) function;
    def->ml_flags = METH_FASTCALL | METH_KEYWORDS;
    made = PyDescr_NewMethod(type, def);
    if (made == NULL)
        return -1;
    failed = PyDict_SetItemString(type->tp_dict, def->ml_name, made);
    Py_DECREF(made);
    PyType_Modified(type);
    return failed;
}

/* `count` arguments as a tuple. */
static inline PyObject *aw_tuple(PyObject *const *args, Py_ssize_t count)
{
    PyObject *made = PyTuple_New(count);
    Py_ssize_t i;
    for (i = 0; made != NULL && i < count; i++) {
        Py_INCREF(args[i]);
        PyTuple_SET_ITEM(made, i, args[i]);
    }
    return made;
}

#endif
