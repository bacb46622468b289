"""What a pull end has received and not handed to its caller yet, and what it owes confirmations for.

Owns: a queue for each pusher, bounded by its window, from which messages are taken in turns; and the counts of what was
taken. No I/O and no waiting. Thread-safe: on the blocking front the caller takes while the service thread adds.

A message is confirmed when the caller comes back for another one: then it is done with it, or has it at least. What a
process that died had in its hands is therefore among what the pusher is told as unconfirmed.
"""

from __future__ import annotations

import collections
import threading
import time

MOST_BYTES = 16 << 20
"""Bytes of one pusher that wait here before it is not read any more."""
SOON = 0.001
"""Seconds; a caller that was away for longer has its messages confirmed at once when it comes back."""


class Giver:
    """One pusher: what came from it."""

    __slots__ = ("done", "full", "messages", "nbytes", "over", "taken", "told", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.messages: collections.deque[bytes] = collections.deque()
        self.nbytes = 0
        self.full = False
        """So many bytes wait that its channel is to be read no further."""
        self.taken = 0
        self.done = 0
        """How many of these the caller came back from."""
        self.told = 0
        """How many it was told were taken."""
        self.over = False


class Inbox:
    """Messages of several pushers."""

    def __init__(self) -> None:
        self.received = 0
        self._ready: collections.deque[Giver] = collections.deque()
        self._owed: set[Giver] = set()
        self._telling: set[Giver] = set()
        self._due = False
        self._relieved = False
        self._taken_at = 0.0
        self._back: collections.deque[bytes] = collections.deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum([len(giver.messages) for giver in list(self._ready)]) + len(self._back)

    def add(self, giver: Giver, messages: list[bytes]) -> bool:
        """Messages came: False when they are more than this pusher may have outstanding."""
        with self._lock:
            if not messages:
                return True
            had = bool(giver.messages)
            giver.messages.extend(messages)
            giver.nbytes += sum(map(len, messages))
            giver.full = giver.nbytes > MOST_BYTES
            self.received += len(messages)
            if not had:
                self._ready.append(giver)
            return len(giver.messages) + giver.taken - giver.told <= giver.window

    def take(self, limit: int = 1) -> list[bytes]:
        """Up to so many messages, from the pushers in turns."""
        out: list[bytes] = []
        with self._lock:
            while self._back and len(out) < limit:
                out.append(self._back.popleft())
            while self._ready and len(out) < limit:
                giver = self._ready.popleft()
                message = giver.messages.popleft()
                out.append(message)
                giver.taken += 1
                giver.nbytes -= len(message)
                if giver.full and giver.nbytes <= MOST_BYTES // 2:
                    giver.full = False
                    self._relieved = True
                if giver.messages:
                    self._ready.append(giver)
                if not giver.over:
                    self._owed.add(giver)
                    if 2 * (giver.taken - giver.told) >= giver.window:
                        self._due = True
            if out:
                self._taken_at = time.monotonic()
        return out

    def give_back(self, messages: list[bytes]) -> None:
        """Messages that were taken and not handed out are the next ones again."""
        with self._lock:
            self._back.extendleft(reversed(messages))

    def settle(self) -> bool:
        """The caller comes back: whether pushers are to be attended to now.

        They are to be told what was taken when much is owed, nothing is here, or the caller was away; and who was full
        is to be read again."""
        if self._relieved:
            self._relieved = False
            self._due = True
        if not self._owed:
            return False
        with self._lock:
            if not self._due and self._ready and time.monotonic() - self._taken_at <= SOON:
                return False
            for giver in self._owed:
                giver.done = giver.taken            # now: the next message is taken before a thread gets to tell it
            self._telling |= self._owed
            self._owed = set()
            self._due = False
        return True

    def owed(self) -> list[Giver]:
        """The pushers to be told now how many messages were `done`; `told` is to follow."""
        with self._lock:
            owed, self._telling = list(self._telling), set()
        return owed

    def drop(self, giver: Giver) -> None:
        """This pusher needs no confirmations any more. What came from it stays."""
        with self._lock:
            giver.over = True
            self._owed.discard(giver)
            self._telling.discard(giver)
