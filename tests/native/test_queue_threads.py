"""Threads that share queues and pipes of anywire.multiprocessing; `make races` runs this under ThreadSanitizer."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from anywire.multiprocessing import connection, queues

MESSAGES = 600
THREADS = 3


@pytest.mark.parametrize("kind", ["queue", "bounded", "simple", "watched", "pipe"])
def test_many_writers_and_readers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "SIZE", 1 << 16)        # small: full now and then, and long messages go in pieces
    monkeypatch.setattr(connection, "SIZE", 1 << 16)
    shared: Any = None
    if kind == "pipe":
        reader, writer = connection.Pipe()
        get, put = reader.recv, writer.send
    else:
        bounded = 4 if kind == "bounded" else 0
        shared = queues.SimpleQueue() if kind in ("simple", "watched") else queues.Queue(bounded)
        get, put = shared.get, shared.put
        if kind == "watched":
            shared._reader.fileno()                     # from now on the descriptor tells of each message
    got: list[tuple[int, int]] = []

    def produce(number: int) -> None:
        for sequence in range(MESSAGES):
            put((number, sequence, bytes(sequence % 300 if sequence % 50 else 100_000)))

    def consume() -> None:
        for number, sequence, data in iter(get, None):
            assert len(data) == (sequence % 300 if sequence % 50 else 100_000)
            got.append((number, sequence))

    producers = [threading.Thread(target=produce, args=(number,)) for number in range(THREADS)]
    consumers = [threading.Thread(target=consume) for _ in range(THREADS)]
    for thread in producers + consumers:
        thread.start()
    for thread in producers:
        thread.join()
    for _ in consumers:
        put(None)
    for thread in consumers:
        thread.join()
    assert sorted(got) == [(number, sequence) for number in range(THREADS) for sequence in range(MESSAGES)]
    if isinstance(shared, queues.Queue):
        shared.close()
        shared.join_thread()
