"""An operation is awaited once: the second time is an error that says so, on whatever operation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import anywire

CHANNEL: dict[str, Callable[[Any], Any]] = {
    "send": lambda one: one.send(b"x"),
    "send_many": lambda one: one.send_many([b"x"]),
    "recv": lambda one: one.recv(),
    "recv_many": lambda one: one.recv_many(),
    "recv_into": lambda one: one.recv_into(bytearray(10)),
}
STREAM: dict[str, Callable[[Any], Any]] = {
    "write": lambda one: one.write(b"x"),
    "read": lambda one: one.read(),
    "read_into": lambda one: one.read_into(bytearray(10)),
}


@pytest.mark.parametrize("loop", [anywire.new_event_loop, asyncio.new_event_loop])
@pytest.mark.parametrize("name", [*CHANNEL, *STREAM])
def test_awaited_twice(name: str, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def echo(one: Any) -> None:
        await (one.send(b"hello") if name in CHANNEL else one.write(b"hello"))
        async for _ in one:
            pass

    async def main() -> None:
        serve, connect = ((anywire.serve, anywire.connect) if name in CHANNEL else
                          (anywire.serve_stream, anywire.connect_stream))
        async with serve(echo, "tcp://127.0.0.1:0") as server, connect(server.addresses[0]) as one:
            operation = {**CHANNEL, **STREAM}[name](one)
            await operation
            for _ in range(2):
                with pytest.raises(RuntimeError, match="already awaited"):
                    await operation

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(main(), 20))
