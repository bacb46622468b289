# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""System calls that the standard library lacks: queued signals, signalfd, timerfd, inotify, pidfd_getfd, removal by name;
and fcntl(2) and open(2) where they wait for others, with a time-out and until another thread says stop.

Thin: numbers in, numbers out, an OSError with the object's name for what fails. Times are nanoseconds. Any thread; what can
wait waits without the GIL. `signals`, `descriptors` and `inotify` make something of them.
"""
from libc.errno cimport EAGAIN, EINTR, ENOSPC, errno
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset
from posix.time cimport itimerspec, timespec
from posix.types cimport pid_t
import os

from cpython.exc cimport PyErr_CheckSignals

from anywire.ipc._interrupt cimport Interrupt
from anywire.ipc._system cimport as_timespec, deadline as deadline_of, fail, left

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <mqueue.h>
    #include <signal.h>
    #include <string.h>
    #include <sys/inotify.h>
    #include <sys/msg.h>
    #include <sys/sem.h>
    #include <sys/shm.h>
    #include <sys/signalfd.h>
    #include <sys/syscall.h>
    #include <sys/timerfd.h>
    #include <unistd.h>
    #ifndef SYS_pidfd_getfd
    #define SYS_pidfd_getfd 438
    #endif
    #ifndef F_OFD_SETLKW
    #define F_OFD_SETLKW 38
    #endif
    static int anywire_lock_file(int fd, int shared, int64_t start, int64_t length) {
        struct flock lock;
        memset(&lock, 0, sizeof lock);
        lock.l_type = shared ? F_RDLCK : F_WRLCK;
        lock.l_whence = SEEK_SET;
        lock.l_start = start;
        lock.l_len = length;
        return fcntl(fd, F_OFD_SETLKW, &lock);
    }
    static int anywire_open(const char* path, int flags) { return open(path, flags); }
    static int anywire_sigqueue(pid_t pid, int number, int value) {
        union sigval v;
        v.sival_ptr = NULL;
        v.sival_int = value;
        return sigqueue(pid, number, v);
    }
    #ifndef SYS_pidfd_send_signal
    #define SYS_pidfd_send_signal 424
    #endif
    static int anywire_pidfd_sigqueue(int pidfd, int number, int value) {
        siginfo_t info;
        memset(&info, 0, sizeof info);
        info.si_signo = number;
        info.si_code = SI_QUEUE;
        info.si_pid = getpid();
        info.si_uid = getuid();
        info.si_value.sival_int = value;
        return (int) syscall(SYS_pidfd_send_signal, pidfd, number, &info, 0u);
    }
    static int anywire_pidfd_getfd(int pidfd, int fd) { return (int) syscall(SYS_pidfd_getfd, pidfd, fd, 0u); }
    static int anywire_remove_sysv(int kind, int id) {
        return kind == 0 ? msgctl(id, IPC_RMID, NULL) : kind == 1 ? semctl(id, 0, IPC_RMID) : shmctl(id, IPC_RMID, NULL);
    }
    struct anywire_told { int number, code, error, pid, uid, status, value; };
    static int anywire_sigtimedwait(const sigset_t* set, const struct timespec* left, struct anywire_told* told) {
        siginfo_t info;
        int number = sigtimedwait(set, &info, left);
        if (number >= 0) {
            told->number = number;
            told->code = info.si_code;
            told->error = info.si_errno;
            told->pid = info.si_pid;
            told->uid = (int) info.si_uid;
            told->status = number == SIGCHLD ? info.si_status : 0;
            told->value = number == SIGCHLD ? 0 : info.si_value.sival_int;
        }
        return number;
    }
    """
    ctypedef struct sigset_t:
        pass
    struct anywire_told:
        int number, code, error, pid, uid, status, value
    int anywire_lock_file(int fd, int shared, int64_t start, int64_t length) nogil
    int anywire_open(const char* path, int flags) nogil
    int anywire_sigqueue(pid_t pid, int number, int value) nogil
    int anywire_pidfd_sigqueue(int pidfd, int number, int value) nogil
    int anywire_remove_sysv(int kind, int id) nogil
    int c_mq_unlink "mq_unlink"(const char* name) nogil
    int anywire_pidfd_getfd(int pidfd, int fd) nogil
    int anywire_sigtimedwait(const sigset_t* set, const timespec* left, anywire_told* told) nogil
    int sigemptyset(sigset_t* set) nogil
    int sigaddset(sigset_t* set, int number) nogil
    int c_signalfd "signalfd"(int fd, const sigset_t* mask, int flags) nogil
    int SFD_CLOEXEC, SFD_NONBLOCK
    int c_timerfd_create "timerfd_create"(int clock, int flags) nogil
    int c_timerfd_settime "timerfd_settime"(int fd, int flags, const itimerspec* new, itimerspec* old) nogil
    int c_timerfd_gettime "timerfd_gettime"(int fd, itimerspec* now) nogil
    int TFD_CLOEXEC, TFD_NONBLOCK
    int inotify_init1(int flags) nogil
    int c_inotify_add_watch "inotify_add_watch"(int fd, const char* path, uint32_t mask) nogil
    int c_inotify_rm_watch "inotify_rm_watch"(int fd, int watch) nogil
    int IN_CLOEXEC, IN_NONBLOCK


