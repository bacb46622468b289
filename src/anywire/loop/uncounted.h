/* Objects that the garbage collector neither counts nor tracks from the beginning.

   It begins a collection when enough more container objects have been made than dropped. What waits in a running loop is
   alive and is not tracked, so handles that are made by the ten thousand would only have it look at everything else for
   nothing. The memory is what PyObject_GC_New gives, and PyObject_GC_Track takes it as such. */
#ifndef ANYWIRE_UNCOUNTED_H
#define ANYWIRE_UNCOUNTED_H

#include <Python.h>

#if !defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
/* In front of the object: two words, zero while it is not tracked (PyGC_Head). */
#define AW_GC_HEAD (2 * sizeof(uintptr_t))

static PyObject *aw_allocate_uncounted(PyTypeObject *type, Py_ssize_t items)
{
    size_t size = AW_GC_HEAD + type->tp_basicsize;
    char *memory = PyObject_Malloc(size);
    (void) items;
    if (memory == NULL)
        return PyErr_NoMemory();
    memset(memory, 0, size);
    return PyObject_Init((PyObject *) (memory + AW_GC_HEAD), type);
}

/* As PyObject_GC_Del, which would count the object's end. */
static void aw_free_uncounted(void *object)
{
    if (PyObject_GC_IsTracked((PyObject *) object))
        PyObject_GC_UnTrack(object);
    PyObject_Free((char *) object - AW_GC_HEAD);
}

#else
#define aw_free_uncounted PyObject_GC_Del

static PyObject *aw_allocate_uncounted(PyTypeObject *type, Py_ssize_t items)
{
    PyObject *made = PyType_GenericAlloc(type, items);
    if (made != NULL)
        PyObject_GC_UnTrack(made);
    return made;
}
#endif

/* Have the type's objects made so. It has no subclasses and no items. */
static void aw_leave_uncounted(PyTypeObject *type)
{
    type->tp_alloc = aw_allocate_uncounted;
    type->tp_free = aw_free_uncounted;
}

#endif
