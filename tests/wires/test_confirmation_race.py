"""A peer may confirm a message before the blocking send that carried it has returned."""

from __future__ import annotations

import threading
from typing import Any

from anywire import sync


def test_a_confirmation_that_overtakes_its_send_is_no_loss() -> None:
    """The sender's system call runs without the GIL: the peer reads, confirms, and this side's receiver may see the
    confirmation before the sender has counted its message. 256 is how many messages a confirmation waits for."""
    count = 256 * 100

    def handle(channel: Any) -> None:
        for _ in range(count):
            channel.recv()
        channel.send(b"all here")

    with sync.serve(handle, "tcp://127.0.0.1:0") as server, sync.connect(server.addresses[0]) as channel:
        heard: list[bytes] = []
        receiver = threading.Thread(target=lambda: heard.extend(channel))
        receiver.start()
        channel.send_many([b"x"] * (count // 2))
        for _ in range(count // 2):
            channel.send(b"x")
        receiver.join(30)
    assert heard == [b"all here"]
    assert channel.unconfirmed == 0
