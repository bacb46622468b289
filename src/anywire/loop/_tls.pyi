import asyncio
import ssl
from asyncio import sslproto
from typing import Any

class TLSLayer: ...

class TLSProtocol(sslproto.SSLProtocol):
    def __init__(
        self, loop: asyncio.AbstractEventLoop, app_protocol: asyncio.BaseProtocol, sslcontext: ssl.SSLContext,
        *arguments: Any, **options: Any,
    ) -> None: ...

def tls_protocol(
    loop: asyncio.AbstractEventLoop, app_protocol: asyncio.BaseProtocol, sslcontext: ssl.SSLContext | None,
    *arguments: Any, **options: Any,
) -> sslproto.SSLProtocol: ...
