# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Timers in a heap that knows each one's place.

A 4-ary heap (D. B. Johnson, "Priority queues with update and finding minimum spanning trees", 1975; four children share
a cache line of keys) in two arrays: keys in C, which is all that comparisons look at, and the timers. Each timer knows
its place, so cancelling takes it out at once, O(log n), and leaves nothing behind. Timers that are added later and later
cost O(1). Equal deadlines keep the order in which they were added.

Times are those of `monotonic`, the clock and the rounding of time.monotonic(), in seconds. A timer is due when the clock
has reached it, never before. -inf and what is past are due at once; +inf is never due, and can be cancelled; NaN is
refused.

One queue, one thread (the GIL protects it otherwise).
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_INCREF
from libc.math cimport INFINITY, ceil, isnan
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "Python.h":
    # The heap moves borrowed pointers; the list owns one reference to each all the time.
    void PyList_SET_ITEM(object list, Py_ssize_t i, void* item)
    void* PyList_GET_ITEM(object list, Py_ssize_t i)


cdef double monotonic() noexcept nogil:
    """time.monotonic(), to the bit."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double> (<int64_t> t.tv_sec * 1000000000 + t.tv_nsec) / 1e9


cdef class Timer:
    """A point in time, and whoever derives from this what happens then."""

    def __cinit__(self):
        self.place = -1

    @property
    def deadline(self):
        """When it is due, in seconds of time.monotonic()."""
        return self.when

    @property
    def pending(self):
        """Whether it is in a queue: neither due and taken out nor cancelled."""
        return self.place >= 0

    def cancel(self):
        """Take it out of its queue. Returns whether it was in one."""
        if self.place < 0:
            return False
        self.queue.cancel_timer(self)
        return True


cdef class Entry(Timer):
    """A timer with a value, as `TimerQueue.add` makes them."""

    cdef readonly object value


@cython.no_gc_clear
@cython.final
cdef class TimerQueue:
    """Timers in the order of their deadlines.

    >>> queue = TimerQueue()
    >>> tea, egg = queue.add(300.0, "tea"), queue.add(240.0, "egg")
    >>> queue.next_deadline
    240.0
    >>> tea.cancel(), len(queue)
    (True, 1)
    >>> queue.due(240.0)
    ['egg']
    """

    def __cinit__(self):
        self.timers = []

    def __dealloc__(self):
        PyMem_Free(self.keys)
        self.keys = NULL

    cdef Py_ssize_t size(self) noexcept:
        return len(self.timers)

    cdef int add_timer(self, Timer timer, double when) except -1:
        """ValueError: NaN, or the timer is in a queue."""
        cdef Py_ssize_t size = len(self.timers), more
        cdef aw_key* p
        cdef aw_key key
        if isnan(when):
            raise ValueError("a timer can't be due at NaN")
        if timer.place >= 0:
            raise ValueError("this timer is in a queue already; cancel it first")
        if size == self.room:
            more = max(64, 2 * self.room)
            p = <aw_key*> PyMem_Realloc(self.keys, more * sizeof(aw_key))
            if p == NULL:
                raise MemoryError
            self.keys = p
            self.room = more
        self.timers.append(timer)
        timer.when = when
        timer.queue = self
        key.when = when
        key.order = self.order
        self.order += 1
        self.up(size, key, <void*> timer)
        return 0

    cdef inline void set(self, Py_ssize_t place, aw_key key, void* timer) noexcept:
        self.keys[place] = key
        PyList_SET_ITEM(self.timers, place, timer)
        (<Timer> timer).place = place

    cdef void up(self, Py_ssize_t place, aw_key key, void* timer) noexcept:
        """Put a timer into the hole at `place`, or above it: later parents come down."""
        cdef Py_ssize_t parent
        while place > 0:
            parent = (place - 1) >> 2
            if self.keys[parent].when < key.when or (
                    self.keys[parent].when == key.when and self.keys[parent].order < key.order):
                break
            self.set(place, self.keys[parent], PyList_GET_ITEM(self.timers, parent))
            place = parent
        self.set(place, key, timer)

    cdef void down(self, Py_ssize_t place, Py_ssize_t size, aw_key key, void* timer) noexcept:
        """Put a timer into the hole at `place`, or below it: the earliest child comes up."""
        cdef Py_ssize_t child, best, end
        while True:
            best = 4 * place + 1
            if best >= size:
                break
            end = min(best + 4, size)
            for child in range(best + 1, end):
                if self.keys[child].when < self.keys[best].when or (
                        self.keys[child].when == self.keys[best].when and
                        self.keys[child].order < self.keys[best].order):
                    best = child
            if key.when < self.keys[best].when or (
                    key.when == self.keys[best].when and key.order < self.keys[best].order):
                break
            self.set(place, self.keys[best], PyList_GET_ITEM(self.timers, best))
            place = best
        self.set(place, key, timer)

    cdef int take_out(self, Py_ssize_t place) except -1:
        """Take out the timer at `place`; the last one fills its hole. The caller has a reference to it."""
        cdef Py_ssize_t size = len(self.timers) - 1
        cdef Timer timer = <Timer> PyList_GET_ITEM(self.timers, place)
        cdef Timer last
        cdef aw_key key = self.keys[size]
        timer.place = -1
        timer.queue = None
        if place == size:
            self.timers.pop()
        else:
            last = self.timers.pop()
            # The list loses one reference to `timer`, for the hole is filled over it, and gets one to `last`.
            Py_INCREF(last)
            if place > 0 and (key.when < self.keys[(place - 1) >> 2].when or (
                    key.when == self.keys[(place - 1) >> 2].when and key.order < self.keys[(place - 1) >> 2].order)):
                self.up(place, key, <void*> last)
            else:
                self.down(place, size, key, <void*> last)
            release(timer)
        if self.room > 1024 and size < self.room >> 3:
            self.shrink(size)
        return 0

    cdef int shrink(self, Py_ssize_t size) except -1:
        """After a flood: give its memory back."""
        cdef aw_key* p = <aw_key*> PyMem_Realloc(self.keys, (self.room >> 2) * sizeof(aw_key))
        if p != NULL:
            self.keys = p
            self.room >>= 2
        return 0

    cdef int cancel_timer(self, Timer timer) except -1:
        """1, or 0 if it wasn't in this queue."""
        # More than there are: the garbage collector has emptied the list of a queue that nobody uses any more.
        if timer.place < 0 or timer.queue is not self or timer.place >= len(self.timers):
            return 0
        self.take_out(timer.place)
        return 1

    cdef double next_when(self) noexcept:
        """The earliest deadline; +inf if there is none."""
        return self.keys[0].when if len(self.timers) else INFINITY

    cdef Timer pop_due(self, double now):
        """Take out the earliest timer if it is due at `now`, else None."""
        cdef Timer timer
        if len(self.timers) == 0 or self.keys[0].when > now or self.keys[0].when == INFINITY:
            return None
        timer = <Timer> PyList_GET_ITEM(self.timers, 0)
        self.take_out(0)
        return timer

    cdef int64_t timeout_ns(self, double now) noexcept:
        """How long a demultiplexer may wait: until the earliest deadline, rounded up; -1 for ever."""
        cdef double left = self.next_when() - now
        if left <= 0:
            return 0
        # What is more than a year away is looked at again then; so far the clock's doubles are exact enough.
        if left > 3e7:
            return -1 if left == INFINITY else 30000000000000000
        return <int64_t> ceil(left * 1e9)

    def add(self, double when, value):
        """Add a timer.

        Args:
            when: when it is due, in seconds of time.monotonic(). Past is due at once, +inf never.
            value: what `due` gives back.

        Returns:
            A `Timer`, for `cancel()`.

        Raises:
            ValueError: `when` is NaN.
        """
        cdef Entry entry = Entry.__new__(Entry)
        entry.value = value
        self.add_timer(entry, when)
        return entry

    def due(self, double now):
        """Take out the timers that are due at `now`, in order. Returns a list of their values."""
        cdef list found = []
        cdef Timer timer
        while True:
            timer = self.pop_due(now)
            if timer is None:
                return found
            found.append((<Entry> timer).value if isinstance(timer, Entry) else timer)

    def timeout(self, double now):
        """How long to wait at `now`, in seconds; None while nothing will ever be due."""
        cdef int64_t ns = self.timeout_ns(now)
        return None if ns < 0 else ns / <double> 1e9

    @property
    def next_deadline(self):
        """The earliest deadline in seconds; +inf if there is none."""
        return self.next_when()

    def __len__(self):
        return len(self.timers)


cdef extern from *:
    """
    static void anywire_release(PyObject *object) { Py_DECREF(object); }
    """
    void release "anywire_release"(object timer)
