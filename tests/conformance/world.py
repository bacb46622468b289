"""A test's world: one wire, one front, the channels and peers that the test opens, and their end.

Owns: `World`, which conftest.py makes for each scenario, inside the scenario's event loop. `world.open` gives a channel
under test, connected with a peer that does what the test asks. At the end everything is aborted and killed, so that a
scenario that failed leaves nothing to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anywire

from . import frames, roles
from .fronts import AsyncFront, BlockingFront, Threaded
from .peers import Peer
from .wires import Setup, client_address


class World:
    def __init__(self, setup: Setup, front: AsyncFront | BlockingFront) -> None:
        self.setup = setup
        self.promise = setup.promise
        self.front = front
        self._stack = contextlib.AsyncExitStack()
        self._peers: list[Peer] = []
        self._listeners: list[Any] = []
        self._channels: list[Any] = []

    async def __aenter__(self) -> World:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="anywire-test-")))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.abort_channels()
        await self.close_listeners()
        await self._stack.aclose()
        for peer in self._peers:
            await peer.close()
        self.front.threads.end()

    # -- addresses ---

    def listen_address(self) -> str:
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        directory.chmod(self.directory.stat().st_mode)
        address = self.setup.listen(directory)
        self._stack.callback(self.setup.sweep, address)
        return address

    def dial_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**self.setup.dial_options(self.directory), **options}

    async def free_address(self) -> str:
        """An address on which nobody listens, and the same for the listener and its clients."""
        address = self.listen_address()
        if re.search(r":0(?=$|\?)", address):
            listener = await self.front.listen(address)
            address = self.setup.again(str(listener.addresses[0]))
            await self.front.stop_listening(listener)
        return address

    def open_directories(self) -> None:
        """Let other users reach files below the scenario's directory."""
        self.directory.chmod(0o777)
        self._umask = os.umask(0)
        self._stack.callback(os.umask, self._umask)

    # -- peers and channels ---

    async def peer(self, fds: list[int] | None = None, *, process: bool | None = None) -> Peer:
        """A peer that is not connected yet."""
        peer = await Peer.open(process=self.setup.processes if process is None else process, fds=fds)
        self._peers.append(peer)
        return peer

    def keep(self, channel: Any) -> Any:
        """Abort the channel when the scenario ends."""
        self._channels.append(channel)
        return channel

    def abort_channels(self) -> None:
        while self._channels:
            self._channels.pop().abort()

    async def listen(self, *addresses: str, **options: Any) -> Any:
        listener = await self.front.listen(*(addresses or [self.listen_address()]), **options)
        self._listeners.append(listener)
        return listener

    async def close_listeners(self) -> None:
        while self._listeners:
            await self.front.stop_listening(self._listeners.pop())

    async def connect(self, address: Any, *, stream: bool = False, **options: Any) -> Any:
        connect = self.front.connect_stream if stream else self.front.connect
        return self.keep(await connect(client_address(address), **self.dial_options(options)))

    async def open(
        self, direction: str, *, stream: bool = False, peer_options: dict[str, Any] | None = None, **options: Any
    ) -> tuple[Any, Peer]:
        """A channel under test and its peer. `direction`, seen from the channel: "send", "receive" or "both".

        A sender dials, a receiver listens; "both" dials. `options` are the channel's, `peer_options` the peer's.
        """
        theirs = peer_options or {}
        if self.setup.shape == "pair":
            return await self._open_pair(direction, stream, theirs, options)
        peer = await self.peer()
        if stream and self.setup.first_byte:
            return await self._open_with_a_byte(peer, direction, theirs, options)
        if direction == "receive":
            listener = await self.listen(stream=stream, **options)
            address = client_address(listener.addresses[0])
            dialing = peer.start(roles.dial, address, stream=stream, **self.dial_options(theirs))
            if not self.setup.announced:
                await dialing
                await peer.call(roles.send_messages, [b"it is me"])
            channel = self.keep(await listener.accept())
            await dialing
            if not self.setup.announced:
                assert await channel.recv() == b"it is me"
            return channel, peer
        addresses = await peer.call(roles.listen, self.listen_address(), stream=stream, **theirs)
        accepting = peer.start(roles.accept)
        channel = await self.connect(addresses[0], stream=stream, **options)
        if not self.setup.announced:
            await channel.send(b"it is me")
            await accepting
            assert await peer.call(roles.recv_one) == b"it is me"
        await accepting
        return channel, peer

    async def _open_with_a_byte(
        self, peer: Peer, direction: str, theirs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Any, Peer]:
        if direction == "receive":
            listener = await self.listen(stream=True, **options)
            await peer.call(roles.dial, client_address(listener.addresses[0]), stream=True, **self.dial_options(theirs))
            await peer.call(roles.write, b"!")
            channel = self.keep(await listener.accept())
            assert await channel.read_exactly(1) == b"!"
            return channel, peer
        addresses = await peer.call(roles.listen, self.listen_address(), stream=True, **theirs)
        channel = await self.connect(addresses[0], stream=True, **options)
        await channel.write(b"!")
        await peer.call(roles.accept)
        await peer.call(roles.skip, 1)
        return channel, peer

    async def open_both(self, **options: Any) -> tuple[Any, Peer]:
        return await self.open("both", **options)

    async def _open_pair(
        self, direction: str, stream: bool, theirs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Any, Peer]:
        address, peer = await self._pair(direction)
        opening = peer.start(roles.use_pipe, stream=stream, **theirs)
        connect = self.front.connect_stream if stream else self.front.connect
        channel = self.keep(await connect(address, **options))
        await opening
        return channel, peer

    async def _pair(self, direction: str) -> tuple[Any, Peer]:
        """Our end's address of a new pipe, and a peer that has the other end's descriptors."""
        first, second = anywire.pipe(duplex=self.setup.two_way)
        reader, writer = (first, second) if str(first.address).find("read=") >= 0 else (second, first)
        ours, other = (reader, writer) if direction == "receive" else (writer, reader)
        with other:
            peer = await self.peer(fds=list(other.fds))
        ours.take()
        return ours.address, peer

    async def opened_by(self, role: Any, *args: Any) -> tuple[Any, Peer, asyncio.Future[Any]]:
        """A receiving channel under test that a peer opens in `role(address, *args, options)`; that call's future."""
        if self.setup.shape == "pair":
            address, peer = await self._pair("receive")
            calling = peer.start(role, "pipe:", *args, {})
            return self.keep(await self.front.connect(address)), peer, calling
        listener = await self.listen()
        peer = await self.peer()
        calling = peer.start(role, client_address(listener.addresses[0]), *args, self.dial_options({}))
        return self.keep(await listener.accept()), peer, calling

    # -- raw peers ---

    def raw(self, raw: Any) -> Any:
        """A blocking raw peer with an async face, closed when the scenario ends."""
        self._stack.callback(raw.close)
        return Threaded(raw, self.front.threads)

    async def raw_dial(self, address: Any) -> Any:
        return self.raw(await self.front.threads.run(frames.raw_dial, client_address(address)))

    async def raw_and_accepted(self, listener: Any, **fields: Any) -> tuple[Any, Any]:
        """A raw peer that greeted well, and the channel that the listener made of it."""
        if not self.setup.two_way:
            return await self._raw_fifo(listener, fields)
        accepting = asyncio.ensure_future(listener.accept())  # first: a raw TLS peer shakes hands while it dials
        raw = await self.raw_dial(listener.addresses[0])
        await raw.greet(**fields)
        return raw, self.keep(await accepting)

    @contextlib.asynccontextmanager
    async def raw_senders(self, **options: Any) -> AsyncIterator[Callable[[], Awaitable[tuple[Any, Any]]]]:
        """Gives a function that makes (raw peer, our receiving channel), the preambles exchanged."""
        if self.setup.shape == "pair":
            yield lambda: self._raw_pipe(options)
            return
        listener = await self.listen(**options)
        if self.setup.two_way:
            yield lambda: self.raw_and_accepted(listener)
        else:
            yield lambda: self._raw_fifo(listener, options)

    async def _raw_pipe(self, options: dict[str, Any]) -> tuple[Any, Any]:
        ours, theirs = os.pipe()
        raw = frames.Raw(write_fd=theirs)
        address = f"pipe:?read={ours}"
        if self.setup.two_way:
            raw.read_fd, back = os.pipe()
            address += f"&write={back}"
        face = self.raw(raw)
        await face.send(frames.preamble())
        channel = self.keep(await self.front.connect(address, **options))
        if self.setup.two_way:
            await face.recv_preamble()
        return face, channel

    async def _raw_fifo(self, listener: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        path = str(listener.addresses[0]).split("://")[1].split("?")[0]
        accepting = asyncio.ensure_future(listener.accept())
        face = self.raw(frames.Raw(write_fd=await self.front.threads.run(os.open, path, os.O_WRONLY)))
        await face.send(frames.preamble())
        return face, self.keep(await accepting)

    # -- time ---

    @staticmethod
    async def still_waiting(call: Awaitable[Any], seconds: float = 0.05) -> asyncio.Future[Any]:
        """Start a call that must not finish now; its future, to be awaited later."""
        future = asyncio.ensure_future(call)
        done, _pending = await asyncio.wait([future], timeout=seconds)
        assert not done, f"it should have waited, but gave {future!r}"
        return future

    @staticmethod
    async def until(condition: Callable[[], Any]) -> None:
        """Wait for something that nothing announces (the scenario's deadline bounds it)."""
        while not condition():
            await asyncio.sleep(0.001)


async def outcome(call: Awaitable[Any]) -> Any:
    """What a call gives: its result, or the anywire error it raised."""
    try:
        return await call
    except anywire.AnywireError as error:
        return error
