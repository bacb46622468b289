"""The pull end: takes messages from the one push end that it connected to, or from all that connect.

Owns: the connections, and a task for each that reads it into the inbox (`inbox.py`) as far as its window allows.
Runs on one event loop's thread; the blocking front has it on a service thread.

What can go wrong: a pusher is lost: what came whole is handed out; connected, the loss is raised after that; listening,
it is logged and counted, and the others go on. Strangers, and pushers that send more than they may, are dropped and
counted.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from dataclasses import dataclass
from typing import Any, Self

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.errors import AnywireError, BadFrame, ChannelClosed, EndOfChannel, PeerLost
from anywire.contract.peer import Peer
from anywire.facade import Authorize
from anywire.patterns.controls import END, LEAVING, LITERAL, PULL, PUSH, TAKEN, control, looks_like_control, read
from anywire.patterns.inbox import Giver, Inbox
from anywire.patterns.meeting import Meeting, Settings
from anywire.patterns.terms import at_least, largest
from anywire.patterns.turns import Turns
from anywire.wires.establish import told
from anywire.wires.plan import CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT

log = logging.getLogger("anywire")

FEW = 16
"""Messages that are taken from a channel at a time, of whatever size they are."""


@dataclass(frozen=True, slots=True)
class PullStats:
    """What a pull end counted since it was made.

    `received`: messages that came; `waiting`: of these, not handed out yet. `pushers`: now; of those who `joined`:
    `left` (ended), `died`, `dropped` (sent what they may not). `refused`: connections of others.
    """

    received: int = 0
    waiting: int = 0
    pushers: int = 0
    joined: int = 0
    left: int = 0
    died: int = 0
    dropped: int = 0
    refused: int = 0


class _Pusher:
    __slots__ = ("channel", "giver", "literal", "room", "telling")

    def __init__(self, channel: Channel, window: int) -> None:
        self.channel = channel
        self.giver = Giver(window)
        self.literal = False
        self.room: asyncio.Future[None] | None = None
        self.telling: asyncio.Task[None] | None = None


class Pull:
    """Receives what push ends send here. Made by `pull`; use it with `async with`, or `start` and `close` it."""

    def __init__(self, settings: Settings, prefetch: int, max_message: int | None) -> None:
        at_least("prefetch", prefetch, 1)
        self.max_message = largest(max_message)
        self.prefetch = prefetch
        self._meeting = Meeting(settings, PULL, PUSH, prefetch, self._pusher, self.max_message, receives=True)
        self._inbox = Inbox()
        self._pushers: dict[Giver, _Pusher] = {}
        self._turns = Turns()
        self._counts = dict.fromkeys(("joined", "left", "died", "dropped"), 0)
        self._over: AnywireError | None = None
        """Connecting: why nothing more comes."""
        self._started = self._closing = False

    @property
    def addresses(self) -> list[Address]:
        """The real addresses: listened on, or connected to."""
        return self._meeting.addresses

    @property
    def pushers(self) -> list[Peer]:
        """Who pushes now, as far as the wire tells."""
        return [pusher.channel.peer for pusher in list(self._pushers.values())]

    def stats(self) -> PullStats:
        """What happened so far."""
        return PullStats(
            received=self._inbox.received,
            waiting=len(self._inbox),
            pushers=len(self._pushers),
            refused=self._meeting.refused,
            **self._counts,
        )

    # -- pushers -------------------------------------------------------------------------------------------------------

    async def _pusher(self, channel: Channel, window: int, answer: bytes) -> None:
        """One connection, from its greeting to its end."""
        pusher = _Pusher(channel, window)
        self._pushers[pusher.giver] = pusher
        self._counts["joined"] += 1
        try:
            if answer:
                await channel.send(answer)
            await self._read(pusher)
        except BadFrame as error:
            self._gone(pusher, "dropped", error)
            channel.abort()
        except EndOfChannel:
            if not self._closing:                       # else it heard that this side takes no more
                self._gone(pusher, "died", PeerLost("it went away without an end", address=channel.address))
                channel.abort()
        except ChannelClosed as error:
            self._gone(pusher, "left", error)           # this side is closing it
        except (AnywireError, OSError) as error:
            self._gone(pusher, "died", error)
            channel.abort()
        finally:
            self._gone(pusher, "left", ChannelClosed(address=channel.address))

    async def _read(self, pusher: _Pusher) -> None:
        channel, giver = pusher.channel, pusher.giver
        while True:
            batch = await channel.recv_many(FEW)
            messages = []
            end = False
            for message in batch:
                if pusher.literal or not looks_like_control(message):
                    pusher.literal = False
                    messages.append(message)
                    continue
                kind = read(message).kind
                if kind == LITERAL:
                    pusher.literal = True
                elif kind == END:
                    end = True
                else:
                    raise BadFrame("a pusher sent what this version does not know", received=message)
            if self._closing:
                continue                                # it was told how many were taken, and keeps the others
            if not self._inbox.add(giver, messages):
                raise BadFrame(f"a pusher has more than {giver.window} messages outstanding", address=channel.address)
            if end:                                     # it ends when all is confirmed, so nothing is owed
                await channel.send(control(LEAVING, giver.taken))
                self._gone(pusher, "left", EndOfChannel("the push end has ended", address=channel.address))
                return
            self._turns.wake()
            while giver.full and not self._closing:
                pusher.room = asyncio.get_running_loop().create_future()
                await pusher.room

    def _gone(self, pusher: _Pusher, count: str, error: Exception) -> None:
        if self._pushers.pop(pusher.giver, None) is None:
            return
        self._counts[count] += 1
        self._inbox.drop(pusher.giver)
        if not self._meeting.listening:
            if not isinstance(error, AnywireError):
                error = PeerLost(str(error), address=pusher.channel.address)
            self._over = error
        if count != "left":
            log.info("%s", told("pull", pusher.channel.address, error))
        self._turns.wake()

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Tell the pushers what was taken, and read on where there is room again. On the loop's thread."""
        for reading in self._pushers.values():
            if reading.room is not None and not reading.giver.full and not reading.room.done():
                reading.room.set_result(None)
        for giver in self._inbox.owed():
            pusher = self._pushers.get(giver)
            if pusher is None or pusher.telling is not None:
                continue                                # a telling under way tells the latest
            total = giver.done
            try:
                if pusher.channel.try_send(control(TAKEN, total)):
                    giver.told = total
                else:
                    pusher.telling = asyncio.create_task(self._tell(pusher))
            except (AnywireError, OSError):
                pass                                    # the reading task meets it

    async def _tell(self, pusher: _Pusher) -> None:
        """As `_settle`, for a channel that had no room: its pusher reads nothing now."""
        giver = pusher.giver
        try:
            while giver.told != giver.done:
                total = giver.done
                await pusher.channel.send(control(TAKEN, total))
                giver.told = total
        except (AnywireError, OSError):
            pass
        finally:
            pusher.telling = None

    def _take(self, out: list[bytes], limit: int, operation: str) -> bool:
        """Take messages into `out`; raises why none will come any more."""
        out += self._inbox.take(limit)
        if out:
            return True
        if self._closing or not self._started:
            what = "the pull end is closed" if self._closing else "the pull end was not started"
            raise ChannelClosed(what, address=self._meeting.name, operation=operation)
        if self._over is not None:
            error = copy.copy(self._over)
            error.operation = operation
            raise error
        return False

    async def _receive(self, limit: int, timeout: float | None, operation: str) -> list[bytes]:
        if self._inbox.settle():
            self._settle()
        out: list[bytes] = []
        if self._turns.line or not self._take(out, limit, operation):
            await self._turns.within(
                timeout, lambda: self._take(out, limit, operation), self._meeting.name, operation
            )
        return out

    async def recv(self, *, timeout: float | None = None) -> bytes:
        """The next message, from the pushers in turns. Calling again confirms it.

        Parameters: `timeout`, seconds, None for ever. Several tasks may wait.
        Raises TimedOut, ChannelClosed; connected also EndOfChannel (the push end ended) and PeerLost. Cancelling takes
        nothing."""
        return (await self._receive(1, timeout, "recv"))[0]

    async def recv_many(self, limit: int = 1024, *, timeout: float | None = None) -> list[bytes]:
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        if limit < 1:
            raise ValueError(f"recv_many needs a limit of at least 1, not {limit}")
        return await self._receive(limit, timeout, "recv_many")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self.recv()
        except EndOfChannel:
            raise StopAsyncIteration from None

    # -- beginning and end ---------------------------------------------------------------------------------------------

    async def start(self) -> Pull:
        """Listen, or connect. `async with` does this."""
        if not self._started:
            await self._meeting.start()
            self._started = True
        return self

    async def close(self, *, timeout: float | None = None) -> None:
        """Take no more: the pushers are told how many messages were taken, and keep the others.

        Parameters: `timeout`, seconds for the polite end (default: `close_timeout`)."""
        if self._closing or not self._started:
            return
        self._closing = True
        self._turns.wake()
        for pusher in self._pushers.values():
            if pusher.room is not None and not pusher.room.done():
                pusher.room.set_result(None)
        limit = self._meeting.settings.close_timeout if timeout is None else timeout
        telling = [asyncio.create_task(self._leave(pusher, limit)) for pusher in self._pushers.values()]
        if telling:
            await asyncio.wait(telling)
        await self._meeting.close(limit)

    async def _leave(self, pusher: _Pusher, timeout: float) -> None:
        try:
            await pusher.channel.send(control(LEAVING, pusher.giver.taken), timeout=timeout)
            if not self._meeting.listening:
                await pusher.channel.close(timeout=timeout)
        except (AnywireError, OSError):
            pass

    async def abort(self) -> None:
        """Drop the connections at once: the pushers see a loss."""
        self._closing = True
        self._turns.wake()
        for pusher in list(self._pushers.values()):
            if not pusher.channel.closed:
                pusher.channel.abort()
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
        return f"<anywire.Pull {self._meeting.name}, {len(self._pushers)} pushers>"


def pull(
    *addresses: str | Address,
    listen: bool = False,
    prefetch: int = 1024,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Pull:
    """Receive what is pushed: by the one push end that listens there, or by all that connect here (`listen=True`).

    Parameters:
        listen: listen at the addresses, and take from all push ends that connect, in turns; else connect to the one
            address, where a push end listens.
        prefetch: most messages of one pusher that may be on their way here or wait here. The pusher may choose fewer.
        timeout, wait: connecting, as `connect`.
        max_message: largest message to receive, bytes (16 MiB).
        handshake_timeout, authorize, backlog, close_timeout, wire_options: as `connect` and `serve`.

    Raises AddressError, UnknownWire, Unsupported (a wire without channels that keep all messages in order), ValueError;
    entering it what `connect` raises.

    >>> async def main():
    ...     async with push("inproc://jobs", listen=True) as jobs, pull("inproc://jobs") as inbox:
    ...         await jobs.send(b"a job")
    ...         return await inbox.recv()
    >>> from anywire import push
    >>> asyncio.run(main())
    b'a job'
    """
    settings = Settings(
        addresses, listen, timeout, wait, handshake_timeout, authorize, backlog, close_timeout, wire_options
    )
    return Pull(settings, prefetch, max_message)
