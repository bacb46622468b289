"""The publisher: one writer, any number of subscribers, over the channels of any wire.

Owns: who listens, and a task for each subscriber that hands it the log's messages in batches, as its channel takes
them.
The log (`log.py`) knows who is where. Runs on one event loop's thread; the blocking front has it on a service thread.

What can go wrong, and what then:
- a subscriber dies: its channel tells at once, and it is dropped;
- it stops taking messages (`reliable`): after `stall_timeout` seconds nobody waits for it any more. Its channel is kept
  for a while, so that it is told when it wakes up; at most `MOST_STALLED` such channels;
- it is too slow (`latest`): it loses the oldest messages, and is told how many;
- a stranger connects, or a subscriber sends what it may not: dropped and counted. Nobody else notices.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.endpoint import Loan
from anywire.contract.errors import AnywireError, BadFrame, ChannelClosed, EndOfChannel, PeerLost, Refused, TooLarge
from anywire.contract.loans import loan_array
from anywire.contract.peer import Peer
from anywire.contract.wire import wire_for
from anywire.facade import Authorize, Server, serve
from anywire.patterns.controls import (
    END,
    LATEST,
    LEAVING,
    PUBLISH,
    REFUSED,
    STALLED,
    SUBSCRIBE,
    TAKEN,
    TOO_LARGE,
    control,
    greeting_of,
    looks_like_control,
    read,
)
from anywire.patterns.log import Log, Place
from anywire.patterns.terms import BURST, CONTROL_LIMIT, EACH, at_least, largest, need_channels, of_the_wire, unchanging
from anywire.patterns.turns import Turns
from anywire.wires.establish import told
from anywire.wires.plan import HANDSHAKE_TIMEOUT

log = logging.getLogger("anywire")

Mode: TypeAlias = Literal["reliable", "latest"]

MOST_STALLED = 16
"""Dropped subscribers whose channels are kept to tell them; of more, the oldest are let go."""
LEAVE_TIMEOUT = 1.0
"""Seconds for a subscriber that leaves, to end its channel."""


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """What a publisher counted since it was made.

    `sent`: messages. `subscribers`: now. `joined`, and of these: `left` (closed politely), `died`, `stalled` (dropped
    after `stall_timeout`), `dropped` (sent what they may not, or could not take a message of that size). `refused`:
    connections of others. `lost`: messages left out for subscribers that were behind, summed over them. `queued` and
    `queued_bytes`: what not every subscriber's channel has yet.
    """

    sent: int = 0
    subscribers: int = 0
    joined: int = 0
    left: int = 0
    died: int = 0
    stalled: int = 0
    dropped: int = 0
    refused: int = 0
    lost: int = 0
    queued: int = 0
    queued_bytes: int = 0


class _Subscriber:
    """One subscriber: its channel, and its place in the log."""

    __slots__ = ("channel", "place", "stalled", "waiter")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.place = Place()
        self.stalled = False
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


def let_go(message: Any) -> None:
    """A message was published: if it is a loan, it can't be opened again."""
    if isinstance(message, Loan):
        message.sent = True