cdef int fill(sigset_t* set, numbers) except -1:
    cdef int number
    sigemptyset(set)
    for number in numbers:
        if sigaddset(set, number) < 0:
            raise ValueError(f"{number} is no signal's number")
    return 0


def lock_file(int fd, bint shared, int64_t start, int64_t length, timeout, Interrupt interrupt):
    """Wait for a lock of the open file description (F_OFD_SETLKW): whether it came within `timeout` seconds."""
    cdef int64_t deadline = deadline_of(timeout)
    cdef int done, e
    interrupt.begin(deadline)
    try:
        while True:
            with nogil:
                done = anywire_lock_file(fd, shared, start, length)
                e = errno
            if done == 0:
                return True
            if e != EINTR:
                fail(e, None)
            if interrupt.over(deadline):
                return False
    finally:
        interrupt.end()


def open_waiting(str path, int flags, timeout, Interrupt interrupt):
    """Open a file where that may wait, as for a FIFO's other side: its descriptor; -1 when `timeout` seconds are over."""
    cdef int64_t deadline = deadline_of(timeout)
    cdef bytes encoded = os.fsencode(path)
    cdef const char* name = encoded
    cdef int made, e
    interrupt.begin(deadline)
    try:
        while True:
            with nogil:
                made = anywire_open(name, flags)
                e = errno
            if made >= 0:
                return made
            if e != EINTR:
                fail(e, path)
            if interrupt.over(deadline):
                return -1
    finally:
        interrupt.end()


def sigqueue(pid_t pid, int pidfd, int number, int value):
    """Send a signal with a 32-bit value (sigqueue(3)); by the pidfd unless that is -1."""
    cdef int done = anywire_sigqueue(pid, number, value) if pidfd < 0 else anywire_pidfd_sigqueue(pidfd, number, value)
    cdef int e = errno
    if done < 0:
        if e == EAGAIN:
            fail(e, f"process {pid}", "as many signals wait for their receivers as this user may queue "
                 "(RLIMIT_SIGPENDING): let them be taken, or raise it by `ulimit -i` and in /etc/security/limits.conf")
        fail(e, f"process {pid}", f"signal {number}")


