"""Servers of stream transports: each test runs on the standard loop and on ours."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.loop.transport_recorder import LOOPS, Recorder, collecting, complaints, running


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from running(request.param)


def test_server_counts_its_connections(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), "127.0.0.1", 0)
        clients = []
        for _ in range(5):
            protocol = Recorder()
            await loop.create_connection(lambda p=protocol: p, *server.sockets[0].getsockname())
            clients.append(protocol)
        while len(accepted) < 5 or not all(one.transport for one in accepted):
            await asyncio.sleep(0)
        server.close()
        if sys.version_info >= (3, 12):
            closing = asyncio.ensure_future(server.wait_closed())
            await asyncio.sleep(0)
            assert not closing.done()
            if sys.version_info >= (3, 13):
                server.abort_clients()
            else:
                for one in accepted:
                    one.transport.abort()
            await closing
        else:
            for one in accepted:
                one.transport.abort()
        for one in [*clients, *accepted]:
            await one.lost
    run(main())


def test_the_name_of_a_closed_unix_server(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        path = tmp_path / "s"
        server = await asyncio.get_running_loop().create_unix_server(Recorder, path)
        assert path.is_socket()
        server.close()
        await server.wait_closed()
        assert path.exists() == (sys.version_info < (3, 13))
    run(main())


def test_a_factory_that_raises_closes_only_that_connection(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder())
            if len(accepted) == 1:
                raise ZeroDivisionError("in the factory")
            return accepted[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        first, second = Recorder(), Recorder()
        await loop.create_connection(lambda: first, *server.sockets[0].getsockname())
        gc.collect()
        await first.lost
        await loop.create_connection(lambda: second, *server.sockets[0].getsockname())
        await accepted[1].until(lambda: accepted[1].transport is not None) if len(accepted) > 1 else None
        second.transport.write(b"hello")
        while len(accepted) < 2:
            await asyncio.sleep(0)
        await accepted[1].until(lambda: accepted[1].data == b"hello")
        second.transport.close()
        await accepted[1].lost
        server.close()
        await server.wait_closed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        run(main())


def test_a_server_closed_by_its_factory(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        made: list[Recorder] = []

        def factory() -> Recorder:
            made.append(Recorder())
            server.close()
            return made[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        clients = []
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
            clients.append(sock)
        while not made:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not server.is_serving()
        for sock in clients:
            sock.close()
        for one in made:
            if one.transport:
                one.transport.abort()
                await one.lost
        complaints()
    run(main())


@pytest.mark.parametrize("run", ["ours"], indirect=True)
def test_out_of_descriptors_while_accepting(run: Any) -> None:
    """The listener backs off, says so once, and serves who waited as soon as there are descriptors again.

    The standard loop tries many times over, and goes on after the server is closed: no model here.
    """
    async def main() -> None:
        import resource

        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), "127.0.0.1", 0)
        client = socket.socket()
        client.setblocking(False)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        gc.disable()                               # what the standard loop left behind would give descriptors back
        spare = os.dup(0)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
        told: list[dict[str, Any]] = []
        try:
            with contextlib.suppress(BlockingIOError):
                client.connect(server.sockets[0].getsockname())
            while not told:
                await asyncio.sleep(0.01)
                told = complaints()
            assert len(told) == 1
            assert told[0]["message"] == "socket.accept() out of system resource"
            assert told[0]["socket"].fileno() == server.sockets[0].fileno()
            assert accepted == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            gc.enable()
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0.01)
        client.close()
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())
