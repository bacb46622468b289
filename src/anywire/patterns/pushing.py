"""The push end: each message to exactly one of the pull ends that have room.

Owns: the connections, listening or the one that it made, and for each a task that feeds it and one that hears what was
taken. What is where is `share.py`'s. Runs on one event loop's thread; the blocking front has it on a service thread.

What can go wrong: a puller is lost: what may have been handed to it is told to `on_loss`, logged and counted, and sent
to nobody else by itself; what certainly was not goes to the others. Strangers, and pullers that claim what can't be,
are dropped and counted.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.errors import AnywireError, BadFrame, ChannelClosed, EndOfChannel, PeerLost
from anywire.contract.peer import Peer
from anywire.facade import Authorize
from anywire.patterns.controls import (
    END,
    LEAVING,
    PULL,
    PUSH,
    TAKEN,
    control,
    looks_like_control,
    read,
)
from anywire.patterns.meeting import Meeting, Settings
from anywire.patterns.share import Share, Taker
from anywire.patterns.terms import BURST, EACH, at_least, largest, unchanging
from anywire.patterns.turns import Turns
from anywire.wires.establish import told
from anywire.wires.plan import CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT

log = logging.getLogger("anywire")

OnLoss: TypeAlias = Callable[["Peer | None", list[bytes]], object]

LEAVE_TIMEOUT = 1.0
"""Seconds for a puller that leaves, to end its channel."""


@dataclass(frozen=True, slots=True)
class PushStats:
    """What a push end counted since it was made.

    `sent`: messages that it took from its caller. Each is `confirmed` (its puller's program came back for more), `lost`
    (told as unconfirmed when its puller was lost), or still `unconfirmed`. `pullers`: now; of those who `joined`:
    `left` (closed politely), `died`, `dropped` (claimed what can't be). `refused`: connections of others.
    """

    sent: int = 0
    confirmed: int = 0
    lost: int = 0
    unconfirmed: int = 0
    pullers: int = 0
    joined: int = 0
    left: int = 0
    died: int = 0
    dropped: int = 0
    refused: int = 0


class _Puller:
    __slots__ = ("channel", "taker", "waiter")

    def __init__(self, channel: Channel, window: int) -> None:
        self.channel = channel
        self.taker = Taker(window)
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Push:
    """Sends each message to one puller. Made by `push`; use it with `async with`, or `start` and `close` it."""

    def __init__(self, settings: Settings, prefetch: int, on_loss: OnLoss | None, max_message: int | None) -> None:
        at_least("prefetch", prefetch, 1)
        self.max_message = largest(max_message)
        self.prefetch = prefetch
        self._on_loss = on_loss
        self._meeting = Meeting(settings, PUSH, PULL, prefetch, self._puller, self.max_message)
        self._share = Share()
        self._pullers: dict[Taker, _Puller] = {}
        self._turns = Turns()
        self._rest: asyncio.Future[None] | None = None
        self._counts = dict.fromkeys(("joined", "left", "died", "dropped"), 0)
        self._over: AnywireError | None = None
        """Connecting: why the one puller takes no more."""
        self._burst = 0
        self._started = self._closing = False

    @property
    def addresses(self) -> list[Address]:
        """The real addresses: listened on, or connected to."""
        return self._meeting.addresses

    @property
    def pullers(self) -> list[Peer]:
        """Who pulls now, as far as the wire tells."""
        return [puller.channel.peer for puller in list(self._pullers.values())]

    @property
    def unconfirmed(self) -> int:
        """Messages sent whose puller has not come back for more yet, and is not lost."""
        return self._share.outstanding

    @property
    def lost(self) -> int:
        """Messages that were told as unconfirmed when their puller was lost."""
        return self._share.lost

    def stats(self) -> PushStats:
        """What happened so far."""
        share = self._share
        return PushStats(
            sent=share.put_in,
            confirmed=share.confirmed,
            lost=share.lost,
            unconfirmed=share.outstanding,
            pullers=len(self._pullers),
            refused=self._meeting.refused,
            **self._counts,
        )

    # -- pullers -------------------------------------------------------------------------------------------------------

    async def _puller(self, channel: Channel, window: int, answer: bytes) -> None:
        """One connection, from its greeting to its end."""
        puller = _Puller(channel, window)
        self._pullers[puller.taker] = puller
        self._counts["joined"] += 1
        self._share.join(puller.taker)
        self._wake_idle()
        self._turns.wake()
        watching = asyncio.create_task(self._watch(puller))
        try:
            if answer:
                await channel.send(answer)
            await self._feed(puller)
            await asyncio.wait([watching])              # it says when it has taken the end
        except (AnywireError, OSError) as error:
            await asyncio.wait([watching], timeout=LEAVE_TIMEOUT)      # what the other end said before comes first
            self._gone(puller, "died", error)
            if not channel.closed:
                channel.abort()
        finally:
            self._gone(puller, "left")                  # unless it was counted before: closed by this side
            if not channel.closed:
                watching.cancel()
            await asyncio.wait([watching])

    async def _feed(self, puller: _Puller) -> None:
        while True:
            batch = self._share.batch(puller.taker)
            if batch:
                await puller.channel.send_many(batch)
            elif puller.taker.gone:
                return
            elif self._closing and self._rest is None:
                await puller.channel.send(control(END))
                return
            else:
                puller.waiter = asyncio.get_running_loop().create_future()
                await puller.waiter

    async def _watch(self, puller: _Puller) -> None:
        """Hear what a puller has taken, and when it leaves or dies."""
        channel, taker = puller.channel, puller.taker
        try:
            while True:
                message = await channel.recv()
                said = read(message) if looks_like_control(message) else None
                if said is None or said.kind not in (TAKEN, LEAVING):
                    raise BadFrame("a puller sent something", received=message[:48], address=channel.address)
                if not self._share.taken(taker, said.value):
                    raise BadFrame("a puller took what was not sent", received=message, address=channel.address)
                self._changed()
                if said.kind == LEAVING:
                    self._gone(puller, "left", surely=True)
                    if self._closing:
                        channel.abort()                 # it has all, and closes its side when it likes
                    else:
                        await channel.close(timeout=LEAVE_TIMEOUT)
                    return
        except EndOfChannel:
            self._gone(puller, "died", PeerLost("it ended without a word", address=channel.address))
            channel.abort()
        except BadFrame as error:
            self._gone(puller, "dropped", error)
            channel.abort()
        except ChannelClosed:
            pass                                        # this side is closing it
        except (AnywireError, OSError) as error:
            self._gone(puller, "died", error)
            channel.abort()

    def _gone(self, puller: _Puller, count: str, error: Exception | None = None, *, surely: bool = False) -> None:
        """Count on this puller no more, if that was not done yet, and tell what it may have taken."""
        if puller.taker not in self._pullers:
            return
        self._counts[count] += 1
        outstanding = self._share.outstanding
        lost = self._share.leave(puller.taker, surely=surely)
        del self._pullers[puller.taker]
        address = puller.channel.address
        if not self._meeting.listening and self._over is None:
            if count == "left":
                what = "the pull end has closed"
                self._over = ChannelClosed(what, address=address, by_peer=True, unconfirmed=self._share.outstanding)
            elif isinstance(error, PeerLost):
                self._over = PeerLost(error.reason, address=address, unconfirmed=outstanding)
            else:
                self._over = PeerLost(str(error), address=address, unconfirmed=outstanding)
        if error is not None and not self._closing:
            log.info("%s", told("push", address, error))
        self._tell(puller.channel.peer, lost)
        puller.wake()
        self._changed()

    def _tell(self, peer: Peer | None, lost: list[bytes]) -> None:
        """Messages are unconfirmed, and their puller is lost."""
        if not lost:
            return
        level = logging.WARNING if self._on_loss is None else logging.INFO
        log.log(level, "push %s: %d messages to %s are unconfirmed", self._meeting.name, len(lost), peer or "nobody")
        if self._on_loss is not None:
            try:
                self._on_loss(peer, lost)
            except Exception:
                log.exception("push %s: on_loss() failed", self._meeting.name)

    def _changed(self) -> None:
        """There may be room, or all may be confirmed."""
        self._wake_idle()
        self._turns.wake()
        if self._rest is not None and not self._rest.done() and (not self._share.outstanding or self._over is not None):
            self._rest.set_result(None)

    def _wake_idle(self) -> None:
        """Whoever was idle and got something sends it. On the loop's thread."""
        for taker in self._share.woken():
            puller = self._pullers.get(taker)
            if puller is not None:
                puller.wake()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _checked(self, message: Any, operation: str) -> bytes:
        self._check_open(operation)
        return unchanging(message, self.max_message, self._meeting.name, operation)

    def _check_open(self, operation: str) -> None:
        if self._closing or not self._started:
            what = "the push end is closed" if self._closing else "the push end was not started"
            raise ChannelClosed(what, address=self._meeting.name, operation=operation)
        if self._over is not None:
            error = copy.copy(self._over)
            error.operation = operation
            raise error

    def _put(self, message: bytes, operation: str) -> bool:
        self._check_open(operation)
        if not self._share.put(message):
            return False
        if self._share.idle:
            self._wake_idle()
        return True

    async def send(self, message: Any, *, timeout: float | None = None) -> None:
        """Send a message, any contiguous buffer, to one puller. Waits while nobody has room, or nobody is there.

        Parameters: `timeout`, seconds, None for ever.
        Raises TooLarge, TimedOut, ChannelClosed; connecting also PeerLost. Cancelled, it went whole or not at all."""
        if type(message) is not bytes or len(message) > self.max_message:
            message = self._checked(message, "send")
        if self._turns.line or self._over is not None or not self._share.put(message):
            await self._turns.within(timeout, lambda: self._put(message, "send"), self._meeting.name, "send")
        elif self._share.idle:
            self._wake_idle()
        self._burst += len(message) + EACH
        if self._burst >= BURST:
            self._burst = 0
            await asyncio.sleep(0)

    def try_send(self, message: Any) -> bool:
        """Send without waiting: False when nobody has room now."""
        message = self._checked(message, "try_send")
        return not self._turns.line and self._put(message, "try_send")

    async def send_many(self, messages: Iterable[Any], *, timeout: float | None = None) -> None:
        """Send messages, each to one puller. Cancelled or timed out, a first part of them went."""
        todo = [self._checked(message, "send_many") for message in messages]
        done = 0

        def attempt() -> bool:
            nonlocal done
            while done < len(todo):
                if not self._put(todo[done], "send_many"):
                    return False
                done += 1
            return True

        if self._turns.line or not attempt():
            await self._turns.within(timeout, attempt, self._meeting.name, "send_many")
        await asyncio.sleep(0)

    # -- beginning and end ---------------------------------------------------------------------------------------------

    async def start(self) -> Push:
        """Listen, or connect. `async with` does this."""
        if not self._started:
            await self._meeting.start()
            self._started = True
            self._share.open()
        return self

    async def close(self, *, timeout: float | None = None) -> None:
        """Wait until all that was sent is confirmed, then end the connections.

        Parameters: `timeout`, seconds to wait (default: `close_timeout`).
        What is unconfirmed then is told to `on_loss`; without one PeerLost is raised, with `unconfirmed`."""
        if self._closing or not self._started:
            return
        limit = self._meeting.settings.close_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._closing = True
        self._share.shut()
        self._turns.wake()
        before = self._share.lost
        if self._share.outstanding and self._over is None:
            self._rest = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._rest], timeout=limit)
            self._rest = None
        for puller in list(self._pullers.values()):
            if puller.taker.sent or puller.taker.queue:
                self._gone(puller, "dropped")
                puller.channel.abort()
            puller.wake()
        self._tell(None, self._share.give_up())
        await self._meeting.close(max(0.1, deadline - time.monotonic()))
        lost = self._share.lost - (before if self._meeting.listening else 0)
        if lost and self._on_loss is None:
            reason = "they were not confirmed in time"
            if self._over is not None:
                reason = self._over.reason if isinstance(self._over, PeerLost) else self._over.what
            raise PeerLost(reason, address=self._meeting.name, operation="close", unconfirmed=lost)

    async def abort(self) -> None:
        """Drop the connections at once: pullers see a loss. What is unconfirmed is told to `on_loss`."""
        self._closing = True
        self._share.shut()
        self._turns.wake()
        for puller in list(self._pullers.values()):
            self._gone(puller, "dropped")
            if not puller.channel.closed:
                puller.channel.abort()
        self._tell(None, self._share.give_up())
        await self._meeting.abort()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await self.abort()
        else:
            await self.close()

    def __repr__(self) -> str:
        return f"<anywire.Push {self._meeting.name}, {len(self._pullers)} pullers, {self.unconfirmed} unconfirmed>"


