"""A pattern test's world: one wire, one front, the ends that the test opens, its peers, and their end.

Owns: `Many`, the conformance suite's `World` with publishers and subscriptions. The end under test is on the front of
the scenario, with an async face; the other ends are in processes of their own (threads, where the wire has none), on
the blocking front (`pattern_roles.py`), so both fronts always meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pattern_roles
from conformance.fronts import Threaded
from conformance.peers import Peer
from conformance.wires import client_address
from conformance.world import World

import anywire
import anywire.sync

WIRES = ["inproc", "shm", "unix", "tcp"]
"""The wires that the patterns are tested on, by their names in the conformance suite: one line for one more."""
if os.environ.get("ANYWIRE_PATTERN_WIRES") == "all":  # the evidence job: what differs there is the channel below
    WIRES += ["tls", "seqpacket"]


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what another task, thread or process brings about. The scenario's deadline ends it."""
    while not condition():
        await asyncio.sleep(0.002)


class Many(World):
    @property
    def blocking(self) -> bool:
        return self.front.name == "blocking"

    def client(self, end: Any) -> str:
        return client_address(end.addresses[0])

    def client_options(self, **options: Any) -> dict[str, Any]:
        return self.dial_options(options)

    @contextlib.asynccontextmanager
    async def opened(self, name: str, *args: Any, **options: Any) -> AsyncIterator[Any]:
        """`anywire.name(...)`, or `anywire.sync.name(...)` with an async face, entered."""
        if not self.blocking:
            async with getattr(anywire, name)(*args, **options) as end:
                yield end
            return
        made = await self.front.threads.run(getattr(anywire.sync, name), *args, **options)
        async with Threaded(made, self.front.threads) as end:
            yield end

    def publish(self, *addresses: str, **options: Any) -> Any:
        return self.opened("publish", *(addresses or [self.listen_address()]), **options)

    def subscribe(self, address: str, **options: Any) -> Any:
        return self.opened("subscribe", address, **self.client_options(**options))

    async def subscriber(self, address: str, **options: Any) -> Peer:
        """A peer that subscribes, on the blocking front."""
        peer = await self.peer()
        await peer.call(pattern_roles.subscribe, address, **self.client_options(**options))
        return peer

    def push(self, *addresses: str, **options: Any) -> Any:
        """A push end that listens, or connects to the address given with `listen=False`."""
        if options.setdefault("listen", True):
            return self.opened("push", *(addresses or [self.listen_address()]), **options)
        return self.opened("push", *addresses, **self.client_options(**options))

    def pull(self, *addresses: str, **options: Any) -> Any:
        """A pull end that connects, or listens with `listen=True`."""
        if options.get("listen"):
            return self.opened("pull", *(addresses or [self.listen_address()]), **options)
        return self.opened("pull", *addresses, **self.client_options(**options))

    async def puller(self, address: str, **options: Any) -> Peer:
        """A peer that pulls from the push end at the address."""
        peer = await self.peer()
        await peer.call(pattern_roles.pull, address, **self.client_options(**options))
        return peer

    async def pusher(self, address: str, **options: Any) -> Peer:
        """A peer that pushes to the pull end at the address."""
        peer = await self.peer()
        await peer.call(pattern_roles.push, address, **self.client_options(**options))
        return peer

    async def listening(self, role: Any, **options: Any) -> tuple[Peer, str]:
        """A peer that listens as a push or pull end, and the address for the others."""
        peer = await self.peer()
        addresses = await peer.call(role, self.listen_address(), listen=True, **options)
        return peer, client_address(addresses[0])

    async def publisher(self, **options: Any) -> tuple[Peer, str]:
        """A peer that publishes, on the blocking front, and the address for subscribers."""
        peer = await self.peer()
        addresses = await peer.call(pattern_roles.publish, self.listen_address(), **options)
        return peer, client_address(addresses[0])
