# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""Being notified that a message came into an empty queue: the calls (mq_notify(3)). `mqueue_notify.py` makes callbacks of it.

Any thread. What can go wrong: another process asked first (EBUSY), which `mqueue_limits.py` explains.
"""
from libc.errno cimport errno
from anywire.ipc._mqueue_open cimport OpenQueue
from anywire.ipc._system cimport fail

import weakref

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <mqueue.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* The C library would run SIGEV_THREAD's function on a thread of its own; the kernel itself sends `cookie` through a
     * netlink socket (ipc/mqueue.c), which any thread and any event loop can wait for. */
    static int anywire_mq_notify_socket(int fd, int socket, const char* cookie) {
        struct sigevent e;
        memset(&e, 0, sizeof(e));
        e.sigev_notify = SIGEV_THREAD;
        e.sigev_signo = socket;
        e.sigev_value.sival_ptr = (void*) cookie;
        return (int) syscall(SYS_mq_notify, fd, &e);
    }
    static int anywire_mq_notify_signal(int fd, int kind, int signo, int value) {
        struct sigevent e;
        memset(&e, 0, sizeof(e));
        e.sigev_notify = kind;
        e.sigev_signo = signo;
        e.sigev_value.sival_int = value;
        return mq_notify(fd, &e);
    }
    """
    int mq_notify(int fd, void* e) nogil
    int notify_socket "anywire_mq_notify_socket"(int fd, int socket, const char* cookie) nogil
    int notify_signal "anywire_mq_notify_signal"(int fd, int kind, int signo, int value) nogil
    int SIGEV_SIGNAL


cdef class NotifyingQueue(OpenQueue):
    """An open queue that tells of messages."""

    def notify(self, callback, *, once=False, loop=None):
        """Have `callback()` called when a message comes into the empty queue: see `mqueue_notify.Notification`, which
        this returns. On a thread of its own, or, with an event loop as `loop`, there.

        It is armed again before each call, and called at once if messages wait already: so a callback that takes all
        messages (`recv(block=False)` until BlockingIOError) misses none. `once=True`: one call, of the next message into
        the empty queue. One process at a time can be notified for a queue. Raises OSError: EBUSY."""
        from anywire.ipc.mqueue_notify import Notification
        self.usable()
        notification = Notification(self, callback, once, loop)
        if self.notifications is None:
            self.notifications = weakref.WeakSet()
        self.notifications.add(notification)
        return notification

    def notify_signal(self, int signo, int value=0):
        """Have one signal sent to this process when the next message comes into the empty queue (mq_notify(3)).

        `value`, a C int, comes with it (`signal.sigwaitinfo` shows who sent the message). For another one, call again,
        *before* taking the messages. `stop_notify` takes it back. Raises OSError: EBUSY, EINVAL."""
        self.usable()
        if notify_signal(self.fd, SIGEV_SIGNAL, signo, value) < 0:
            self._refuse_notify(errno)

    def _notify_socket(self, int socket, bytes cookie):
        """Have the kernel send the cookie (32 bytes) into a netlink socket."""
        self.usable()
        if len(cookie) != 32:
            raise ValueError("a cookie has 32 bytes")
        if notify_socket(self.fd, socket, cookie) < 0:
            self._refuse_notify(errno)

    def stop_notify(self):
        """Take back what this process asked for by `notify_signal` (or `notify`, which asks again by itself: cancel it).
        Does nothing when another process, or nobody, is to be notified."""
        self.usable()
        if mq_notify(self.fd, NULL) < 0:
            fail(errno, self.name)

    def _refuse_notify(self, int e):
        from anywire.ipc import mqueue_limits
        fail(e, self.name, mqueue_limits.explain_notify(e, self.fd))