def sigtimedwait(numbers, timeout):
    """Take the next of these signals that is pending for this thread or process; None after `timeout` seconds.

    The fields: number, code, errno, pid, uid, status (of SIGCHLD), value."""
    cdef sigset_t set
    cdef anywire_told told
    cdef timespec t
    cdef int64_t deadline = deadline_of(timeout)
    cdef int64_t rest
    cdef int found, e
    fill(&set, numbers)
    memset(&told, 0, sizeof(told))
    while True:
        with nogil:
            rest = left(deadline)
            if rest >= 0:
                t = as_timespec(rest)
            found = anywire_sigtimedwait(&set, &t if rest >= 0 else NULL, &told)
            e = errno
        if found >= 0:
            return told.number, told.code, told.error, told.pid, <uint32_t> told.uid, told.status, told.value
        if e == EAGAIN:
            return None
        if e != EINTR:
            fail(e, None, "sigtimedwait")
        PyErr_CheckSignals()


def signalfd(int fd, numbers):
    """A descriptor that these signals can be read from; with an fd of that kind, change which."""
    cdef sigset_t set
    cdef int made
    fill(&set, numbers)
    made = c_signalfd(fd, &set, SFD_CLOEXEC | SFD_NONBLOCK)
    if made < 0:
        fail(errno, None, "signalfd")
    return made


def timerfd_create(int clock):
    """A timer's descriptor; `clock` is one of time.CLOCK_*."""
    cdef int made = c_timerfd_create(clock, TFD_CLOEXEC | TFD_NONBLOCK)
    if made < 0:
        fail(errno, None, "timerfd_create")
    return made


def timerfd_settime(int fd, int flags, int64_t value, int64_t interval):
    """Set it off: first at `value`, then every `interval`, both in nanoseconds; a value of 0 stops it."""
    cdef itimerspec setting
    setting.it_value = as_timespec(value)
    setting.it_interval = as_timespec(interval)
    if c_timerfd_settime(fd, flags, &setting, NULL) < 0:
        fail(errno, None, "timerfd_settime")


def timerfd_gettime(int fd):
    """(nanoseconds until it expires next, 0 when it doesn't; the interval)."""
    cdef itimerspec now
    if c_timerfd_gettime(fd, &now) < 0:
        fail(errno, None, "timerfd_gettime")
    return (
        <int64_t> now.it_value.tv_sec * 1000000000 + now.it_value.tv_nsec,
        <int64_t> now.it_interval.tv_sec * 1000000000 + now.it_interval.tv_nsec,
    )


def pidfd_getfd(int pidfd, int fd):
    """A copy of another process's descriptor, close-on-exec (pidfd_getfd(2)); it needs the right to trace that process."""
    cdef int made = anywire_pidfd_getfd(pidfd, fd)
    if made < 0:
        fail(errno, None, "pidfd_getfd")
    return made


def inotify_init():
    """A new inotify instance (inotify(7))."""
    cdef int made = inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    if made < 0:
        fail(errno, None, "inotify_init1: the limit for a user's instances is in /proc/sys/fs/inotify/max_user_instances")
    return made


def inotify_add_watch(int fd, bytes path, uint32_t mask):
    """Watch a file; the number by which its events come."""
    cdef const char* name = path
    cdef int watch, e
    with nogil:
        watch = c_inotify_add_watch(fd, name, mask)
        e = errno
    if watch < 0:
        fail(e, os.fsdecode(path), None if e != ENOSPC else "the limit for a user's watches is in /proc/sys/fs/inotify/max_user_watches")
    return watch


def inotify_rm_watch(int fd, int watch):
    """End a watch."""
    if c_inotify_rm_watch(fd, watch) < 0:
        fail(errno, None, "inotify_rm_watch")


def mq_unlink(bytes name):
    """Remove the name of a POSIX message queue."""
    if c_mq_unlink(name) < 0:
        fail(errno, os.fsdecode(name))


def remove_sysv(str kind, int id):
    """Remove a System V object; `kind` is "msg", "sem" or "shm"."""
    if anywire_remove_sysv(("msg", "sem", "shm").index(kind), id) < 0:
        fail(errno, f"{kind}:{id}")
