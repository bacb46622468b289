"""Waiting in an event loop for descriptors that several tasks may wait for at a time.

`add_reader` of a loop has room for one callback; here everybody who waits is woken, looks, and may wait again. Nothing
is taken from the descriptor meanwhile, so a wait that is cancelled has lost nothing. On the loop's thread, but for
`forget`. What can go wrong: a descriptor that no loop can watch, as a regular file's (PermissionError from the loop).
"""

from __future__ import annotations

import asyncio
import weakref

_Waiters = dict[tuple[int, bool], list["asyncio.Future[None]"]]
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiters] = weakref.WeakKeyDictionary()


async def readable(fd: int) -> None:
    """Return when the descriptor is readable, or may be. OSError: `forget` was called for it meanwhile."""
    await _wait(fd, writing=False)


async def writable(fd: int) -> None:
    """Return when the descriptor is writable, or may be. OSError: `forget` was called for it meanwhile."""
    await _wait(fd, writing=True)


def forget(fd: int) -> None:
    """Before the descriptor is closed: end all waits for it with an OSError (EBADF). From any thread."""
    for loop, waiters in list(_loops.items()):
        if (fd, False) in waiters or (fd, True) in waiters:
            if loop.is_closed():
                continue
            if _running() is loop:
                _end(loop, waiters, fd)
            else:
                loop.call_soon_threadsafe(_end, loop, waiters, fd)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _end(loop: asyncio.AbstractEventLoop, waiters: _Waiters, fd: int) -> None:
    for writing in (False, True):
        for future in _take(loop, waiters, fd, writing):
            if not future.done():
                future.set_exception(OSError(9, "the descriptor was closed while a task waited for it"))


def _take(
    loop: asyncio.AbstractEventLoop, waiters: _Waiters, fd: int, writing: bool
) -> list[asyncio.Future[None]]:
    found = waiters.pop((fd, writing), [])
    if found:
        (loop.remove_writer if writing else loop.remove_reader)(fd)
    return found


def _ready(loop: asyncio.AbstractEventLoop, waiters: _Waiters, fd: int, writing: bool) -> None:
    for future in _take(loop, waiters, fd, writing):
        if not future.done():
            future.set_result(None)


async def _wait(fd: int, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    waiters = _loops.setdefault(loop, {})
    key = (fd, writing)
    future = loop.create_future()
    if key in waiters:
        waiters[key].append(future)
    else:
        (loop.add_writer if writing else loop.add_reader)(fd, _ready, loop, waiters, fd, writing)
        waiters[key] = [future]
    try:
        await future
    finally:
        if future in waiters.get(key, ()):
            waiters[key].remove(future)
            if not waiters[key]:
                _take_away(loop, waiters, fd, writing)


def _take_away(loop: asyncio.AbstractEventLoop, waiters: _Waiters, fd: int, writing: bool) -> None:
    del waiters[fd, writing]
    (loop.remove_writer if writing else loop.remove_reader)(fd)
