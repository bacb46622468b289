# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A condition variable of processes, to wait at until another one has changed what a Mutex guards (pthread_cond_init(3)).

Any thread that holds the mutex may wait. What can go wrong: waits may end without a reason, so look again (`wait_for` does);
and a condition is not robust: a notification may be lost with a process that was killed while it waited, so wait with a
time-out where processes may die. A wait that a signal's handler or a cancelled task ends after it was notified passes that
on. Its clock is the monotonic one.
"""
from libc.errno cimport ETIMEDOUT
from libc.stdint cimport int64_t, uint32_t
from cpython.exc cimport PyErr_CheckSignals
from anywire.ipc._lock cimport (
    AW_CONDITION, Lock, aw_condition_wait, aw_count_notification, aw_lock, aw_make_condition,
    aw_notifications, pthread_cond_broadcast, pthread_cond_signal,
)
from anywire.ipc._system cimport deadline, fail, now
from anywire.ipc.mutex cimport Mutex

import cython
import os

cdef extern from "<errno.h>":
    int ENOTRECOVERABLE, EOWNERDEAD

cdef int O_CREAT = os.O_CREAT, O_EXCL = os.O_EXCL


@cython.no_gc_clear
cdef class Condition(Lock):
    """Where threads of several processes wait, with a Mutex, until they are notified.

    Args:
        name: as "/changed": one slash, then up to 255 bytes without one. The mutex has a name of its own.
        mutex: the Mutex that guards what is waited for; all who use the condition use the same one.
        flags: 0 opens an existing one, os.O_CREAT makes it if there is none, os.O_CREAT | os.O_EXCL insists on a new one.
        mode: permissions of a new one, less the umask.
        owner: whether `close` removes the name, in the process that opened it.

    Thread-safe. Pickled, it and its mutex open the same names again.

    Raises:
        FileNotFoundError, FileExistsError, PermissionError: as the flags say.
        ValueError: what has this name is no condition.
    """
    cdef readonly Mutex mutex

    def __init__(self, name, Mutex mutex not None, flags=0, mode=0o600, *, owner=False):
        self.begin(name, flags, mode, owner)
        self.mutex = mutex

    @classmethod
    def create(cls, name, Mutex mutex not None, mode=0o600, *, owner=False):
        """Make a new one. FileExistsError: the name is taken."""
        return cls(name, mutex, O_CREAT | O_EXCL, mode, owner=owner)

    @classmethod
    def open(cls, name, Mutex mutex not None, *, owner=False):
        """Open an existing one. FileNotFoundError: there is none."""
        return cls(name, mutex, 0, owner=owner)

    @classmethod
    def create_or_open(cls, name, Mutex mutex not None, mode=0o600, *, owner=False):
        """Open it, or make it if there is none; nobody ever sees a half-made one."""
        return cls(name, mutex, O_CREAT, mode, owner=owner)

    @classmethod
    def create_in(cls, buffer, Mutex mutex not None, offset=0):
        """Make one inside a buffer that others share too: SIZE bytes at `offset`, a multiple of 8. Once, before its use."""
        cdef Condition made = cls.__new__(cls)
        made.settle(buffer, offset, True)
        made.mutex = mutex
        return made

    @classmethod
    def open_in(cls, buffer, Mutex mutex not None, offset=0):
        """Use the one that lies at this offset of a buffer. ValueError: there is none."""
        cdef Condition made = cls.__new__(cls)
        made.settle(buffer, offset, False)
        made.mutex = mutex
        return made

    cdef int kind(self) noexcept:
        return AW_CONDITION

    cdef int make(self) except -1:
        cdef int e = aw_make_condition(&self.at.c.condition)
        return fail(e, self.name, "pthread_cond_init") if e else 0

    def wait(self, timeout=None):
        """Unlock the mutex, wait until notified, lock it again.

        May come back without being notified: call it in a loop that looks at what is waited for, or use `wait_for`. The
        mutex is held in any case, also when this raises (but for NotRecoverable).

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: the time was over first.
            OwnerDied: the mutex's last holder died; you hold it, and have something to repair.
            NotRecoverable: nobody can have the mutex any more; you do not hold it.
            PermissionError: this thread does not hold the mutex.
        """
        cdef int64_t end
        cdef aw_lock *place
        cdef aw_lock *mutex
        cdef uint32_t seen
        cdef int e
        if self.at is NULL:
            self.refuse()
        if self.mutex.at is NULL:
            self.mutex.refuse()
        end = deadline(timeout)
        place, mutex = self.place, self.mutex.place
        self.enter()
        self.mutex.enter()
        try:
            while True:
                seen = aw_notifications(place)
                with nogil:
                    e = aw_condition_wait(place, mutex, end)
                if e == EOWNERDEAD or e == ENOTRECOVERABLE:
                    self.mutex.held = 0         # `took` knows
                    self.mutex.took(e)
                if e and e != ETIMEDOUT:
                    fail(e, self.name, "does this thread hold the mutex? does everybody here use the same one?")
                self.mutex.held = 1
                try:
                    PyErr_CheckSignals()
                except BaseException:
                    if e == 0:
                        pthread_cond_signal(&place.c.condition)     # what it was told is the next one's
                    raise
                # The main thread comes back to look for signals. A notification that came just then it finds counted; if
                # a C program did not count it, a wait without a time-out must end, in case.
                if e == 0 or end < 0 or aw_notifications(place) != seen:
                    return
                if end <= now():
                    fail(e, self.name, f"nobody notified for {timeout} s")
        finally:
            self.mutex.leave()
            self.leave()

    def wait_for(self, predicate, timeout=None):
        """Wait until `predicate()` is true, with the mutex held; returns what it gave. Raises as `wait`."""
        cdef int64_t end = deadline(timeout)
        while True:
            result = predicate()
            if result:
                return result
            if end < 0:
                self.wait()
                continue
            left = (end - now()) / 1e9
            if left <= 0:
                fail(ETIMEDOUT, self.name, f"what is waited for did not come within {timeout} s")
            try:
                self.wait(left)
            except TimeoutError:
                continue                # look once more

    def notify(self, n=1):
        """Wake at least `n` of those who wait, if so many do. Hold the mutex, or somebody may look before and wait after."""
        if self.at is NULL:
            self.refuse()
        aw_count_notification(self.at)
        for _ in range(n):
            pthread_cond_signal(&self.at.c.condition)

    def notify_all(self):
        """Wake all who wait."""
        if self.at is NULL:
            self.refuse()
        self._wake_all()

    # -- in event loops

    async def wait_async(self, timeout=None):
        """As `wait`, for a task that took the mutex by `lock_async`. Cancelled, it comes back with the mutex, as always."""
        from anywire.ipc import lock_tasks

        await lock_tasks.wait_by_holder(self.mutex, self.wait, self._wake_all, timeout)

    def _wake_all(self):
        """For a wait that is cancelled; also once it is closed, which does not end waits."""
        if self.place is not NULL:
            aw_count_notification(self.place)
            pthread_cond_broadcast(&self.place.c.condition)

    async def wait_for_async(self, predicate, timeout=None):
        """As `wait_for`, for a task that took the mutex by `lock_async`. `predicate` is called in the loop's thread."""
        cdef int64_t end = deadline(timeout)
        while True:
            result = predicate()
            if result:
                return result
            if end < 0:
                await self.wait_async()
                continue
            left = (end - now()) / 1e9
            if left <= 0:
                fail(ETIMEDOUT, self.name, f"what is waited for did not come within {timeout} s")
            try:
                await self.wait_async(left)
            except TimeoutError:
                continue                # look once more

    def __reduce__(self):
        if self.name is None:
            return Lock.__reduce__(self)
        return type(self).open, (self.name, self.mutex)
