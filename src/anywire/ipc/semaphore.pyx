# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""POSIX semaphores, with a name or inside shared memory (sem_overview(7)).

Any thread may use a Semaphore. Its memory stays until it is closed and nobody is inside a call any more: a thread that
waits in a semaphore that another thread closes goes on waiting. Waiting in an event loop is `semaphore_waits`.

What can go wrong: the units of a process that was killed are gone, since a semaphore does not know who took them
(`processes` tells who is left); a sem_t that isn't one is used as if it were.
"""
from libc.errno cimport EINTR, EOVERFLOW, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint32_t
from cpython.buffer cimport PyBuffer_Release, Py_buffer
from cpython.exc cimport PyErr_CheckSignals, PyErr_WarnEx
from anywire.ipc._place cimport take_place
from anywire.ipc._system cimport deadline, encoded, fail, refusal

import cython
import os

from anywire.ipc.processes import processes_with
from anywire.ipc.unlinking import Unlink

cdef extern from "anywire/ipc/semaphore.h" nogil:
    ctypedef struct sem_t:
        pass
    ctypedef unsigned int mode_t
    sem_t *SEM_FAILED
    int SEM_VALUE_MAX, AW_MOST
    int aw_no_clockwait
    sem_t *sem_open(const char *name, int flags, mode_t mode, unsigned int value)
    int sem_close(sem_t *s)
    int sem_unlink(const char *name)
    int sem_init(sem_t *s, int shared, unsigned int value)
    int sem_trywait(sem_t *s)
    int sem_post(sem_t *s)
    int sem_getvalue(sem_t *s, int *value)
    int aw_sem_wait(sem_t *s, int64_t deadline)
    int aw_sem_known()
    uint32_t aw_called
    void aw_call_helper()
    int aw_wait_for_any(sem_t **all, unsigned int count, uint32_t seen)
    void aw_pass_on(sem_t *s)
    int alignof_sem "_Alignof(sem_t)"

cdef int O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL


def remove(name):
    """Remove the name. The semaphore itself stays for those who have it open; the next one of this name is another.

    Raises FileNotFoundError, PermissionError.
    """
    cdef bytes raw = encoded(name, "a semaphore", "/jobs")
    if sem_unlink(raw):
        raise refusal(errno, name, 250, "semaphore", False)


@cython.no_gc                     # refers to a buffer and a str: the collector must not take the buffer away before us
cdef class Semaphore:
    """A counting semaphore that processes and threads share.

    Args:
        name: as "/jobs": one slash, then up to 250 bytes without one.
        flags: 0 opens an existing one, os.O_CREAT makes it if there is none, os.O_CREAT | os.O_EXCL insists on a new one.
        mode: permissions of a new one, less the umask. Whoever uses it needs to read and to write.
        value: units that a new one has, 0 ... VALUE_MAX. Ignored for one that exists.
        owner: whether `close` removes the name, in the process that opened it.

    With a name it is one of sem_open(3); inside a shared buffer it is one of sem_init(3) (`create_in`, `open_in`): C
    programs use the same. `with` takes a unit and gives it back.

    Thread-safe. After a fork both processes have it open. Pickled, it opens the same name again; without one it refuses
    (TypeError). A process that is killed while it has units never gives them back: see `processes`.

    >>> with Semaphore.create("/anywire-example", value=1, owner=True) as semaphore:
    ...     semaphore.value, semaphore.try_acquire()
    (0, False)
    >>> semaphore.close()

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: as the flags say.
        ValueError: the value, or the place in a buffer, is out of range.
        OSError: a name that can't be one (EINVAL, ENAMETOOLONG), no memory.
    """
    cdef sem_t *sem                     # NULL: closed
    cdef sem_t *held                    # until it is closed and nobody is inside
    cdef Py_buffer view                 # of the buffer it lies in
    cdef bint in_buffer
    cdef int users, owner_pid
    cdef readonly object name
    cdef object __weakref__

    VALUE_MAX = SEM_VALUE_MAX
    SIZE = sizeof(sem_t)
    unlink = Unlink(remove)

    def __cinit__(self):
        self.sem = self.held = NULL

    def __init__(self, name, flags=0, mode=0o600, value=0, *, owner=False):
        cdef bytes raw = encoded(name, "a semaphore", "/jobs")
        cdef const char *text = raw
        cdef int how = flags
        cdef mode_t bits = mode
        cdef unsigned int units
        cdef sem_t *got
        cdef int e
        if self.held is not NULL:
            raise RuntimeError("this semaphore is open already")
        units = checked(value)
        if how & ~(O_CREAT | O_EXCL):
            raise ValueError(f"flags of a semaphore are os.O_CREAT and os.O_EXCL, not {flags:#o}")
        with nogil:
            got = sem_open(text, how, bits, units)
            e = errno
        if got == SEM_FAILED:
            raise refusal(e, name, 250, "semaphore", not how & O_CREAT)
        self.name = name
        self.sem = self.held = got
        self.owner_pid = os.getpid() if owner else 0

    @classmethod
    def create(cls, name, value=0, mode=0o600, *, owner=False):
        """Make a new one. FileExistsError: the name is taken."""
        return cls(name, O_CREAT | O_EXCL, mode, value, owner=owner)

    @classmethod
    def open(cls, name, *, owner=False):
        """Open an existing one. FileNotFoundError: there is none."""
        return cls(name, 0, owner=owner)

    @classmethod
    def create_or_open(cls, name, value=0, mode=0o600, *, owner=False):
        """Open it, or make it if there is none; nobody ever sees a half-made one."""
        return cls(name, O_CREAT, mode, value, owner=owner)

    @classmethod
    def create_in(cls, buffer, offset=0, value=0):
        """Make one inside a buffer that others share too: SIZE bytes at `offset`, a multiple of 8.

        Do it once, before others use it: it overwrites what lies there. The buffer stays exported until `close`.
        """
        cdef Semaphore made = cls.__new__(cls)
        cdef unsigned int units = checked(value)
        made.settle(buffer, offset)
        if sem_init(made.sem, 1, units):
            fail(errno, None, "sem_init")
        return made

    @classmethod
    def open_in(cls, buffer, offset=0):
        """Use the one that lies at this offset of a buffer; a sem_t has no mark by which another thing could be told."""
        cdef Semaphore made = cls.__new__(cls)
        made.settle(buffer, offset)
        return made

    cdef int settle(self, object buffer, object offset) except -1:
        cdef Py_ssize_t alignment = max(8, alignof_sem)
        self.held = <sem_t *> take_place(&self.view, buffer, offset, sizeof(sem_t), alignment, "semaphore")
        self.sem = self.held
        self.in_buffer = True
        return 0

    # -- taking and giving

    def acquire(self, timeout=None):
        """Take a unit; wait until there is one.

        Args:
            timeout: seconds; None waits for ever, 0 not at all.

        Raises TimeoutError, and ValueError once it is closed. Signals' handlers run while it waits.
        """
        if self.sem is NULL:
            self.refuse()
        if sem_trywait(self.sem):
            self.wait(timeout)

    def try_acquire(self):
        """Take a unit if there is one now: whether it did."""
        if self.sem is NULL:
            self.refuse()
        return sem_trywait(self.sem) == 0

    def release(self):
        """Give a unit back, or add one: whoever waits is woken. Any process may. OSError (EOVERFLOW): at VALUE_MAX."""
        if self.sem is NULL:
            self.refuse()
        if sem_post(self.sem):
            fail(errno, self.name, f"the value is at its limit of {SEM_VALUE_MAX}" if errno == EOVERFLOW else None)

    async def acquire_async(self, timeout=None):
        """As `acquire`, in an event loop. Cancelled, it has taken nothing, or gives back what it had won.

        One thread of the process waits for all tasks; those that wait for one Semaphore are served in their order.
        """
        from anywire.ipc.semaphore_waits import acquire

        if self.sem is NULL:
            self.refuse()
        if sem_trywait(self.sem):
            await acquire(self, timeout)

    @property
    def value(self):
        """Units that are there now; it may have changed before you look at it. 0 also while others wait."""
        cdef int value = 0
        if self.sem is NULL:
            self.refuse()
        if sem_getvalue(self.sem, &value):
            fail(errno, self.name)
        return value

    def processes(self):
        """The processes that have it open, by number, of those that we may look at. ValueError: it has no name.

        When no unit is left and nobody who could give one is there any more, units were lost with a killed process; then
        `release` as many. FileNotFoundError: the name was removed.
        """
        if self.name is None:
            raise ValueError("this semaphore has no name: ask its shared memory for its processes")
        return processes_with(f"/dev/shm/sem.{self.name.lstrip('/')}")

    cdef int wait(self, object timeout) except -1:
        cdef int64_t end = deadline(timeout)
        cdef sem_t *sem = self.held
        cdef int e
        self.users += 1
        try:
            while True:
                with nogil:
                    e = aw_sem_wait(sem, end)
                if not e:
                    return 0
                if e == ETIMEDOUT:
                    return fail(e, self.name, f"no unit came within {timeout} s")
                if e != EINTR:
                    return fail(e, self.name)
                PyErr_CheckSignals()
        finally:
            self.leave()

    # -- for semaphore_waits: a task that waits is inside, too

    def _enter(self):
        if self.sem is NULL:
            self.refuse()
        self.users += 1

    def _hold(self):
        self.users += 1

    def _leave(self):
        self.leave()

    def _try(self):
        return sem_trywait(self.held) == 0

    def _give_back(self):
        sem_post(self.held)

    def _pass_on(self):
        aw_pass_on(self.held)

    def _wait_until(self, double seconds):
        """Take a unit within so many seconds: whether it did. Without regard to signals."""
        cdef int64_t end = deadline(seconds)
        cdef sem_t *sem = self.held
        cdef int e
        with nogil:
            e = aw_sem_wait(sem, end)
        return e == 0

    # -- the end

    cdef int refuse(self) except -1:
        raise ValueError("this semaphore is closed" if self.name is None else f"the semaphore {self.name} is closed")

    cdef int leave(self) except -1:
        self.users -= 1
        if self.sem is NULL and self.users == 0:
            self.let_go()
        return 0

    cdef void let_go(self) noexcept:
        if self.held is NULL:
            return
        if self.in_buffer:
            PyBuffer_Release(&self.view)
        else:
            sem_close(self.held)
        self.held = NULL

    @property
    def closed(self):
        """Whether it was closed here."""
        return self.sem is NULL

    def close(self):
        """Stop using it here; also when it is closed already. An owner removes the name. Units that were taken stay so.

        Tasks that wait get an OSError (EBADF); threads that wait go on, and the memory stays until they are done.
        """
        if self.sem is NULL:
            return
        self.sem = NULL
        if self.users:
            from anywire.ipc.semaphore_waits import forget

            forget(self)
        if self.users == 0:
            self.let_go()
        if self.owner_pid and self.owner_pid == os.getpid():
            try:
                remove(self.name)
            except FileNotFoundError:
                pass

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, kind, error, trace):
        self.release()

    async def __aenter__(self):
        await self.acquire_async()
        return self

    async def __aexit__(self, kind, error, trace):
        self.release()

    def __dealloc__(self):
        if self.sem is not NULL:
            PyErr_WarnEx(ResourceWarning, "a semaphore was never closed", 1)
            if self.owner_pid and self.owner_pid == os.getpid():
                sem_unlink(<bytes> os.fsencode(self.name))
        self.let_go()

    def __reduce__(self):
        if self.name is None:
            raise TypeError("a semaphore without a name can't be pickled: pickle its shared memory, and open_in it there")
        return Semaphore.open, (self.name,)

    def __repr__(self):
        what = repr(self.name) if self.name is not None else "in a buffer"
        return f"<Semaphore {what}, {'closed' if self.sem is NULL else f'value {self.value}'}>"


cdef unsigned int checked(object value) except? 0xffffffff:
    if not 0 <= value <= SEM_VALUE_MAX:
        raise ValueError(f"the value of a semaphore is 0 ... {SEM_VALUE_MAX}, not {value}")
    return value


# -- for semaphore_waits

def _seen():
    return aw_called


def _call_helper():
    aw_call_helper()


def _can_wait_for_any():
    return bool(aw_sem_known())


def _without_clockwait(bint yes):
    """For tests: as on a C library that has no sem_clockwait."""
    global aw_no_clockwait
    aw_no_clockwait = yes


_MOST = AW_MOST - 1


def _wait_for_any(list semaphores, uint32_t seen):
    """Until one of them has a unit, or the helper is called. Whoever calls is inside each of them. False: not possible."""
    cdef sem_t *all[128]
    cdef unsigned int count = 0
    cdef int result
    cdef Semaphore each
    if len(semaphores) > _MOST:
        raise ValueError(f"the kernel waits for at most {_MOST}")
    for each in semaphores:
        all[count] = each.held
        count += 1
    with nogil:
        result = aw_wait_for_any(all, count, seen)
    return result == 0
