"""The async subscription: a channel to a publisher, seen as a run of messages.

Owns: the greeting, and the reading. What the publisher says between messages is `incoming.py`'s, which the blocking
front shares. Runs on one event loop's thread. What can go wrong: MessagesLost (the subscription goes on), TooSlow,
PeerLost.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal, Self, overload

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.errors import EndOfChannel, PeerLost, TimedOut
from anywire.facade import Authorize, Connecting, _connect
from anywire.patterns.controls import LEAVING, SIZE, SUBSCRIBE, control
from anywire.patterns.incoming import FEW, SMALL, Face, Incoming, Losses
from anywire.patterns.terms import largest, need_channels, of_the_wire
from anywire.wires.plan import CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, plan_for


class Subscription(Face):
    """The messages of a publisher. Made by `subscribe`. One receiver at a time; used in one event loop."""

    _channel: Channel

    def _before(self, operation: str) -> None:
        """What each receive begins with."""
        if self._incoming.over is not None and not self._channel.closed:
            raise self._incoming.failure(operation)
        if time.monotonic() >= self._incoming.report_at:
            self._incoming.report()

    @overload
    async def recv(self, *, copy: Literal[True] = True, timeout: float | None = None) -> bytes: ...
    @overload
    async def recv(self, *, copy: Literal[False], timeout: float | None = None) -> memoryview: ...
    async def recv(self, *, copy: bool = True, timeout: float | None = None) -> bytes | memoryview:
        """The next message as bytes; with `copy=False` a read-only memoryview, in place where the wire allows.

        Parameters: `timeout`, seconds, None for ever.
        Raises MessagesLost (once for each gap, and the next call goes on), EndOfChannel, PeerLost, TooSlow, TooLarge,
        TimedOut, Busy, ChannelClosed. Cancelling takes nothing: the message stays for the next call."""
        incoming = self._incoming
        ahead = incoming.ahead
        self._before("recv")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                while ahead:
                    message = ahead.popleft()
                    if len(message) != SIZE or incoming.is_message(message, "recv"):
                        incoming.size = len(message)
                        return message if copy else memoryview(message)
                if copy and incoming.size <= SMALL:
                    ahead.extend(await self._channel.recv_many(FEW, timeout=timeout))
                else:
                    got: Any
                    if copy:
                        got = await self._channel.recv(timeout=timeout)
                    else:
                        got = await self._channel.recv(copy=False, timeout=timeout)
                    if incoming.is_message(got, "recv"):
                        incoming.size = len(got)
                        return got  # type: ignore[no-any-return]
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic())
        except (EndOfChannel, PeerLost) as error:
            raise incoming.ended(error) from None

    async def recv_many(self, limit: int = 1024, *, timeout: float | None = None) -> list[bytes]:
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        incoming = self._incoming
        self._before("recv_many")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if incoming.ahead:
                messages = incoming.from_ahead(limit, "recv_many")
                if messages:
                    return messages
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                batch = await self._channel.recv_many(limit, timeout=left)
            except (EndOfChannel, PeerLost) as error:
                raise incoming.ended(error) from None
            if not incoming.has_controls(batch):
                return batch
            incoming.ahead.extend(batch)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        incoming = self._incoming
        if incoming.ahead and time.monotonic() < incoming.report_at:        # recv() in short, for the usual case
            message = incoming.ahead.popleft()
            if len(message) != SIZE:
                return message
            incoming.ahead.appendleft(message)
        try:
            return await self.recv()
        except EndOfChannel:
            raise StopAsyncIteration from None

    async def close(self, *, timeout: float = 5.0) -> None:
        """Leave. The publisher goes on. Parameters: `timeout`, seconds for the polite end."""
        if not self.closed and self._incoming.over is None:
            self._tell(LEAVING)
        self._incoming.ahead.clear()
        try:
            await self._channel.close(timeout=timeout)
        except PeerLost:
            pass                            # nothing of ours can be lost with it

    def abort(self) -> None:
        """Leave at once."""
        self._incoming.ahead.clear()
        self._channel.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "over" if self._incoming.over is not None else "open"
        return f"<anywire.Subscription {self.address} {state}, {self.lost} lost>"


def subscribe(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    losses: Losses = "raise",
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    **wire_options: Any,
) -> Connecting[Subscription]:
    """Subscribe to a publisher; gives a Subscription, of every message that is sent from now on.

    Await it, or enter it with `async with`, which also closes it.

    Parameters:
        losses: what to do when messages were left out because this subscriber was behind (a publisher of mode
            "latest"): "raise" MessagesLost, once for each gap, or only "count" them in `subscription.lost`.
        timeout, wait, max_message, handshake_timeout, authorize, wire_options: as `connect`.

    Raises: what `connect` raises; Unsupported; Refused and BadFrame also for what is no publisher.
    """
    own: Connecting[Subscription] | None = of_the_wire("subscriber", "async", locals())
    if own is not None:
        return own
    need_channels([address], "subscribe")
    incoming = Incoming(address, losses, largest(max_message))
    plan = plan_for(address, "subscription", "connect", max_message, handshake_timeout, wire_options)

    async def make() -> Subscription:
        deadline = None if wait is None else time.monotonic() + wait
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            channel = await _connect(Channel, plan, timeout, left, authorize)
            try:
                await channel.send(control(SUBSCRIBE), timeout=handshake_timeout)
                incoming.greeted(await channel.recv(timeout=handshake_timeout))
            except (PeerLost, TimedOut):
                channel.abort()
                if deadline is None or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.01)
            except BaseException:
                channel.abort()
                raise
            else:
                return Subscription(channel, incoming)

    return Connecting(make)
