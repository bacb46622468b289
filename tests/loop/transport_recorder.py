"""What the tests of transports share: both loops, protocols that note each call, a transport with its peer's socket."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anywire.loop

LOOPS = {"standard": asyncio.new_event_loop, "ours": anywire.loop.new_event_loop}
PATIENCE = 20.0


def running(name: str) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """For a fixture: runs one coroutine; fails on what reaches the loop's exception handler and was not expected."""
    loop = LOOPS[name]()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: complaints.append(context))
    loop.complaints = complaints  # type: ignore[attr-defined]

    def go(main: Awaitable[Any]) -> Any:
        return loop.run_until_complete(asyncio.wait_for(main, PATIENCE))

    asyncio.set_event_loop(loop)
    yield go
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    asyncio.set_event_loop(None)
    if name == "standard":                # it leaves connections behind in some tests: not into the next ones
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        sys.unraisablehook = hook
    assert not loop.complaints, loop.complaints  # type: ignore[attr-defined]


def complaints() -> list[dict[str, Any]]:
    """What reached the exception handler so far; the test has seen it."""
    found = list(asyncio.get_running_loop().complaints)  # type: ignore[attr-defined]
    asyncio.get_running_loop().complaints.clear()  # type: ignore[attr-defined]
    return found


class Recorder(asyncio.Protocol):
    """Notes every call; `when` holds what to do in one."""

    def __init__(self, **when: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        self.data = bytearray()
        self.when = when
        self.transport: Any = None
        self.error: BaseException | None = None
        self.changed = asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()

    def note(self, name: str, *args: Any) -> Any:
        self.calls.append(name)
        self.changed.set()
        return self.when[name](self, *args) if name in self.when else None

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("connection_made")

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.data += data
        self.note("data_received", data)

    def eof_received(self) -> Any:
        return self.note("eof_received")

    def pause_writing(self) -> None:
        self.note("pause_writing")

    def resume_writing(self) -> None:
        self.note("resume_writing")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        if not self.lost.done():
            self.lost.set_result(exc)
        self.note("connection_lost", exc)


class Buffered(asyncio.BufferedProtocol):
    """A buffered protocol with room of `size` bytes."""

    def __init__(self, size: int, **when: Callable[..., Any]) -> None:
        self.room = bytearray(size)
        self.data = bytearray()
        self.when = when
        self.calls: list[str] = []
        self.changed = asyncio.Event()
        self.lost = asyncio.get_running_loop().create_future()

    until = Recorder.until

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, hint: int) -> Any:
        return self.when["get_buffer"](self) if "get_buffer" in self.when else self.room

    def buffer_updated(self, count: int) -> None:
        self.data += self.room[:count]
        self.calls.append("buffer_updated")
        self.changed.set()
        if "buffer_updated" in self.when:
            self.when["buffer_updated"](self, count)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")
        self.changed.set()
        self.lost.set_result(exc)


async def connected(protocol: asyncio.BaseProtocol, *, small: bool = False) -> tuple[Any, socket.socket]:
    """A transport of `protocol` over one end of a socket pair, and the other end, non-blocking."""
    ours, theirs = socket.socketpair()
    if small:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
    return transport, theirs


async def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes, or less at the end."""
    loop = asyncio.get_running_loop()
    got = bytearray()
    while len(got) < count:
        piece = await loop.sock_recv(sock, count - len(got))
        if not piece:
            break
        got += piece
    return bytes(got)


def collecting(accepted: list[Recorder]) -> Callable[[], Recorder]:
    """A factory of protocols that puts them into a list."""
    def factory() -> Recorder:
        accepted.append(Recorder())
        return accepted[-1]
    return factory


def pattern(count: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(count))


async def fill(transport: Any) -> bytes:
    """Write until the kernel takes no more and bytes wait; returns what was written."""
    written = bytearray()
    while transport.get_write_buffer_size() == 0:
        transport.write(b"x" * 65536)
        written += b"x" * 65536
    return bytes(written)
