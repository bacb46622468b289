import asyncio
import socket
import ssl as tls
from collections.abc import Callable

from anywire.engine._watches import Watcher
from anywire.loop._core import Core

class Acceptor(Watcher):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        core: Core,
        factory: Callable[[], asyncio.BaseProtocol],
        sock: socket.socket,
        server: asyncio.AbstractServer | None,
        backlog: int,
        ssl: tls.SSLContext | None,
        handshake_timeout: float | None,
        shutdown_timeout: float | None,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
