"""What beginners pass by mistake is refused at once, in words that say what was wanted."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import pytest

import anywire
from anywire import sync


async def coroutine_handler(channel: Any) -> None:
    """Would never run in a thread."""


class CoroutineObject:
    async def __call__(self, channel: Any) -> None:
        """As coroutine_handler, not seen before it is called."""


@pytest.mark.parametrize("serve", [anywire.serve, sync.serve, anywire.serve_stream, sync.serve_stream])
@pytest.mark.parametrize("handler", [None, "handler"], ids=repr)
def test_a_handler_must_be_callable(serve: Any, handler: Any) -> None:
    with pytest.raises(TypeError, match="a handler is a .*function of one argument"):
        serve(handler, "tcp://127.0.0.1:0")


def test_the_blocking_server_refuses_coroutine_functions() -> None:
    for handler in (coroutine_handler, functools.partial(coroutine_handler)):
        with pytest.raises(TypeError, match="is a coroutine function: serve it with anywire.serve"):
            sync.serve(handler, "tcp://127.0.0.1:0")


def test_a_coroutine_that_nothing_runs_is_a_failed_handler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="anywire")
    with sync.serve(CoroutineObject(), "tcp://127.0.0.1:0") as server:
        channel = sync.connect(server.addresses[0])
        with pytest.raises(anywire.PeerLost):
            channel.recv(timeout=20)
        channel.abort()
    assert "gave a coroutine, which nothing runs here: use anywire.serve" in caplog.text


@pytest.mark.parametrize("data", [5, None, ["bytes"]], ids=repr)
def test_a_message_is_bytes(data: Any) -> None:
    async def main() -> None:
        async with anywire.serve(coroutine_handler, "inproc://wrong"), anywire.connect("inproc://wrong") as channel:
            with pytest.raises(TypeError, match=f"a message is bytes, .* not {type(data).__name__}"):
                await channel.send(data)

    asyncio.run(main())
