# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The contract of all demultiplexers, and what they share.

A demultiplexer watches descriptors, each for some conditions, and gives back with each report the number (`token`) that
the caller gave. It doesn't own the descriptors and runs no handlers; `Watches` does the latter.

From C, all with the GIL:

- `c_add(fd, conditions, trigger, token)`: watch. FileExistsError if it is watched already, PermissionError (EPERM) for
  what can't be waited for (regular files under epoll), OSError EBADF for what isn't open.
- `c_modify(...)`: the same arguments replace the former ones, and arm a ONESHOT again. A descriptor that isn't watched,
  or no longer since its number was closed, is added (modify, then add: as trio's epoll does).
- `c_remove(fd)`: 1, or 0 if it wasn't watched (closing a descriptor ends its being watched; nothing is wrong then).
- `c_wait(timeout_ns)`: fills `ready`, returns how many. 0 looks and keeps the GIL; more waits without it; below 0, for
  ever. It never returns early but for an event, a signal handler of Python's that raised, or a wait that the kernel
  can't count (many years): callers look at their clock. A signal is no end (PEP 475).
- `c_reset()`: forget all descriptors. `c_close()`: and never use it again.

Conditions 0 keep a descriptor known and report nothing of it, not even a hang-up: no busy loop.

One thread at a time, and RuntimeError for the second that waits. While one waits, others may still change an epoll.
"""

from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport INT64_MAX
from libc.errno cimport EBADF
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from anywire.engine.conditions cimport ALL_CONDITIONS, EDGE, EXCLUSIVE, ONESHOT, PRIORITY, READ_HANGUP

import os

from anywire.engine.conditions import Condition, Trigger


cdef int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef int64_t deadline_after(int64_t timeout_ns) noexcept:
    """When a time-out of more than 0 has passed; one of many years ends in many years."""
    return now_ns() + timeout_ns if timeout_ns < (<int64_t> 1 << 61) else <int64_t> 1 << 62


cdef void spend(int64_t deadline, int64_t* timeout_ns) noexcept:
    """Leave what is left of the time until `deadline`; 0 and "for ever" stay so."""
    if timeout_ns[0] > 0:
        timeout_ns[0] = max(deadline - now_ns(), <int64_t> 0)


cdef int interrupted(int64_t deadline, int64_t* timeout_ns) except -1:
    """After EINTR: Python's handlers run (and may raise), then the rest of the time is waited for."""
    PyErr_CheckSignals()
    spend(deadline, timeout_ns)
    return 0


cdef int* with_room_for(int fd, int* numbers, int* room) except NULL:
    """An array with a number for each descriptor, grown so that `fd` has its own; what is new is -1. `room`: its length."""
    cdef int more = max(fd + 1, 2 * room[0], 64), i
    cdef int* grown = <int*> PyMem_Realloc(numbers, more * sizeof(int))
    if grown == NULL:
        raise MemoryError
    for i in range(room[0], more):
        grown[i] = -1
    room[0] = more
    return grown


cdef int refuse(int e, str what) except -1:
    raise OSError(e, f"{what}: {os.strerror(e)}")


cdef class Demultiplexer:
    """Watches descriptors by one call of the kernel's. See `anywire.engine.demultiplexers.by_name`.

    One thread at a time may wait; RuntimeError for a second one, and for changes meanwhile (epoll allows these).
    """

    name = "none"
    triggers = Trigger.LEVEL
    conditions = Condition(0)

    def __dealloc__(self):
        PyMem_Free(self.ready)
        self.ready = NULL

    cdef int reserve(self, int count) except -1:
        """Room for `count` reports."""
        cdef aw_ready* more
        if count > self.capacity:
            count = max(count, 2 * self.capacity)
            more = <aw_ready*> PyMem_Realloc(self.ready, count * sizeof(aw_ready))
            if more == NULL:
                raise MemoryError
            self.ready = more
            self.capacity = count
        return 0

    cdef int check_alone(self) except -1:
        if self.is_closed:
            raise ValueError(f"this {self.name} is closed")
        if self.waiting:
            raise RuntimeError(f"another thread waits in this {self.name}; wake it first, by a Wakeup")
        return 0

    cdef int check(self, int fd, uint32_t conditions, uint32_t trigger, uint32_t able, uint32_t tells) except -1:
        """What no demultiplexer, or not this one, can do; `able` are its triggers, `tells` its conditions."""
        if self.is_closed:
            raise ValueError(f"this {self.name} is closed")
        if fd < 0:
            refuse(EBADF, f"descriptor {fd}")
        if conditions & ~<uint32_t> ALL_CONDITIONS:
            raise ValueError(f"conditions {conditions:#x}: not all of them are known; use those of Condition")
        if trigger & ~able:
            if trigger & ~<uint32_t> (EDGE | ONESHOT | EXCLUSIVE):
                raise ValueError(f"trigger {trigger:#x}: not all of it is known; use those of Trigger")
            raise NotImplementedError(f"{self.name} has no {Trigger(trigger & ~able)!r}; epoll has")
        if conditions & ~tells:
            raise NotImplementedError(f"{self.name} doesn't tell {Condition(conditions & ~tells)!r}; poll and epoll do")
        if trigger & EXCLUSIVE:
            if trigger & ONESHOT:
                raise ValueError("EXCLUSIVE can't be combined with ONESHOT (epoll_ctl(2))")
            if conditions & (PRIORITY | READ_HANGUP):
                raise ValueError("EXCLUSIVE goes with READ and WRITE only (epoll_ctl(2))")
        return 0

    cdef int c_add(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        raise NotImplementedError

    cdef int c_modify(self, int fd, uint32_t conditions, uint32_t trigger, uint64_t token) except -1:
        raise NotImplementedError

    cdef int c_remove(self, int fd) except -1:
        raise NotImplementedError

    cdef int c_wait(self, int64_t timeout_ns) except -1:
        raise NotImplementedError

    cdef int c_reset(self) except -1:
        raise NotImplementedError

    cdef int c_close(self) except -1:
        self.check_alone()
        self.is_closed = True
        return 0

    cdef int c_fileno(self) except -2:
        raise NotImplementedError(f"{self.name} has no descriptor of its own; epoll has")

    @property
    def closed(self):
        """Whether `close` was called."""
        return bool(self.is_closed)

    def add(self, fd, conditions, trigger=0, token=None):
        """Watch a descriptor.

        Args:
            fd: its number, or an object with fileno().
            conditions: those of `Condition`; 0 keeps it known and silent.
            trigger: of `Trigger`.
            token: what `wait` gives back with it, 0 to 2**64 - 1; the number of the descriptor if None.

        Raises:
            FileExistsError: it is watched already.
            OSError: it isn't open (EBADF), can't be waited for (EPERM), or the kernel has no room (ENOMEM, ENOSPC).
            ValueError, NotImplementedError: what this kind, or any, can't do.
        """
        cdef int number = fd if isinstance(fd, int) else fd.fileno()
        self.c_add(number, conditions, trigger, number if token is None else token)

    def modify(self, fd, conditions, trigger=0, token=None):
        """Watch it for other conditions from now on, and arm a ONESHOT again; what isn't watched is added."""
        cdef int number = fd if isinstance(fd, int) else fd.fileno()
        self.c_modify(number, conditions, trigger, number if token is None else token)

    def remove(self, fd):
        """Watch it no longer. Returns whether it was watched: a closed one isn't."""
        cdef int number = fd if isinstance(fd, int) else fd.fileno()
        return bool(self.c_remove(number))

    def wait(self, timeout=None):
        """Wait until something is ready.

        Args:
            timeout: in seconds; None waits for ever, 0 only looks.

        Returns:
            A list of (token, conditions), empty when the time has passed.
        """
        cdef int64_t ns = -1
        cdef int i, count
        if timeout is not None:
            if timeout != timeout:
                raise ValueError("a time-out of NaN is none; None waits for ever")
            if timeout <= 0:
                ns = 0
            elif timeout < 9e9:
                # Rounded up: never early.
                ns = min(-int(-timeout * 1_000_000_000 // 1), <int64_t> INT64_MAX)
        count = self.c_wait(ns)
        return [(self.ready[i].token, Condition(self.ready[i].conditions)) for i in range(count)]

    def reset(self):
        """Forget all descriptors."""
        self.c_reset()

    def close(self):
        """Release what the kernel holds for it. The descriptors watched stay open."""
        if not self.is_closed:
            self.c_close()

    def fileno(self):
        """The demultiplexer's own descriptor, readable while something is ready. NotImplementedError: it has none."""
        if self.is_closed:
            raise ValueError(f"this {self.name} is closed")
        return self.c_fileno()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        return f"<{type(self).__name__}{' closed' if self.is_closed else ''}>"
