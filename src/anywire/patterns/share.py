"""What a push end hands out: which puller has room, what each has not confirmed yet.

Owns: the messages from `put` until their puller confirmed them, at most `window` for each puller. No I/O, no waiting.
A message is assigned when it is put in, round robin among those with room; so a slow puller holds up its own few.

Thread-safe: the blocking front puts messages in from any thread while its service thread feeds the channels.

What can go wrong: a puller is lost. What its channel had begun to send may have been handed to it: `leave` returns
those, and they are given to nobody else. What certainly was not handed to it goes to others, before anything new: so
each message goes to one puller at most.
"""

from __future__ import annotations

import collections
import threading

from anywire.patterns.controls import LITERAL, control, looks_like_control

LITERALLY = control(LITERAL)


class Taker:
    """One puller: what it was assigned and has not confirmed."""

    __slots__ = ("confirmed", "gone", "idle", "queue", "ready", "sent", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        """Most messages that may be outstanding."""
        self.queue: collections.deque[bytes] = collections.deque()
        """Assigned; its channel has not begun with them."""
        self.sent: collections.deque[bytes] = collections.deque()
        """Given to its channel."""
        self.confirmed = 0
        self.idle = False
        self.ready = False
        self.gone = False

    def has_room(self) -> bool:
        return len(self.queue) + len(self.sent) < self.window


class Share:
    """Messages and their pullers."""

    def __init__(self) -> None:
        self.takers: set[Taker] = set()
        self.put_in = 0
        self.confirmed = 0
        self.lost = 0
        self.idle: list[Taker] = []
        """Those who were idle and got something; whoever put it in takes them out with `woken` and wakes them."""
        self._returned: collections.deque[bytes] = collections.deque()
        self._ready: collections.deque[Taker] = collections.deque()
        self._shut = True
        self._lock = threading.Lock()

    @property
    def outstanding(self) -> int:
        """Messages put in that are neither confirmed nor told as lost."""
        return self.put_in - self.confirmed - self.lost

    def put(self, message: bytes) -> bool:
        """Assign a message: False when nobody has room."""
        with self._lock:
            if self._shut or not self._ready:
                return False
            self.put_in += 1
            self._assign(message)
            return True

    def open(self) -> None:
        """Take messages from now on."""
        self._shut = False

    def shut(self) -> None:
        """Take no more messages."""
        with self._lock:
            self._shut = True

    def woken(self) -> list[Taker]:
        """Those who were idle and have something to send now."""
        with self._lock:
            idle, self.idle = self.idle, []
        return idle

    def batch(self, taker: Taker) -> list[bytes]:
        """What to hand to this puller's channel next, with control messages. Empty: it is idle now, or gone."""
        with self._lock:
            if not taker.queue or taker.gone:
                taker.idle = not taker.gone
                return []
            batch = list(taker.queue)
            taker.queue.clear()
            taker.sent.extend(batch)
        if any(map(looks_like_control, batch)):
            return [part for one in batch for part in ((LITERALLY, one) if looks_like_control(one) else (one,))]
        return batch

    def taken(self, taker: Taker, total: int) -> bool:
        """A puller says how many it has taken so far: False when that can't be."""
        with self._lock:
            count = total - taker.confirmed
            if not 0 <= count <= len(taker.sent):
                return False
            for _ in range(count):
                taker.sent.popleft()
            taker.confirmed = total
            self.confirmed += count
            self._offer(taker)
            self._hand_on()
            return True

    def join(self, taker: Taker) -> None:
        """A puller comes."""
        with self._lock:
            self.takers.add(taker)
            self._offer(taker)
            self._hand_on()

    def leave(self, taker: Taker, *, surely: bool) -> list[bytes]:
        """A puller goes: the messages that may have been handed to it. `surely`: it said how many it took in all."""
        with self._lock:
            if taker.gone:
                return []
            taker.gone = True
            self.takers.discard(taker)
            if taker.ready:
                self._ready.remove(taker)
            if taker in self.idle:
                self.idle.remove(taker)
            lost = [] if surely else list(taker.sent)
            back = [*taker.sent, *taker.queue] if surely else taker.queue
            self._returned.extendleft(reversed(back))
            taker.queue = collections.deque()
            taker.sent = collections.deque()
            self.lost += len(lost)
            self._hand_on()
            return lost

    def give_up(self) -> list[bytes]:
        """What is assigned to nobody, and never will be."""
        with self._lock:
            left = list(self._returned)
            self._returned.clear()
            self.lost += len(left)
            return left

    def _offer(self, taker: Taker) -> None:
        if not taker.ready and not taker.gone and taker.has_room():
            taker.ready = True
            self._ready.append(taker)

    def _hand_on(self) -> None:
        while self._returned and self._ready:
            self._assign(self._returned.popleft())

    def _assign(self, message: bytes) -> None:
        taker = self._ready.popleft()
        taker.queue.append(message)
        if taker.has_room():
            self._ready.append(taker)
        else:
            taker.ready = False
        if taker.idle:
            taker.idle = False
            self.idle.append(taker)