def push(
    *addresses: str | Address,
    listen: bool = False,
    prefetch: int = 16,
    on_loss: OnLoss | None = None,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Push:
    """Send each message to exactly one pull end: to those who connect (`listen=True`), in turns, or to the one there.

    Parameters:
        listen: listen at the addresses, and give the messages to the pullers that have room; else connect to the one
            address, where a pull end listens.
        prefetch: most messages outstanding at each puller: sent, and its program has not come back for more. A puller
            may ask for fewer.
        on_loss: `on_loss(peer, messages)`, a plain function, called when a puller is lost, with the messages that may
            or may not have been handed to it: at most `prefetch`. Nobody else gets them unless you send them again.
            `peer` is None for those that nobody had been given when this end closed.
        timeout, wait: connecting, as `connect`.
        max_message: largest message to send, bytes (16 MiB).
        handshake_timeout, authorize, backlog, wire_options: as `connect` and `serve`.
        close_timeout: seconds that closing waits for confirmations.

    Raises AddressError, UnknownWire, Unsupported (a wire without channels that keep all messages in order), ValueError;
    entering it what `connect` raises.
    """
    settings = Settings(
        addresses, listen, timeout, wait, handshake_timeout, authorize, backlog, close_timeout, wire_options
    )
    return Push(settings, prefetch, on_loss, max_message)
