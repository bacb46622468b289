# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""What a loop that polls before it sleeps can look at without a system call: memory that another process writes.

A demultiplexer costs a system call a look, and whoever makes a descriptor ready pays another one. Who has something that
tells sooner derives from `Poller`. While the loop polls it asks `here`; so nobody has to ring for it. Before it sleeps it
calls `arm`: from then on a watched descriptor must become ready when something comes.

One object, one thread. What can go wrong: what `ready` raises ends the delivery, as that of a watcher does.
"""

cdef extern from *:
    """
    #if defined(__x86_64__) || defined(__i386__)
    #define anywire_relax() __builtin_ia32_pause()
    #elif defined(__aarch64__)
    #define anywire_relax() __asm__ __volatile__("isb")
    #else
    #define anywire_relax() ((void) 0)
    #endif
    """
    void relax "anywire_relax"() noexcept

cdef enum:
    LOOKS = 24                      # of a glance: about a microsecond, three times what a look at the kernel costs


cdef class Poller:
    """Something to look at. Cython classes override its three functions; see the module."""

    cdef bint here(self) noexcept:
        return False

    cdef bint arm(self) noexcept:
        return False

    cdef int ready(self) except -1:
        return 0


cdef class Pollers:
    """Those that a loop looks at: at most MOST_POLLERS, so that a look at all of them stays a short one."""

    def __cinit__(self):
        self.pollers = []

    cdef bint add(self, Poller poller) except -1:
        """Whether it is looked at from now on."""
        if len(self.pollers) >= MOST_POLLERS:
            return False
        self.pollers.append(poller)
        return True

    cdef int remove(self, Poller poller) except -1:
        """Look at it no longer; nothing if nobody did."""
        if poller in self.pollers:
            self.pollers.remove(poller)
        return 0

    cdef Py_ssize_t size(self) noexcept:
        return len(self.pollers)

    cdef bint glance(self) noexcept:
        """Look at all of them for about a microsecond: whether something is here."""
        cdef int look
        cdef Py_ssize_t i, count = len(self.pollers)
        for look in range(1 if count > LOOKS else LOOKS):
            for i in range(count):
                if (<Poller> self.pollers[i]).here():
                    return True
            relax()
        return False

    cdef bint arm(self) noexcept:
        """The loop is about to sleep. True: it must not, something is here."""
        cdef Py_ssize_t i
        for i in range(len(self.pollers)):
            if (<Poller> self.pollers[i]).arm():
                return True
        return False

    cdef int deliver(self) except -1:
        """Tell all for whom something is here. They may add and remove."""
        cdef Poller poller
        cdef Py_ssize_t i = 0
        while i < len(self.pollers):
            poller = self.pollers[i]
            i += 1
            if poller.here():
                poller.ready()
        return 0
