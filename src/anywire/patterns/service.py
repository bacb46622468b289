"""A thread with an event loop, for the blocking ends that have several peers.

Owns: that thread, from `Service()` to `stop`. A publisher must hear who joins, leaves and dies while its program does
something else, so the blocking front gives it one thread, whatever the number of peers; the async end runs there.

What can go wrong: a fork: the child has no such thread, so every call there says Forked. An interrupt (Ctrl-C) while a
call waits: what it waits for is cancelled, as a task is. A close in another thread: who waits gets ChannelClosed. A
call from a callback that runs in that very thread, which would wait for itself: refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from anywire.contract.errors import ChannelClosed, Forked

T = TypeVar("T")


_generation = 0
"""How often this process was forked off since the import. Looked at for each message: getpid(2) is a system call."""


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)


class Service:
    """Runs coroutines for other threads."""

    def __init__(self, name: str, address: object) -> None:
        self._address = str(address)
        self._owner = _generation
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._nudged = False
        self._stopping = False
        self._lock = threading.Lock()
        self._thread.start()

    def check(self, operation: str) -> None:
        """Raise Forked in a forked child."""
        if self._owner != _generation:
            raise Forked(
                "it was opened by the parent process, and its thread is there",
                address=self._address,
                operation=operation,
                advice="open one in the child",
            )

    def run(
        self, operation: str, coroutine: Coroutine[Any, Any, T], undo: Callable[[T], object] = lambda result: None
    ) -> T:
        """Run a coroutine there, and wait for what it returns or raises.

        Interrupted, it is cancelled; if it returned before that could happen, `undo` gets what it returned."""
        tasks: list[asyncio.Task[Any] | None] = []

        async def there() -> T:
            tasks.append(asyncio.current_task())
            return await coroutine

        running = there()
        try:
            self.check(operation)
            if threading.get_ident() == self._thread.ident:
                raise RuntimeError(
                    f"{operation} {self._address}: a callback would wait for its own thread; use try_send there"
                )
            with self._lock:                    # what is scheduled before `_wind_up` is, is seen by it
                if self._stopping:
                    raise ChannelClosed(address=self._address, operation=operation)
                future = asyncio.run_coroutine_threadsafe(running, self._loop)
        except BaseException:
            running.close()
            coroutine.close()
            raise
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ChannelClosed(address=self._address, operation=operation) from None
        except BaseException:
            if not future.done():
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks if task is not None])
            try:
                undo(future.result())
            except BaseException:
                pass                            # it was cancelled, or what it raised is what is being raised
            raise

    def soon(self, callback: Callable[[], object]) -> None:
        """Call `callback` there; calls of this that come before it runs are one."""
        if not self._nudged:
            self._nudged = True
            try:
                self._loop.call_soon_threadsafe(self._nudge, callback)
            except RuntimeError:                # closed meanwhile, and everybody was woken for that
                pass

    def _nudge(self, callback: Callable[[], object]) -> None:
        self._nudged = False
        callback()

    def stop(self) -> None:
        """End the thread. Safe to call twice."""
        if self._owner != _generation or self._loop.is_closed():
            return
        with self._lock:
            self._stopping = True
            asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._loop.shutdown_default_executor()
        self._loop.stop()


class Served:
    """A blocking end: an async one in a thread of its own, from `start` to `close`."""

    _role = ""
    """What it is about, for errors and the thread's name."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner = inner
        self._where = name
        self._service: Service | None = None

    def start(self) -> Self:
        """Listen, or connect, and begin the thread. `with` does this."""
        if self._service is None:
            service = Service(f"anywire {self._role}", self._where)
            try:
                service.run(self._role, self._inner.start())
            except BaseException:
                service.stop()
                raise
            self._service = service
        return self

    def _end(self, make: Callable[[], Any]) -> None:
        service, self._service = self._service, None
        if service is not None:
            try:
                service.run("close", make())
            finally:
                service.stop()

    def close(self, *, timeout: float | None = None) -> None:
        """End politely, as the async end does, within `timeout` seconds (default: its `close_timeout`)."""
        self._end(lambda: self._inner.close(timeout=timeout))

    def abort(self) -> None:
        """Drop the connections at once: the other ends see a loss."""
        self._end(self._inner.abort)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
        else:
            self.close()

    def __repr__(self) -> str:
        return repr(self._inner).replace("anywire.", "anywire.sync.", 1)
