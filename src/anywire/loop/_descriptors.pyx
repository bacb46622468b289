# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True, auto_pickle=False
"""The descriptors of a loop: who watches which, readers and writers (add_reader), and who waits for one (sock_recv).

`Descriptors` is the third of the classes that a loop is made of (see `_core`, whose turn waits for reports and delivers
them). A transport is a watcher of its own and needs `watch`, `rewatch` and `unwatch` only; for all others a descriptor has one
`Callbacks`.

On the loop's thread. What can go wrong: a descriptor is used twice (RuntimeError); its number is closed and used again
(watched anew); the process forks (the set in the kernel is the parent's, so the child's copy changes nothing of it).
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t

from anywire.engine.conditions cimport ERROR, HANGUP, ONESHOT, READ, WRITE
from anywire.engine._watches cimport Watcher
from anywire.loop._handles cimport Handle, context_of, fill, remember_caller, settle

import os
from asyncio import Future
from socket import socket as Socket

cdef extern from "<sys/socket.h>":
    int MSG_DONTWAIT
    Py_ssize_t recv(int fd, void* buffer, size_t size, int flags)


cdef class Callbacks(Watcher):
    """The reader and the writer of one descriptor (add_reader, add_writer), and who waits for it (sock_recv and others).

    For those who only wait it is watched ONESHOT, and stays here when they have gone: waiting again costs one system call
    instead of two, and nothing is reported meanwhile.
    """

    cdef int ready(self, uint32_t conditions) except -1:
        cdef Handle handle
        cdef list waiting = self.waiting
        if waiting is not None and conditions & (READ | HANGUP | ERROR):
            self.waiting = None
            for future in waiting:
                if not future.done():
                    future.set_result(None)
        handle = self.reader
        if handle is not None and conditions & (READ | HANGUP | ERROR):
            self.descriptors.calls += 1
            self.descriptors.execute(handle, handle._callback, handle._args, handle.surroundings)
        # The reader may have removed the writer.
        handle = self.writer
        if handle is not None and conditions & (WRITE | HANGUP | ERROR):
            self.descriptors.calls += 1
            self.descriptors.execute(handle, handle._callback, handle._args, handle.surroundings)
        return 0


cdef int number_of(object fd) except -1:
    """The descriptor's number, as selectors finds it."""
    cdef long number
    if isinstance(fd, int):
        number = fd
    else:
        try:
            number = int(fd.fileno())
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"Invalid file object: {fd!r}") from None
    if number < 0 or number > 0x7FFFFFFF:
        raise ValueError(f"Invalid file descriptor: {number}")
    return <int> number


