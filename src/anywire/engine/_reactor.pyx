# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""A reactor: one place where descriptors, timers, signals and other threads' wishes become calls of handlers.

The pattern is D. C. Schmidt's ("Reactor", Pattern Languages of Program Design, 1995). One turn: wait until something is
ready or due; note all of it as active; call the handlers, those of priority 0 first, equal ones in the order in which they
became active. All that was active is handled before the next wait, so that no priority starves another for longer than
one turn, and no descriptor gets a second call before all others had their first.

A handler may add, change and remove any event, its own included. What it removed isn't called any more, though it was
active; what it asks for less of isn't called with the rest. What a handler raises comes out of `turn` (or goes to
`on_error`); the other active events are handled by the next turn.

One thread runs it. From others: `post` and `stop`, from signal handlers, too. RuntimeError for the rest, as after a fork,
in the child. The reactor owns neither descriptors nor handlers.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport isnan

from anywire.engine._timers cimport monotonic
from anywire.engine._wakeup cimport aw_drain, aw_wake
from anywire.engine.conditions cimport ERROR, HANGUP, ONESHOT, READ

import os
import signal as signals
import threading
from collections import deque

from anywire.engine import demultiplexers
from anywire.engine.conditions import Condition

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()

cdef extern from "<unistd.h>" nogil:
    long getpid()


cdef class WakeWatcher(Watcher):
    cdef int ready(self, uint32_t conditions) except -1:
        aw_drain(&self.wakeup.c)
        return 0


cdef class Posted:
    cdef int run(self) except -1:
        self.function(*self.arguments)
        return 0


cdef class Event(Watcher):
    """A descriptor's event, made by `Reactor.watch`. Its handler is called as handler(event, conditions)."""

    def __init__(self):
        raise TypeError("events are made by Reactor.watch")

    cdef int ready(self, uint32_t conditions) except -1:
        if self.pending and self.activated == self.generation:
            self.pending |= conditions
            return 0
        self.pending = conditions
        self.activated = self.generation
        return self.reactor.activate(self, self.priority)

    cdef int run(self) except -1:
        cdef uint32_t conditions = self.pending & (self.conditions | HANGUP | ERROR)
        self.pending = 0
        # Removed or added anew since: the report was another's. Changed since: what is left of it may be nothing.
        if self.slot < 0 or self.activated != self.generation or conditions == 0 or self.conditions == 0:
            return 0
        if self.once:
            self.reactor.watches.remove(self)
        self.reactor.handled += 1
        self.handler(self, Condition(conditions))
        return 0

    @property
    def watched_for(self):
        """The conditions it is watched for; 0 while it is removed."""
        return Condition(self.conditions if self.slot >= 0 else 0)

    def change(self, conditions, trigger=None):
        """Watch it for other conditions; with the trigger ONESHOT this arms it again.

        Args:
            conditions: 0 keeps it and is silent.
            trigger: None keeps the former one.

        Raises:
            ValueError: it was removed; `add` it.
            OSError: the descriptor isn't open.
        """
        self.reactor.check()
        self.reactor.watches.modify(self, conditions, self.trigger if trigger is None else trigger)

    def add(self, fd, conditions, trigger=0):
        """Watch again after `remove`, or after a call of an event that is watched once. As `Reactor.watch`."""
        self.reactor.check()
        self.reactor.watches.add(self, fd if isinstance(fd, int) else fd.fileno(), conditions, trigger)

    def remove(self):
        """Watch it no longer; before the descriptor is closed. Returns whether it was watched."""
        self.reactor.check()
        return bool(self.reactor.watches.remove(self))

    def activate(self, conditions):
        """Have its handler called in the next turn though the kernel may report nothing: for handlers that stop before
        EAGAIN, so that others get a turn, under an edge trigger.
        """
        self.reactor.check()
        if self.slot >= 0:
            self.reactor.again.append((self, self.generation, <uint32_t> conditions))

    def __repr__(self):
        return f"<Event of descriptor {self.fd} for {self.watched_for!r}>" if self.slot >= 0 else "<Event, removed>"


