"""A publisher whose subscribers on one wire read the same memory: each message is written once for all of them.

Owns: who of the subscribers reads the wire's `Broadcast`, and the watch for those who stop reading it. The others
(other wires, plain channels, a connection that fell back) get the messages from the log, as from any publisher; a
message goes to both or to neither. Threads as for `publishing.py`.

What can go wrong: what can for any publisher, and a reader that breaks the rules of the shared memory: dropped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from typing import Any

from anywire.contract.endpoint import Loan
from anywire.contract.errors import TooLarge
from anywire.contract.wire import Broadcast, Latest
from anywire.patterns.controls import END, LATEST, PUBLISH, SKIPPED, control
from anywire.patterns.log import LITERALLY, Log
from anywire.patterns.publishing import Publisher, PublisherStats, _Subscriber
from anywire.patterns.turns import Turns


class SharedLog(Log):
    """A log beside a broadcast. What went there is not kept here, unless somebody else needs it."""

    def __init__(self, depth: int, depth_bytes: int, broadcast: Broadcast, latest: bool) -> None:
        super().__init__(depth, depth_bytes, latest)
        self._broadcast = broadcast
        self._writing = threading.Lock()

    def put(self, message: bytes) -> bool:
        """Publish to both: False when one has no room."""
        with self._writing:
            if self._shut:
                return False
            if self.places and not self.latest and (len(self) >= self.depth or self.nbytes >= self.depth_bytes):
                return False
            if not self._broadcast.put(message, LITERALLY):
                return False
            with self._lock:
                if not self.places:                                 # the usual case, without a second call
                    self.base += 1
                    return True
            return self._keep(message)

    def put_many(self, messages: list[bytes], start: int = 0) -> int:
        """Publish to both, and wake each reader once."""
        with self._writing:
            if not self._shut and not self.places:
                done = self._broadcast.put_many(messages, start, LITERALLY)
                if not self._pass(done - start):                    # somebody came meanwhile
                    for message in messages[start:done]:
                        self._keep(message)
                return done
        return super().put_many(messages, start)

    def _keep(self, message: bytes) -> bool:
        return super().put(message if not self.places or type(message) is bytes else bytes(message))

    def _pass(self, count: int) -> bool:
        """So many messages went that nobody needs from here: False if somebody does."""
        with self._lock:
            if not self.places:
                self.base += count
            return not self.places

    def shut(self) -> None:
        """Take no more messages."""
        with self._writing:
            super().shut()

    def end(self) -> bool:
        """Tell the readers that all was sent: False when there is no room for that now."""
        with self._writing:
            return self._broadcast.put(control(END))

    def pump(self) -> None:
        """There may be room."""
        with self._writing:
            self._broadcast.pump()


class SharingPublisher(Publisher):
    """The publisher of an address whose wire broadcasts."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._broadcast: Broadcast | None = None
        self._readers: dict[Any, _Subscriber] = {}
        self._refused = 0
        self._ending = Turns()
        self._ended = False
        self._watching: asyncio.TimerHandle | None = None
        self._watch_soon = False
        self._look_again_at = 0.0

    async def start(self) -> Publisher:
        """Listen. `async with` does this."""
        await super().start()                           # nobody is accepted before this task waits
        if self._broadcast is None and self._server._listener is not None:
            latest = None
            greeting = control(PUBLISH, number=int(self._stall_timeout * 1000))
            if self.mode == "latest":
                greeting = control(PUBLISH, flags=LATEST)
                told = control(SKIPPED) + LITERALLY
                latest = Latest(self._log.depth, self._log.depth_bytes, self.max_message, told)
            for acceptor in self._server._listener._acceptors:
                broadcast = acceptor.broadcast(greeting, latest)
                if broadcast is not None:
                    self._share(broadcast)
                    break                               # a message must go to all or to none: so there is one
        return self

    def _share(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._shared_log = SharedLog(self._log.depth, self._log.depth_bytes, broadcast, self._log.latest)
        self._shared_log.open()
        self._log = self._shared_log
        self._loop = asyncio.get_running_loop()
        broadcast.when_room = self._room
        broadcast.when_full = self._full
        broadcast.when_bad = self._bad

    def loan(self, nbytes: int) -> Loan:
        """Writable memory for one message; in the memory that the subscribers read, where there is place."""
        self._check_open("loan")
        return super().loan(nbytes) if self._broadcast is None else self._broadcast.loan(nbytes)

    def _checked(self, message: Any, operation: str) -> bytes:
        if self._broadcast is not None and type(message) is not bytes:
            lent = self._broadcast.lent(message)
            if lent is not None and len(lent) <= self.max_message:
                self._check_open(operation)
                return lent  # type: ignore[no-any-return]  # the broadcast takes it, and the log makes bytes of it
        return super()._checked(message, operation)

    def _shares(self, subscriber: _Subscriber) -> bool:
        return self._broadcast is not None and self._broadcast.has(subscriber.channel.endpoint)

    def stats(self) -> PublisherStats:
        """What happened so far."""
        if self._broadcast is None:
            return super().stats()
        self._counts["refused"] += self._broadcast.refused - self._refused
        self._refused = self._broadcast.refused
        stats = super().stats()
        queued, nbytes = self._broadcast.behind()
        return dataclasses.replace(
            stats,
            lost=stats.lost + self._broadcast.lost,
            queued=max(stats.queued, queued),
            queued_bytes=max(stats.queued_bytes, nbytes),
        )

    # -- who reads ----------------------------------------------------------------------------------------------------

    def _join(self, subscriber: _Subscriber) -> None:
        if not self._shares(subscriber):
            super()._join(subscriber)
            return
        assert self._broadcast is not None
        self._readers[subscriber.channel.endpoint] = subscriber
        self._broadcast.join(subscriber.channel.endpoint)

    def _leave(self, subscriber: _Subscriber) -> None:
        endpoint = subscriber.channel.endpoint
        if endpoint not in self._readers:
            super()._leave(subscriber)
            return
        assert self._broadcast is not None
        subscriber.place.gone = True
        del self._readers[endpoint]
        if subscriber.stalled:
            self._broadcast.remove(endpoint, max(1, int(self._stall_timeout * 1000)))
        else:
            self._broadcast.remove(endpoint)
        self._ending.wake()

    async def _feed(self, subscriber: _Subscriber) -> bool:
        if not self._shares(subscriber):
            return await super()._feed(subscriber)
        place = subscriber.place
        if self._ended:                                 # it came just too late for the end
            subscriber.channel.abort()
            return True
        while not (self._closing or place.gone):
            subscriber.waiter = asyncio.get_running_loop().create_future()
            await subscriber.waiter
        await self._ending.until(lambda: place.gone or self._end())
        return True

    def _end(self) -> bool:
        if not self._ended and self._shared_log.end():
            self._ended = True
            self._close_broadcast()
        return self._ended

    def _close_broadcast(self) -> None:
        """Nothing is written any more, so who goes now is not cut off from what it has not read yet."""
        assert self._broadcast is not None
        self._broadcast.close()

    async def abort(self) -> None:
        """Drop every subscriber at once: they see a loss."""
        self._stop()
        if self._broadcast is not None:
            self._close_broadcast()
        await super().abort()

    # -- what the broadcast tells -------------------------------------------------------------------------------------

    def _room(self) -> None:
        self._shared_log.pump()
        self._turns.wake()
        self._ending.wake()

    def _full(self) -> None:
        if self._watching is None and not self._watch_soon and not self._closed:
            self._watch_soon = True
            self._loop.call_soon_threadsafe(self._watch_readers)

    def _watch_readers(self) -> None:
        """The loop's callback: drop who read nothing for too long. It runs only while the writer waits for somebody."""
        self._watching, self._watch_soon = None, False
        if self._closed:
            return
        assert self._broadcast is not None
        # Late: this process was stopped, or its loop, and perhaps the readers with it. They get their time again.
        late = 0 < self._look_again_at < time.monotonic() - self._stall_timeout / 4
        stalled, again = self._broadcast.stalled(self._stall_timeout, late)
        for endpoint in stalled:
            subscriber = self._readers.get(endpoint)
            if subscriber is None:                      # it had been counted before
                self._broadcast.remove(endpoint)
            else:
                self._stall(subscriber)
        self._room()
        self._look_again_at = 0.0
        if again is not None:
            self._look_again_at = time.monotonic() + again
            self._watching = self._loop.call_later(again, self._watch_readers)

    def _bad(self) -> None:
        self._loop.call_soon_threadsafe(self._drop_bad)

    def _drop_bad(self) -> None:
        assert self._broadcast is not None
        for endpoint, error in self._broadcast.take_bad():
            subscriber = self._readers.get(endpoint)
            if subscriber is None:
                continue
            if isinstance(error, TooLarge):             # it reads up to that message, and finds out itself
                del self._readers[endpoint]
                self._farewells.append(subscriber)
                subscriber.stalled = subscriber.place.gone = True
            self._gone(subscriber, "dropped", error)
            if not isinstance(error, TooLarge):
                subscriber.channel.abort()

    def _over(self) -> None:
        super()._over()
        if self._broadcast is not None:
            self._close_broadcast()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
