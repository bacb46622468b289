"""How fast does one publisher reach four subscribers in other processes, over Unix sockets and through shared memory?

Beside pyzmq's PUB/SUB, also on Unix sockets, and iceoryx2, also in shared memory.

The publisher has one CPU, its four subscribers share the other one. It publishes as fast as it may for a while; the
rate is what the slowest subscriber received, from the first send to its last message, and `lost` what it did not
receive. anywire's `publish` is reliable: nothing is lost. Mode latest, which drops the oldest for who is behind, is
shown beside it. ZeroMQ's PUB drops what is over its high-water mark; the peer to beat is therefore the same with
XPUB_NODROP, which waits instead, and the dropping one is shown beside it. To be shown: as many messages as pyzmq, with
asyncio on both sides and blocking on both sides; in shared memory as many as
iceoryx2, where both senders copy the message in and both receivers look at it in place. iceoryx2's subscribers have no
way to sleep until something comes: they look, and give way to the others on their CPU. CPU time for a message is that
of the sender, and of one receiver; it hardly depends on what else the machine does, which the rate does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import os
import signal
import sys
import time
from typing import Any

from anywire.cli.measure import size_name, times, turns
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Child, Report, options

SUBSCRIBERS = 4
SIZES = (1 << 10, 64 << 10, 1 << 20)
IOX = "iceoryx2, in place"
IN_PLACE = "anywire shm blocking, in place"
PAIRS = {
    "anywire asyncio": "pyzmq asyncio, no drops",
    "anywire blocking": "pyzmq, no drops",
    "anywire shm asyncio": "pyzmq asyncio, no drops",
    "anywire shm blocking": "pyzmq, no drops",
    IN_PLACE: IOX,
}
DROPPING = "pyzmq, dropping"
LATEST = "anywire shm latest"
LAST = b"the last one"
MARK = 1000
"""ZeroMQ's default high-water mark, in messages, on each side. Both libraries get the same depth: subscribers that
share a CPU run one after the other, and what one can take in its slice of time is what waits for it."""


RING = {"ring": "2MiB"}
"""The same on shm: its ring is what a subscriber may be behind in messages of 1 KiB."""


def say(*words: object) -> None:
    print(*words, flush=True)


def orders() -> Any:
    """What this process is told, line by line: (size, seconds)."""
    for line in sys.stdin:
        size, seconds = line.split()
        yield int(size), float(seconds)


# -- anywire ---


def ring(address: str) -> dict[str, Any]:
    return RING if address.startswith("shm") else {}


async def publish_asyncio(address: str) -> None:
    anywire = importlib.import_module("anywire")
    async with anywire.publish(address, depth=2 * MARK, **ring(address)) as publisher:
        say("READY")
        while len(publisher.subscribers) < SUBSCRIBERS:
            await asyncio.sleep(0.01)
        for size, seconds in orders():
            message, count, begun = bytes(size), 0, time.monotonic()
            while time.monotonic() < begun + seconds:
                for _ in range(16):
                    await publisher.send(message)
                count += 16
            await publisher.send(LAST)
            while publisher.stats().queued:
                await asyncio.sleep(0.001)
            say(count, begun, time.process_time())


async def subscribe_asyncio(address: str) -> None:
    anywire = importlib.import_module("anywire")
    async with anywire.subscribe(address, wait=10) as subscription:
        say("READY")
        count = 0
        async for message in subscription:
            if message == LAST:
                say(count, time.monotonic(), time.process_time())
                count = 0
            else:
                count += 1


def publish_blocking(address: str, mode: str = "reliable") -> None:
    sync = importlib.import_module("anywire.sync")
    with sync.publish(address, mode=mode, depth=2 * MARK, **ring(address)) as publisher:
        say("READY")
        while len(publisher.subscribers) < SUBSCRIBERS:
            time.sleep(0.01)
        for size, seconds in orders():
            message, count, begun = bytes(size), 0, time.monotonic()
            while time.monotonic() < begun + seconds:
                for _ in range(16):
                    publisher.send(message)
                count += 16
            publisher.send(LAST)
            say(count, begun, time.process_time())


def subscribe_blocking(address: str) -> None:
    sync = importlib.import_module("anywire.sync")
    with sync.subscribe(address, wait=10, losses="count") as subscription:
        say("READY")
        count = 0
        for message in subscription:
            if message == LAST:
                say(count, time.monotonic(), time.process_time())
                count = 0
            else:
                count += 1


def subscribe_in_place(address: str) -> None:
    sync = importlib.import_module("anywire.sync")
    with sync.subscribe(address, wait=10) as subscription:
        say("READY")
        count = 0
        with contextlib.suppress(importlib.import_module("anywire").EndOfChannel):
            while True:
                with subscription.recv(copy=False) as message:
                    last = len(message) == len(LAST)
                if last:
                    say(count, time.monotonic(), time.process_time())
                    count = 0
                else:
                    count += 1


# -- iceoryx2 ---


def iox_services(address: str) -> list[Any]:
    """A service for each size, in the order of SIZES, in which they are measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())        # its files go only with an orderly end
    iox = importlib.import_module("iceoryx2")
    iox.set_log_level(iox.LogLevel.Error)
    node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
    services = [node]                   # which must live as long as they do
    for size in SIZES:
        builder = node.service_builder(iox.ServiceName.new(f"{address}/{size}"))
        builder = builder.publish_subscribe(iox.Slice[ctypes.c_uint8]).enable_safe_overflow(False)
        builder = builder.subscriber_max_buffer_size(max(8, min(2 * MARK, (2 << 20) // size)))
        services.append(builder.open_or_create())
    return services


def iox_publish(address: str) -> None:
    iox = importlib.import_module("iceoryx2")
    node, *services = iox_services(address)
    publishers = {}
    for size, service in zip(SIZES, services, strict=True):
        builder = service.publisher_builder().initial_max_slice_len(size)
        publishers[size] = builder.backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered).create()
    say("READY")
    while any(service.dynamic_config.number_of_subscribers < SUBSCRIBERS for service in services):
        time.sleep(0.01)

    def send(size: int, message: bytes) -> None:
        sample = publishers[size].loan_slice_uninit(size)
        ctypes.memmove(sample.payload_ptr, message, size)
        sample.assume_init().send()

    for size, seconds in orders():
        message, count, begun = bytes(size), 0, time.monotonic()
        while time.monotonic() < begun + seconds:
            for _ in range(16):
                send(size, message)
            count += 16
        send(size, LAST.ljust(size))
        say(count, begun, time.process_time())
    del node


def iox_subscribe(address: str) -> None:
    node, *services = iox_services(address)
    subscribers = [service.subscriber_builder().create() for service in services]
    say("READY")
    for subscriber in itertools.cycle(subscribers):
        count = 0
        while True:
            sample = subscriber.receive()
            if sample is None:
                os.sched_yield()
                continue
            if ctypes.c_uint8.from_address(sample.payload_ptr).value:
                del sample
                break
            del sample
            count += 1
        say(count, time.monotonic(), time.process_time())
    del node


# -- pyzmq ---


def zmq_publisher(zmq: Any, context: Any, address: str, no_drops: bool) -> Any:
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.XPUB_VERBOSE, 1)
    socket.setsockopt(zmq.XPUB_NODROP, int(no_drops))
    socket.setsockopt(zmq.SNDHWM, MARK)
    socket.bind(address)
    return socket


def zmq_subscriber(zmq: Any, context: Any, address: str) -> Any:
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.setsockopt(zmq.RCVHWM, MARK)
    socket.connect(address)
    return socket


async def zmq_send(zmq: Any, socket: Any, message: bytes) -> None:
    while True:
        try:
            await socket.send(message)
            return
        except zmq.Again:           # XPUB always calls itself writable, so pyzmq can't wait for it
            await asyncio.sleep(0)


async def zmq_publish_asyncio(address: str) -> None:
    zmq = importlib.import_module("zmq")
    context = importlib.import_module("zmq.asyncio").Context()
    socket = zmq_publisher(zmq, context, address, True)
    say("READY")
    for _ in range(SUBSCRIBERS):
        await socket.recv()
    for size, seconds in orders():
        message, count, begun = bytes(size), 0, time.monotonic()
        while time.monotonic() < begun + seconds:
            for _ in range(16):
                await zmq_send(zmq, socket, message)
            count += 16
        await zmq_send(zmq, socket, LAST)
        say(count, begun, time.process_time())


async def zmq_subscribe_asyncio(address: str) -> None:
    zmq = importlib.import_module("zmq")
    socket = zmq_subscriber(zmq, importlib.import_module("zmq.asyncio").Context(), address)
    say("READY")
    count = 0
    while True:
        message = await socket.recv()
        if message == LAST:
            say(count, time.monotonic(), time.process_time())
            count = 0
        else:
            count += 1


def zmq_publish_blocking(address: str, no_drops: bool) -> None:
    zmq = importlib.import_module("zmq")
    socket = zmq_publisher(zmq, zmq.Context(), address, no_drops)
    say("READY")
    for _ in range(SUBSCRIBERS):
        socket.recv()
    for size, seconds in orders():
        message, count, begun = bytes(size), 0, time.monotonic()
        while time.monotonic() < begun + seconds:
            for _ in range(16):
                socket.send(message)
            count += 16
        for _ in range(1 if no_drops else 20):
            if not no_drops:
                time.sleep(0.05)    # the last one may be dropped like any other
            socket.send(LAST)
        say(count, begun, time.process_time())


def zmq_subscribe_blocking(address: str) -> None:
    zmq = importlib.import_module("zmq")
    socket = zmq_subscriber(zmq, zmq.Context(), address)
    say("READY")
    count, at = 0, 0.0
    while True:
        message = socket.recv()
        if message == LAST:
            if count:               # of the dropping one the last comes several times
                say(count, at, time.process_time())
            count = 0
        else:
            count += 1
            if not count & 15:
                at = time.monotonic()


def serve(name: str, address: str) -> None:
    role, _, contender = name.partition(" ")
    publishes = role == "publish"
    if contender.startswith("anywire") and contender.endswith("asyncio"):
        asyncio.run((publish_asyncio if publishes else subscribe_asyncio)(address))
    elif contender == LATEST and publishes:
        publish_blocking(address, "latest")
    elif contender == IN_PLACE and not publishes:
        subscribe_in_place(address)
    elif contender == IOX:
        (iox_publish if publishes else iox_subscribe)(address)
    elif contender.startswith("anywire"):
        (publish_blocking if publishes else subscribe_blocking)(address)
    elif contender == "pyzmq asyncio, no drops":
        asyncio.run((zmq_publish_asyncio if publishes else zmq_subscribe_asyncio)(address))
    elif publishes:
        zmq_publish_blocking(address, contender != DROPPING)
    else:
        zmq_subscribe_blocking(address)


class Group:
    """A publisher and its subscribers, which stay for all rounds."""

    def __init__(self, stack: contextlib.ExitStack, contender: str, number: int) -> None:
        name = f"anywire-broadcast-{os.getpid()}-{number}"
        address = f"ipc://@{name}"
        if contender.startswith("anywire"):
            address = f"shm://{name}" if " shm " in contender else f"unix:@{name}"

        def child(core: int, role: str) -> Child:
            what = ("--serve", f"{role} {contender}", "--address", address)
            return stack.enter_context(Child(core, sys.executable, "-m", "benchmarks.broadcast", *what))

        self.publisher = child(SERVER_CORE, "publish")
        assert self.publisher.line() == "READY"
        self.subscribers = [child(CLIENT_CORE, "subscribe") for _ in range(SUBSCRIBERS)]
        for subscriber in self.subscribers:
            assert subscriber.line() == "READY"
        self.cpu = [0.0, 0.0]

    def measure(self, size: int, seconds: float) -> dict[str, float]:
        self.publisher.tell(f"{size} {seconds}")
        sent, begun, cpu = map(float, self.publisher.line().split())
        got = [tuple(map(float, subscriber.line().split())) for subscriber in self.subscribers]
        used = [cpu, sum(cpu for _, _, cpu in got)]
        sender, receivers = (now - before for now, before in zip(used, self.cpu, strict=True))
        self.cpu = used
        return {
            "rate": min(count / (at - begun) if at > begun else 0.0 for count, at, _ in got),
            "lost": sent - min(count for count, _, _ in got),
            "sender_cpu_us": sender / sent * 1e6,
            "cpu_us": (sender + receivers) / sent * 1e6,
            "receiver_cpu_us": receivers / max(1.0, sum(count for count, _, _ in got)) * 1e6,
        }


def main() -> None:
    parser = options(__doc__, rounds=5, seconds=0.8)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.address)
        return
    report = Report("broadcast: one publisher, four subscribers", ("anywire", "pyzmq", "iceoryx2"))
    report.begin()
    names = [*PAIRS, LATEST]
    for module, package, theirs in (
        ("zmq", "pyzmq", [*dict.fromkeys(base for base in PAIRS.values() if base != IOX), DROPPING]),
        ("iceoryx2", "iceoryx2", [IOX]),
    ):
        if importlib.util.find_spec(module):
            names += theirs
        else:
            report.note(f"{package} is not installed, and left out")
    with contextlib.ExitStack() as stack:
        groups = {name: Group(stack, name, number) for number, name in enumerate(names)}
        for number in range(arguments.rounds):
            for size in SIZES:
                for name in turns(list(groups), number):
                    report.results.add(size_name(size), name, groups[name].measure(size, arguments.seconds))
    for cell in report.results.cells:
        report.rates(cell, "pyzmq, no drops", "rate", ("lost", "sender_cpu_us", "receiver_cpu_us"))
        for ours, base in PAIRS.items():
            if base in names:
                ratio = report.results.ratio(cell, ours, base, "rate")
                report.claim(f"{ours}, {cell} to {SUBSCRIBERS}, of {base}", ratio, 1.0)
                cpu = report.results.ratio(cell, base, ours, "cpu_us")
                report.note(f"      the same by CPU time of all five: {times(cpu)}")
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
