"""An ASGI application without a framework, which uvicorn serves."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

gone = asyncio.Event()


async def answer(send: Any, *parts: bytes) -> None:
    length = [(b"content-length", str(len(parts[0])).encode())] if len(parts) == 1 else []
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), *length]})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await web_socket(receive, send)
        return
    path = scope["path"]
    if path == "/digest":
        total, more = hashlib.sha256(), True
        while more:
            message = await receive()
            total.update(message.get("body", b""))
            more = message.get("more_body", False)
        await answer(send, total.hexdigest().encode())
    elif path == "/stream":
        await answer(send, *(bytes([number % 256]) * 10_000 for number in range(200)))
    elif path == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
    elif path == "/gone":
        await gone.wait()
        await answer(send, b"gone")
    else:
        await answer(send, b"hello")


async def web_socket(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") is not None:
            await send({"type": "websocket.send", "text": message["text"].upper()})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"][::-1]})
