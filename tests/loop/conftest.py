"""Fixtures of the TLS tests: each runs on the standard loop, and on ours over MemoryBIO and straight through libssl.

The other test modules here have a `run` of their own."""

from __future__ import annotations

import asyncio
from asyncio import sslproto
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import anywire.loop
import anywire.loop.sockets
from tests.leftovers import nothing_is_left  # noqa: F401 - for every test here

PATIENCE = 20.0
WAYS = ("standard", "memory", "direct")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "memory":
        monkeypatch.setattr(anywire.loop.sockets, "tls_protocol", sslproto.SSLProtocol)
    return str(request.param)


@pytest.fixture
def run(way: str) -> Iterator[Callable[[Awaitable[Any]], Any]]:
    """Runs one coroutine; fails on anything that reaches the loop's exception handler and was not expected."""
    make = asyncio.new_event_loop if way == "standard" else anywire.loop.new_event_loop
    with asyncio.Runner(loop_factory=make) as runner:
        told: list[dict[str, Any]] = []
        loop: Any = runner.get_loop()
        loop.told = told
        loop.set_exception_handler(lambda loop, context: told.append(context))

        async def limited(main: Awaitable[Any]) -> Any:
            return await asyncio.wait_for(main, PATIENCE)

        yield lambda main: runner.run(limited(main))
        assert told == []
