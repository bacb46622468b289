"""Every wire on every kind of event loop that asyncio knows: the driver uses the loop's public methods only.

uvloop, written in C, with futures, handles and polling of its own; asyncio's debug mode, which refuses calls from other
threads and checks each argument; select(2) in place of epoll(7); and tasks and futures in pure Python, as a program
gets them by a task factory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from conformance.wires import SETUPS, Setup, client_address

import anywire

LARGE = 300_000


def uv_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def debugged() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def over_select() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def in_python() -> asyncio.AbstractEventLoop:
    """Tasks and futures are instances of the Python classes, not of the C ones of `_asyncio`."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(lambda loop, coroutine, **options: asyncio.tasks._PyTask(coroutine, loop=loop, **options))
    loop.create_future = lambda: asyncio.futures._PyFuture(loop=loop)
    return loop


MISSING = importlib.util.find_spec("uvloop") is None
LOOPS = [
    pytest.param(uv_loop, marks=pytest.mark.skipif(MISSING, reason="uvloop is not built for this Python yet")),
    debugged,
    over_select,
    in_python,
]
SERVERS = [setup for setup in SETUPS if setup.two_way and setup.shape == "listener" and setup.several]


def run(make_loop: Callable[[], asyncio.AbstractEventLoop], main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `main` on such a loop, and see that nothing failed behind its back and nothing is left."""
    failures: list[dict[str, Any]] = []

    async def watched() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: failures.append(context))
        async with asyncio.timeout(30):
            await main()
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(watched())
    assert not failures, failures


@contextlib.asynccontextmanager
async def connected(setup: Setup, directory: Path) -> AsyncIterator[tuple[anywire.Channel, anywire.Channel]]:
    """Both ends; the first sends."""
    if setup.shape == "pair":
        ends = await asyncio.gather(*map(anywire.attach, anywire.pipe(duplex=setup.two_way)))
        async with ends[0], ends[1]:
            yield ends[0], ends[1]
        return
    async with anywire.listen(setup.listen(directory)) as listener:
        accepting = asyncio.ensure_future(listener.accept())
        address = client_address(listener.addresses[0])
        async with anywire.connect(address, **setup.dial_options(directory)) as sender:
            if not setup.announced:
                await sender.send(b"it is me")
            async with await accepting as receiver:
                if not setup.announced:
                    assert await receiver.recv() == b"it is me"
                yield sender, receiver


async def give_up(operation: Any, turns: int) -> None:
    task = asyncio.ensure_future(operation)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("make_loop", LOOPS)
def test_the_loops_are_what_they_are_called(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> tuple[bool, ...]:
        loop = asyncio.get_running_loop()
        return (
            type(loop).__module__.startswith("uvloop"),
            loop.get_debug(),
            isinstance(getattr(loop, "_selector", None), selectors.SelectSelector),
            type(asyncio.current_task()) is asyncio.tasks._PyTask,
        )

    with asyncio.Runner(loop_factory=make_loop) as runner:
        expected = (make_loop is uv_loop, make_loop is debugged, make_loop is over_select, make_loop is in_python)
        assert runner.run(main()) == expected


@pytest.mark.parametrize("make_loop", LOOPS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_an_exchange(setup: Setup, make_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    """Messages small and large, cancelled and timed out receives and sends, and the end."""
    large = bytes(min(LARGE, setup.largest))

    async def main() -> None:
        async with connected(setup, tmp_path) as (sender, receiver):
            receiving = asyncio.ensure_future(receiver.recv())
            await asyncio.sleep(0)
            await sender.send(b"small")
            assert await receiving == b"small"
            receiving = asyncio.ensure_future(receiver.recv())
            await sender.send(large)
            assert await receiving == large
            several = [b"%d" % number for number in range(min(10, setup.room))]
            await sender.send_many(several)
            got: list[bytes] = []
            while len(got) < len(several):
                got += await receiver.recv_many()
            assert got == several

            for turns in range(4):
                await give_up(receiver.recv(), turns)
                await give_up(receiver.recv_into(bytearray(10)), turns)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await receiver.recv()
            with pytest.raises(anywire.TimedOut):
                await receiver.recv(timeout=0.01)
            await sender.send(b"after those")
            assert await receiver.recv() == b"after those"

            if setup.promise.reliable:
                await a_cancelled_send(sender, receiver, min(60_000, setup.largest))
            if setup.two_way:
                await receiver.send(b"answer")
                assert await sender.recv() == b"answer"
            ending = asyncio.ensure_future(receiver.recv())
            await asyncio.sleep(0)
            closing = asyncio.ensure_future(sender.close())
            if setup.promise.clean_end:
                with pytest.raises(anywire.EndOfChannel):
                    await ending
            elif setup.promise.death == "at once":
                with pytest.raises((anywire.EndOfChannel, anywire.PeerLost)):
                    await ending
            else:
                await give_up(ending, 2)
            await receiver.close()
            await closing

    run(make_loop, main)


async def a_cancelled_send(sender: anywire.Channel, receiver: anywire.Channel, size: int) -> None:
    """The receiver takes nothing, so sends wait, and one of them is cancelled: it went whole or not at all."""
    sends: list[asyncio.Future[None]] = []
    while sum(not one.done() for one in sends) < 2:         # the kernel may make room for one more behind our back
        sends.append(asyncio.ensure_future(sender.send(b"%8d" % len(sends) + bytes(size))))
        await asyncio.sleep(0)
    cancelled = len(sends) - 1
    sends[cancelled].cancel()
    last = len(sends)
    sends.append(asyncio.ensure_future(sender.send(b"%8d" % last)))
    numbers: list[int] = []
    while not numbers or numbers[-1] != last:
        numbers.append(int((await receiver.recv())[:8]))
    assert numbers in ([*range(cancelled), last], [*range(last + 1)])
    with contextlib.suppress(asyncio.CancelledError):
        await sends.pop(cancelled)
    await asyncio.gather(*sends)


@pytest.mark.parametrize("make_loop", LOOPS)
@pytest.mark.parametrize("setup", SERVERS, ids=str)
def test_a_server(setup: Setup, make_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    """Handlers are tasks of that loop too; one that waits is cancelled when the server closes."""
    cancelled: list[bytes] = []

    async def handler(channel: anywire.Channel) -> None:
        async for message in channel:
            await channel.send(message)
            if message == b"wait":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(message)
                    raise

    async def main() -> None:
        async with anywire.serve(handler, setup.listen(tmp_path)) as server:
            address, options = client_address(server.addresses[0]), setup.dial_options(tmp_path)
            channels = [await anywire.connect(address, **options) for _ in range(3)]
            for channel in channels:
                await channel.send(b"hello")
            assert [await channel.recv() for channel in channels] == [b"hello"] * 3
            await channels[0].send(b"wait")
            assert await channels[0].recv() == b"wait"
            await asyncio.gather(*(channel.close() for channel in channels[1:]))
            await server.close(timeout=0.05)
            await channels[0].close()

    run(make_loop, main)
    assert cancelled == [b"wait"]
