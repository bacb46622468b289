# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""What a connection shows of itself (address, peer, traits, counters), whichever front waits on it.

The base of the async and the blocking front, which add the waiting. No I/O here; used on the front's threads.
What can go wrong: use after this side closed it, or after a fork (`check`); a connection that nobody closed is reported.
"""
from dataclasses import asdict

from cpython.exc cimport PyErr_WarnEx
from anywire.contract cimport counters
from anywire.contract.endpoint cimport MessageEndpoint, RawEndpoint, fork_generation

from anywire.contract.errors import AnywireError, ChannelClosed
from anywire.contract.handle import Handle


cdef int name_operation(object error, str operation) except -1:
    """An endpoint doesn't know what its caller was about, and says "use": name it in the error that the caller gets."""
    if isinstance(error, AnywireError) and error.operation == "use":
        error.operation = operation
    return 0


cdef class Face:
    """The half of a channel or stream that does not wait; not made by users."""

    def __dealloc__(self):
        if self.end is not None and not self.end.closed and self.end.generation == fork_generation():
            PyErr_WarnEx(ResourceWarning, "a channel or stream was never closed", 1)

    @property
    def address(self):
        """The address of the connection."""
        return self.end.address

    @property
    def peer(self):
        """Who is at the other end, as far as the wire tells."""
        return self.end.peer

    @property
    def traits(self):
        """What this wire promises."""
        return self.end.wire.traits(self.end.address)

    @property
    def closed(self):
        """Whether this side has closed (or is closing)."""
        return self.closing or self.end.closed

    @property
    def unconfirmed(self):
        """Messages sent and not known to have been handed to the peer's application."""
        return self.end.unconfirmed

    @property
    def endpoint(self):
        """The endpoint below, for wires and tools."""
        return self.end

    def stats(self):
        """This connection's counters, read from the process's counters page."""
        return counters.read_slot(self.end.slot)

    def when_closed(self, callback):
        """Call `callback(self)` once when this connection is over (used by servers)."""
        self.on_close = callback

    def detach(self):
        """Take the connection out of this object, for another process or front: a Handle; see `anywire.attach`.

        Nothing may be under way. Raises Busy, Unsupported (a wire whose state can't leave the process), ChannelClosed."""
        face = "stream" if isinstance(self.end, RawEndpoint) else "channel"
        address = str(self.end.address)
        peer = self.end.peer
        kind, fds, state = self.detach_state()
        state["peer"] = None if peer is None else asdict(peer)
        return Handle(face, face, kind, address, fds, state)

    def __repr__(self):
        state = "closed" if self.closed else "lost" if self.end.broken else "open"
        return f"<{type(self).__module__}.{type(self).__name__} {self.end.address} {state}>"

    cdef int check(self, str operation) except -1:
        try:
            self.end.check()
        except AnywireError as error:
            name_operation(error, operation)
            raise
        if self.closing:
            raise ChannelClosed("it is being closed on this side", address=str(self.end.address), operation=operation)
        return 0

    cdef int told_over(self) except -1:
        """Tell whoever asked with `when_closed`."""
        if self.on_close is not None:
            callback, self.on_close = self.on_close, None
            callback(self)
        return 0
