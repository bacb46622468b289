"""The server side of the TLS tests: protocols that note every call, and a server with one of them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from tests.loop.tls_peer import contexts, joined, peer_of

KINDS = ("plain", "buffered", "streams")
both_kinds = pytest.mark.parametrize("kind", ["plain", "buffered"])


def complaints() -> list[dict[str, Any]]:
    """What reached the exception handler so far; the test has seen it."""
    loop: Any = asyncio.get_running_loop()
    found = list(loop.told)
    loop.told.clear()
    return found


class Recorder(asyncio.Protocol):
    """Notes every call; `when` holds what to do in one."""

    def __init__(self, **when: Callable[..., object]) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.when = when
        self.changed = asyncio.Event()
        self.transport: Any = None

    def note(self, name: str, value: object = None) -> None:
        self.calls.append((name, value))
        self.changed.set()
        if name in self.when:
            self.when[name](self, value)

    async def until(self, condition: Callable[[Recorder], object]) -> None:
        while not condition(self):
            self.changed.clear()
            await self.changed.wait()

    def named(self, name: str) -> list[Any]:
        return [value for called, value in self.calls if called == name]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.note("data", data)

    def eof_received(self) -> None:
        self.note("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.note("lost", exc)

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    @property
    def data(self) -> bytes:
        return joined(self.calls)

    def lost(self) -> bool:
        return bool(self.named("lost"))


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same with a small buffer of its own."""

    data_received: Any = None

    def __init__(self, **when: Callable[..., object]) -> None:
        super().__init__(**when)
        self.room = bytearray(5000)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self.room)                   # the standard class would slice, and so copy, a bytearray

    def buffer_updated(self, nbytes: int) -> None:
        self.note("data", bytes(self.room[:nbytes]))


@contextlib.asynccontextmanager
async def serving(server: Recorder, context: ssl.SSLContext | None = None) -> Any:
    """A TLS server with this protocol for its one connection; its address."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: server, "127.0.0.1", 0, ssl=context or contexts()[0])
    yield listener.sockets[0].getsockname()
    if server.transport is not None:
        server.transport.abort()
        await server.until(Recorder.lost)
    listener.close()
    await listener.wait_closed()


@contextlib.asynccontextmanager
async def connected(
    server: Recorder, context: ssl.SSLContext | None = None, *, client: ssl.SSLContext | None = None, **peers: Any,
) -> Any:
    """A peer that has shaken hands with a server of this protocol."""
    async with serving(server, context) as address, peer_of(address, client, **peers) as peer:
        await server.until(lambda s: s.transport is not None)
        yield peer


def recorder(kind: str, **when: Callable[..., object]) -> Recorder:
    return BufferedRecorder(**when) if kind == "buffered" else Recorder(**when)
