"""The two fronts behind one face, so that each scenario is written once, as a coroutine.

Owns: `AsyncFront`, which is `anywire` itself, and `BlockingFront`, which is `anywire.sync` with every call that may
wait moved into a thread of its own: a blocked call then blocks nobody else, as in a threaded program.
Called by world.py, on the test's event loop. A blocking call that never returns keeps a daemon thread, never the run.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import anywire
import anywire.sync

ABANDONED = object()  # what an abandoned call gives when it did not finish


class Threads:
    """Runs blocking calls in daemon threads, which are kept for the next call."""

    def __init__(self) -> None:
        self._idle: list[queue.SimpleQueue[Any]] = []
        self._over = False

    def end(self) -> None:
        """Let the threads end: the idle ones now, the others when their call returns."""
        self._over = True
        for jobs in self._idle:
            jobs.put(None)

    async def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        jobs = self._idle.pop() if self._idle else self._start()
        jobs.put((loop, future, call, args, options))
        return await future

    def _start(self) -> queue.SimpleQueue[Any]:
        jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(jobs,), name="conformance", daemon=True).start()
        return jobs

    def _work(self, jobs: queue.SimpleQueue[Any]) -> None:
        while True:
            job = jobs.get()
            if job is None:
                return
            loop, future, call, args, options = job
            try:
                settle, value = future.set_result, call(*args, **options)
            except StopIteration:
                settle, value = future.set_exception, StopAsyncIteration()
            except BaseException as error:
                settle, value = future.set_exception, error
            if self._over:
                jobs.put(None)
            self._idle.append(jobs)
            try:
                loop.call_soon_threadsafe(lambda s=settle, f=future, v=value: None if f.done() else s(v))
            except RuntimeError:  # the test is over: its loop is closed
                pass
            del job, loop, future, call, args, options, settle, value  # an idle thread keeps nothing of its last call


class Threaded:
    """A blocking object with an async face: what may wait is awaited, the rest is passed on."""

    PLAIN = frozenset("try_send loan loan_array abort detach stats".split())

    def __init__(self, inner: Any, threads: Threads) -> None:
        self.inner = inner
        self.threads = threads

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value) or name in self.PLAIN:
            return value

        async def call(*args: Any, **options: Any) -> Any:
            result = await self.threads.run(value, *args, **options)
            return Threaded(result, self.threads) if name == "accept" else result

        return call

    def __aiter__(self) -> Threaded:
        return Threaded(iter(self.inner), self.threads)

    async def __anext__(self) -> Any:
        return await self.threads.run(next, self.inner)

    async def __aenter__(self) -> Threaded:
        await self.threads.run(self.inner.__enter__)
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self.threads.run(self.inner.__exit__, *error)


class AsyncFront:
    name = "async"
    ways_to_abandon = ("cancel", "asyncio.timeout", "timeout argument")

    def __init__(self) -> None:
        self.threads = Threads()  # for raw peers only

    async def connect(self, address: Any, **options: Any) -> Any:
        return await anywire.connect(address, **options)

    async def connect_stream(self, address: Any, **options: Any) -> Any:
        return await anywire.connect_stream(address, **options)

    async def listen(self, *addresses: Any, stream: bool = False, **options: Any) -> Any:
        listener = (anywire.listen_stream if stream else anywire.listen)(*addresses, **options)
        return await listener.__aenter__()

    async def stop_listening(self, listener: Any) -> None:
        await listener.__aexit__(None, None, None)

    def serve(self, handler: Any, *addresses: Any, stream: bool = False, **options: Any) -> Any:
        """Async context manager, as `anywire.serve`; the handler is a coroutine function on either front."""
        return (anywire.serve_stream if stream else anywire.serve)(handler, *addresses, **options)

    def connect_forever(self, address: Any, **options: Any) -> Any:
        return anywire.connect_forever(address, **options)

    async def attach(self, handle: Any, **options: Any) -> Any:
        return await anywire.attach(handle, **options)

    def inside(self, channel: Any) -> Any:
        """The real channel."""
        return channel

    async def abandon(self, call: Any, *args: Any, turns: int = 3, way: str = "cancel") -> Any:
        """Give up a call after some turns of the loop (or tenths of a millisecond): its result, or ABANDONED."""
        if way == "timeout argument":
            try:
                return await call(*args, timeout=turns / 10_000)
            except anywire.TimedOut:
                return ABANDONED
        if way == "asyncio.timeout":
            try:
                async with asyncio.timeout(turns / 10_000):
                    return await call(*args)
            except TimeoutError:
                return ABANDONED
        task = asyncio.ensure_future(call(*args))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            scenario = asyncio.current_task()
            if scenario is not None and scenario.cancelling():      # its deadline passed meanwhile
                raise
            return ABANDONED


class BlockingFront:
    name = "blocking"
    ways_to_abandon = ("timeout argument",)

    def __init__(self) -> None:
        self.threads = Threads()

    def _wrap(self, inner: Any) -> Threaded:
        return Threaded(inner, self.threads)

    async def connect(self, address: Any, **options: Any) -> Any:
        return self._wrap(await self.threads.run(anywire.sync.connect, address, **options))

    async def connect_stream(self, address: Any, **options: Any) -> Any:
        return self._wrap(await self.threads.run(anywire.sync.connect_stream, address, **options))

    async def listen(self, *addresses: Any, stream: bool = False, **options: Any) -> Any:
        make = anywire.sync.listen_stream if stream else anywire.sync.listen
        return self._wrap(await self.threads.run(lambda: make(*addresses, **options).__enter__()))

    async def stop_listening(self, listener: Any) -> None:
        await self.threads.run(listener.inner.__exit__, None, None, None)

    def serve(self, handler: Any, *addresses: Any, stream: bool = False, **options: Any) -> Any:
        loop = asyncio.get_running_loop()

        def blocking_handler(inner: Any) -> None:
            asyncio.run_coroutine_threadsafe(handler(self._wrap(inner)), loop).result()

        make = anywire.sync.serve_stream if stream else anywire.sync.serve
        return self._wrap(make(blocking_handler, *addresses, **options))

    def connect_forever(self, address: Any, **options: Any) -> Any:
        return _WrappedIterator(anywire.sync.connect_forever(address, **options), self)

    async def attach(self, handle: Any, **options: Any) -> Any:
        return self._wrap(await self.threads.run(anywire.sync.attach, handle, **options))

    def inside(self, channel: Any) -> Any:
        return channel.inner

    async def abandon(self, call: Any, *args: Any, turns: int = 3, way: str = "timeout argument") -> Any:
        try:
            return await call(*args, timeout=turns / 10_000)
        except anywire.TimedOut:
            return ABANDONED


class _WrappedIterator:
    """Async iterator over a blocking iterator of channels."""

    def __init__(self, inner: Any, front: BlockingFront) -> None:
        self._inner = iter(inner)
        self._front = front

    def __aiter__(self) -> _WrappedIterator:
        return self

    async def __anext__(self) -> Any:
        return self._front._wrap(await self._front.threads.run(next, self._inner))


FRONTS = {"async": AsyncFront, "blocking": BlockingFront}
