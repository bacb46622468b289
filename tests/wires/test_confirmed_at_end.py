"""A peer that has half-closed learns that everything was taken, although this side stays open and sends nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

import anywire
from anywire import sync


def blocking_server(listening: Callable[[str], None], leave: threading.Event) -> None:
    with sync.listen("tcp://127.0.0.1:0") as listener:
        listening(str(listener.addresses[0]))
        with listener.accept() as channel:
            assert list(channel) == [b"one", b"two"]
            leave.wait()


def async_server(listening: Callable[[str], None], leave: threading.Event) -> None:
    async def serve() -> None:
        async with anywire.listen("tcp://127.0.0.1:0") as listener:
            listening(str(listener.addresses[0]))
            async with await listener.accept() as channel:
                assert [message async for message in channel] == [b"one", b"two"]
                await asyncio.to_thread(leave.wait)

    asyncio.run(serve())


@pytest.mark.parametrize("server", [blocking_server, async_server])
def test_the_end_is_answered_with_what_was_taken(server: Any) -> None:
    address: list[str] = []
    told, leave = threading.Event(), threading.Event()

    def listening(real: str) -> None:
        address.append(real)
        told.set()

    thread = threading.Thread(target=server, args=(listening, leave))
    thread.start()
    try:
        assert told.wait(30)
        with sync.connect(address[0]) as channel:
            channel.send_many([b"one", b"two"])
            channel.send_eof()
            while channel.unconfirmed:                  # the test's own limit is the deadline
                with contextlib.suppress(anywire.TimedOut):
                    channel.recv(timeout=0.05)          # takes in what came
            leave.set()
    finally:
        leave.set()
        thread.join(30)
