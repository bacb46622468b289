# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Who gets what a demultiplexer reports: watchers in slots, each with a generation.

The kernel reports a batch, and a handler in it may close a descriptor whose report comes later in the same batch, and
open another that gets its number. So a report carries no descriptor but slot and generation (`generation << 32 | slot`);
one whose generation is gone is dropped. A watcher also gets only conditions that it still asks for.

A descriptor that was duplicated, then closed without being removed, goes on being reported by an epoll, and no number is
left to remove it by (epoll(7), Q6). Such a report is stale though nothing was removed since the batch came: then the
demultiplexer is made anew with the watchers that are here. Without that, a level-triggered one would be reported for ever.

One object, one thread. Watchers are kept alive here while they are watched.
"""

cimport cython
from cpython.mem cimport PyMem_Free
from libc.errno cimport EBADF, EEXIST

from anywire.engine.conditions cimport ERROR, HANGUP
from anywire.engine.demultiplexers._base cimport aw_ready, with_room_for

import errno


cdef class Watcher:
    """One watched descriptor and what happens when it is ready. Cython classes override `ready`.

    `ready` runs inside `Watches.dispatch`. What it raises ends the dispatch (the rest of the batch is kept for the next
    one), so handlers deal with their own errors and let only what must end the loop pass.
    """

    def __cinit__(self):
        self.fd = -1
        self.slot = -1

    cdef int ready(self, uint32_t conditions) except -1:
        return 0

    @property
    def watched(self):
        """Whether it is watched now."""
        return self.slot >= 0


@cython.no_gc_clear
cdef class Watches:
    """The watchers of one demultiplexer, one for each descriptor.

    Args:
        demultiplexer: an empty one, used by nobody else from now on.
    """

    def __cinit__(self, Demultiplexer demultiplexer not None):
        self.demultiplexer = demultiplexer
        self.watchers = []
        self.free = []

    def __dealloc__(self):
        PyMem_Free(self.slots)
        self.slots = NULL

    cdef int add(self, Watcher watcher, int fd, uint32_t conditions, uint32_t trigger) except -1:
        """Watch `fd` by `watcher`. ValueError: the watcher is watched already; FileExistsError: the descriptor is, by
        another one; OSError as `c_add`. Whatever fails leaves nothing behind.

        If the descriptor is found to be a new one under the number of one that was closed without being removed, the old
        watcher is forgotten: nothing can be reported to it any more.
        """
        cdef int slot
        cdef Watcher former
        if watcher.slot >= 0:
            raise ValueError(f"this watcher watches descriptor {watcher.fd} already")
        if fd >= self.numbers:
            self.slots = with_room_for(fd, self.slots, &self.numbers)
        slot = self.free.pop() if self.free else -1
        if slot < 0:
            slot = len(self.watchers)
            self.watchers.append(None)
        self.generation = 1 if self.generation == 0xFFFFFFFF else self.generation + 1
        try:
            self.demultiplexer.c_add(fd, conditions, trigger, <uint64_t> self.generation << 32 | slot)
        except BaseException:
            self.free.append(slot)
            raise
        former = self.of(fd)
        if former is not None:
            if former.conditions == 0:
                # A silent one isn't in the kernel, so the number says nothing of whose it is.
                self.demultiplexer.c_remove(fd)
                self.free.append(slot)
                raise FileExistsError(errno.EEXIST, f"descriptor {fd} is watched already; modify or remove its watcher")
            self.forget(former)
        self.watchers[slot] = watcher
        self.slots[fd] = slot
        watcher.watches = self
        watcher.fd = fd
        watcher.slot = slot
        watcher.generation = self.generation
        watcher.conditions = conditions
        watcher.trigger = trigger
        self.count += 1
        return 0

    cdef int modify(self, Watcher watcher, uint32_t conditions, uint32_t trigger) except -1:
        """Watch it for other conditions, and arm a ONESHOT again. ValueError: it isn't watched here."""
        if watcher.slot < 0 or watcher.watches is not self:
            raise ValueError("this watcher isn't watched here; add it first")
        self.demultiplexer.c_modify(
            watcher.fd, conditions, trigger, <uint64_t> watcher.generation << 32 | watcher.slot)
        watcher.conditions = conditions
        watcher.trigger = trigger
        return 0

    cdef int renew(self, Watcher watcher, uint32_t conditions, uint32_t trigger) except -1:
        """As `modify`, where the number may be a new descriptor's: what is on its way to the watcher is dropped. If the
        descriptor is the same after all, it is reported again."""
        cdef uint32_t former = watcher.generation
        self.generation = 1 if self.generation == 0xFFFFFFFF else self.generation + 1
        watcher.generation = self.generation
        try:
            self.modify(watcher, conditions, trigger)
        except BaseException:
            watcher.generation = former
            raise
        self.removed += 1                       # so that what is stale now is no reason to rebuild
        return 0

    cdef int remove(self, Watcher watcher) except -1:
        """Watch it no longer; 0 if it wasn't. Before its descriptor is closed, if it can be: see the module."""
        if watcher.slot < 0 or watcher.watches is not self:
            return 0
        if self.slots[watcher.fd] == watcher.slot:
            self.demultiplexer.c_remove(watcher.fd)
        self.forget(watcher)
        return 1

    cdef int forget(self, Watcher watcher) except -1:
        self.removed += 1
        self.count -= 1
        self.watchers[watcher.slot] = None
        self.free.append(watcher.slot)
        if self.slots[watcher.fd] == watcher.slot:
            self.slots[watcher.fd] = -1
        watcher.slot = -1
        watcher.fd = -1
        watcher.conditions = 0
        watcher.watches = None
        return 0

    cdef Watcher of(self, int fd):
        """The watcher of a descriptor, or None."""
        if 0 <= fd < self.numbers and self.slots[fd] >= 0:
            return self.watchers[self.slots[fd]]
        return None

    cdef int wait(self, int64_t timeout_ns) except -1:
        """Wait for a batch and return its size. What is left of the former batch comes first, without a wait."""
        if self.first == self.last:
            self.first = 0
            self.last = 0
            self.last = self.demultiplexer.c_wait(timeout_ns)
            self.removed = 0
        return self.last - self.first

    cdef int dispatch(self, int count) except -1:
        """Deliver the next `count` reports of the batch. Returns how many were delivered, stale ones not counted.

        A handler may add, modify and remove any watcher, and may wait and dispatch itself: it gets the rest first.
        """
        cdef aw_ready report
        cdef uint64_t slot
        cdef Watcher watcher
        cdef uint32_t conditions
        cdef int delivered = 0
        while count > 0 and self.first < self.last:
            count -= 1
            report = self.demultiplexer.ready[self.first]
            self.first += 1
            slot = <uint32_t> report.token              # a mask would be a Python int, and so would all of it
            watcher = None
            if slot < <uint64_t> len(self.watchers):
                watcher = <Watcher> self.watchers[slot]
            if watcher is None or watcher.generation != report.token >> 32:
                self.stale += 1
                if self.removed == 0:
                    self.rebuild()
                continue
            conditions = report.conditions & (watcher.conditions | HANGUP | ERROR)
            if conditions and watcher.conditions:
                delivered += 1
                watcher.ready(conditions)
        return delivered

    cdef int rebuild(self) except -1:
        """The demultiplexer anew, with those that are here; those that were closed meanwhile are forgotten."""
        cdef Watcher watcher
        self.resets += 1
        self.demultiplexer.c_reset()
        for watcher in [watcher for watcher in self.watchers if watcher is not None]:
            try:
                self.demultiplexer.c_add(watcher.fd, watcher.conditions, watcher.trigger,
                                         <uint64_t> watcher.generation << 32 | watcher.slot)
            except OSError as error:
                if error.errno != EBADF:
                    raise
                self.forget(watcher)
        return 0

    def close(self):
        """Forget all watchers and close the demultiplexer. Descriptors stay open."""
        cdef Watcher watcher
        self.first = self.last = 0
        for watcher in [watcher for watcher in self.watchers if watcher is not None]:
            self.forget(watcher)
        self.demultiplexer.close()
