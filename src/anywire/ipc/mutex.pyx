# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A robust mutex of processes: whoever gets it after its holder has died is told (pthread_mutexattr_setrobust(3)).

It belongs to a thread: the one that locked it unlocks it. For tasks of an event loop threads of `lock_tasks` do both.
Checked by the C library (PTHREAD_MUTEX_ERRORCHECK): locking it twice and unlocking somebody else's are errors.

Any thread. What can go wrong: see OwnerDied and NotRecoverable. It does not know about exceptions: what a `with` block
leaves half done when it raises is the block's to mend.
"""
from libc.errno cimport EBUSY, EINVAL, EPERM, ETIMEDOUT
from libc.stdint cimport int64_t
from cpython.exc cimport PyErr_CheckSignals
from anywire.ipc._lock cimport (
    AW_LOCK, AW_MUTEX, Lock, aw_lock, aw_lock_wait, aw_make_mutex, aw_no_clocklock,
    aw_mutex_try, pthread_mutex_consistent, pthread_mutex_unlock,
)
from anywire.ipc._system cimport deadline, fail, now

import cython
import errno
import os

cdef extern from "<errno.h>":
    int EDEADLK, ENOTRECOVERABLE, EOWNERDEAD

cdef extern from *:
    """
    #include <stdatomic.h>
    static _Atomic int aw_word;
    static inline void aw_set_word(void) { int zero = 0; atomic_compare_exchange_strong(&aw_word, &zero, 1); }
    static inline void aw_clear_word(void) { atomic_exchange(&aw_word, 0); }
    """
    void aw_set_word() noexcept nogil
    void aw_clear_word() noexcept nogil

cdef int O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL


class OwnerDied(OSError):
    """The mutex is yours now, and whoever had it died with it: what it guards may be half changed.

    Repair that, call `mark_consistent()`, go on, and unlock. Unlocked without that it is NotRecoverable for all.
    `mutex` is the one that you hold.
    """

    mutex = None


class NotRecoverable(OSError):
    """Somebody who had to repair what the mutex guards gave up. It can never be locked again: make a new one."""


@cython.no_gc_clear
cdef class Mutex(Lock):
    """A lock that one thread of one process holds at a time; robust against the death of its holder.

    Args:
        name: as "/accounts": one slash, then up to 255 bytes without one.
        flags: 0 opens an existing one, os.O_CREAT makes it if there is none, os.O_CREAT | os.O_EXCL insists on a new one.
        mode: permissions of a new one, less the umask. Whoever uses it needs to read and to write.
        repair: called without arguments by `with`, when the last holder died: it repairs what the mutex guards, then the
            mutex is marked consistent. If it raises, the mutex is NotRecoverable from then on.
        owner: whether `close` removes the name, in the process that opened it.

    Thread-safe. After a fork the child has it open, but does not hold what its parent holds. Pickled, it opens the same
    name again.

    >>> with Mutex.create("/anywire-example", owner=True) as mutex:
    ...     mutex.try_lock()
    Traceback (most recent call last):
    OSError: [Errno 35] Resource deadlock avoided: this thread holds it already
    >>> mutex.close()

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: as the flags say.
        ValueError: what has this name is no mutex.
    """

    def __init__(self, name, flags=0, mode=0o600, *, repair=None, owner=False):
        self.begin(name, flags, mode, owner)
        self.repair = repair

    @classmethod
    def create(cls, name, mode=0o600, *, repair=None, owner=False):
        """Make a new one. FileExistsError: the name is taken."""
        return cls(name, O_CREAT | O_EXCL, mode, repair=repair, owner=owner)

    @classmethod
    def open(cls, name, *, repair=None, owner=False):
        """Open an existing one. FileNotFoundError: there is none."""
        return cls(name, 0, repair=repair, owner=owner)

    @classmethod
    def create_or_open(cls, name, mode=0o600, *, repair=None, owner=False):
        """Open it, or make it if there is none; nobody ever sees a half-made one."""
        return cls(name, O_CREAT, mode, repair=repair, owner=owner)

    @classmethod
    def create_in(cls, buffer, offset=0, *, repair=None):
        """Make one inside a buffer that others share too: SIZE bytes at `offset`, a multiple of 8. Once, before its use."""
        cdef Mutex made = cls.__new__(cls)
        made.settle(buffer, offset, True)
        made.repair = repair
        return made

    @classmethod
    def open_in(cls, buffer, offset=0, *, repair=None):
        """Use the one that lies at this offset of a buffer. ValueError: there is none."""
        cdef Mutex made = cls.__new__(cls)
        made.settle(buffer, offset, False)
        made.repair = repair
        return made

    cdef int kind(self) noexcept:
        return AW_MUTEX

    cdef int make(self) except -1:
        cdef int e = aw_make_mutex(&self.at.c.mutex)
        return fail(e, self.name, "pthread_mutex_init") if e else 0

    def lock(self, timeout=None):
        """Take it; wait until nobody else has it.

        Args:
            timeout: seconds; None waits for ever, 0 not at all.

        Raises:
            OwnerDied: you hold it, and have something to repair.
            NotRecoverable: nobody can have it any more.
            TimeoutError: somebody else had it all the time.
            OSError: EDEADLK: this thread has it already.
        """
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = aw_mutex_try(self.at)
        if e:
            self.wait(e, timeout)
        self.held = 1

    def try_lock(self):
        """Take it if nobody has it now: whether it did. Raises as `lock`."""
        cdef int e
        if self.at is NULL:
            self.refuse()
        e = aw_mutex_try(self.at)
        if e == EBUSY:
            return False
        self.took(e)
        return True

    def unlock(self):
        """Give it back. PermissionError: another thread has it, or nobody."""
        cdef int e
        cdef aw_lock *place = self.at
        if place is NULL:
            place = self.still()
        e = pthread_mutex_unlock(&place.c.mutex)
        if e:
            fail(e, self.name, "this thread does not hold it: who locks it unlocks it" if e == EPERM else None)
        self.held = 0                   # still under the GIL: who waits here says otherwise after this
        if self.at is NULL:
            self.part()

    def mark_consistent(self):
        """After OwnerDied: what it guards is in order again. OSError (EINVAL): there is nothing to repair."""
        cdef int e
        cdef aw_lock *place = self.at
        if place is NULL:
            place = self.still()
        e = pthread_mutex_consistent(&place.c.mutex)
        if e:
            fail(e, self.name, "no holder died, or it was marked already" if e == EINVAL else None)

    cdef int wait(self, int e, object timeout) except -1:
        cdef int64_t end
        cdef aw_lock *place = self.place
        if e != EBUSY:
            return self.took(e)
        end = deadline(timeout)
        self.enter()
        try:
            while True:
                with nogil:
                    e = aw_lock_wait(place, AW_LOCK, end)
                if e != ETIMEDOUT:
                    return self.took(e)
                PyErr_CheckSignals()
                if 0 <= end <= now():
                    return fail(e, self.name, f"others held it for {timeout} s")
        finally:
            self.leave()

    cdef int took(self, int e) except -1:
        """What locking gave."""
        if e == 0:
            self.held = 1
            return 0
        if e == EOWNERDEAD:
            self.held = 1
            error = OwnerDied(e, "its holder died, you hold it now: repair what it guards, mark_consistent(), unlock()", self.name)
            error.mutex = self
            raise error
        if e == ENOTRECOVERABLE:
            raise NotRecoverable(e, "somebody unlocked it without a repair after its holder had died: make a new one", self.name)
        return fail(e, self.name, "this thread holds it already" if e == EDEADLK else None)

    def __enter__(self):
        try:
            self.lock()
        except OwnerDied:
            if self.repair is None:
                raise
            try:
                self.repair()
                self.mark_consistent()
            except BaseException:
                self.unlock()
                raise
        return self

    def __exit__(self, kind, error, trace):
        self.unlock()

    # -- in event loops

    async def lock_async(self, timeout=None):
        """As `lock`, for this task: a helper thread holds it for the task. Cancelled, it has not taken it, or gives it back.

        Only this task unlocks it, by `unlock_async`.
        """
        from anywire.ipc import lock_tasks

        await lock_tasks.take(self, self.lock, timeout)

    async def unlock_async(self):
        """Give back what this task took by `lock_async`. PermissionError: it did not. Cancelled, it is given back, too."""
        from anywire.ipc import lock_tasks

        await lock_tasks.give(self, self.unlock)

    async def mark_consistent_async(self):
        """As `mark_consistent`, by the thread that holds it for this task."""
        from anywire.ipc import lock_tasks

        await lock_tasks.by_holder(self, self.mark_consistent)

    async def __aenter__(self):
        from anywire.ipc import lock_tasks

        await lock_tasks.take(self, self._enter_within, None)
        return self

    def _enter_within(self, timeout):
        self.__enter__()

    async def __aexit__(self, kind, error, trace):
        await self.unlock_async()

    # -- for the benchmark: what calls like these cost when they do nothing,

    def _no_lock(self, timeout=None):
        if self.at is NULL:
            self.refuse()

    def _no_unlock(self):
        if self.at is NULL:
            self.refuse()

    # and with the atomic operation each that no lock can do without

    def _atomic_lock(self, timeout=None):
        if self.at is NULL:
            self.refuse()
        aw_set_word()

    def _atomic_unlock(self):
        if self.at is NULL:
            self.refuse()
        aw_clear_word()


def _without_clocklock(bint yes):
    """For tests: as on a C library that has no pthread_mutex_clocklock."""
    global aw_no_clocklock
    aw_no_clocklock = yes
