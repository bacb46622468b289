# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A lock of processes that many hold for reading, or one for writing (pthread_rwlock_init(3)).

It belongs to threads, as a Mutex. What can go wrong: POSIX has no robust ones. When a process is killed that held it for
writing, nobody gets it any more; its number is kept beside the lock, so that `abandoned` and the errors say so. Killed
readers leave no trace: then writers wait for ever, and a time-out is all that tells.
"""
from libc.errno cimport EAGAIN, EBUSY, EPERM, ETIMEDOUT
from libc.stdint cimport int32_t, int64_t
from cpython.exc cimport PyErr_CheckSignals
from anywire.ipc._lock cimport (
    AW_READ, AW_RWLOCK, AW_WRITE, Lock, aw_lock, aw_lock_wait, aw_make_rwlock, aw_set_writer, aw_writer,
    pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock, pthread_rwlock_unlock,
)
from anywire.ipc._system cimport deadline, fail, now

import cython
import os

cdef extern from "<errno.h>":
    int EDEADLK

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef int O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL


@cython.no_gc_clear
cdef class RWLock(Lock):
    """A lock that many threads of many processes hold for reading at a time, or one for writing.

    Args:
        name: as "/table": one slash, then up to 255 bytes without one.
        flags: 0 opens an existing one, os.O_CREAT makes it if there is none, os.O_CREAT | os.O_EXCL insists on a new one.
        mode: permissions of a new one, less the umask.
        prefer_writers: of a new one: new readers wait while a writer does; then a thread must not read-lock it twice.
            Otherwise readers that never end may keep a writer out for ever.
        owner: whether `close` removes the name, in the process that opened it.

    Thread-safe. Pickled, it opens the same name again.

    >>> with RWLock.create("/anywire-example", owner=True).reading() as lock:
    ...     lock.try_read_lock(), lock.try_write_lock()
    (True, False)
    >>> lock.unlock()
    >>> lock.close()

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: as the flags say.
        ValueError: what has this name is no RWLock.
    """
    cdef bint prefer_writers

    def __init__(self, name, flags=0, mode=0o600, *, prefer_writers=False, owner=False):
        self.prefer_writers = prefer_writers
        self.begin(name, flags, mode, owner)

    @classmethod
    def create(cls, name, mode=0o600, *, prefer_writers=False, owner=False):
        """Make a new one. FileExistsError: the name is taken."""
        return cls(name, O_CREAT | O_EXCL, mode, prefer_writers=prefer_writers, owner=owner)

    @classmethod
    def open(cls, name, *, owner=False):
        """Open an existing one. FileNotFoundError: there is none."""
        return cls(name, 0, owner=owner)

    @classmethod
    def create_or_open(cls, name, mode=0o600, *, prefer_writers=False, owner=False):
        """Open it, or make it if there is none; nobody ever sees a half-made one."""
        return cls(name, O_CREAT, mode, prefer_writers=prefer_writers, owner=owner)

    @classmethod
    def create_in(cls, buffer, offset=0, *, prefer_writers=False):
        """Make one inside a buffer that others share too: SIZE bytes at `offset`, a multiple of 8. Once, before its use."""
        cdef RWLock made = cls.__new__(cls)
        made.prefer_writers = prefer_writers
        made.settle(buffer, offset, True)
        return made

    @classmethod
    def open_in(cls, buffer, offset=0):
        """Use the one that lies at this offset of a buffer. ValueError: there is none."""
        cdef RWLock made = cls.__new__(cls)
        made.settle(buffer, offset, False)
        return made

    cdef int kind(self) noexcept:
        return AW_RWLOCK

    cdef int make(self) except -1:
        cdef int e = aw_make_rwlock(&self.at.c.rwlock, self.prefer_writers)
        return fail(e, self.name, "pthread_rwlock_init") if e else 0

    def read_lock(self, timeout=None):
        """Take it for reading; wait while somebody writes.

        Args:
            timeout: seconds; None waits for ever, 0 not at all.

        Raises:
            TimeoutError: somebody else had it all the time; the text says so when that process is dead.
            OSError: EDEADLK: this thread holds it for writing. EAGAIN: too many readers.
        """
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = pthread_rwlock_tryrdlock(&self.at.c.rwlock)
        if e:
            self.wait(e, AW_READ, timeout)
        else:
            self.got()

    def write_lock(self, timeout=None):
        """Take it for writing; wait until nobody else has it. Raises as `read_lock`; EDEADLK also if this thread reads."""
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = pthread_rwlock_trywrlock(&self.at.c.rwlock)
        if e:
            self.wait(e, AW_WRITE, timeout)
        else:
            self.got()
        aw_set_writer(self.place, getpid())

    def try_read_lock(self):
        """Take it for reading if nobody writes now: whether it did."""
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = pthread_rwlock_tryrdlock(&self.at.c.rwlock)
        if e and e != EBUSY:
            self.failed(e, None)
        if e == 0:
            self.got()
        return e == 0

    def try_write_lock(self):
        """Take it for writing if nobody else has it now: whether it did."""
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = pthread_rwlock_trywrlock(&self.at.c.rwlock)
        if e and e != EBUSY:
            self.failed(e, None)
        if e == 0:
            aw_set_writer(self.at, getpid())
            self.got()
        return e == 0

    def unlock(self):
        """Give it back, by the thread that took it. PermissionError: nobody took it through this object."""
        cdef aw_lock *place = self.at
        if place is NULL:
            place = self.still()
        self.look()
        if self.held == 0:
            fail(EPERM, self.name, "it was not locked through this object")
        # While it is held for writing nobody else writes here, and nobody reads.
        if aw_writer(place):
            aw_set_writer(place, 0)
        self.held -= 1
        pthread_rwlock_unlock(&place.c.rwlock)
        if self.at is NULL:
            self.part()

    @property
    def writer(self):
        """The number of the process that holds it for writing by this class, or None; C programs need not say."""
        if self.at is NULL:
            self.refuse()
        return aw_writer(self.at) or None

    @property
    def abandoned(self):
        """Whether the process that holds it for writing is dead: then nobody gets it any more; make a new one.

        Processes of other PID namespaces look dead. A new process may have the dead one's number.
        """
        pid = self.writer
        if pid is None:
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    cdef int got(self) noexcept:
        self.look()
        self.held += 1
        return 0

    cdef int wait(self, int e, int how, object timeout) except -1:
        cdef int64_t end
        cdef aw_lock *place = self.place
        if e != EBUSY:
            return self.failed(e, timeout)
        end = deadline(timeout)
        self.enter()
        try:
            while True:
                with nogil:
                    e = aw_lock_wait(place, how, end)
                if e == 0:
                    return self.got()
                if e != ETIMEDOUT:
                    return self.failed(e, timeout)
                PyErr_CheckSignals()
                if 0 <= end <= now():
                    return self.failed(e, timeout)
        finally:
            self.leave()

    cdef int failed(self, int e, object timeout) except -1:
        if e == ETIMEDOUT:
            why = f"others held it for {timeout} s"
            if self.at is not NULL and self.abandoned:
                why += f"; process {self.writer}, which holds it for writing, is dead: make a new one"
            return fail(e, self.name, why)
        return fail(e, self.name, {
            EDEADLK: "this thread holds it already",
            EAGAIN: "too many readers",
        }.get(e))

    def reading(self, timeout=None):
        """`with lock.reading():` or `async with lock.reading():` holds it for reading. Gives the lock itself."""
        return _Held(self, timeout, False)

    def writing(self, timeout=None):
        """`with lock.writing():` or `async with lock.writing():` holds it for writing. Gives the lock itself."""
        return _Held(self, timeout, True)

    # -- in event loops

    async def read_lock_async(self, timeout=None):
        """As `read_lock`, for this task: a helper thread holds it. Only this task unlocks it, by `unlock_async`."""
        from anywire.ipc import lock_tasks

        await lock_tasks.take(self, self.read_lock, timeout)

    async def write_lock_async(self, timeout=None):
        """As `write_lock`, for this task: a helper thread holds it. Only this task unlocks it, by `unlock_async`."""
        from anywire.ipc import lock_tasks

        await lock_tasks.take(self, self.write_lock, timeout)

    async def unlock_async(self):
        """Give back what this task took. PermissionError: it did not. Cancelled, it is given back, too."""
        from anywire.ipc import lock_tasks

        await lock_tasks.give(self, self.unlock)


cdef class _Held:
    """A block that holds an RWLock."""
    cdef RWLock lock
    cdef object timeout
    cdef bint writes

    def __cinit__(self, RWLock lock, timeout, bint writes):
        self.lock, self.timeout, self.writes = lock, timeout, writes

    def __enter__(self):
        if self.writes:
            self.lock.write_lock(self.timeout)
        else:
            self.lock.read_lock(self.timeout)
        return self.lock

    def __exit__(self, kind, error, trace):
        self.lock.unlock()

    async def __aenter__(self):
        if self.writes:
            await self.lock.write_lock_async(self.timeout)
        else:
            await self.lock.read_lock_async(self.timeout)
        return self.lock

    async def __aexit__(self, kind, error, trace):
        await self.lock.unlock_async()
