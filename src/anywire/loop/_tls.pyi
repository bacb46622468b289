import asyncio
import ssl
from asyncio import sslproto
from typing import Any

class TLSLayer:
    state: Any
    app_protocol: Any
    app_reading_paused: bool
    app_writing_paused: bool
    ssl_reading_paused: bool
    ssl_writing_paused: bool

def of_the_layer(name: str) -> property: ...

class TLSProtocol(sslproto.SSLProtocol):
    def __init__(
        self, loop: asyncio.AbstractEventLoop, app_protocol: asyncio.BaseProtocol, sslcontext: ssl.SSLContext,
        *arguments: Any, **options: Any,
    ) -> None: ...

def tls_protocol(
    loop: asyncio.AbstractEventLoop, app_protocol: asyncio.BaseProtocol, sslcontext: ssl.SSLContext | None,
    *arguments: Any, **options: Any,
) -> sslproto.SSLProtocol: ...
