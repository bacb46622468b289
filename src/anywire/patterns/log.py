"""The publisher's log: each message once, and each subscriber's place in it.

Owns: what was published and not yet handed to every subscriber's channel, bounded in messages and bytes; who is where;
what those who are behind lose. No I/O and no waiting: the publisher moves messages from here into channels.

One log for all subscribers, instead of a queue for each, so that publishing costs the same for one and for sixty-four,
and a message is kept once. A place is a sequence number; what a subscriber lost is a difference of two numbers, so the
count is exact by construction.

Thread-safe: the blocking front publishes from any thread while its service thread feeds the channels.
"""

from __future__ import annotations

import threading
import time

from anywire.patterns.controls import LITERAL, SIZE, SKIPPED, control, looks_like_control

BATCH = 256
"""Messages that go to one channel at a time."""
BATCH_BYTES = 64 << 10
"""Bytes that go to one channel at a time where the oldest may be left out: what is under way no longer can be."""

LITERALLY = control(LITERAL)


class Place:
    """Where one subscriber is. Messages before `at` were handed to its channel."""

    __slots__ = ("at", "gone", "idle", "lost", "sending", "since")

    def __init__(self) -> None:
        self.at = 0
        self.sending = 0
        """Messages from `at` on that are being handed to its channel now."""
        self.lost = 0
        self.idle = False
        """It has all, and waits for the next message."""
        self.gone = False
        self.since = time.monotonic()
        """When it last took something, or began to be behind: monotonic seconds."""


class Log:
    """Messages `base` to `head - 1`, by sequence number."""

    def __init__(self, depth: int, depth_bytes: int, latest: bool) -> None:
        self.depth = depth
        self.depth_bytes = depth_bytes
        self.latest = latest
        self.base = 0
        self.nbytes = 0
        self.lost = 0
        self.places: set[Place] = set()
        self.idle: list[Place] = []
        """Those who wait for a message; whoever puts one in takes them out with `woken` and wakes them."""
        self._messages: list[bytes] = []
        self._literal: set[int] = set()
        self._shut = True
        self._lock = threading.Lock()

    @property
    def head(self) -> int:
        """The sequence number of the next message: how many there were."""
        return self.base + len(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: bytes) -> bool:
        """Publish: False when there is no room, which with `latest` there always is."""
        with self._lock:
            messages = self._messages
            if self._shut:
                return False
            if not self.places:
                self.base += 1
                return True
            if len(messages) >= self.depth or self.nbytes >= self.depth_bytes:
                if not self.latest:
                    return False
                if len(messages) >= self.depth + (self.depth >> 3) + 64 or self.nbytes >= self.depth_bytes:
                    self._make_room()
            if len(message) == SIZE and looks_like_control(message):
                self._literal.add(self.base + len(messages))
            messages.append(message)
            self.nbytes += len(message)
            return True

    def put_many(self, messages: list[bytes], start: int = 0) -> int:
        """Publish messages from this place of the list on: the place of the first that found no room."""
        while start < len(messages) and self.put(messages[start]):
            start += 1
        return start

    def open(self) -> None:
        """Take messages from now on."""
        self._shut = False

    def shut(self) -> None:
        """Take no more messages."""
        with self._lock:
            self._shut = True

    def woken(self) -> list[Place]:
        """Those who waited for a message. They are behind from now on."""
        now = time.monotonic()
        with self._lock:
            idle, self.idle = self.idle, []
            for place in idle:
                place.idle = False
                place.since = now
        return idle

    def batch(self, place: Place) -> list[bytes]:
        """What to hand to this subscriber's channel next, with control messages; call `done` when it was.

        Empty when it has all (then it is idle) or is gone."""
        with self._lock:
            if place.gone:
                return []
            messages = self._messages
            told = []
            if self.latest:
                oldest = max(self.base, self.base + len(messages) - self.depth)
                if place.at < oldest:
                    skipped = oldest - place.at
                    place.at = oldest
                    place.lost += skipped
                    self.lost += skipped
                    told = [control(SKIPPED, skipped)]
            first = place.at - self.base
            batch = messages[first : first + BATCH]
            if self.latest:
                nbytes = 0
                for index, message in enumerate(batch):
                    nbytes += len(message)
                    if nbytes > BATCH_BYTES and index:
                        del batch[index:]
                        break
            place.sending = len(batch)
            if not batch:
                place.idle = True
                self.idle.append(place)
                return batch
            if self._literal:
                batch = [
                    part
                    for number, message in enumerate(batch, place.at)
                    for part in ((LITERALLY, message) if number in self._literal else (message,))
                ]
            return told + batch if told else batch

    def done(self, place: Place) -> None:
        """The last batch was handed to the channel."""
        place.since = time.monotonic()
        with self._lock:
            place.at += place.sending
            place.sending = 0
            if not place.gone:
                self._trim()

    def join(self, place: Place) -> None:
        """A subscriber comes: it gets every message from now on."""
        with self._lock:
            place.at = self.head
            place.since = time.monotonic()
            self.places.add(place)

    def leave(self, place: Place) -> None:
        """A subscriber goes: nobody waits for it any more. Safe to call twice."""
        with self._lock:
            if place.gone:
                return
            place.gone = True
            self.places.discard(place)
            if place.idle:
                self.idle.remove(place)
            self._trim()

    def _trim(self) -> None:
        """Forget what everybody has."""
        least = min([place.at for place in self.places], default=self.head)
        if least > self.base:
            self._forget(least - self.base)

    def _make_room(self) -> None:
        """Forget the oldest, whoever does not have them yet."""
        self._trim()
        count = max(0, len(self._messages) - self.depth)
        nbytes = self.nbytes - sum(map(len, self._messages[:count]))
        while nbytes >= self.depth_bytes and count < len(self._messages):
            nbytes -= len(self._messages[count])
            count += 1
        self._forget(count)

    def _forget(self, count: int) -> None:
        if count == len(self._messages):
            self.nbytes = 0
            self._messages.clear()
        else:
            self.nbytes -= sum(map(len, self._messages[:count]))
            del self._messages[:count]
        self.base += count
        if self._literal:
            self._literal = {number for number in self._literal if number >= self.base}
