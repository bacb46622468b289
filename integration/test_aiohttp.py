"""aiohttp's server and its client, both on our loop."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402 - it may be missing
from programs import Run  # noqa: E402

LARGE = os.urandom(5 << 20)


async def hello(request: web.Request) -> web.Response:
    return web.Response(text=f"hello {request.query.get('name', 'world')}")


async def digest(request: web.Request) -> web.Response:
    total = hashlib.sha256()
    async for chunk in request.content.iter_chunked(65536):
        total.update(chunk)
    return web.Response(text=total.hexdigest())


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for start in range(0, len(LARGE), 100_000):
        await response.write(LARGE[start:start + 100_000])
    await response.write_eof()
    return response


async def words(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.data == "close":
            await socket.close(code=4000, message=b"as you wish")
        elif message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data.upper())
        else:
            await socket.send_bytes(message.data[::-1])
    return socket


@asynccontextmanager
async def serving(*routes: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    app = web.Application(client_max_size=16 << 20)
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield f"{'https' if context else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_requests_beside_each_other(run: Run) -> None:
    async def main() -> None:
        async with serving(web.get("/", hello)) as url, aiohttp.ClientSession() as session:

            async def one(number: int) -> str:
                async with session.get(url, params={"name": str(number)}) as response:
                    assert response.status == 200
                    return await response.text()

            # More than the client's 100 connections: some wait for one, and all are used again.
            texts = await asyncio.gather(*(one(number) for number in range(300)))
            assert texts == [f"hello {number}" for number in range(300)]

    run(main())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_large_bodies_both_ways(run: Run, tls: bool, authority: Any) -> None:
    server = client = None
    if tls:
        server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
        authority.issue_cert("127.0.0.1").configure_cert(server)
        authority.configure_trust(client)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(LARGE), 77_777):
            yield LARGE[start:start + 77_777]

    async def main() -> None:
        routes = (web.get("/", stream), web.post("/", digest))
        async with serving(*routes, context=server) as url, aiohttp.ClientSession() as session:
            async with session.get(url, ssl=client or True) as response:
                assert await response.read() == LARGE
            expected = hashlib.sha256(LARGE).hexdigest()
            for body in (io.BytesIO(LARGE), chunks()):          # with a length, and in chunks
                async with session.post(url, data=body, ssl=client or True) as response:
                    assert await response.text() == expected
        if tls:
            await asyncio.sleep(0.1)                # aiohttp's own advice: TLS connections end in the background

    run(main())


def test_files_by_sendfile(run: Run, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)

    async def main() -> None:
        async with serving(web.static("/files", tmp_path)) as url, aiohttp.ClientSession() as session:
            async with session.get(f"{url}/files/large") as response:
                assert await response.read() == LARGE
            async with session.get(f"{url}/files/large", headers={"Range": "bytes=1000-1999"}) as response:
                assert response.status == 206
                assert await response.read() == LARGE[1000:2000]

    run(main())


def test_web_sockets(run: Run) -> None:
    async def main() -> None:
        async with serving(web.get("/", words)) as url, aiohttp.ClientSession() as session:
            async with session.ws_connect(url) as socket:
                await socket.send_str("shout")
                assert await socket.receive_str() == "SHOUT"
                await socket.send_bytes(LARGE[:1 << 20])
                assert await socket.receive_bytes() == LARGE[:1 << 20][::-1]
                await socket.send_str("close")
                message = await socket.receive()
                assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4000)

    run(main())


def test_a_client_that_leaves_and_one_that_waits_too_long(run: Run) -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def never(request: web.Request) -> web.Response:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                gone.set()
                raise
            raise AssertionError

        app = web.Application()
        app.add_routes([web.get("/", never)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            with pytest.raises(asyncio.TimeoutError):
                await session.get(url, timeout=aiohttp.ClientTimeout(total=0.1))
            await gone.wait()                   # the server has noticed
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get("http://127.0.0.1:1")
        await runner.cleanup()

    run(main())
