"""Who owns a transport's descriptor, what is known of it, and when all is freed: on the standard loop and on ours."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.loop.transport_recorder import LOOPS, Recorder, collecting, connected, receive, running


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield from running(request.param)


def test_extra_info(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []

        def factory() -> Recorder:
            accepted.append(Recorder())
            return accepted[-1]
        server = await loop.create_server(factory, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        protocol = Recorder()
        transport, _ = await loop.create_connection(lambda: protocol, *address)
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0)
        theirs = accepted[0].transport
        assert transport.get_extra_info("peername") == theirs.get_extra_info("sockname") == address
        assert transport.get_extra_info("sockname") == theirs.get_extra_info("peername")
        for end in (transport, theirs):
            sock = end.get_extra_info("socket")
            assert type(sock) is asyncio.trsock.TransportSocket
            assert sock is end.get_extra_info("socket")
            assert sock.family == socket.AF_INET
            assert sock.type == socket.SOCK_STREAM
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockname() == end.get_extra_info("sockname")
            assert end.get_extra_info("nothing") is None
            assert end.get_extra_info("nothing", 5) == 5
            assert isinstance(end, asyncio.Transport)
            assert isinstance(end, asyncio.transports._FlowControlMixin)
        transport.close()
        await protocol.lost
        await accepted[0].lost
        assert theirs.get_extra_info("peername") == transport.get_extra_info("sockname")
        assert theirs.get_extra_info("sockname") == address
        server.close()
        await server.wait_closed()
    run(main())


@pytest.mark.parametrize("host", ["::1"])
def test_extra_info_of_ipv6(run: Any, host: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        server = await loop.create_server(collecting(accepted), host, 0)
        address = server.sockets[0].getsockname()
        with socket.socket(socket.AF_INET6) as client:
            client.setblocking(False)
            await loop.sock_connect(client, address)
            while not (accepted and accepted[0].transport):
                await asyncio.sleep(0)
            assert accepted[0].transport.get_extra_info("peername") == client.getsockname()
            assert accepted[0].transport.get_extra_info("sockname") == address
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())


def test_extra_info_of_unix_sockets(run: Any, tmp_path: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        accepted: list[Recorder] = []
        path = str(tmp_path / "s")
        server = await loop.create_unix_server(collecting(accepted), path)
        protocol = Recorder()
        transport, _ = await loop.create_unix_connection(lambda: protocol, path)
        while not (accepted and accepted[0].transport):
            await asyncio.sleep(0)
        assert transport.get_extra_info("peername") == path
        assert transport.get_extra_info("sockname") == ""
        assert accepted[0].transport.get_extra_info("peername") == ""
        assert accepted[0].transport.get_extra_info("sockname") == path
        transport.close()
        await protocol.lost
        await accepted[0].lost
        server.close()
        await server.wait_closed()
    run(main())


def test_a_socket_closed_under_its_transport(run: Any) -> None:
    """And its number given to a file: nothing may be written there."""
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            protocol = Recorder()
            transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
            number = ours.fileno()
            ours.close()
            read, write = os.pipe()
            taken = read if read == number else write
            assert taken == number
            transport.write(b"to nobody")
            assert isinstance(await protocol.lost, OSError)
            os.fstat(number)
            other = write if taken == read else read
            os.close(other)
            os.close(taken)
    run(main())


def test_add_reader_of_a_transports_descriptor_is_refused(run: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            sock = transport.get_extra_info("socket")
            for call in (loop.add_reader, loop.add_writer):
                with pytest.raises(RuntimeError, match="is used by transport"):
                    call(sock.fileno(), lambda: None)
            for remove in (loop.remove_reader, loop.remove_writer):
                with pytest.raises(RuntimeError, match="is used by transport"):
                    remove(sock.fileno())
            transport.close()
            await protocol.lost
    run(main())


def test_a_descriptor_used_again_at_once(run: Any) -> None:
    """Close and reopen under the same number, many times, with events on the way: none reaches the next owner."""
    async def main() -> None:
        for i in range(100):
            protocol = Recorder()
            transport, theirs = await connected(protocol)
            theirs.send(b"%d" % i)
            if i % 2:
                transport.abort()
                await protocol.lost
                assert protocol.data in (b"", b"%d" % i)
            else:
                await protocol.until(lambda p=protocol, i=i: p.data == b"%d" % i)
                transport.close()
                await protocol.lost
            theirs.close()
    run(main())


def test_an_abandoned_transport_warns_and_closes(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        with theirs:
            transport.pause_reading()
            theirs.send(b"ends the watch")
            await asyncio.sleep(0.001)             # long enough for the loop to look at its descriptors
            gone = weakref.ref(transport)
            protocol.transport = None
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                del transport, protocol
                gc.collect()
            assert any("unclosed transport" in str(one.message) for one in seen)
            del seen                               # it has the transport
            gc.collect()
            assert gone() is None
            with contextlib.suppress(ConnectionResetError):        # what the peer sent was never read
                assert await receive(theirs, 1) == b""
    run(main())


def test_transports_and_protocols_are_freed(run: Any) -> None:
    async def main() -> None:
        protocol = Recorder()
        transport, theirs = await connected(protocol)
        gone = weakref.ref(transport), weakref.ref(protocol)
        transport.write(b"x")
        theirs.close()
        await protocol.lost
        await asyncio.sleep(0)
        assert transport.get_protocol() is None
        del transport, protocol
        gc.collect()
        assert gone[0]() is None
        assert gone[1]() is None
    run(main())
