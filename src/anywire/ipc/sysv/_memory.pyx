# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""An attached System V shared memory segment as a buffer, for memory.py.

Any thread. The memory is detached when the last memoryview of it is gone, never before: a detach with views is refused.
"""
cimport cython
from libc.errno cimport EACCES, EINVAL, EMFILE, ENOMEM, errno
from libc.stdint cimport uintptr_t
from cpython.buffer cimport PyBuffer_FillInfo

from anywire.ipc.sysv.kernel_limits import refuse, refuse_removed

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/ipc.h>
    #include <sys/shm.h>
    """
    int SHM_RDONLY, SHM_RND
    void* shmat(int id, const void* where, int flags) nogil
    int shmdt(const void* where) nogil


@cython.no_gc
@cython.auto_pickle(False)
cdef class Memory:
    """A segment by its id, attached or not. `name` is for errors."""

    cdef readonly int id
    cdef readonly int key
    cdef readonly bint closed
    cdef readonly bint readonly
    cdef readonly size_t size
    cdef readonly Py_ssize_t exports
    cdef public str name
    cdef void* where

    def __init__(self, int ident, int key, str name, size_t size):
        self.id = ident
        self.key = key
        self.name = name
        self.size = size

    def __dealloc__(self):
        if self.where is not NULL:
            shmdt(self.where)

    def shut(self):
        """Detach, and refuse everything from now on. BufferError: memoryviews of it are in use."""
        self.detach()
        self.closed = True

    @property
    def attached(self):
        """Whether the memory is attached to this process through this reference."""
        return self.where is not NULL

    @property
    def address(self):
        """Where it is attached; 0: it is not."""
        return <uintptr_t> self.where

    def attach(self, *, bint readonly=False, size_t address=0):
        """Attach the memory, if it is not attached.

        `readonly`: writing is refused (a memoryview of it is read-only). `address`: where, rounded down to what the machine
        can do; 0 lets the kernel choose. OSError: EIDRM, removed; EMFILE, the process has too many (vm.max_map_count); EINVAL,
        something is at that address; PermissionError."""
        cdef void* found
        cdef int e
        if self.closed:
            raise ValueError(f"this shared memory object ({self.name}) is closed; open the key again")
        if self.where is not NULL:
            raise ValueError(f"this shared memory object ({self.name}) is attached already; detach it first")
        found = shmat(self.id, <void*> address, (SHM_RDONLY if readonly else 0) | (SHM_RND if address else 0))
        e = errno
        if found != <void*> -1:
            self.where = found
            self.readonly = readonly
            return
        if e == EACCES:
            refuse(e, self.name, "the mode does not let this user " + ("read it" if readonly else
                                 "write to it; readonly=True attaches it for reading"))
        if e == EINVAL and address:
            refuse(e, self.name, f"something else is at the address {address:#x}, or the memory was removed")
        if e == ENOMEM or e == EMFILE:
            refuse(e, self.name, "no room in this process for it (ulimit -v, vm.max_map_count)")
        refuse_removed(self.name, "shared memory", False)

    def detach(self):
        """Detach the memory from this process; nothing if it is not attached. BufferError: memoryviews of it are in use."""
        cdef void* where = self.where
        if where is NULL:
            return
        if self.exports:
            raise BufferError(f"{self.exports} memoryviews of the shared memory ({self.name}) are in use; release them first")
        self.where = NULL
        shmdt(where)

    def __len__(self):
        return <Py_ssize_t> self.size

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.where is NULL:
            raise BufferError(f"the shared memory ({self.name}) is not attached")
        PyBuffer_FillInfo(view, self, self.where, <Py_ssize_t> self.size, self.readonly, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1
