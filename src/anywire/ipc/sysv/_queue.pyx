# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Sending to and receiving from a System V message queue: the calls that are hot, for queue.py.

A call without a time-out is one system call. Any number of threads; the GIL is released in every call that may wait. What
arrives lands on the stack first: nothing of a queue's largest message is allocated for a small one.
"""
cimport cython
from cpython.buffer cimport PyBUF_CONTIG_RO, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport E2BIG, EACCES, EAGAIN, EIDRM, EINTR, EINVAL, EMSGSIZE, ENOMEM, ENOMSG, ENOSYS, ETIMEDOUT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from anywire.ipc._system cimport deadline, fail, left
from anywire.ipc._interrupt cimport Interrupt

from anywire.ipc._interrupt import Cancelled
from anywire.ipc.sysv import _calls
from anywire.ipc.sysv.kernel_limits import explain, limits, refuse, refuse_removed

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ipc.h>
    #include <sys/msg.h>
    #ifndef MSG_EXCEPT
    #define MSG_EXCEPT 020000
    #endif
    #ifndef MSG_COPY
    #define MSG_COPY 040000
    #endif
    #define ANYWIRE_SMALL 8192                  /* kernel.msgmax unless somebody raised it */

    typedef struct { long type; char bytes[ANYWIRE_SMALL]; } anywire_message;

    static int anywire_msgsnd(int id, long type, const void* data, size_t size, int flags) {
        anywire_message small, *message = &small;
        int done;
        if (size > ANYWIRE_SMALL && (message = malloc(sizeof(long) + size)) == NULL) {
            errno = ENOMEM;
            return -1;
        }
        message->type = type;
        memcpy((char*) message + sizeof(long), data, size);
        done = msgsnd(id, message, size, flags);
        if (message != &small) {
            int e = errno;
            free(message);
            errno = e;
        }
        return done;
    }
    """
    int IPC_NOWAIT, MSG_NOERROR, MSG_EXCEPT, MSG_COPY
    int ANYWIRE_SMALL
    ctypedef struct anywire_message:
        long type
    int anywire_msgsnd(int id, long type, const void* data, size_t size, int flags) nogil
    ssize_t msgrcv(int id, void* message, size_t size, long type, int flags) nogil


cdef inline char* bytes_of(anywire_message* message) noexcept:
    return <char*> message + sizeof(long)


