"""What a task waits by when it awaits a native read: a Future of asyncio's own, which stays pending and is used again.

Each test runs for a channel and for asyncio's streams, on our loop and on asyncio's, and with Futures whose fields are
not known (as on an interpreter that we have not seen): then the Future is done, and the task goes on a turn later.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest

import anywire
from anywire.engine._awaiting import Waiter, _know_futures

MESSAGE = b"four"


class End:
    """One end of a connection whose other end blocks: how it reads, and how something comes."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], arrive: Callable[[], object]) -> None:
        self.read, self.arrive = read, arrive


@contextlib.asynccontextmanager
async def streams() -> AsyncIterator[End]:
    here, there = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=here)
    with there:
        yield End(lambda: reader.readexactly(len(MESSAGE)), lambda: there.send(MESSAGE))
    writer.close()


@contextlib.asynccontextmanager
async def channel() -> AsyncIterator[End]:
    ours, theirs = anywire.pipe(duplex=True)
    here, there = await asyncio.gather(anywire.attach(ours), asyncio.to_thread(anywire.sync.attach, theirs))
    yield End(here.recv, lambda: there.send(MESSAGE))
    here.abort()
    there.abort()


@pytest.fixture(params=["channel", "streams"])
def end(request: pytest.FixtureRequest) -> Callable[[], contextlib.AbstractAsyncContextManager[End]]:
    return channel if request.param == "channel" else streams


