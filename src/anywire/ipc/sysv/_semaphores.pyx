# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Operations on a System V semaphore set: semtimedop(2), for semaphores.py.

One call makes a list of operations, all or none. The GIL is released in every call that may wait. Any thread. Undo belongs
to the process, not to the thread (pthread_create shares it): a helper's thread may acquire what another releases.
"""
cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport E2BIG, EACCES, EAGAIN, EFBIG, EIDRM, EINTR, EINVAL, ENOMEM, ENOSPC, ERANGE, ETIMEDOUT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from posix.time cimport timespec

from anywire.ipc._system cimport as_timespec, deadline, fail, left
from anywire.ipc._interrupt cimport Interrupt

from anywire.ipc._interrupt import Cancelled
from anywire.ipc.sysv import _calls
from anywire.ipc.sysv.kernel_limits import explain, refuse, refuse_removed

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/ipc.h>
    #include <sys/sem.h>
    """
    int IPC_NOWAIT, SEM_UNDO
    struct sembuf:
        unsigned short sem_num
        short sem_op
        short sem_flg
    int semtimedop(int id, sembuf* operations, size_t count, const timespec* timeout) nogil

cdef enum:
    FEW = 16                                    # operations that need no memory of their own



@cython.auto_pickle(False)
cdef class Set:
    """A set by its id. `name` is for errors; `closed` refuses everything."""

    cdef readonly int id
    cdef readonly int key
    cdef readonly bint closed
    cdef readonly int count
    cdef public str name

    def __init__(self, int ident, int key, str name, int count):
        self.id = ident
        self.key = key
        self.name = name
        self.count = count

    def shut(self):
        """Refuse everything from now on."""
        self.closed = True

    def acquire(self, int index=0, int n=1, *, bint undo=False, timeout=None, bint block=True):
        """Take n from a semaphore, waiting until it has them.

        `undo`: if this process ends without giving them back, however it ends, the kernel does. `timeout`: seconds to wait,
        None for ever. TimeoutError; BlockingIOError with `block=False`. OSError: EIDRM, removed; PermissionError."""
        if n < 1:
            raise ValueError(f"acquire takes 1 or more, not {n}")
        self.one(index, -n, undo, timeout, block)

    def release(self, int index=0, int n=1, *, bint undo=False):
        """Give n to a semaphore; never waits. `undo` as it was in `acquire`: then nothing is left to undo. OSError: ERANGE,
        above 32767; EIDRM, removed; PermissionError."""
        if n < 1:
            raise ValueError(f"release gives 1 or more, not {n}")
        self.one(index, n, undo, None, True)

    def wait_zero(self, int index=0, *, timeout=None, bint block=True):
        """Wait until a semaphore is zero; it stays so. Time-outs and errors as `acquire`."""
        self.one(index, 0, False, timeout, block)

    cdef int one(self, int index, int change, bint undo, timeout, bint block) except -1:
        cdef sembuf operation
        self.fill(&operation, index, change, (SEM_UNDO if undo else 0) | (0 if block else IPC_NOWAIT))
        self.run(&operation, 1, deadline(timeout), timeout, not block or timeout is not None, None)
        return 0

    cdef int fill(self, sembuf* operation, long index, long change, int flags) except -1:
        if self.closed:
            raise ValueError(f"this semaphore set object ({self.name}) is closed; open the key again")
        if not 0 <= index < self.count:
            raise IndexError(f"the set ({self.name}) has {self.count} semaphores, 0 to {self.count - 1}; not {index}")
        if not -32768 <= change <= 32767:
            raise ValueError(f"a semaphore changes by -32767 to 32767, not {change}")
        operation.sem_num = <unsigned short> index
        operation.sem_op = <short> change
        operation.sem_flg = <short> flags
        return 0

    def operate(self, operations, bint undo, timeout, bint block, Interrupt interrupt):
        """The operations at once: each (index, change) or (index, change, flags)."""
        cdef sembuf few[FEW]
        cdef sembuf* all = few
        cdef Py_ssize_t i = 0, count
        cdef int64_t until = deadline(timeout)
        cdef int flags
        cdef bint nowait = False
        operations = operations if type(operations) is list else list(operations)
        count = len(operations)
        if count == 0:
            return
        if count > FEW:
            all = <sembuf*> malloc(count * sizeof(sembuf))
            if all is NULL:
                raise MemoryError
        try:
            for operation in operations:
                if not 2 <= len(operation) <= 3:
                    raise ValueError(f"an operation is (index, change) or (index, change, flags), not {operation!r}")
                flags = operation[2] if len(operation) == 3 else 0
                if undo and operation[1] != 0:
                    flags |= SEM_UNDO
                if not block:
                    flags |= IPC_NOWAIT
                nowait = nowait or flags & IPC_NOWAIT
                self.fill(&all[i], operation[0], operation[1], flags)
                i += 1
            self.run(all, count, until, timeout, nowait, interrupt)
        finally:
            if all is not few:
                free(all)

    cdef int run(self, sembuf* all, size_t count, int64_t until, timeout, bint nowait, Interrupt interrupt) except -1:
        cdef timespec rest
        cdef int done, e = 0
        cdef bint waits = False, armed = False
        cdef size_t i
        for i in range(count):
            if all[i].sem_op <= 0 and not all[i].sem_flg & IPC_NOWAIT:
                waits = True
        try:
            if interrupt is not None and waits:
                interrupt.begin(-1)
                armed = True
            while True:
                if waits:
                    with nogil:
                        if until >= 0:
                            rest = as_timespec(left(until))
                        done = semtimedop(self.id, all, count, &rest if until >= 0 else NULL)
                        e = errno
                else:                               # it never waits: what the GIL's release costs is saved
                    done = semtimedop(self.id, all, count, NULL)
                    e = errno
                if done == 0:
                    return 0
                if e != EINTR:
                    break
                PyErr_CheckSignals()
                if interrupt is not None and interrupt.cancelled:
                    raise Cancelled
        finally:
            if armed:
                interrupt.end()
        if e == EAGAIN:
            if until >= 0 and (not nowait or left(until) == 0):
                raise TimeoutError(ETIMEDOUT, f"the operations could not be made for {timeout:g} s", self.name)
            raise BlockingIOError(EAGAIN, "the operations would have to wait", self.name)
        return self.failed(e, waits)

    cdef int failed(self, int e, bint waited) except -1:
        """Raise what this number means here."""
        if e == EIDRM:
            refuse_removed(self.name, "semaphore set", waited)
        if e == EINVAL:
            try:
                _calls.sem_status(self.id)
            except PermissionError:
                pass
            except OSError:
                refuse_removed(self.name, "semaphore set", False)
        if e == EACCES:
            refuse(e, self.name, "the set's mode does not let this user do that (changing needs the right to write)")
        if e == ERANGE:
            refuse(e, self.name, "a semaphore, or what is to be undone of it, would go above 32767, which is fixed in the kernel")
        if e == E2BIG:
            refuse(e, self.name, f"too many operations for one call: {explain('semopm')}")
        if e == ENOSPC or e == ENOMEM:
            refuse(e, self.name, "no memory in the kernel for what is to be undone")
        return fail(e, self.name)
