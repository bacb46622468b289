# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Threads that wait for a System V queue on behalf of who can only wait for a descriptor. How: sysv_waiting.h.

A `Helper` has one thread, made for its first job and parked between jobs; it rings an eventfd(2) when its job is done. Its
owner calls it under the GIL, from any thread. To end a job takes as long as it takes the thread to wake: some ten
microseconds. A forked child has no such threads, and leaves its copy alone. `Watch` is what a listener waits on.

What can go wrong: no thread can be made (EAGAIN, the user's limit of processes), no real-time signal is free (EBUSY).
"""
from libc.errno cimport E2BIG, EINTR, ENOMSG, errno

from anywire.contract.endpoint cimport fork_generation
from anywire.ipc._system cimport fail
from anywire.ipc._interrupt cimport interrupting_signal

import os

cdef extern from "anywire/wires/sysv_waiting.h" nogil:
    void anywire_ring(int bell)
    bint anywire_has_some(int id)
    void anywire_helper_make(anywire_helper* h)
    int anywire_helper_begin(anywire_helper* h, int job, int number)
    bint anywire_helper_busy(anywire_helper* h)
    int anywire_helper_end(anywire_helper* h, int number)
    void anywire_helper_quit(anywire_helper* h)

cdef extern from "<sys/msg.h>" nogil:
    int IPC_NOWAIT
    ssize_t msgrcv(int id, void* message, size_t size, long type, int flags)
    int msgsnd(int id, const void* message, size_t size, int flags)

cdef struct Empty:
    long type
    char none[8]


cdef class Helper:
    """Rings `bell`, which stays its owner's."""

    def __cinit__(self, int bell):
        self.generation = fork_generation()
        anywire_helper_make(&self.state)
        self.state.bell = bell

    def __dealloc__(self):
        self.quit()

    cdef int wait_for_message(self, int id, long type) except -1:
        """Ring when there is a message of this type. It stays in the queue, unless it is empty."""
        self.state.id, self.state.type = id, type
        return self.begin(ANYWIRE_COMING)

    cdef int send(self, int id, const void* message, size_t size) except -1:
        """Send this as soon as there is room, and ring."""
        self.state.id, self.state.message, self.state.size = id, message, size
        return self.begin(ANYWIRE_SENDING)

    cdef int begin(self, int job) except -1:
        cdef int failed
        if not self.number:
            self.number = interrupting_signal()
        failed = anywire_helper_begin(&self.state, job, self.number)
        if failed:
            fail(failed, None, "no thread to wait for a System V queue")
        self.used = True
        return 0

    cdef bint busy(self) noexcept:
        return self.used and anywire_helper_busy(&self.state)

    cdef int end(self) noexcept:
        """What came of the last job, once. One that is under way is ended now: it has done nothing then, or all."""
        if not self.used or self.over or self.generation != fork_generation():
            return ANYWIRE_NOTHING
        self.used = False
        return anywire_helper_end(&self.state, self.number)

    cdef void quit(self) noexcept:
        """End the thread, for good."""
        if not self.over and self.generation == fork_generation():
            self.end()
            self.over = True
            anywire_helper_quit(&self.state)


cdef class Watch:
    """A descriptor that is readable when a queue may have a message of a type; `look` tells, and waits for the next.

    Any thread; what it is told of the queue is told once."""

    cdef readonly int fd                 # -1: closed
    cdef int id
    cdef long type
    cdef Helper helper

    def __cinit__(self, int id, long type):
        self.fd = -1
        self.id, self.type = id, type
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.helper = Helper(self.fd)

    def __dealloc__(self):
        self.close()

    def clear(self):
        """The descriptor is readable no longer; to be called before one looks at anything that it tells of."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def look(self):
        """None: there is no message, and the descriptor will be readable when there is one. 0: there is one. Above 0:
        an empty one was taken, of this type. OSError: EIDRM, the queue was removed."""
        cdef int outcome
        cdef Empty empty
        # A thread that waits may have been told of a message without having run yet: then it is asked now.
        if self.helper.busy() and not anywire_has_some(self.id):
            return None
        outcome = self.helper.end()
        if outcome == ANYWIRE_TAKEN:
            return self.helper.state.taken
        if outcome == ANYWIRE_FAILED:
            fail(self.helper.state.error, None)
        while msgrcv(self.id, &empty, 0, self.type, IPC_NOWAIT) < 0:
            if errno == E2BIG:
                return 0
            if errno == ENOMSG:
                self.helper.wait_for_message(self.id, self.type)
                return None
            if errno != EINTR:
                fail(errno, None)
        return empty.type

    def ring(self):
        """Make the descriptor readable: somebody should look."""
        if self.fd >= 0:
            anywire_ring(self.fd)

    def close(self):
        """Wait no longer. An empty message that was taken goes back, as the newest."""
        cdef Empty empty
        cdef bint ours = self.helper is not None and self.helper.generation == fork_generation()
        if self.fd < 0:
            return
        if ours and self.helper.end() == ANYWIRE_TAKEN:
            empty.type = self.helper.state.taken
            msgsnd(self.id, &empty, 0, IPC_NOWAIT)
        if self.helper is not None:
            self.helper.quit()
        fd, self.fd = self.fd, -1
        os.close(fd)