cdef class Descriptors(Schedule):
    """What a loop waits for in the kernel."""

    # ---- for transports, and for what is not of this package: the wires' driver watches a connection by these --------

    cdef int watch(self, Watcher watcher, int fd, uint32_t conditions) except -1:
        cdef Watcher former
        self.check()
        former = self.watches.of(fd)
        if isinstance(former, Callbacks) and (<Callbacks> former).reader is None and (<Callbacks> former).writer is None:
            self.watches.remove(former)         # left by who waited
        return self.watches.add(watcher, fd, conditions, 0)

    cdef int rewatch(self, Watcher watcher, uint32_t conditions) except -1:
        if self._closed or self.forked():
            return 0                # the set in the kernel is the parent's, too
        return self.watches.modify(watcher, conditions, 0)

    cdef int unwatch(self, Watcher watcher) except -1:
        if self._closed or self.forked():
            return 0
        return self.watches.remove(watcher)

    # For what is not of this package, and so has no C functions of it: the wires' driver watches a connection by these.

    def _watch(self, Watcher watcher not None, int fd, uint32_t conditions):
        self.watch(watcher, fd, conditions)

    def _rewatch(self, Watcher watcher not None, uint32_t conditions):
        self.rewatch(watcher, conditions)

    def _unwatch(self, Watcher watcher not None):
        self.unwatch(watcher)

    # ---- readers and writers -------------------------------------------------------------------------------------

    cdef object set_reader(self, object fd, object callback, tuple args, bint writing):
        cdef int number
        cdef Watcher watcher
        cdef Callbacks callbacks
        cdef Handle handle, former
        self.check()
        number = number_of(fd)
        handle = Handle.__new__(Handle)
        fill(handle, self, callback, args, None)
        settle(handle)
        context_of(handle)                             # it is called more than once
        if self._debug:
            remember_caller(handle)
        watcher = self.watches.of(number)
        if watcher is None:
            callbacks = Callbacks.__new__(Callbacks)
            callbacks.descriptors = self
            self.watches.add(callbacks, number, WRITE if writing else READ, 0)
        elif not isinstance(watcher, Callbacks):
            raise RuntimeError(f"File descriptor {number} is used by transport {watcher!r}")
        else:
            callbacks = <Callbacks> watcher
            # Also where nothing changes: the number may be a new descriptor's by now, and what is reported of the old one's
            # is not for the new handler.
            self.watches.renew(
                callbacks, WRITE * (writing or callbacks.writer is not None) |
                READ * (not writing or callbacks.reader is not None or callbacks.waiting is not None), 0)
        if writing:
            former = callbacks.writer
            callbacks.writer = handle
        else:
            former = callbacks.reader
            callbacks.reader = handle
        if former is not None:
            former.cancel()
        return handle

    cdef bint drop_reader(self, object fd, bint writing) except -1:
        cdef int number
        cdef Watcher watcher
        cdef Callbacks callbacks
        cdef Handle former
        if self._closed or self.forked():
            return False
        try:
            number = number_of(fd)
        except ValueError:
            return False            # closed, so it isn't watched any more
        watcher = self.watches.of(number)
        if watcher is None or not isinstance(watcher, Callbacks):
            return False
        callbacks = <Callbacks> watcher
        if writing:
            former = callbacks.writer
            callbacks.writer = None
        else:
            former = callbacks.reader
            callbacks.reader = None
        if former is None:
            return False
        if callbacks.reader is None and callbacks.writer is None and callbacks.waiting is None:
            self.watches.remove(callbacks)
        elif callbacks.reader is None and callbacks.writer is None:
            self.watches.modify(callbacks, READ, ONESHOT)
        else:
            self.watches.modify(
                callbacks, WRITE * (callbacks.writer is not None) |
                READ * (callbacks.reader is not None or callbacks.waiting is not None), 0)
        former.cancel()
        return True

    def _readable(self, int fd):
        """A future that is done when the descriptor is readable, or was. Whoever waits then tries, and may wait again."""
        cdef Watcher watcher
        cdef Callbacks callbacks
        self.check()
        watcher = self.watches.of(fd)
        if watcher is None:
            callbacks = Callbacks.__new__(Callbacks)
            callbacks.descriptors = self
            self.watches.add(callbacks, fd, READ, ONESHOT)
        elif not isinstance(watcher, Callbacks):
            raise RuntimeError(f"File descriptor {fd} is used by transport {watcher!r}")
        else:
            callbacks = <Callbacks> watcher
            if callbacks.reader is None and callbacks.writer is None:
                self.watches.modify(callbacks, READ, ONESHOT)
            elif not callbacks.conditions & READ:
                self.watches.modify(callbacks, READ | WRITE, 0)
        future = Future(loop=self)
        if callbacks.waiting is None:
            callbacks.waiting = [future]
        else:
            # Without those that were cancelled: the number may be one of a hundred sockets, none of them ever readable.
            callbacks.waiting = [one for one in callbacks.waiting if not one.done()]
            callbacks.waiting.append(future)
        return future

    def _add_reader(self, fd, callback, *args):
        return self.set_reader(fd, callback, args, False)

    def _remove_reader(self, fd):
        return bool(self.drop_reader(fd, False))

    def _add_writer(self, fd, callback, *args):
        return self.set_reader(fd, callback, args, True)

    def _remove_writer(self, fd):
        return bool(self.drop_reader(fd, True))

    def _watched(self, fd):
        """The conditions that a descriptor is watched for, 1 to read and 2 to write, and the two handles; or None."""
        cdef Watcher watcher = self.watches.of(number_of(fd))
        if watcher is None:
            return None
        if isinstance(watcher, Callbacks):
            if (<Callbacks> watcher).reader is None and (<Callbacks> watcher).writer is None:
                return None
            return watcher.conditions, ((<Callbacks> watcher).reader, (<Callbacks> watcher).writer)
        return watcher.conditions & (READ | WRITE), (None, None)

    def _receive(self, sock, Py_ssize_t nbytes):
        """What the socket has, at most `nbytes` bytes; or a future that is done when there may be something."""
        cdef int fd, e
        cdef Py_ssize_t got
        if nbytes < 0:
            raise ValueError("negative buffersize in recv")
        if type(sock) is not Socket:
            try:
                return sock.recv(nbytes)
            except (BlockingIOError, InterruptedError):
                return self._until_readable(sock)
        fd = sock.fileno()
        data = PyBytes_FromStringAndSize(NULL, nbytes)
        while True:
            got = recv(fd, PyBytes_AS_STRING(data), nbytes, MSG_DONTWAIT)
            if got >= 0:
                return data if got == nbytes else PyBytes_FromStringAndSize(PyBytes_AS_STRING(data), got)
            e = errno
            if e == EAGAIN:
                # Who has waited for it here before isn't a transport, and a transport drops what he left.
                return self._readable(fd) if isinstance(self.watches.of(fd), Callbacks) else self._until_readable(sock)
            if e != EINTR:
                raise OSError(e, os.strerror(e))
            PyErr_CheckSignals()
