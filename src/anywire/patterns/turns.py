"""Tasks that wait for room, in the order in which they came.

Used by what has room at times: a publisher's log, the receivers of a push end. On one event loop's thread.
What can go wrong: a task that is cancelled just as it was woken; it leaves the line, and the next one is woken.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable

from anywire.contract.errors import AnywireError, TimedOut


class _Turn:
    __slots__ = ("woken",)

    def __init__(self) -> None:
        self.woken: asyncio.Future[None] | None = None


class Turns:
    """A line of tasks, of which the first one tries."""

    __slots__ = ("line",)

    def __init__(self) -> None:
        self.line: collections.deque[_Turn] = collections.deque()
        """Who waits. While it is not empty, others go behind."""

    async def until(self, attempt: Callable[[], bool]) -> None:
        """Wait until it is this task's turn and `attempt()`, tried at each `wake`, is true. Raises what that raises."""
        turn = _Turn()
        self.line.append(turn)
        try:
            while self.line[0] is not turn or not attempt():
                turn.woken = asyncio.get_running_loop().create_future()
                await turn.woken
        finally:
            self.line.remove(turn)
            self.wake()

    async def within(self, timeout: float | None, attempt: Callable[[], bool], address: object, operation: str) -> None:
        """As `until`, for at most `timeout` seconds: then TimedOut."""
        if timeout is None:
            await self.until(attempt)
            return
        try:
            async with asyncio.timeout(timeout):
                await self.until(attempt)
        except TimeoutError as error:
            if isinstance(error, AnywireError):
                raise
            raise TimedOut(timeout, address=address, operation=operation) from None

    def wake(self) -> None:
        """Something changed: the first one tries again."""
        if self.line:
            woken = self.line[0].woken
            if woken is not None and not woken.done():
                woken.set_result(None)
