"""What users' type checkers see of the public names: checked by mypy and by pyright, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import assert_type

import anywire
from anywire.contract.address import Address
from anywire.contract.errors import AnywireError, EndOfChannel, PeerLost, TimedOut


def addresses(text: str) -> None:
    address = Address.parse(text)
    assert_type(address, Address)
    assert_type(address.scheme, str)
    assert_type(address.port, int | None)
    assert_type(address.params, Mapping[str, str])


def errors(error: Exception) -> None:
    if isinstance(error, PeerLost):
        assert_type(error.unconfirmed, int)
        caught: ConnectionResetError = error
        print(caught)
    elif isinstance(error, EndOfChannel):
        ended: EOFError = error
        print(ended)
    elif isinstance(error, TimedOut):
        late: TimeoutError = error
        print(late)
    elif isinstance(error, AnywireError):
        print(error)


async def channels(text: str) -> None:
    async with anywire.connect(text, wait=1.0, max_message=100) as channel:
        assert_type(channel, anywire.Channel)
        assert_type(await channel.send(b"one"), None)
        assert_type(await channel.send(bytearray(3), timeout=1.0), None)
        assert_type(await channel.send(channel.loan(100)), None)
        assert_type(await channel.send_many([b"two", memoryview(b"three")]), None)
        assert_type(channel.try_send(b"four"), bool)
        assert_type(await channel.recv(), bytes)
        assert_type(await channel.recv(copy=False, timeout=2.0), memoryview)
        assert_type(await channel.recv_into(bytearray(10)), int)
        assert_type(await channel.recv_many(10), list[bytes])
        assert_type(await channel.recv_fds(), tuple[bytes, list[int]])
        async for message in channel:
            assert_type(message, bytes)
        task = asyncio.create_task(channel.recv())
        assert_type(await asyncio.wait_for(task, 1.0), bytes)
        assert_type(channel.peer, anywire.Peer)
        assert_type(channel.traits, anywire.Traits)
        assert_type(channel.unconfirmed, int)
        assert_type(channel.stats().messages_sent, int)
        await channel.send_eof()
    assert_type(await anywire.connect(Address.parse(text)), anywire.Channel)
    async for channel in anywire.connect_forever(text, backoff=(0.1, 1.0)):
        assert_type(channel.detach(), anywire.Handle)


async def streams(text: str) -> None:
    stream = await anywire.connect_stream(text)
    assert_type(stream, anywire.Stream)
    assert_type(await stream.read(), bytes)
    assert_type(await stream.read_into(memoryview(bytearray(10))), int)
    assert_type(await stream.read_exactly(3), bytes)
    assert_type(await stream.read_until(b"\r\n", limit=100), bytes)
    async for chunk in stream:
        assert_type(chunk, bytes)
    await stream.write(b"data")
    await stream.write_eof()
    await stream.close(timeout=1.0)


async def servers(text: str) -> None:
    async def handle(channel: anywire.Channel) -> None:
        async for message in channel:
            await channel.send(message)

    async def pump(stream: anywire.Stream) -> None:
        async for chunk in stream:
            await stream.write(chunk)

    async with anywire.serve(handle, text, limit=3, authorize=lambda peer: peer.is_same_user()) as server:
        assert_type(server, anywire.Server[anywire.Channel])
        assert_type(server.addresses, list[Address])
        assert_type(server.connections, set[anywire.Channel])
    async with anywire.serve_stream(pump, text) as pumps:
        assert_type(pumps.connections, set[anywire.Stream])
    async with anywire.listen(text) as listener:
        assert_type(await listener.accept(timeout=1.0), anywire.Channel)
    async with anywire.listen_stream(text) as listener_of_streams:
        assert_type(await listener_of_streams.accept(), anywire.Stream)


def blocking(text: str) -> None:
    with anywire.sync.connect(text) as channel:
        assert_type(channel, anywire.sync.Channel)
        assert_type(channel.recv(), bytes)
        assert_type(channel.recv(copy=False), memoryview)
        assert_type(channel.recv_many(), list[bytes])
        for message in channel:
            channel.send(message, timeout=1.0)
        channel.send_many([b"one", b"two"])
    with anywire.sync.connect_stream(text) as stream:
        assert_type(stream.read_exactly(3), bytes)
        stream.write(b"data")
    with anywire.sync.serve(lambda channel: channel.send(b"hello"), text) as server:
        assert_type(server.connections, set[anywire.sync.Channel])
    with anywire.sync.listen_stream(text) as listener:
        assert_type(listener.accept(), anywire.sync.Stream)


class TwoBytes(anywire.ByteEndpoint):
    """A byte endpoint in Python, as wires of other packages bring."""

    def do_read_into(self, buffer: memoryview) -> int | None:
        buffer[:2] = b"ab"
        return 2

    def do_write(self, data: memoryview) -> int | None:
        return len(data)


async def patterns(text: str) -> None:
    async with anywire.publish(text, mode="latest", depth=10) as publisher:
        assert_type(publisher, anywire.Publisher)
        assert_type(await publisher.send(b"one", timeout=1.0), None)
        assert_type(publisher.try_send(bytearray(3)), bool)
        assert_type(publisher.subscribers, list[anywire.Peer])
        assert_type(publisher.stats().lost, int)
    async with anywire.subscribe(text, losses="count") as subscription:
        assert_type(subscription, anywire.Subscription)
        assert_type(await subscription.recv(), bytes)
        assert_type(await subscription.recv(copy=False), memoryview)
        assert_type(await subscription.recv_many(), list[bytes])
        assert_type(subscription.lost, int)
        async for message in subscription:
            assert_type(message, bytes)
    with anywire.sync.publish(text) as blocking, anywire.sync.subscribe(text, wait=1.0) as listener:
        assert_type(blocking, anywire.sync.Publisher)
        assert_type(blocking.send(b"two"), None)
        assert_type(listener.recv(timeout=1.0), bytes)
        for message in listener:
            assert_type(message, bytes)
    async with anywire.push(text, listen=True, on_loss=lambda peer, messages: print(peer, len(messages))) as jobs:
        assert_type(jobs, anywire.Push)
        assert_type(await jobs.send(b"one"), None)
        assert_type(jobs.unconfirmed, int)
        assert_type(jobs.stats().lost, int)
    async with anywire.pull(text) as inbox:
        assert_type(await inbox.recv(timeout=1.0), bytes)
        async for message in inbox:
            assert_type(message, bytes)
    with anywire.sync.pull(text, listen=True) as results:
        assert_type(results, anywire.sync.Pull)
        assert_type(results.recv(), bytes)
