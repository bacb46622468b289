# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Timers in a heap that knows each one's place.

A 4-ary heap (D. B. Johnson, "Priority queues with update and finding minimum spanning trees", 1975; four children share
a cache line of keys) in two arrays: keys in C, which is all that comparisons look at, and the timers. Each timer knows
its place, so cancelling takes it out at once and leaves nothing behind. Behind the heap, in the same arrays, are those that
were added since somebody last asked for the earliest: adding is O(1), and so is cancelling one of these, for the last one
takes its place. So a time-out that is set and cancelled between two looks never sees the heap. From the heap, cancelling is
O(log n). Those that are due together are taken out together: in the heap they are its top, found without looking at more
than their children, and are sorted when they are out. Equal deadlines keep the order in which they were added.

Times are those of `monotonic`, the clock and the rounding of time.monotonic(), in seconds. A timer is due when the clock
has reached it, never before. -inf and what is past are due at once; +inf is never due, and can be cancelled; NaN is
refused.

One queue, one thread (the GIL protects it otherwise).
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.float cimport DBL_MAX
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
        self.left()
        return True

    cdef int left(self) except -1:
        return 0


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
        PyMem_Free(self.due_keys)
        self.keys = NULL
        self.due_keys = NULL

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
        self.keys[size] = key
        timer.place = size
        return 0

    cdef void settle(self) noexcept:
        """The new ones go to their places in the heap."""
        cdef Py_ssize_t size = len(self.timers)
        while self.heap < size:
            self.up(self.heap, self.keys[self.heap], PyList_GET_ITEM(self.timers, self.heap))
            self.heap += 1

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
        """Take out the timer at `place`. The caller has a reference to it."""
        cdef Py_ssize_t last = len(self.timers) - 1, hole = place
        cdef Timer timer = <Timer> PyList_GET_ITEM(self.timers, place)
        cdef aw_key key
        timer.place = -1
        timer.queue = None
        if place < self.heap:
            self.heap -= 1
            hole = self.heap                # which the last one of the heap leaves behind
            if place != hole:
                key = self.keys[hole]
                if place > 0 and (key.when < self.keys[(place - 1) >> 2].when or (
                        key.when == self.keys[(place - 1) >> 2].when and key.order < self.keys[(place - 1) >> 2].order)):
                    self.up(place, key, PyList_GET_ITEM(self.timers, hole))
                else:
                    self.down(place, hole, key, PyList_GET_ITEM(self.timers, hole))
        if hole != last:
            self.set(hole, self.keys[last], PyList_GET_ITEM(self.timers, last))
        # The list's reference to it goes with the list's last place.
        PyList_SET_ITEM(self.timers, last, <void*> timer)
        self.timers.pop()
        if self.room > 1024 and last < self.room >> 3:
            self.shrink()
        return 0

    cdef int shrink(self) except -1:
        """After a flood: give its memory back."""
        cdef aw_key* p = <aw_key*> PyMem_Realloc(self.keys, (self.room >> 2) * sizeof(aw_key))
        if p != NULL:
            self.keys = p
            self.room >>= 2
        PyMem_Free(self.due_keys)
        self.due_keys = NULL
        self.due_room = 0
        return 0

    cdef int cancel_timer(self, Timer timer) except -1:
        """1, or 0 if it wasn't in this queue."""
        # More than there are: the garbage collector has emptied the list of a queue that nobody uses any more.
        if timer.place < 0 or timer.queue is not self or timer.place >= len(self.timers):
            return 0
        self.take_out(timer.place)
        return 1

    cdef bint is_due(self, double now) noexcept:
        """Whether any timer is due. Looks at the new ones where they are."""
        cdef Py_ssize_t place, size = len(self.timers)
        if now == INFINITY:
            now = DBL_MAX
        if self.heap and self.keys[0].when <= now:
            return True
        for place in range(self.heap, size):
            if self.keys[place].when <= now:
                return True
        return False

    cdef double next_when(self) noexcept:
        """The earliest deadline; +inf if there is none."""
        self.settle()
        return self.keys[0].when if len(self.timers) else INFINITY

    cdef Timer pop_due(self, double now):
        """Take out the earliest timer if it is due at `now`, else None."""
        cdef Timer timer
        self.settle()
        if len(self.timers) == 0 or self.keys[0].when > now or self.keys[0].when == INFINITY:
            return None
        timer = <Timer> PyList_GET_ITEM(self.timers, 0)
        self.take_out(0)
        return timer

    cdef list take_due(self, double now):
        """Take out all that are due at `now`. Returns a list of them, the latest first, for it is meant to be popped; None
        if there are none. MemoryError leaves all where they are."""
        cdef list found
        cdef Py_ssize_t size = len(self.timers), count = 0, first, i, place, child, heap
        cdef Timer timer
        cdef aw_due* due
        if not self.is_due(now):
            self.settle()
            return None
        if now == INFINITY:
            now = DBL_MAX               # +inf is never due
        if self.due_room < size:
            due = <aw_due*> PyMem_Realloc(self.due_keys, 2 * self.room * sizeof(aw_due))
            if due == NULL:
                raise MemoryError
            self.due_keys = due
            self.due_room = self.room
        due = self.due_keys
        # Of the new ones, those that aren't due go to the heap; it grows no faster than the look at them.
        heap = self.heap
        for i in range(heap, size):
            if self.keys[i].when <= now:
                due[count].when = self.keys[i].when
                due[count].order = self.keys[i].order
                due[count].timer = PyList_GET_ITEM(self.timers, i)
                count += 1
            else:
                self.up(heap, self.keys[i], PyList_GET_ITEM(self.timers, i))
                heap += 1
        # Those of the heap, level by level: nothing below one that isn't due is.
        first = i = count
        child = place = 0
        while child < heap:
            while child < heap and child <= place:
                if self.keys[child].when <= now:
                    due[count].when = self.keys[child].when
                    due[count].order = self.keys[child].order
                    due[count].timer = PyList_GET_ITEM(self.timers, child)
                    count += 1
                child += 1
            if i == count:
                break
            place = (<Timer> due[i].timer).place
            child = 4 * place + 1
            place = child + 3
            i += 1
        # From the bottom up, so that below each hole there is a heap to sift through.
        for i in range(count - 1, first - 1, -1):
            place = (<Timer> due[i].timer).place
            heap -= 1
            if place != heap:
                self.down(place, heap, self.keys[heap], PyList_GET_ITEM(self.timers, heap))
        self.heap = heap
        if count > 1:
            aw_due_sort(due, due + self.due_room, count)
        # As new ones, so that nothing is lost if there is no memory for the list.
        for i in range(count):
            place = size - 1 - i
            self.keys[place].when = due[i].when
            self.keys[place].order = due[i].order
            PyList_SET_ITEM(self.timers, place, due[i].timer)
            (<Timer> due[i].timer).place = place
        if count == 1:
            timer = <Timer> due[0].timer
            found = [timer]
            self.timers.pop()
        else:
            found = self.timers[heap:]
            del self.timers[heap:]
        for timer in found:
            timer.place = -1
            timer.queue = None
        if self.room > 1024 and heap < self.room >> 3:
            self.shrink()
        return found

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
        cdef list found = self.take_due(now)
        if found is None:
            return []
        found.reverse()
        return [(<Entry> timer).value if isinstance(timer, Entry) else timer for timer in found]

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