@pytest.fixture(params=["anywire", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    make = anywire.new_event_loop if request.param == "anywire" else asyncio.new_event_loop

    def run(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=make) as runner:
            runner.run(asyncio.wait_for(main, 30))

    return run


@pytest.fixture(params=["known", "unknown"], autouse=True)
def known(request: pytest.FixtureRequest) -> Iterator[bool]:
    assert _know_futures()
    try:
        yield _know_futures(request.param == "known")
    finally:
        assert _know_futures()


async def a_while() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_many_waits(end: Any, run: Any) -> None:
    async def main() -> None:
        async with end() as one:
            loop = asyncio.get_running_loop()
            for _ in range(50):
                loop.call_later(0.0001, one.arrive)
                assert bytes(await one.read()) == MESSAGE

    run(main())


def test_the_future_is_used_again(end: Any, known: bool) -> None:
    seen: list[asyncio.Future[None] | None] = []

    async def main() -> None:
        async with end() as one:
            loop = asyncio.get_running_loop()
            task = asyncio.current_task()

            def look() -> None:
                seen.append(task._fut_waiter)    # type: ignore[union-attr]
                one.arrive()

            for _ in range(3):
                loop.call_soon(look)
                await one.read()

    anywire.run(main())
    assert {type(future) for future in seen} == {asyncio.Future}
    assert (seen[0] is seen[1] is seen[2]) == known


def test_a_cancelled_wait_loses_nothing(end: Any, run: Any) -> None:
    async def main() -> None:
        async with end() as one:
            for _ in range(5):
                task = asyncio.ensure_future(one.read())
                await a_while()
                assert task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                one.arrive()
                assert bytes(await one.read()) == MESSAGE

    run(main())


def test_a_cancel_before_the_report_of_the_same_turn(end: Any, run: Any) -> None:
    # Both connections are readable in one look at the descriptors. What the first one's task does cancels the second's.
    async def main() -> None:
        async with end() as first, end() as second:
            for _ in range(5):
                waiting = asyncio.ensure_future(second.read())

                async def cancel(waiting: asyncio.Future[bytes], one: End) -> None:
                    await one.read()
                    waiting.cancel()

                cancelling = asyncio.ensure_future(cancel(waiting, first))
                await a_while()
                first.arrive()
                second.arrive()
                await cancelling
                await asyncio.wait([waiting])
                # Whichever came first: the message is in the task's result, or comes next.
                message = await second.read() if waiting.cancelled() else waiting.result()
                assert bytes(message) == MESSAGE

    run(main())


def test_a_cancel_after_the_wake_up(run: Any) -> None:
    # The standard `feed_data` completes the wait; the task, which would go on in the next turn, is cancelled before.
    async def main() -> None:
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=here)
        task = asyncio.ensure_future(reader.readexactly(len(MESSAGE)))
        await a_while()
        reader.feed_data(MESSAGE)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await reader.readexactly(len(MESSAGE)) == MESSAGE
        writer.close()
        there.close()

    run(main())


def test_a_channel_closed_under_a_task_that_is_then_cancelled(run: Any) -> None:
    async def main() -> None:
        async with channel() as one:
            here = one.read.__self__             # type: ignore[attr-defined]
            task = asyncio.ensure_future(here.recv())
            await a_while()
            here.abort()
            task.cancel()
            with pytest.raises((asyncio.CancelledError, anywire.ChannelClosed)):
                await task
            with pytest.raises(anywire.ChannelClosed):
                await here.recv()

    run(main())


def test_time_outs(run: Any) -> None:
    async def main() -> None:
        async with channel() as one:
            here = one.read.__self__             # type: ignore[attr-defined]
            for _ in range(3):
                with pytest.raises(anywire.TimedOut):
                    await here.recv(timeout=0.001)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(here.recv(), 0.001)
                one.arrive()
                assert bytes(await here.recv(timeout=10)) == MESSAGE

    run(main())


def test_a_task_in_python(end: Any, run: Any) -> None:
    # asyncio's own Task in Python, and whatever else takes a Future that a coroutine yields.
    async def main() -> None:
        async with end() as one:
            async def three() -> list[bytes]:
                return [bytes(await one.read()) for _ in range(3)]

            task = asyncio.tasks._PyTask(three())    # type: ignore[attr-defined]
            for _ in range(3):
                await a_while()
                one.arrive()
            assert await task == [MESSAGE] * 3
            task = asyncio.tasks._PyTask(three())    # type: ignore[attr-defined]
            await a_while()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_by_hand(end: Any, run: Any) -> None:
    # Nobody has added a callback when the bytes come: the Future is done, and says so.
    async def main() -> None:
        async with end() as one:
            operation = one.read()
            future = operation.send(None)
            assert type(future) is asyncio.Future and future._asyncio_future_blocking and not future.done()
            one.arrive()
            while not future.done():
                await asyncio.sleep(0.001)
            with pytest.raises(StopIteration) as stopped:
                operation.send(None)
            assert bytes(stopped.value.value) == MESSAGE
            operation = one.read()
            operation.send(None)
            operation.close()
            one.arrive()
            assert bytes(await one.read()) == MESSAGE

    run(main())


def test_who_completes_the_future_wakes_the_task_for_nothing(end: Any) -> None:
    async def main() -> None:
        async with end() as one:
            task = asyncio.ensure_future(one.read())
            for _ in range(3):
                await a_while()
                task._fut_waiter.set_result(None)    # type: ignore[attr-defined]
            await a_while()
            assert not task.done()
            one.arrive()
            assert bytes(await task) == MESSAGE

    anywire.run(main())


def test_two_who_wait_for_the_future(end: Any) -> None:
    # A second callback, of whoever looks at tasks: the Future is done for both.
    called: list[asyncio.Future[None]] = []

    async def main() -> None:
        async with end() as one:
            for turn in range(3):
                task = asyncio.ensure_future(one.read())
                await a_while()
                future = task._fut_waiter                # type: ignore[attr-defined]
                future.add_done_callback(called.append)
                one.arrive()
                assert bytes(await task) == MESSAGE
                await a_while()
                assert called[turn:] == [future] and future.done()

    anywire.run(main())


def test_who_has_the_future_from_the_operation(end: Any, run: Any) -> None:
    # Other ways to drive a coroutine than a Task's own: what they do with the Future is what they do with any.
    async def main() -> None:
        async with end() as one:
            async def driven(wait: Callable[[asyncio.Future[None]], Awaitable[object]]) -> bytes:
                operation = one.read()
                future = operation.send(None)            # type: ignore[attr-defined]
                future._asyncio_future_blocking = False
                await wait(future)
                assert future.done()
                with pytest.raises(StopIteration) as stopped:
                    operation.send(None)                 # type: ignore[attr-defined]
                return bytes(stopped.value.value)

            async def by_callback(future: asyncio.Future[None]) -> None:
                called = asyncio.get_running_loop().create_future()
                future.add_done_callback(called.set_result)
                assert await called is future

            async def awaited(future: asyncio.Future[None]) -> None:
                await future

            async def among_others(future: asyncio.Future[None]) -> None:
                assert await asyncio.wait([future]) == ({future}, set())

            for way in (awaited, by_callback, among_others, awaited):
                task = asyncio.ensure_future(driven(way))
                await a_while()
                one.arrive()
                assert await asyncio.wait_for(task, 5) == MESSAGE

    run(main())


def test_the_tasks_context_is_its_own(end: Any, run: Any) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

    async def main() -> None:
        async with end() as one:
            async def read(name: str) -> str:
                variable.set(name)
                await one.read()
                return variable.get()

            for name in ("first", "second"):
                task = asyncio.ensure_future(read(name))
                await a_while()
                one.arrive()
                assert await task == name
            assert variable.get() == ""

    run(main())


@pytest.mark.filterwarnings("ignore:unclosed event loop")
def test_a_loop_that_read_a_stream_is_collected() -> None:
    loop = anywire.new_event_loop()

    async def main() -> None:
        async with streams() as one:
            asyncio.get_running_loop().call_soon(one.arrive)
            await one.read()

    loop.run_until_complete(main())
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None


def test_what_it_shows() -> None:
    async def main() -> None:
        async with streams() as one:
            task = asyncio.ensure_future(one.read())
            await a_while()
            reader = inspect.getclosurevars(one.read).nonlocals["reader"]
            waiter = reader._waiter
            assert type(waiter) is Waiter and waiter.loop is asyncio.get_running_loop()
            assert not waiter.done() and not waiter.cancelled()
            reader.set_exception(OSError("it broke"))
            with pytest.raises(asyncio.InvalidStateError):
                waiter.set_result(None)
            assert waiter.done() and not waiter.cancelled() and not waiter.cancel()
            with pytest.raises(OSError, match="it broke"):
                await task

    anywire.run(main())