@cython.auto_pickle(False)
cdef class Queue:
    """A queue by its id. `name` is for errors; `closed` refuses everything."""

    cdef readonly int id
    cdef readonly int key
    cdef readonly bint closed
    cdef public str name
    cdef size_t room                    # bytes of messages that the queue may hold
    cdef size_t largest                 # a message of this size came once: no small buffer is tried

    def __init__(self, int ident, int key, str name):
        self.id = ident
        self.key = key
        self.name = name
        self.room = 0
        self.largest = ANYWIRE_SMALL

    def shut(self):
        """Refuse everything from now on."""
        self.closed = True

    # The public three: Python methods of their own would cost a tenth of a call.

    def send(self, message, long type=1, *, timeout=None, bint block=True):
        """Put a message into the queue, after those that are there; whole or not at all.

        `type`: 1 to 2⁶³-1. `timeout`: seconds to wait for room, None for ever. TimeoutError; BlockingIOError with
        `block=False`. OSError: EMSGSIZE, larger than kernel.msgmax or than the queue will ever hold; EIDRM, removed;
        PermissionError."""
        self.send_message(message, type, timeout, block, None)

    def recv(self, long type=0, *, excluding=None, truncate=None, timeout=None, bint block=True):
        """Take the oldest message of a type: (its bytes, its type).

        `type`: 0 for any, n for that type alone, -n for the lowest type that is there and not above n. `excluding`: any
        but this type. `truncate`: take so many bytes of it at most, and drop the rest. `timeout`: seconds to wait, None
        for ever. TimeoutError; BlockingIOError with `block=False`. OSError: EIDRM, removed; PermissionError."""
        return self.recv_message(type, excluding, truncate, timeout, block, None)

    def recv_into(self, buffer, long type=0, *, excluding=None, bint truncate=False, timeout=None, bint block=True):
        """Take a message as `recv` does, into a buffer: (its length, its type). OSError E2BIG: it is longer than the
        buffer, and stays in the queue; with `truncate` its beginning is taken and the rest dropped."""
        return self.recv_message_into(buffer, type, excluding, truncate, timeout, block)

    cdef int check(self) except -1:
        if self.closed:
            raise ValueError(f"this queue object ({self.name}) is closed; open the key again")
        return 0

    cdef int failed(self, int e, str operation, bint waited) except -1:
        """Raise what this number means here."""
        if e == EIDRM:
            refuse_removed(self.name, "queue", waited)
        if e == EINVAL:
            try:
                _calls.msg_status(self.id)
            except PermissionError:
                pass
            except OSError:
                refuse_removed(self.name, "queue", False)
        if e == EACCES:
            refuse(e, self.name, f"the queue's mode does not let this user {operation}")
        if e == ENOMEM:
            refuse(e, self.name, f"no memory in the kernel to {operation}")
        return fail(e, self.name, operation)

    cdef int interrupted(self, Interrupt interrupt, int64_t until, timeout, str what) except -1:
        """After EINTR: run the signals' handlers; raise if the wait is over."""
        PyErr_CheckSignals()
        self.check()
        if interrupt is not None and interrupt.cancelled:
            raise Cancelled
        if until >= 0 and left(until) == 0:
            self.late(timeout, what)
        return 0

    cdef int late(self, timeout, str what) except -1:
        raise TimeoutError(ETIMEDOUT, f"the queue had no {what} for {timeout:g} s", self.name)

    # ------------------------------------------------------------------------------------------------------ sending

    cpdef send_message(self, data, long type, timeout, bint block, Interrupt interrupt):
        """Put a message of this type into the queue."""
        cdef Py_buffer view
        self.check()
        if type < 1:
            raise ValueError(f"a message's type is a number of 1 to 2⁶³-1, not {type}")
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            if <size_t> view.len > self.room:
                self.fits(<size_t> view.len)
            self.put(view.buf, <size_t> view.len, type, timeout, block, interrupt)
        finally:
            PyBuffer_Release(&view)

    cdef int fits(self, size_t size) except -1:
        """Whether the queue will ever have room for it: msgsnd(2) waits for that without end."""
        try:
            self.room = _calls.msg_status(self.id)[8]
        except PermissionError:
            self.room = <size_t> -1                     # write-only: the kernel alone knows
        except OSError:
            refuse_removed(self.name, "queue", False)
        if size > self.room:
            refuse(EMSGSIZE, self.name, f"a message of {size} bytes, and the queue holds {self.room} in all; raise it: "
                                        "set(max_bytes=...), for new queues sysctl -w kernel.msgmnb=")
        return 0

    cdef int put(self, const void* data, size_t size, long type, timeout, bint block, Interrupt interrupt) except -1:
        cdef int e = 0
        if self.transfer(True, <void*> data, size, type, 0, timeout, block, interrupt, &e) >= 0:
            return 0
        if e == EAGAIN:
            raise BlockingIOError(EAGAIN, f"the queue is full ({explain('msgmnb')})", self.name)
        if e == EINVAL and 0 <= limits().msgmax < size:
            refuse(EMSGSIZE, self.name, f"a message of {size} bytes; {explain('msgmax')}")
        return self.failed(e, "send", block)

    cdef ssize_t transfer(
        self, bint sends, void* bytes, size_t size, long type, int flags, timeout, bint block, Interrupt interrupt, int* error
    ) except -2:
        """msgsnd(2) or msgrcv(2), with what they wait: what they returned; of -1 the reason in `error`."""
        cdef int64_t until = deadline(timeout)
        cdef bint armed = False
        cdef ssize_t n
        # Only a wait that may be ended needs the means for it (four system calls), and only if it comes to a wait.
        cdef int e, nowait = 0 if block and until < 0 and interrupt is None else IPC_NOWAIT
        try:
            while True:
                with nogil:
                    if sends:
                        n = anywire_msgsnd(self.id, type, bytes, size, flags | nowait)
                    else:
                        n = msgrcv(self.id, bytes, size, type, flags | nowait)
                    e = errno
                if n >= 0:
                    return n
                if e == EINTR:
                    self.interrupted(interrupt, until, timeout, "room" if sends else "such message")
                elif block and e == (EAGAIN if sends else ENOMSG):
                    if until >= 0 and left(until) == 0:
                        self.late(timeout, "room" if sends else "such message")
                    if interrupt is None:
                        interrupt = Interrupt()
                    interrupt.begin(until)
                    armed, nowait = True, 0
                else:
                    error[0] = e
                    return -1
        finally:
            if armed:
                interrupt.end()

    # ---------------------------------------------------------------------------------------------------- receiving

    cpdef recv_message(self, long type, excluding, truncate, timeout, bint block, Interrupt interrupt):
        """Take a message: (its bytes, its type). `truncate`: no more bytes than this; the rest is dropped."""
        cdef anywire_message small
        cdef anywire_message* message = &small
        cdef size_t size = self.largest
        cdef ssize_t n
        cdef int flags = selection(&type, excluding)
        self.check()
        if truncate is not None:
            if truncate < 0:
                raise ValueError(f"truncate is a number of bytes to keep, not {truncate}")
            size, flags = truncate, flags | MSG_NOERROR
        try:
            while True:
                if size > <size_t> ANYWIRE_SMALL:
                    message = <anywire_message*> malloc(sizeof(long) + size)
                    if message is NULL:
                        raise MemoryError
                n = self.take(message, size, type, flags, timeout, block, interrupt)
                if n >= 0:
                    if n > ANYWIRE_SMALL and truncate is None:
                        self.largest = size
                    return PyBytes_FromStringAndSize(bytes_of(message), n), message.type
                # A larger one; it is in the queue still. Memory that is not touched costs nothing.
                if message is not &small:
                    free(message)
                    message = &small
                size *= 8
        finally:
            if message is not &small:
                free(message)

    cdef recv_message_into(self, buffer, long type, excluding, bint truncate, timeout, bint block):
        """Take a message into a buffer: (its length, its type)."""
        cdef Py_buffer view
        cdef anywire_message small
        cdef anywire_message* message = &small
        cdef ssize_t n
        cdef int flags = selection(&type, excluding)
        self.check()
        PyObject_GetBuffer(buffer, &view, PyBUF_CONTIG_RO | PyBUF_WRITABLE)
        try:
            if view.len > ANYWIRE_SMALL:
                message = <anywire_message*> malloc(sizeof(long) + <size_t> view.len)
                if message is NULL:
                    raise MemoryError
            if truncate:
                flags |= MSG_NOERROR
            n = self.take(message, <size_t> view.len, type, flags, timeout, block, None)
            if n < 0:
                refuse(E2BIG, self.name, f"the message is longer than the buffer of {view.len} bytes and stays in the queue; "
                                         "truncate=True takes its beginning and drops the rest")
            memcpy(view.buf, bytes_of(message), n)
            return n, message.type
        finally:
            if message is not &small:
                free(message)
            PyBuffer_Release(&view)

    cdef ssize_t take(self, anywire_message* message, size_t size, long type, int flags, timeout, bint block,
                      Interrupt interrupt) except -2:
        """The length of what was taken; -1: the message that would be taken is larger than this, and stays."""
        cdef int e = 0
        cdef ssize_t n = self.transfer(False, message, size, type, flags, timeout, block, interrupt, &e)
        if n >= 0:
            return n
        if e == E2BIG:
            return -1
        if e == ENOMSG:
            raise BlockingIOError(EAGAIN, "no such message is in the queue", self.name)
        return self.failed(e, "receive", block)

    def copy_message(self, long index):
        """The message at this place, left in the queue: (its bytes, its type). IndexError: there are not so many."""
        cdef anywire_message* message
        cdef size_t size
        cdef ssize_t n
        cdef int e
        self.check()
        if index < 0:
            raise IndexError("the places of a queue's messages are counted from 0, the oldest")
        # The kernel copies into a buffer of this size and of msgmax at most, and refuses what is larger.
        size = max(limits().msgmax, ANYWIRE_SMALL)
        message = <anywire_message*> malloc(sizeof(long) + size)
        if message is NULL:
            raise MemoryError
        try:
            with nogil:
                n = msgrcv(self.id, message, size, index, MSG_COPY | IPC_NOWAIT)
                e = errno
            if n >= 0:
                return PyBytes_FromStringAndSize(bytes_of(message), n), message.type
            if e == ENOMSG:
                raise IndexError(f"the queue ({self.name}) has no {index + 1} messages")
            if e == ENOSYS:
                refuse(e, self.name, "this kernel has no MSG_COPY (built without CONFIG_CHECKPOINT_RESTORE)")
            self.failed(e, "receive", False)
        finally:
            free(message)


cdef int selection(long* type, object excluding) except -1:
    """msgrcv(2)'s flags; what `excluding` means for the type."""
    if excluding is None:
        return 0
    if type[0] != 0:
        raise ValueError("give either a type or excluding=, not both")
    type[0] = excluding
    if type[0] < 1:
        raise ValueError(f"excluding is a message's type, 1 to 2⁶³-1, not {excluding}")
    return MSG_EXCEPT