class Publisher:
    """Sends each message to every subscriber. Made by `publish`; use it with `async with`, or `start` and `close`."""

    def __init__(
        self,
        addresses: Sequence[str | Address],
        *,
        mode: Mode,
        stall_timeout: float,
        depth: int,
        depth_bytes: int,
        max_message: int | None,
        handshake_timeout: float,
        close_timeout: float,
        options: dict[str, Any],
        wire_options: dict[str, Any],
    ) -> None:
        if mode not in ("reliable", "latest"):
            raise ValueError(f"a publisher's mode is 'reliable' or 'latest', not {mode!r}")
        at_least("stall_timeout", stall_timeout, 0.001)
        at_least("depth", depth, 1)
        at_least("depth_bytes", depth_bytes, 1)
        framed = need_channels(addresses, "publish")
        self.mode: Mode = mode
        self.max_message = largest(max_message)
        self._name = ", ".join(map(str, addresses))
        self._stall_timeout = stall_timeout
        self._handshake_timeout = handshake_timeout
        self._close_timeout = close_timeout
        self._server: Server[Channel] = serve(
            self._subscriber,
            *addresses,
            max_message=CONTROL_LIMIT if framed else self.max_message,
            handshake_timeout=handshake_timeout,
            close_timeout=close_timeout,
            **options,
            **wire_options,
        )
        self._log = Log(depth, depth_bytes, mode == "latest")
        self._subscribers: dict[Place, _Subscriber] = {}
        self._farewells: collections.deque[_Subscriber] = collections.deque()
        self._going: set[asyncio.Task[Any]] = set()
        self._turns = Turns()
        self._burst = 0
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = 0.0
        self._started = self._closing = self._closed = False
        self._counts = dict.fromkeys(("joined", "left", "died", "stalled", "dropped", "refused"), 0)

    # -- who subscribes -----------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[Address]:
        """The real addresses, in the order given."""
        return self._server.addresses

    @property
    def subscribers(self) -> list[Peer]:
        """Who subscribes now, as far as the wire tells."""
        return [subscriber.channel.peer for subscriber in list(self._subscribers.values())]

    def stats(self) -> PublisherStats:
        """What happened so far."""
        return PublisherStats(
            sent=self._log.head,
            subscribers=len(self._subscribers),
            lost=self._log.lost,
            queued=len(self._log),
            queued_bytes=self._log.nbytes,
            **self._counts,
        )

    async def _subscriber(self, channel: Channel) -> None:
        """One connection, from its greeting to its end: the server's handler."""
        try:
            greeting = await channel.recv(timeout=self._handshake_timeout)
            greeting_of(greeting, SUBSCRIBE, channel.address, "publish")
        except EndOfChannel:
            return
        except (AnywireError, OSError) as error:
            self._counts["refused"] += 1
            log.info("%s", told("publish", channel.address, error))
            if isinstance(error, (Refused, BadFrame)) and channel.try_send(control(REFUSED, PUBLISH)):
                await self._let_go(channel)
            channel.abort()
            return
        subscriber = _Subscriber(channel)
        self._counts["joined"] += 1
        self._join(subscriber)
        self._subscribers[subscriber.place] = subscriber
        watching = asyncio.create_task(self._watch(subscriber))
        try:
            if await self._feed(subscriber):
                await asyncio.wait([watching])              # it says when it has taken the end
            else:
                await self._let_go(channel)
        except (AnywireError, OSError) as error:
            await asyncio.wait([watching], timeout=LEAVE_TIMEOUT)      # what the other end said before comes first
            self._gone(subscriber, "died", error)
            if not channel.closed:
                channel.abort()
        finally:
            self._gone(subscriber, "left")                  # unless it was counted before: closed by this side
            if subscriber.stalled and subscriber in self._farewells:
                self._farewells.remove(subscriber)
            if not channel.closed:
                watching.cancel()
            await asyncio.wait([watching])

    async def _let_go(self, channel: Channel) -> None:
        """Close the channel of somebody who was told why. Nobody waits for that: closing the publisher ends it."""
        if not self._closing and not channel.closed:
            task = asyncio.current_task()
            assert task is not None
            self._going.add(task)
            try:
                await channel.close(timeout=self._close_timeout)
            except PeerLost:
                pass
            finally:
                self._going.discard(task)

    async def _watch(self, subscriber: _Subscriber) -> None:
        """Hear when a subscriber leaves or dies. It says nothing else but that it takes messages, or leaves."""
        channel = subscriber.channel
        left = channel.traits.promises("clean_end")
        try:
            while True:
                message = await channel.recv()
                kind = read(message).kind if looks_like_control(message) else 0
                if kind not in (TAKEN, LEAVING):
                    raise BadFrame("a subscriber sent something", received=message[:48], address=channel.address)
                subscriber.place.since = time.monotonic()
                left = left or kind == LEAVING
                if left and self._closing and kind == LEAVING:
                    self._gone(subscriber, "left")
                    channel.abort()                         # it has all, and closes its side when it likes
                    return
        except EndOfChannel:
            self._gone(subscriber, "left" if left else "died")
            try:
                await channel.close(timeout=LEAVE_TIMEOUT)
            except PeerLost:
                pass
        except BadFrame as error:
            self._gone(subscriber, "dropped", error)
            channel.abort()
        except ChannelClosed:
            pass                                            # this side is closing it
        except (AnywireError, OSError) as error:
            self._gone(subscriber, "died", error)
            channel.abort()

    def _gone(self, subscriber: _Subscriber, count: str, error: Exception | None = None) -> None:
        """Wait for this subscriber no more, and count why, if that was not done yet."""
        if subscriber.place not in self._subscribers:
            return
        self._counts[count] += 1
        del self._subscribers[subscriber.place]
        self._leave(subscriber)
        subscriber.wake()
        self._turns.wake()
        if error is not None and not self._closed:
            log.info("%s", told("publish", subscriber.channel.address, error))

    def _join(self, subscriber: _Subscriber) -> None:
        self._log.join(subscriber.place)

    def _leave(self, subscriber: _Subscriber) -> None:
        self._log.leave(subscriber.place)

    async def _feed(self, subscriber: _Subscriber) -> bool:
        """Hand the log's messages to one channel, as it takes them: whether all, and the end, were handed over."""
        channel, place = subscriber.channel, subscriber.place
        latest = self.mode == "latest"
        patience = 0 if latest else int(self._stall_timeout * 1000)
        await channel.send(control(PUBLISH, place.at, number=patience, flags=LATEST if latest else 0))
        while True:
            batch = self._log.batch(place)
            if batch:
                try:
                    await channel.send_many(batch)
                except TooLarge as error:
                    self._gone(subscriber, "dropped", error)
                    await channel.send(control(TOO_LARGE, error.size))
                    return False
                self._log.done(place)
                self._turns.wake()
            elif subscriber.stalled:
                await channel.send(control(STALLED, int(self._stall_timeout * 1000)))
                return False
            elif place.gone:
                return False
            elif self._closing:
                await channel.send(control(END))
                return True
            else:
                subscriber.waiter = asyncio.get_running_loop().create_future()
                await subscriber.waiter

    # -- who takes nothing --------------------------------------------------------------------------------------------

    def _watch_stalls(self) -> None:
        """The loop's callback: drop who took nothing for too long. It runs only while somebody is behind."""
        self._timer = None
        now = time.monotonic()
        behind = [one for one in self._subscribers.values() if not one.place.idle]
        if now > self._look_at + self._stall_timeout / 4:
            # This process was stopped, or its loop: what they took meanwhile was not heard. They get their time again.
            for subscriber in behind:
                subscriber.place.since = now
        for subscriber in behind:
            if now - subscriber.place.since >= self._stall_timeout:
                self._stall(subscriber)
        left = [one.place.since for one in behind if not one.place.gone]
        if left and not self._closed:
            self._look_in(max(0.001, min(left) + self._stall_timeout - now))

    def _look_in(self, seconds: float) -> None:
        self._look_at = time.monotonic() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._watch_stalls)

    def _stall(self, subscriber: _Subscriber) -> None:
        log.warning(
            "publish %s: dropped %s, which took nothing for %g s",
            subscriber.channel.address,
            subscriber.channel.peer,
            self._stall_timeout,
        )
        subscriber.stalled = True
        self._farewells.append(subscriber)
        self._gone(subscriber, "stalled")
        if len(self._farewells) > MOST_STALLED:
            self._farewells.popleft().channel.abort()

    def _wake_idle(self) -> None:
        """There is a message: whoever has all others goes on. On the loop's thread."""
        for place in self._log.woken():
            subscriber = self._subscribers.get(place)
            if subscriber is not None:
                subscriber.wake()
        if self._timer is None and self.mode == "reliable":
            self._look_in(self._stall_timeout)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _checked(self, message: Any, operation: str) -> bytes:
        self._check_open(operation)
        return unchanging(message, self.max_message, self._name, operation)

    def _check_open(self, operation: str) -> None:
        if self._closing or not self._started:
            what = "the publisher is closed" if self._closing else "the publisher was not started"
            advice = "" if self._closing else "use it with `async with`, or start it"
            raise ChannelClosed(what, address=self._name, operation=operation, advice=advice)

    def _put(self, message: bytes, operation: str) -> bool:
        self._check_open(operation)
        if not self._log.put(message):
            return False
        if self._log.idle:
            self._wake_idle()
        return True

    def loan(self, nbytes: int) -> Loan:
        """Writable memory of `nbytes` bytes for one message: fill it, then `send(loan)`. On shared memory nothing is
        copied.

        Where nothing is shared, or the pool has no place now, the loan is private memory, and its `send` copies, and
        waits like any other. A loan whose `send` timed out can be sent again. Raises ChannelClosed, ValueError."""
        self._check_open("loan")
        return Loan(nbytes)

    def loan_array(self, shape: int | tuple[int, ...], dtype: Any = "uint8") -> Any:
        """As `loan`, as an uninitialised NumPy array: fill it, then `send(array)`. On shared memory nothing is copied.

        Parameters: `shape` and `dtype` as in numpy.empty. After the send the array may still show the memory that the
        subscribers now read: leave it alone. Needs the extra anywire[numpy]; raises TypeError for a dtype that holds
        Python objects."""
        return loan_array(self.loan, shape, dtype)

    async def send(self, message: Any, *, timeout: float | None = None) -> None:
        """Publish a message: any contiguous buffer, or a loan. With `reliable` it waits while the slowest subscriber
        has no room.

        Parameters: `timeout`, seconds to wait for room, None for ever. It never waits longer than `stall_timeout` for a
        subscriber that takes nothing.
        Raises TooLarge, TimedOut, ChannelClosed. Cancelled, the message went to all or to nobody."""
        given = message
        if type(message) is not bytes or len(message) > self.max_message:
            message = self._checked(message, "send")
        if self._turns.line or not self._log.put(message):
            await self._turns.within(timeout, lambda: self._put(message, "send"), self._name, "send")
        elif self._log.idle:
            self._wake_idle()
        if message is not given:
            let_go(given)
        self._burst += len(message) + EACH
        if self._burst >= BURST:
            self._burst = 0
            await asyncio.sleep(0)

    def try_send(self, message: Any) -> bool:
        """Publish without waiting: False when there is no room now."""
        checked = self._checked(message, "try_send")
        if self._turns.line or not self._put(checked, "try_send"):
            return False
        let_go(message)
        return True

    async def send_many(self, messages: Iterable[Any], *, timeout: float | None = None) -> None:
        """Publish messages in order. Cancelled or timed out, a first part of them went.

        On shared memory each subscriber is woken once for all that have room."""
        given = list(messages)
        todo = [self._checked(message, "send_many") for message in given]
        deadline = None if timeout is None else time.monotonic() + timeout
        done = 0

        def attempt() -> bool:
            nonlocal done
            self._check_open("send_many")
            before, done = done, self._log.put_many(todo, done)
            for message in given[before:done]:
                let_go(message)
            if self._log.idle:
                self._wake_idle()
            return done == len(todo)

        if self._turns.line or not attempt():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            await self._turns.within(left, attempt, self._name, "send_many")
        await asyncio.sleep(0)

    # -- beginning and end --------------------------------------------------------------------------------------------

    async def start(self) -> Publisher:
        """Listen. `async with` does this."""
        if self._closing:
            raise ChannelClosed("the publisher is closed", address=self._name, operation="publish")
        await self._server.start()
        self._name = ", ".join(map(str, self._server.addresses)) or self._name
        self._started = True
        self._log.open()
        return self

    async def close(self, *, timeout: float | None = None) -> None:
        """Stop listening, hand every subscriber what was sent, and end their subscriptions.

        Parameters: `timeout`, seconds for that (default: the publisher's `close_timeout`); who has not taken all by
        then is dropped."""
        self._stop()
        for task in self._going:
            task.cancel()
        while self._farewells:
            self._farewells.popleft().channel.abort()
        for subscriber in list(self._subscribers.values()):
            subscriber.wake()
        try:
            await self._server.close(timeout=timeout)
        finally:
            self._over()

    async def abort(self) -> None:
        """Drop every subscriber at once: they see a loss."""
        self._stop()
        for subscriber in [*self._subscribers.values(), *self._farewells]:
            if not subscriber.channel.closed:
                subscriber.channel.abort()
        try:
            await self._server.abort()
        finally:
            self._over()

    def _stop(self) -> None:
        self._closing = True
        self._log.shut()
        self._turns.wake()

    def _over(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await self.abort()
        else:
            await self.close()

    def __repr__(self) -> str:
        return f"<anywire.Publisher {self._name}, {self.mode}, {len(self._subscribers)} subscribers>"


def publish(
    *addresses: str | Address,
    mode: Mode = "reliable",
    stall_timeout: float = 5.0,
    depth: int = 1024,
    depth_bytes: int = 64 << 20,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Publisher:
    """Publish messages to all who subscribe at the addresses, which may be of several wires.

    Parameters:
        mode: "reliable": each subscriber gets every message that was sent after it came, in order, and the slowest one
            gates the writer. "latest": the writer never waits; a subscriber that is behind by more than `depth`
            messages loses the oldest ones, and is told how many.
        stall_timeout: seconds (`reliable`); a subscriber that takes nothing for so long while messages wait for it is
            dropped.
        depth, depth_bytes: messages, and bytes, that wait in the publisher. What the wires hold comes on top.
        max_message: largest message to send, bytes (16 MiB).
        handshake_timeout, authorize, backlog, wire_options: as `serve`.
        close_timeout: seconds that closing gives the subscribers to take what was sent.

    Raises AddressError, UnknownWire, Unsupported (a wire without channels that keep all messages in order), ValueError.

    >>> async def main():
    ...     async with publish("inproc://news") as publisher, subscribe("inproc://news") as subscription:
    ...         await publisher.send(b"hello, all")
    ...         return await subscription.recv()
    >>> from anywire import subscribe
    >>> asyncio.run(main())
    b'hello, all'
    """
    own: Publisher | None = of_the_wire("publisher", "async", locals())
    if own is not None:
        return own
    options = {"authorize": authorize, "backlog": backlog}
    made: type[Publisher] = Publisher
    if any(wire_for(address).broadcasts for address in addresses):
        from anywire.patterns.shared import SharingPublisher  # which is a Publisher, and of use to few

        made = SharingPublisher
    return made(
        addresses,
        mode=mode,
        stall_timeout=stall_timeout,
        depth=depth,
        depth_bytes=depth_bytes,
        max_message=max_message,
        handshake_timeout=handshake_timeout,
        close_timeout=close_timeout,
        options=options,
        wire_options=wire_options,
    )