cdef class TimerEvent(Timer):
    """A timer, made by `Reactor.after`, `at` and `every`. Its handler is called as handler(event, deadline)."""

    def __init__(self):
        raise TypeError("timers are made by Reactor.after, at and every")

    cdef int run(self) except -1:
        cdef double deadline = self.when
        cdef double now
        if not self.due:
            return 0
        self.due = False
        if self.every > 0:
            # On the grid of the first deadline: no drift, and turns that were missed aren't made up for.
            now = monotonic()
            deadline += self.every
            if deadline <= now:
                deadline += self.every * ((now - deadline) // self.every + 1)
            self.reactor.timers.add_timer(self, deadline)
            deadline = self.when
        self.reactor.handled += 1
        self.handler(self, deadline)
        return 0

    def remove(self):
        """Call it no more. Returns whether it would have been called."""
        cdef bint was = self.due
        self.reactor.check()
        self.due = False
        if self.queue is not None:
            was = self.queue.cancel_timer(self) or was
        return bool(was)

    def cancel(self):
        """As `remove`."""
        return self.remove()

    def change(self, seconds):
        """Due so many seconds from now, whether or not it was due, or removed."""
        self.reactor.check()
        self.remove()
        self.reactor.timers.add_timer(self, monotonic() + seconds)

    @property
    def pending(self):
        """Whether its handler is yet to be called."""
        return self.place >= 0 or bool(self.due)

    def __repr__(self):
        return f"<TimerEvent due at {self.when}{'' if self.pending else ', over'}>"


cdef class SignalEvent:
    """A signal, made by `Reactor.signal`. Its handler is called as handler(event, count), where count is how many came
    since the last call (the kernel merges standard signals, too)."""

    def __init__(self):
        raise TypeError("signal events are made by Reactor.signal")

    cdef int run(self) except -1:
        cdef uint64_t count = self.count
        self.count = 0
        if count == 0 or self.reactor.signals.get(self.number) is not self:
            return 0
        if self.once:
            self.remove()
        self.reactor.handled += 1
        self.handler(self, count)
        return 0

    def remove(self):
        """Give the signal back to the handler from before. Returns whether it was handled here."""
        self.reactor.check()
        if self.reactor.signals.get(self.number) is not self:
            return False
        del self.reactor.signals[self.number]
        signals.signal(self.number, self.former)
        if not self.reactor.signals:
            signals.set_wakeup_fd(self.reactor.former_wakeup_fd)
            self.reactor.watches.remove(self.reactor.signal_watcher)
            self.reactor.signal_wakeup.close()
            self.reactor.signal_wakeup = None
        return True

    def __repr__(self):
        return f"<SignalEvent of {signals.Signals(self.number).name}>"


cdef class Reactor:
    """Calls handlers when descriptors are ready, timers are due, signals come, or other threads ask.

    Args:
        demultiplexer: an empty one; None takes the platform's best.
        priorities: how many there are; 0 is the most urgent, events get the middle one.
        on_error: called as on_error(event, error) with what a handler raised (Exception only); None lets it out of `turn`.

    >>> reactor = Reactor()
    >>> timer = reactor.after(0.001, lambda event, deadline: print("due"))
    >>> reactor.run()
    due
    >>> reactor.close()
    """

    def __cinit__(self, demultiplexer=None, int priorities=3, on_error=None):
        if priorities < 1:
            raise ValueError("a reactor has at least one priority")
        self.process = getpid()
        self.watches = Watches(demultiplexers.default() if demultiplexer is None else demultiplexer)
        self.timers = TimerQueue()
        self.priorities = priorities
        self.on_error = on_error
        self.posted = deque()
        self.again = deque()
        self.active = [deque() for _ in range(priorities)]
        self.signals = {}
        self.wakeup = Wakeup()
        self.wake_watcher = self.watch_wakeup(self.wakeup)

    def watch_wakeup(self, Wakeup wakeup not None):
        cdef WakeWatcher watcher = WakeWatcher()
        watcher.wakeup = wakeup
        self.watches.add(watcher, wakeup.c.read_fd, READ, 0)
        return watcher

    cdef int check(self) except -1:
        cdef long thread
        if self.is_closed:
            raise ValueError("this reactor is closed")
        if self.thread:
            thread = <long> PyThread_get_thread_ident()
            if thread != self.thread:
                raise RuntimeError("another thread runs this reactor; let it do this: reactor.post(function, *arguments)")
        return 0

    cdef int activate(self, object event, int priority) except -1:
        (<object> self.active[priority]).append(event)
        self.active_count += 1
        return 0

    def level_of(self, priority):
        if priority is None:
            return self.priorities // 2
        if not 0 <= priority < self.priorities:
            raise ValueError(f"priority {priority}: this reactor has 0 (urgent) to {self.priorities - 1}")
        return priority

    def watch(self, fd, conditions, handler, *, once=False, trigger=0, priority=None):
        """Call `handler(event, conditions)` when a descriptor is ready.

        Args:
            fd: its number, or an object with fileno(). One event for each; it stays the caller's.
            conditions: of `Condition`; HANGUP and ERROR come unasked.
            handler: any callable. `event.handler` may be set to another one later.
            once: watch it no longer as soon as the handler is called.
            trigger: of `Trigger`.
            priority: 0 is the most urgent; None, the middle.

        Returns:
            An `Event`, watched until it is removed.

        Raises:
            FileExistsError: another event watches the descriptor.
            OSError: it isn't open (EBADF), or can't be waited for (EPERM).
        """
        cdef Event event = Event.__new__(Event)
        self.check()
        event.reactor = self
        event.handler = handler
        event.priority = self.level_of(priority)
        event.once = once
        self.watches.add(event, fd if isinstance(fd, int) else fd.fileno(), conditions, trigger)
        return event

    cdef TimerEvent timer(self, double when, double every, object handler, object priority):
        cdef TimerEvent event = TimerEvent.__new__(TimerEvent)
        self.check()
        event.reactor = self
        event.handler = handler
        event.every = every
        event.priority = self.level_of(priority)
        self.timers.add_timer(event, when)
        return event

    def after(self, double seconds, handler, *, priority=None):
        """Call `handler(event, deadline)` once, in so many seconds. Returns a `TimerEvent`. ValueError: NaN."""
        return self.timer(monotonic() + seconds, 0, handler, priority)

    def at(self, double when, handler, *, priority=None):
        """Call `handler(event, deadline)` once, when time.monotonic() has reached `when`. Returns a `TimerEvent`."""
        return self.timer(when, 0, handler, priority)

    def every(self, double seconds, handler, *, priority=None):
        """Call `handler(event, deadline)` every so many seconds, without drift; turns that were missed are left out.

        Returns a `TimerEvent`. ValueError: not above 0.
        """
        if not seconds > 0 or seconds == float("inf"):
            raise ValueError(f"every {seconds} s: a period is above 0, and finite")
        return self.timer(monotonic() + seconds, seconds, handler, priority)

    def signal(self, number, handler, *, once=False, priority=None):
        """Call `handler(event, count)` after a signal came, as an event among others, not in the middle of something.

        Args:
            number: of `signal.Signals`.

        Returns:
            A `SignalEvent`; removing it gives the signal back to the former handler.

        Raises:
            ValueError: this isn't the main thread (only there Python's handlers run), or the signal can't be handled.
            FileExistsError: another event here has it.
        """
        cdef SignalEvent event = SignalEvent.__new__(SignalEvent)
        self.check()
        if number in self.signals:
            raise FileExistsError(f"{signals.Signals(number).name} has an event here already; remove it first")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Python handles signals in its main thread only: run the reactor there")
        event.reactor = self
        event.handler = handler
        event.number = number
        event.once = once
        event.priority = self.level_of(priority)
        if self.signal_wakeup is None:
            # Not the reactor's own wakeup: C code writes single bytes there, which an eventfd doesn't take.
            self.signal_wakeup = Wakeup("socketpair")
            self.former_wakeup_fd = signals.set_wakeup_fd(self.signal_wakeup.write_fd, warn_on_full_buffer=False)
            self.signal_watcher = self.watch_wakeup(self.signal_wakeup)
        try:
            event.former = signals.signal(number, event_noter(event))
        except BaseException:
            if not self.signals:
                signals.set_wakeup_fd(self.former_wakeup_fd)
                self.watches.remove(self.signal_watcher)
                self.signal_wakeup.close()
                self.signal_wakeup = None
            raise
        signals.siginterrupt(number, False)
        self.signals[number] = event
        return event

    def post(self, function, *arguments):
        """Have the reactor's thread call `function(*arguments)`, in the order of the posts. From any thread, and from
        signal handlers. ValueError: the reactor is closed.
        """
        if self.is_closed:
            raise ValueError("this reactor is closed")
        cdef Posted posted = Posted()
        posted.function = function
        posted.arguments = arguments
        self.posted.append(posted)
        aw_wake(&self.wakeup.c)

    def stop(self):
        """Have `run` return when the handlers that are active now are done. From any thread."""
        self.stopping = True
        if not self.is_closed:
            aw_wake(&self.wakeup.c)

    def run(self):
        """Take turns until `stop`, or until there is no event left that anything could come from. A `post` from another
        thread alone is no reason to stay: keep an event, as servers do."""
        while not self.stopping:
            if self.watches.count <= 1 and len(self.timers) == 0 and not self.posted and not self.active_count \
                    and not self.again:
                break
            self.c_turn(-1)
        self.stopping = False

    def turn(self, timeout=None):
        """Wait once and call the handlers of what is ready.

        Args:
            timeout: how long to wait at most, in seconds; None, until something happens; 0 doesn't wait.

        Returns:
            How many handlers were called.
        """
        cdef uint64_t before = self.handled
        cdef int64_t ns = -1
        if timeout is not None:
            if isnan(timeout):
                raise ValueError("a time-out of NaN is none; None waits until something happens")
            ns = 0 if timeout <= 0 else <int64_t> -(-min(timeout, 3e7) * 1e9 // 1)
        self.c_turn(ns)
        return self.handled - before

    cdef int c_turn(self, int64_t timeout_ns) except -1:
        cdef int64_t until
        cdef TimerEvent timer
        cdef Timer due
        cdef Event event
        cdef double now
        cdef Py_ssize_t count
        cdef long outer = self.thread
        self.check()
        if self.process != getpid():
            raise RuntimeError(f"this reactor belongs to process {self.process}; after a fork, make a new one")
        self.thread = <long> PyThread_get_thread_ident()
        try:
            self.turns += 1
            if self.active_count or self.again or self.posted or self.stopping:
                timeout_ns = 0
            elif len(self.timers):
                until = self.timers.timeout_ns(monotonic())
                if until >= 0 and (timeout_ns < 0 or until < timeout_ns):
                    timeout_ns = until
            # Signal handlers of Python's run here and after the wait: no bytecode may run between two turns.
            PyErr_CheckSignals()
            count = self.watches.wait(0 if self.active_count else timeout_ns)
            self.watches.dispatch(<int> count)
            PyErr_CheckSignals()
            if len(self.timers):
                now = monotonic()
                while True:
                    due = self.timers.pop_due(now)
                    if due is None:
                        break
                    timer = <TimerEvent?> due
                    timer.due = True
                    self.activate(timer, timer.priority)
            for _ in range(len(self.again)):
                event, generation, conditions = self.again.popleft()
                if event.slot >= 0 and event.generation == generation:
                    event.ready(conditions)
            # Only those that are here now: one that posts itself anew waits for the next turn.
            for _ in range(len(self.posted)):
                self.activate(self.posted.popleft(), self.priorities // 2)
            self.handle()
        finally:
            self.thread = outer
        return 0

    cdef int handle(self) except -1:
        """Call the handlers of all that is active now, the urgent ones first. What comes to be active meanwhile (by a turn
        within a handler) is handled, too."""
        cdef object event
        cdef object ready
        cdef int level = 0
        while level < self.priorities:
            ready = self.active[level]
            if not ready:
                level += 1
                continue
            event = ready.popleft()
            self.active_count -= 1
            try:
                if type(event) is Event:
                    (<Event> event).run()
                elif type(event) is TimerEvent:
                    (<TimerEvent> event).run()
                elif type(event) is SignalEvent:
                    (<SignalEvent> event).run()
                else:
                    (<Posted> event).run()
                    self.handled += 1
            except Exception as error:
                if self.on_error is None:
                    raise
                self.on_error(event, error)
            if self.active_count == 0:
                break
            level = 0
        return 0

    @property
    def closed(self):
        """Whether `close` was called."""
        return bool(self.is_closed)

    @property
    def wake_writes(self):
        """How many writes all posts and stops so far have cost."""
        return self.wakeup.writes

    def close(self):
        """Forget all events, give signals back, release what the kernel holds. Descriptors stay open."""
        cdef TimerEvent event
        if self.is_closed:
            return
        self.check()
        for event_of_signal in list(self.signals.values()):
            event_of_signal.remove()
        self.watches.close()
        self.timers = TimerQueue()
        self.is_closed = True
        self.posted.clear()
        self.again.clear()
        for ready in self.active:
            ready.clear()
        self.active_count = 0
        self.wakeup.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        state = "closed" if self.is_closed else f"{self.watches.count} descriptors, {len(self.timers)} timers"
        return f"<Reactor on {self.watches.demultiplexer.name}, {state}>"


def event_noter(SignalEvent event):
    """What Python calls, between two of its instructions: it notes, and the wakeup's byte ends the wait."""

    def note(number, frame):
        if event.count == 0:
            event.reactor.activate(event, event.priority)
        event.count += 1

    return note
