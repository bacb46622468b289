# A place in memory that others share: some bytes of a writable buffer, exported for as long as an object lies there.
from cpython.buffer cimport Py_buffer

# Fills the view (to be released) and returns the address. `what` names the object in errors.
cdef char *take_place(Py_buffer *view, object buffer, object offset, Py_ssize_t size, Py_ssize_t alignment, str what) except NULL
