"""An async channel in a task of another thread's loop: sends go there, receives are refused, nothing is torn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import anywire

ADDRESSES = ["inproc://other-threads", "tcp://127.0.0.1:0", "unix:@anywire-other-threads"]
LARGE = 20 << 20


def in_another_loop(work: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Future[Any]:
    """The result of `work()`, run by a loop in a thread of its own."""
    return asyncio.get_running_loop().run_in_executor(None, lambda: asyncio.run(work()))


async def collected(channel: anywire.Channel) -> list[bytes]:
    return [message async for message in channel]


@pytest.mark.parametrize("address", ADDRESSES)
def test_sends_from_another_loop_stay_whole_whatever_is_cancelled(address: str) -> None:
    accepted: list[bytes] = []
    received: list[bytes] = []
    unsure: list[bytes] = []

    async def main() -> None:
        over = asyncio.Event()

        async def handler(channel: anywire.Channel) -> None:
            received.extend(await collected(channel))
            over.set()

        async with anywire.serve(handler, address) as server:
            channel = await anywire.connect(server.addresses[0])

            async def sends() -> None:
                for number in range(300):
                    data = bytearray(b"%06d" % number * 10_000)
                    whole = bytes(data)
                    sending = asyncio.ensure_future(channel.send(data))
                    if number % 3:
                        for _ in range(number % 7):
                            await asyncio.sleep(0)
                        sending.cancel()
                    try:
                        await sending
                        accepted.append(whole)
                    except asyncio.CancelledError:
                        unsure.append(whole)
                    data[:] = b"x" * len(data)          # must not be seen by the receiver
                await channel.send_many([b"m1", bytearray(b"m2")])
                await channel.send_eof()
                await channel.close()

            await in_another_loop(sends)
            assert channel.closed
            await over.wait()

    asyncio.run(main())
    assert received[-2:] == [b"m1", b"m2"]
    assert set(received[:-2]) <= set(accepted) | set(unsure)
    assert [one for one in received if one in set(accepted)] == accepted
    assert len(accepted) >= 100


@pytest.mark.parametrize("address", ADDRESSES)
def test_receiving_in_another_loop_is_refused_and_takes_nothing(address: str) -> None:
    async def main() -> None:
        async def handler(channel: anywire.Channel) -> None:
            await channel.send(b"for the right loop")
            await collected(channel)

        async with anywire.serve(handler, address) as server, anywire.connect(server.addresses[0]) as channel:

            async def receives() -> None:
                for receive in (
                    channel.recv, channel.recv_many, lambda: channel.recv_into(bytearray(10)), lambda: anext(channel),
                ):
                    with pytest.raises(RuntimeError, match=r"recv .*another thread.*anywire.sync"):
                        await receive()
                with pytest.raises(RuntimeError, match="another thread"):
                    channel.try_send(b"x")
                with pytest.raises(RuntimeError, match="another thread"):
                    channel.detach()

            await in_another_loop(receives)
            assert await channel.recv() == b"for the right loop"

    asyncio.run(main())


def test_streams_write_from_another_loop_and_read_in_their_own() -> None:
    async def main() -> None:
        async def handler(stream: anywire.Stream) -> None:
            total = 0
            async for chunk in stream:
                total += len(chunk)
            await stream.write(b"%d" % total)

        async with (
            anywire.serve_stream(handler, "tcp://127.0.0.1:0") as server,
            anywire.connect_stream(server.addresses[0]) as stream,
        ):

            async def writes() -> None:
                await stream.write(bytes(LARGE))
                await stream.write_many([b"1", b"2"])
                with pytest.raises(RuntimeError, match=r"read .*another thread"):
                    await stream.read()
                await stream.write_eof()

            await in_another_loop(writes)
            assert await stream.read_exactly(8) == b"%d" % (LARGE + 2)

    asyncio.run(main())


def test_abort_from_any_thread() -> None:
    async def main() -> None:
        lost = asyncio.Event()

        async def handler(channel: anywire.Channel) -> None:
            with pytest.raises(anywire.PeerLost):
                await channel.recv()
            lost.set()

        async with anywire.serve(handler, "tcp://127.0.0.1:0") as server:
            channel = await anywire.connect(server.addresses[0])
            receiving = asyncio.ensure_future(channel.recv())
            await asyncio.sleep(0)
            thread = threading.Thread(target=channel.abort)
            thread.start()
            with pytest.raises(anywire.ChannelClosed):
                await receiving
            thread.join()
            await lost.wait()

    asyncio.run(main())


def test_a_send_to_a_loop_that_is_closed_says_so() -> None:
    async def connected() -> tuple[Any, anywire.Channel]:
        server = await anywire.serve(collected, "inproc://closed-loop").start()
        return server, await anywire.connect("inproc://closed-loop")

    loop = asyncio.new_event_loop()
    server, channel = loop.run_until_complete(connected())
    loop.run_until_complete(server.abort())
    loop.close()

    async def send() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            await channel.send(b"x")
        channel.abort()

    thread = threading.Thread(target=lambda: asyncio.run(send()))
    thread.start()
    thread.join()
    assert channel.closed
