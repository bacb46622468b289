"""Nothing is left of reactors, events, connections and timers: descriptors, objects, native memory."""

from __future__ import annotations

import gc
import os
import socket
import tracemalloc
from collections.abc import Callable

import pytest

from anywire.engine import Buffer, BufferedConnection, Condition, Reactor, SharedQueue, TimerQueue, Wakeup
from anywire.engine.demultiplexers import by_name, names


def descriptors() -> None:
    """Watch, let the number be used again, forget: with and without removing."""
    with Reactor() as reactor:
        for removing in (True, False):
            a, b = socket.socketpair()
            event = reactor.watch(a, Condition.READ, lambda event, what: None)
            b.send(b"x")
            reactor.turn(0)
            if removing:
                event.remove()
            a.close()
            b.close()


def connections() -> None:
    with Reactor() as reactor:
        a, b = socket.socketpair()
        one = BufferedConnection(reactor, a, on_data=lambda c: c.write(c.read()), read_timeout=9, write_timeout=9)
        two = BufferedConnection(reactor, b)
        two.write(bytes(300_000))
        while two.read_bytes < 300_000:
            reactor.turn()
            two.read()
        one.close()
        two.close()


def abandoned() -> None:
    """A cycle of a reactor, its events and their handlers, that nobody closed."""
    a, b = socket.socketpair()
    reactor = Reactor()
    connection = BufferedConnection(reactor, a, on_data=lambda c: c.read(), read_timeout=60)
    connection.on_end = lambda c, error: c.reactor.stop()
    b.send(bytes(20_000))
    reactor.turn(0)
    reactor.post(reactor.stop)
    a.close()
    b.close()
    del connection, reactor
    gc.collect()  # now: several at a time would take more blocks, of which the pool keeps some


def errors() -> None:
    with Reactor() as reactor:
        a, b = socket.socketpair()
        reactor.watch(a, Condition.WRITE, lambda event, what: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                reactor.turn()
        with pytest.raises(FileExistsError):
            reactor.watch(a, Condition.READ, print)
        a.close()
        b.close()


def timers() -> None:
    queue = TimerQueue()
    entries = [queue.add(number % 7, [number]) for number in range(300)]
    for entry in entries[::2]:
        entry.cancel()
    queue.due(3)


def others() -> None:
    for name in names():
        with by_name(name) as demultiplexer, Wakeup("socketpair") as wakeup:
            demultiplexer.add(wakeup, Condition.READ)
            wakeup.wake()
            demultiplexer.wait()
            demultiplexer.reset()
    queue: SharedQueue[list[int]] = SharedQueue()
    queue.put([1])
    queue.take()
    queue.close()


@pytest.mark.no_sanitize
@pytest.mark.parametrize("cycle", [descriptors, connections, abandoned, errors, timers, others])
def test_flat(cycle: Callable[[], None]) -> None:
    """Native memory is traced, too: it comes from PyMem_Malloc."""
    rounds = 40
    full = Buffer()
    full.append(bytearray(full.pool.block_size * full.pool.keep))
    del full  # so that the pool has all that it ever keeps
    for _ in range(rounds):  # caches fill: blocks of the pool, exceptions, the tracer's own
        cycle()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(3):
            cycle()
        gc.collect()
        open_before, objects_before = len(os.listdir("/proc/self/fd")), len(gc.get_objects())
        memory_before = tracemalloc.get_traced_memory()[0]
        for _ in range(rounds):
            cycle()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == open_before
        assert len(gc.get_objects()) - objects_before < rounds / 2
        assert tracemalloc.get_traced_memory()[0] - memory_before < 100 * rounds
    finally:
        tracemalloc.stop()
