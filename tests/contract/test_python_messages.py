"""A message endpoint written in Python, as wires of other packages bring, keeps the promises of the compiled ones."""

from __future__ import annotations

import asyncio

import pytest

import anywire
from anywire.contract import blocking
from anywire.contract.channel import Channel
from anywire.contract.driver import driver_for


class Queued(anywire.MessageEndpoint):
    """Its messages are here already."""

    def __init__(self, *messages: bytes) -> None:
        super().__init__()
        self.messages = list(messages)

    def take(self) -> bytes | None:
        return self.messages.pop(0) if self.messages else None


def test_a_message_that_does_not_fit_stays() -> None:
    channel = blocking.Channel(Queued(b"x" * 100, b"y"))
    buffer = bytearray(b"\xee" * 10)
    for _ in range(2):
        with pytest.raises(BufferError, match=r"100 bytes.*10"):
            channel.recv_into(buffer)
    assert buffer == b"\xee" * 10
    assert channel.recv() == b"x" * 100
    assert channel.recv_into(buffer) == 1
    assert buffer[:1] == b"y"
    channel.abort()


class Interrupted(BaseException):
    """As a signal handler raises it."""


class Interrupting(Queued):
    """A signal comes where its list says so."""

    def take(self) -> bytes | None:
        message = super().take()
        if message == b"signal":
            raise Interrupted
        return message


def test_an_interrupted_recv_many_loses_nothing() -> None:
    channel = blocking.Channel(Interrupting(b"1", b"22", b"3", b"signal", b"4"))
    with pytest.raises(Interrupted):
        channel.recv_many()
    with pytest.raises(anywire.ChannelClosed, match="3 messages of an interrupted recv_many"):
        channel.detach()
    with pytest.raises(anywire.Unsupported):
        channel.recv_fds()
    assert channel.recv() == b"1"
    buffer = bytearray(2)
    with pytest.raises(BufferError, match=r"2 bytes and the buffer 1"):
        channel.recv_into(memoryview(buffer)[:1])
    assert channel.recv_into(buffer) == 2
    assert buffer == b"22"
    assert channel.recv_many() == [b"3", b"4"]
    channel.abort()


def test_an_interrupted_recv_many_of_a_task_loses_nothing() -> None:
    async def main() -> None:
        channel = Channel(Interrupting(b"1", b"22", b"3", b"signal", b"4"), driver_for(asyncio.get_running_loop()))
        with pytest.raises(Interrupted):
            await channel.recv_many(10)
        assert await channel.recv() == b"1"
        buffer = bytearray(2)
        assert await channel.recv_into(buffer) == 2
        with pytest.raises(anywire.ChannelClosed, match="1 messages of an interrupted recv_many"):
            channel.detach()
        assert await channel.recv_many() == [b"3", b"4"]
        channel.abort()

    asyncio.run(main())


def test_an_end_or_a_loss_waits_for_the_call_after_recv_many() -> None:
    class Ending(Queued):
        def take(self) -> bytes | None:
            message = super().take()
            if message is None:
                raise anywire.EndOfChannel(address="test", operation="recv")
            return message

    channel = blocking.Channel(Ending(b"1", b"2"))
    assert channel.recv_many() == [b"1", b"2"]
    with pytest.raises(anywire.EndOfChannel):
        channel.recv()
    channel.abort()
