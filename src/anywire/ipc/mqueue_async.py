"""Waiting for a message queue in an event loop: try, wait until the descriptor is ready, try again.

Called by MessageQueue's `_async` methods after a first try in vain. A message is taken, or sent, in the same turn in
which the method returns: so a cancelled wait has done nothing. Any asyncio event loop that can watch descriptors.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from anywire.ipc.waiting import readable, writable

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from anywire.ipc.mqueue import MessageQueue

T = TypeVar("T")


async def send(queue: MessageQueue, data: Buffer, priority: int, timeout: float | None) -> None:
    """Send when there is room. Raises TimeoutError, OSError."""
    await _until(
        queue, lambda: queue._try_send(data, priority) or None, writable, timeout, "send: the queue stayed full"
    )


async def receive(queue: MessageQueue, timeout: float | None) -> tuple[bytes, int]:
    """The next message and its priority. Raises TimeoutError, OSError."""
    return await _until(queue, queue._try_recv, readable, timeout, "recv: the queue stayed empty")


async def receive_into(queue: MessageQueue, buffer: Buffer, timeout: float | None) -> tuple[int, int]:
    """The next message's length and priority. Raises TimeoutError, OSError."""
    return await _until(
        queue, lambda: queue._try_recv_into(buffer), readable, timeout, "recv: the queue stayed empty"
    )


async def _until(
    queue: MessageQueue,
    attempt: Callable[[], T | None],
    ready: Callable[[int], Awaitable[None]],
    timeout: float | None,
    what: str,
) -> T:
    if timeout is not None and not timeout >= 0:
        raise ValueError(f"timeout is a number of seconds that is not negative, or None for no limit; not {timeout!r}")
    try:
        async with asyncio.timeout(timeout) as limit:
            while (found := attempt()) is None:
                try:
                    await ready(queue.fileno())
                except OSError:
                    queue.fileno()  # closed: an error with the queue's name
                    raise
            return found
    except TimeoutError:
        if not limit.expired():
            raise
        text = f"{os.strerror(errno.ETIMEDOUT)}: {what} for {timeout} s"
        raise TimeoutError(errno.ETIMEDOUT, text, queue.name) from None
