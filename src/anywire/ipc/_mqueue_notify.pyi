import asyncio
from collections.abc import Callable

from anywire.ipc._mqueue_open import OpenQueue
from anywire.ipc.mqueue_notify import Notification

class NotifyingQueue(OpenQueue):
    def notify(
        self,
        callback: Callable[[], object],
        *,
        once: bool = False,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Notification: ...
    def notify_signal(self, signo: int, value: int = 0) -> None: ...
    def stop_notify(self) -> None: ...
    def _notify_socket(self, socket: int, cookie: bytes) -> None: ...
