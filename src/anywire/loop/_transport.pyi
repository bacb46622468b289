import asyncio
import socket
from asyncio import transports
from collections.abc import Mapping
from typing import Any

from anywire.loop._core import Core

class SocketTransport(transports._FlowControlMixin, transports.Transport): ...  # pyright: ignore[reportPrivateUsage]

class StreamTransport(SocketTransport):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        core: Core,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        server: asyncio.AbstractServer | None = None,
    ) -> None: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def bytes_sent(self) -> int: ...
