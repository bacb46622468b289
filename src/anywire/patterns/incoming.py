"""What a subscriber makes of what its channel brings: messages, losses, the end.

Owns: the meaning of the publisher's control messages, the count of lost messages, and what a batch left over. No I/O;
both fronts, the subscription's thread. What can go wrong is told by errors: MessagesLost, TooSlow, TooLarge, PeerLost.
"""

from __future__ import annotations

import collections
import copy
import math
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from anywire.contract import blocking, channel
from anywire.contract.address import Address
from anywire.contract.counters import Stats
from anywire.contract.errors import AnywireError, BadFrame, EndOfChannel, MessagesLost, PeerLost, TooLarge, TooSlow
from anywire.contract.peer import Peer
from anywire.patterns.controls import (
    END,
    LATEST,
    LEAVING,
    LITERAL,
    PUBLISH,
    SIZE,
    SKIPPED,
    STALLED,
    TAKEN,
    TOO_LARGE,
    control,
    greeting_of,
    looks_like_control,
    read,
)

FEW = 64
"""Small messages that `recv` takes from the channel at a time, ..."""
SMALL = 4096
"""... which are those of at most so many bytes."""

Losses: TypeAlias = Literal["raise", "count"]


class Incoming:
    """One subscription's messages."""

    def __init__(self, address: object, losses: Losses, limit: int) -> None:
        if losses not in ("raise", "count"):
            raise ValueError(f"losses is 'raise' or 'count', not {losses!r}")
        self.address = str(address)
        self.lost = 0
        """Messages that this subscriber lost so far."""
        self.latest = False
        self.ahead: collections.deque[bytes] = collections.deque()
        """What came in a batch after the messages that were handed out."""
        self.over: AnywireError | None = None
        """Why nothing more comes."""
        self.tell: Callable[[int], object] = lambda kind: None
        """Sends a control message to the publisher, best effort."""
        self._raises = losses == "raise"
        self._limit = limit
        self._literal = False
        self._stall_timeout = 0.0
        self.report_at = math.inf
        """When to tell the publisher again that messages are taken, as the caller wants one: monotonic seconds.

        The kernel may hold hours of messages for a slow subscriber; the publisher must not take that for a stop."""
        self.size = 0
        """Bytes of the last message: small ones are taken from the channel in batches."""

    def greeted(self, message: bytes) -> None:
        """The publisher's first message. Raises Refused, BadFrame."""
        told = greeting_of(message, PUBLISH, self.address, "subscribe")
        self.latest = bool(told.flags & LATEST)
        self._stall_timeout = told.number / 1000
        if self._stall_timeout:
            self.report_at = time.monotonic() + self._stall_timeout / 4

    def report(self) -> None:
        """Tell the publisher that this side takes messages."""
        self.report_at = time.monotonic() + self._stall_timeout / 4
        if self.over is None:
            self.tell(TAKEN)

    def is_message(self, message: bytes, operation: str) -> bool:
        """Whether these bytes are for the caller. If not, they were understood: raises what they tell."""
        if len(message) != SIZE or self._literal or not looks_like_control(message):
            self._literal = False
            return True
        told = read(message)
        if told.kind == LITERAL:
            self._literal = True
        elif told.kind == SKIPPED:
            self.lost += told.value
            if self._raises:
                raise MessagesLost(told.value, address=self.address, operation=operation)
        elif told.kind == END:
            self.end(EndOfChannel("the publisher ended", address=self.address))
            self.tell(LEAVING)              # all was taken: the publisher need not wait for this side's close
        elif told.kind == STALLED:
            self.end(TooSlow(told.value / 1000, address=self.address))
        elif told.kind == TOO_LARGE:
            self.end(TooLarge(told.value, self._limit, address=self.address))
        else:
            self.end(BadFrame("the publisher sent what this version does not know", address=self.address))
        if self.over is not None:
            raise self.failure(operation)
        return False

    def has_controls(self, batch: list[bytes]) -> bool:
        """Whether some of these may be control messages: a quick look."""
        return self._literal or (SIZE in map(len, batch) and any(map(looks_like_control, batch)))

    def from_ahead(self, limit: int, operation: str) -> list[bytes]:
        """Messages of those ahead, up to what the publisher told between them; raises that if it comes first."""
        out: list[bytes] = []
        ahead = self.ahead
        while ahead and len(out) < limit:
            if out and not self._literal and looks_like_control(ahead[0]):
                break
            message = ahead.popleft()
            if self.is_message(message, operation):
                out.append(message)
        return out

    def end(self, error: AnywireError) -> None:
        """Nothing more comes."""
        if self.over is None:
            self.over = error

    def ended(self, error: AnywireError) -> AnywireError:
        """The channel ended, or failed: what to raise. A publisher says END before it closes."""
        if self.over is not None:
            return error
        if isinstance(error, EndOfChannel):
            error = PeerLost("the publisher went away without an end", address=self.address)
        if isinstance(error, PeerLost):
            if self._stall_timeout:
                error.advice = (
                    "subscribe again; a subscriber that takes no message for "
                    f"stall_timeout={self._stall_timeout:g} s is dropped"
                )
            self.end(error)
        return error

    def failure(self, operation: str) -> AnywireError:
        """Why nothing more comes, to raise once more."""
        assert self.over is not None
        error = copy.copy(self.over)
        error.operation = operation
        return error


class Face:
    """What a subscription of either front shows of itself; the fronts add the waiting."""

    _channel: channel.Channel | blocking.Channel

    def __init__(self, channel: channel.Channel | blocking.Channel, incoming: Incoming) -> None:
        self._channel = channel
        self._incoming = incoming
        incoming.tell = self._tell

    @property
    def lost(self) -> int:
        """Messages that were left out for this subscriber so far, because it was behind."""
        return self._incoming.lost

    @property
    def address(self) -> Address:
        """The address of the connection."""
        return self._channel.address

    @property
    def peer(self) -> Peer:
        """Who publishes, as far as the wire tells."""
        return self._channel.peer

    @property
    def closed(self) -> bool:
        """Whether this side has closed."""
        return self._channel.closed

    def stats(self) -> Stats:
        """The counters of the channel below."""
        return self._channel.stats()

    def _tell(self, kind: int) -> None:
        try:
            self._channel.try_send(control(kind))
        except (AnywireError, OSError):
            pass                            # the next receive meets it, after what came before
