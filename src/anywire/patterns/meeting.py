"""How push and pull ends meet: one side listens, the other connects, each says what it is.

Owns: the server, or the one connection, and the greetings with the number of messages that may be outstanding, of which
the smaller counts. Calls `run(channel, window, answer)` for each connection that is right; `answer` is to be sent
first, when this end is ready for what follows. On one event loop's thread.
What can go wrong: strangers: refused with a word where they said something, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.errors import AnywireError, BadFrame, EndOfChannel, PeerLost, Refused, TimedOut
from anywire.facade import Authorize, Server, connect, serve
from anywire.patterns.controls import ENDS, REFUSED, control, greeting_of
from anywire.patterns.terms import CONTROL_LIMIT, need_channels
from anywire.wires.establish import told

log = logging.getLogger("anywire")


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments that push and pull have in common."""

    addresses: Sequence[str | Address]
    listen: bool
    timeout: float | None
    wait: float | None
    handshake_timeout: float
    authorize: Authorize | None
    backlog: int
    close_timeout: float
    wire_options: dict[str, Any]


class Meeting:
    """The connections of one end."""

    def __init__(
        self,
        settings: Settings,
        role: int,
        wanted: int,
        window: int,
        run: Callable[[Channel, int, bytes], Awaitable[None]],
        max_message: int,
        *,
        receives: bool = False,
    ) -> None:
        verb = ENDS[role].partition(" ")[0]
        if not settings.listen and len(settings.addresses) != 1:
            raise ValueError(f"{verb} connects to one address, not {len(settings.addresses)}; listen=True has several")
        self.settings = settings
        self.listening = settings.listen
        self.name = ", ".join(map(str, settings.addresses))
        self.refused = 0
        self._role, self._wanted, self._window, self._run, self._verb = role, wanted, window, run, verb
        framed = need_channels(settings.addresses, verb)
        self._max_message = max_message if receives or not framed else CONTROL_LIMIT
        self._server: Server[Channel] | None = None
        self._channel: Channel | None = None
        self._running: asyncio.Task[None] | None = None
        if settings.listen:
            self._server = serve(
                self._met,
                *settings.addresses,
                max_message=self._max_message,
                handshake_timeout=settings.handshake_timeout,
                authorize=settings.authorize,
                backlog=settings.backlog,
                close_timeout=settings.close_timeout,
                **settings.wire_options,
            )

    @property
    def addresses(self) -> list[Address]:
        """The real addresses: listened on, or connected to."""
        if self._server is not None:
            return self._server.addresses
        return [self._channel.address] if self._channel is not None else []

    async def start(self) -> None:
        """Listen, or connect and greet."""
        if self._server is not None:
            await self._server.start()
            self.name = ", ".join(map(str, self._server.addresses)) or self.name
            return
        settings = self.settings
        deadline = None if settings.wait is None else time.monotonic() + settings.wait
        while True:
            channel = await connect(
                settings.addresses[0],
                timeout=settings.timeout,
                wait=None if deadline is None else max(0.0, deadline - time.monotonic()),
                max_message=self._max_message,
                handshake_timeout=settings.handshake_timeout,
                authorize=settings.authorize,
                **settings.wire_options,
            )
            try:
                await channel.send(control(self._role, number=self._window), timeout=settings.handshake_timeout)
                answer = await channel.recv(timeout=settings.handshake_timeout)
                greeting = greeting_of(answer, self._wanted, channel.address, self._verb)
            except (PeerLost, TimedOut):
                channel.abort()
                if deadline is None or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.01)
            except BaseException:
                channel.abort()
                raise
            else:
                break
        self._channel = channel
        window = max(1, min(self._window, greeting.number))
        self._running = asyncio.create_task(self._over(channel, window))
        await asyncio.sleep(0)                      # it has begun: the first message finds it there

    async def _over(self, channel: Channel, window: int) -> None:
        try:
            await self._run(channel, window, b"")
        finally:
            if not channel.closed:
                try:
                    await channel.close(timeout=self.settings.close_timeout)
                except PeerLost:
                    pass

    async def _met(self, channel: Channel) -> None:
        """One who came: the server's handler."""
        try:
            greeting = await channel.recv(timeout=self.settings.handshake_timeout)
            window = greeting_of(greeting, self._wanted, channel.address, self._verb).number
        except EndOfChannel:
            return
        except (AnywireError, OSError) as error:
            self.refused += 1
            log.info("%s", told(self._verb, channel.address, error))
            if isinstance(error, (Refused, BadFrame)):
                try:
                    channel.try_send(control(REFUSED, self._role))
                    await channel.close(timeout=0.2)
                except (AnywireError, OSError):
                    pass
            channel.abort()
            return
        window = max(1, min(self._window, window))
        await self._run(channel, window, control(self._role, number=window))

    async def close(self, timeout: float) -> None:
        """End the connections politely, within so many seconds."""
        if self._server is not None:
            await self._server.close(timeout=timeout)
        elif self._running is not None:
            await asyncio.wait([self._running], timeout=timeout)
            await self.abort()

    async def abort(self) -> None:
        """Drop the connections."""
        if self._server is not None:
            await self._server.abort()
        elif self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
            if self._channel is not None and not self._channel.closed:
                self._channel.abort()
