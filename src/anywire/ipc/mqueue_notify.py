"""Being told that a message came into an empty queue (mq_notify(3)), again and again, on a thread or in an event loop.

The kernel tells one process, once, and only when the queue was empty and nobody was blocked receiving. So whoever wants
to be told again has to ask again *before* taking the messages; and whoever asks while messages wait is not told of
those. `Notification` does both: it asks again before each call, and calls at once when messages wait already.

The kernel's word comes through a netlink socket, as the C library's SIGEV_THREAD has it: 32 bytes that end with WOKEN
or REMOVED. REMOVED comes also when this process closes *any* descriptor of the queue, a second MessageQueue's too; then
it asks again.

What can go wrong: another process was faster in asking (OSError EBUSY from `notify`; later, logged, and it ends);
netlink sockets are forbidden here (OSError). A callback that raises is logged to logger `anywire`, and called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from anywire.ipc.mqueue import MessageQueue

COOKIE = 32
WOKEN, REMOVED = 1, 2
"""NOTIFY_COOKIE_LEN, NOTIFY_WOKENUP, NOTIFY_REMOVED (include/linux/mqueue.h)"""

log = logging.getLogger("anywire")


class Notification:
    """What `MessageQueue.notify` returns. Lasts until `cancel`, the queue's `close`, or, with `once`, its call.

    A forked child has none of its parent's. `cancel` is thread-safe; with a loop, call `notify` on its thread. Also a
    context manager, which cancels at its end."""

    def __init__(
        self,
        queue: MessageQueue,
        callback: Callable[[], object],
        once: bool,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._queue, self._callback, self._once, self._loop = queue, callback, once, loop
        self._lock = threading.Lock()
        self._active = True
        self._pid = os.getpid()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        try:
            if loop is not None:
                self._socket.setblocking(False)
            self._arm()
            if loop is not None:
                loop.add_reader(self._socket.fileno(), self._ready)
                if not once:
                    loop.call_soon(self._look)
            else:
                threading.Thread(target=self._run, name=f"notify {queue.name}", daemon=True).start()
        except BaseException:
            self._active = False
            self._socket.close()
            raise

    @property
    def active(self) -> bool:
        """Whether it may still call."""
        return self._active and self._pid == os.getpid()

    def cancel(self) -> None:
        """No call begins after this returns, but for one that another thread is beginning now. Again: does nothing."""
        with self._lock:
            if not self._active:
                return
            self._active = False
        if self._pid != os.getpid():
            self._socket.close()
            return
        # The word REMOVED that this brings wakes the thread. If it had been told already, WOKEN wakes it.
        with contextlib.suppress(OSError):
            self._queue.stop_notify()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)
        elif self._loop is not None:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    # -- on the thread or in the loop ---------------------------------------------------------------------------------

    def _arm(self) -> None:
        self._queue._notify_socket(self._socket.fileno(), secrets.token_bytes(COOKIE - 1) + b"\0")

    def _run(self) -> None:
        with self._socket:
            if not self._once:
                self._look()
            while self._active:
                self._heard(self._socket.recv(COOKIE))

    def _ready(self) -> None:
        try:
            word = self._socket.recv(COOKIE)
        except BlockingIOError:
            return
        self._heard(word)

    def _heard(self, word: bytes) -> None:
        with self._lock:
            if not self._active:
                return
            if self._once and word[-1] == WOKEN:
                self._active = False
            else:
                try:
                    self._arm()
                except OSError as error:
                    self._active = False
                    if not self._queue.closed:
                        log.error("notification of message queue %s ends: %s", self._queue.name, error)
        if word[-1] == WOKEN:
            self._call()
        elif not self._once:
            self._look()
        if not self._active:
            self._end()

    def _look(self) -> None:
        """Messages that came while nobody was to be told."""
        try:
            waiting = self._active and self._queue.depth
        except OSError:  # closed meanwhile
            return
        if waiting:
            self._call()

    def _call(self) -> None:
        try:
            self._callback()
        except Exception:
            log.exception("the callback for message queue %s raised", self._queue.name)

    def _end(self) -> None:
        if self._loop is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
