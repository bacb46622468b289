# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What the primitives share: errors that name the object, deadlines of the monotonic clock, waiting for a descriptor.

A deadline is a number of nanoseconds of CLOCK_MONOTONIC, -1 for none, so that a wait which a signal interrupts goes on
with what is left (PEP 475). Any thread.
"""
from libc.errno cimport EEXIST, EINTR, EINVAL, ENAMETOOLONG, ENOENT, errno
from libc.math cimport ceil
from posix.time cimport CLOCK_MONOTONIC, clock_gettime
from cpython.exc cimport PyErr_CheckSignals

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    static int anywire_poll(int fd, short events, const struct timespec* left) {
        struct pollfd p = { fd, events, 0 };
        return ppoll(&p, 1, left, NULL);
    }
    """
    int anywire_poll(int fd, short events, const timespec* left) nogil


cdef object failure(int e, object name, str more=None):
    """The OSError of the subclass that belongs to the number, with the object's name as `filename`."""
    text = os.strerror(e)
    if more is not None:
        text = f"{text}: {more}"
    return OSError(e, text) if name is None else OSError(e, text, name)


cdef int fail(int e, object name, str more=None) except -1:
    raise failure(e, name, more)


cdef object refusal(int e, object name, int most, str what, bint seeks):
    more = None
    if len(os.fsencode(name).lstrip(b"/")) > most:
        e = ENAMETOOLONG                # as POSIX says; glibc before 2.37 has other numbers
    if e == EINVAL:
        more = f"a name is a slash and up to {most} bytes without one"
    elif e == ENAMETOOLONG:
        more = f"a name has at most {most} bytes behind its slash"
    elif e == ENOENT and seeks:
        more = f"no {what} has this name (create, or create_or_open, makes it)"
    elif e == EEXIST:
        more = f"there is a {what} of this name (open, or create_or_open, uses it)"
    return failure(e, name, more)


cdef bytes encoded(object name, str what, str example):
    """The bytes of the name of `what`. TypeError: no str. ValueError: a null character, which would end it."""
    if not isinstance(name, str):
        raise TypeError(f"the name of {what} is a str such as {example!r}, not {type(name).__name__}")
    if "\0" in name:
        raise ValueError(f"the name of {what} has no null character: {name!r}")
    return os.fsencode(name)


cdef int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t> t.tv_sec * 1000000000 + t.tv_nsec


cdef int64_t deadline(object timeout) except? -2:
    """ValueError: below 0, or NaN. TypeError: no number. What is more than a century away is never."""
    cdef double seconds
    if timeout is None:
        return -1
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout is a number of seconds that is not negative, or None for no limit; not {timeout!r}")
    if seconds > 3e9:
        return -1
    return now() + <int64_t> ceil(seconds * 1e9)


cdef int64_t left(int64_t deadline) noexcept nogil:
    cdef int64_t rest
    if deadline < 0:
        return -1
    rest = deadline - now()
    return rest if rest > 0 else 0


cdef timespec as_timespec(int64_t nanoseconds) noexcept nogil:
    cdef timespec t
    t.tv_sec = nanoseconds // 1000000000
    t.tv_nsec = nanoseconds % 1000000000
    return t


cdef int wait_for(int fd, short events, int64_t deadline) except -1:
    cdef timespec t
    cdef int found, e
    cdef int64_t rest
    while True:
        with nogil:
            rest = left(deadline)
            if rest >= 0:
                t = as_timespec(rest)
            found = anywire_poll(fd, events, &t if rest >= 0 else NULL)
            e = errno
        if found > 0:
            return 1
        if found == 0:
            return 0
        if e != EINTR:
            return fail(e, None, "poll")
        PyErr_CheckSignals()
