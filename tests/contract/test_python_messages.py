"""A message endpoint written in Python, as wires of other packages bring, keeps the promises of the compiled ones."""

from __future__ import annotations

import pytest

import anywire
from anywire.contract import blocking


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
