"""One process that connects, sends, receives and closes thousands of times, and prints what it holds before and after.

    python leak_cycles.py WIRE FRONT CYCLES [--ways=WAY,WAY] [--trace] [--leak]

Server and client are both in it, so a leak of either side shows. Besides the polite way there are those that end in an
error, a time-out, a cancellation or an abort, where a reference is easily forgotten: the cycles are shared out among
the ways, and each way's among PARTS parts. WIRE is an address to listen at, or `udp` or `pipe`. Prints a line of JSON
for each look: [way, cycles since the last look, what is held]. With --ways only these are made, as often as if all
were; with --trace it prints where what was added came from; with --leak each cycle leaves an object and a few bytes,
for a test of the test. Run by test_leaks.py, alone in its process, so that nothing else allocates.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anywire
from anywire import sync
from anywire.contract.wire import wire_for

WARM_UP = 25
"""Cycles of each way before the first of any is measured: imports, free lists and pools fill up in these."""
PARTS = 4
"""A leak grows in each part; what merely fills up, or is doubled once, grows in one or two."""
Watch = Callable[[str, int], None]
ONLY = {way for argument in sys.argv if argument.startswith("--ways=") for way in argument[7:].split(",")}
LEAKING = "--leak" in sys.argv
LEFT: list[object] = []
LARGE = bytes(300_000)
"""More than one read brings, so that it is received into its own buffer."""
MORE_THAN_FITS = bytes(3 << 20)
"""More than the kernel holds between two processes that don't read."""
LIMIT = 8 << 20
GONE = (anywire.PeerLost, anywire.ChannelClosed)


class Mallinfo(ctypes.Structure):
    """mallinfo(3): what malloc has handed out, of all its arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo


def malloced() -> int:
    """Bytes that malloc has handed out: the native code's, and Python's objects above 512 bytes."""
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def shares(way: str, cycles: int, ways: int) -> list[int]:
    """How many cycles of one way to make before each look. The first fill the free lists."""
    if ONLY and way not in ONLY:
        return []
    each = cycles // ways
    return [each // 2] + [each // PARTS] * PARTS


def turns(many: int) -> Iterator[None]:
    for _ in range(many):
        yield
        if LEAKING:
            LEFT.append(object())
            libc.malloc(400)


def warmed_up() -> None:
    """What is there now need not be looked through at each of the hundred collections to come."""
    held()
    gc.freeze()


def held() -> dict[str, Any]:
    for _ in range(3):
        gc.collect()
    libc.malloc_trim(0)     # what handler threads freed in arenas of their own goes back to the kernel
    return {
        "objects": sys.getallocatedblocks(),
        "malloced": malloced(),
        "resident": resident(),
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in descriptors()),
        # The loop's pool for getaddrinfo(3) grows as it likes, to a few threads.
        "threads": sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate()),
    }


def descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def missing(address: anywire.Address) -> str:
    """An address of the same wire where nobody listens."""
    if address.scheme in ("inproc", "shm"):
        return f"{address.scheme}://nobody-listens-here"
    if address.scheme == "fifo":
        return f"fifo://{address.path}-nobody-listens-here?reply=true"
    return "unix:@anywire-nobody-listens-here" if address.scheme == "unix" else f"{address.scheme}://127.0.0.1:1"


def has_streams(wire: str) -> bool:
    """Whether it carries bytes too."""
    return "stream" in wire_for(wire).traits(anywire.Address.parse(wire)).kind


def other(wire: str) -> str:
    """A second address beside it."""
    path, question, options = wire.partition("?")
    return wire if path.startswith(("tcp:", "tls:")) else f"{path}-bytes{question}{options}"


def pair_of(wire: str) -> str:
    """The key in PAIRS of a wire whose cycles make both ends anew; "" for those that have a server for all cycles."""
    if wire.startswith("fifo:") and "reply=true" not in wire:
        return "fifo-many" if "writers=many" in wire else "fifo-one-way"
    if wire.startswith(("mq:", "sysv:")):
        return wire.partition(":")[0]
    return wire if wire in ("pipe", "udp") else ""


Options = dict[str, Any]
QUARTER = bytes(250)
"""Of a queue of four messages, or of 1000 bytes."""


def mark(wire: str) -> Options:
    """What the messages of a queue's sender may have."""
    return {"priority": 3} if wire.startswith("mq:") else {"type": 3}


def identity(wire: str, directory: str) -> tuple[Options, Options]:
    """What the listener and the client of a wire need besides its address."""
    if not wire.startswith("tls:"):
        return {}, {}
    import trustme

    authority, certificate = trustme.CA(), f"{directory}/server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    authority.cert_pem.write_to_path(f"{directory}/ca.pem")
    return {"cert": certificate}, {"ca": f"{directory}/ca.pem"}


# ---- the async front ------------------------------------------------------------------------------------------------


async def async_echo(channel: anywire.Channel) -> None:
    with contextlib.suppress(*GONE):
        async for message in channel:
            await channel.send(message)


async def async_stream_echo(stream: anywire.Stream) -> None:
    with contextlib.suppress(*GONE, ConnectionError):
        async for chunk in stream:
            await stream.write(chunk)


async def a_small(channel: anywire.Channel) -> None:
    await channel.send(b"small")
    assert await channel.recv() == b"small"


async def a_large(channel: anywire.Channel) -> None:
    await channel.send(LARGE)
    assert len(await channel.recv()) == len(LARGE)
    await channel.send(LARGE)
    assert await channel.recv_into(bytearray(len(LARGE))) == len(LARGE)


async def a_view(channel: anywire.Channel) -> None:
    await channel.send(memoryview(b"view"))
    assert bytes(await channel.recv(copy=False)) == b"view"


async def a_batches(channel: anywire.Channel) -> None:
    await channel.send_many([b"a", b"b", bytearray(b"c")])
    got: list[bytes] = []
    while len(got) < 3:
        got += await channel.recv_many()
    loan = channel.loan(4)
    memoryview(loan)[:] = b"loan"
    await channel.send(loan)
    assert await channel.recv() == b"loan"
    channel.loan(100_000)          # taken and never sent


async def a_half_close(channel: anywire.Channel) -> None:
    await channel.send(b"last")
    await channel.send_eof()
    assert [message async for message in channel] == [b"last"]


async def a_cancelled_receive(channel: anywire.Channel) -> None:
    for receive in (channel.recv, lambda: channel.recv_into(bytearray(10)), channel.recv_many):
        task = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await a_small(channel)


async def a_timed_out_receive(channel: anywire.Channel) -> None:
    with contextlib.suppress(anywire.TimedOut):
        await channel.recv(timeout=0)
    await channel.send(b"answered")


async def a_too_large(channel: anywire.Channel) -> None:
    with contextlib.suppress(anywire.TooLarge):
        await channel.send(bytes(LIMIT + 1))
    await a_small(channel)


async def a_cancelled_send(channel: anywire.Channel) -> None:
    senders = [asyncio.ensure_future(channel.send(MORE_THAN_FITS)) for _ in range(3)]
    await asyncio.sleep(0)
    for sender in senders:
        sender.cancel()
    await asyncio.gather(*senders, return_exceptions=True)
    channel.abort()


async def a_abort(channel: anywire.Channel) -> None:
    await channel.send(b"never read")
    channel.abort()


ASYNC_KINDS = [
    a_small, a_large, a_view, a_batches, a_half_close, a_cancelled_receive, a_timed_out_receive, a_too_large,
    a_cancelled_send, a_abort,
]  # fmt: skip


async def a_refused(address: anywire.Address, options: Options) -> None:
    with contextlib.suppress(anywire.Refused):
        await anywire.connect(missing(address), **options)


async def a_stream(address: anywire.Address, options: Options) -> None:
    async with anywire.connect_stream(address, **options) as stream:
        await stream.write(b"line\nrest")
        assert await stream.read_until(b"\n") == b"line\n"
        assert await stream.read_exactly(4) == b"rest"


async def forget_cancelled_timers() -> None:
    """asyncio keeps cancelled timers until they are over a hundred, and over half of all: add some until then."""
    loop = asyncio.get_running_loop()
    for _ in range(50):
        for _ in range(400):
            loop.call_later(3600, print).cancel()
        await asyncio.sleep(0)
        if sum(type(one) is asyncio.TimerHandle and one.cancelled() for one in gc.get_objects()) < 100:
            return
    raise AssertionError("the loop keeps its cancelled timers")


async def a_cancelled(operation: Awaitable[Any]) -> None:
    task = asyncio.ensure_future(operation)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def a_pipe(wire: str) -> None:
    ours, theirs = await asyncio.gather(*map(anywire.attach, anywire.pipe()))
    receiving = asyncio.ensure_future(theirs.recv())
    await ours.send(LARGE)
    assert len(await receiving) == len(LARGE)
    await a_cancelled(theirs.recv())
    await asyncio.gather(ours.close(), theirs.close())


async def a_lost_pipe(wire: str) -> None:
    ours, theirs = await asyncio.gather(*map(anywire.attach, anywire.pipe()))
    await ours.send(b"never read")
    ours.abort()
    with contextlib.suppress(anywire.PeerLost):
        while True:
            await theirs.recv()
    theirs.abort()


async def a_datagrams(wire: str) -> None:
    async with anywire.serve(async_echo, "udp://127.0.0.1:0") as server:
        channel = await anywire.connect(server.addresses[0])
        await channel.send_many([b"a", b"b"])
        got: list[bytes] = []
        while len(got) < 2:
            got += await channel.recv_many(timeout=20)
        with contextlib.suppress(anywire.TooLarge):
            await channel.send(LARGE)
        with contextlib.suppress(anywire.TimedOut):
            await channel.recv(timeout=0)
        await channel.close()
        await server.abort()


async def a_writer(wire: str) -> None:
    async with (
        anywire.listen(wire) as listener,
        anywire.connect(listener.addresses[0]) as writer,
        await listener.accept() as reader,
    ):
        sending = asyncio.ensure_future(writer.send(LARGE))
        assert len(await reader.recv()) == len(LARGE)
        await sending
        await a_cancelled(reader.recv())
        await writer.send_many([b"a", b"b"])
        assert await reader.recv_into(bytearray(1)) == 1
        closing = asyncio.ensure_future(writer.close())
        assert [message async for message in reader] == [b"b"]
        await closing
    with contextlib.suppress(anywire.Refused):
        await anywire.connect(wire)


async def a_lost_writer(wire: str) -> None:
    async with anywire.listen(wire) as listener:
        writer = await anywire.connect(listener.addresses[0])
        reader = await listener.accept()
        await a_cancelled(writer.send(MORE_THAN_FITS))
        writer.abort()
        with contextlib.suppress(anywire.PeerLost):
            await reader.recv()
        reader.abort()
        writer = await anywire.connect(listener.addresses[0])    # its FIFO goes with the listener
        writer.abort()


async def a_writer_of_bytes(wire: str) -> None:
    async with anywire.listen_stream(wire) as listener:
        async with anywire.connect_stream(listener.addresses[0]) as writer:
            await writer.write(b"line\nrest")
            reader = await listener.accept()
        async with reader:
            assert await reader.read_until(b"\n") == b"line\n"
            assert [chunk async for chunk in reader] == [b"rest"]


async def a_crowd(wire: str) -> None:
    """Two writers; the reader is one for all."""
    async with anywire.listen(wire) as listener:
        first, second = [await anywire.connect(listener.addresses[0]) for _ in range(2)]
        async with await listener.accept() as reader:
            await first.send_many([b"a", b"b"])
            await second.send(b"c")
            assert sorted([await reader.recv(), *await reader.recv_many()]) == [b"a", b"b", b"c"]
            sending = asyncio.ensure_future(second.send(LARGE))
            assert len(await reader.recv()) == len(LARGE)
            await sending
            await a_cancelled(reader.recv())
            await asyncio.gather(first.close(), second.close())


async def a_lost_crowd(wire: str) -> None:
    """One is cancelled in mid-message and goes, one sends what is never read, and the next reader finds the rest."""
    async with anywire.listen(wire) as listener:
        first, second = [await anywire.connect(listener.addresses[0]) for _ in range(2)]
        await second.send(b"whole")
        await a_cancelled(first.send(MORE_THAN_FITS))
        first.abort()
        reader = await listener.accept()
        assert await reader.recv() == b"whole"
        reader.abort()
        second.abort()


async def a_queue(wire: str) -> None:
    async with anywire.listen(wire) as listener, anywire.connect(listener.addresses[0]) as client:
        await client.send_many([b"a", b"b", b"c"])
        async with await listener.accept() as there:
            got: list[bytes] = []
            while len(got) < 3:
                got += await there.recv_many()
            await a_cancelled(there.recv())
            await there.send(b"answer")
            assert await client.recv_into(bytearray(6)) == 6
            with contextlib.suppress(anywire.TooLarge):
                await client.send(LARGE)
            with contextlib.suppress(anywire.TimedOut):
                await client.recv(timeout=0)
            await client.send(b"last")
            listener.close()
            assert [message async for message in there] == [b"last"]


async def a_full_queue(wire: str) -> None:
    """One way; what was sent is not all received, and what does not fit is cancelled."""
    async with anywire.listen(wire.replace("reply=true", "reply=false")) as listener:
        sender = await anywire.connect(listener.addresses[0], **mark(wire))
        await sender.send_many([QUARTER] * 4)
        await a_cancelled(sender.send(b"5"))
        reader = await listener.accept()
        assert await reader.recv() == QUARTER
        reader.abort()
        sender.abort()
    with contextlib.suppress(anywire.Refused):
        await anywire.connect(wire)


# Both sides in each cycle: a pipe is one connection, one way nothing says that the other end has done its part, and a
# datagram socket, or a queue, never says that it has gone.
ASYNC_PAIRS = {
    "pipe": [a_pipe, a_lost_pipe],
    "udp": [a_datagrams],
    "fifo-one-way": [a_writer, a_lost_writer, a_writer_of_bytes],
    "fifo-many": [a_crowd, a_lost_crowd],
    "mq": [a_queue, a_full_queue],
    "sysv": [a_queue, a_full_queue],
}


async def async_pairs(wire: str, cycles: int, watch: Watch) -> None:
    ways = ASYNC_PAIRS[pair_of(wire)]
    for way in ways:
        for _ in range(WARM_UP):
            await way(wire)
    for _ in range(3):
        await forget_cancelled_timers()
        warmed_up()
    for way in ways:
        for many in shares(way.__name__, cycles, len(ways)):
            for _ in turns(many):
                await way(wire)
                await asyncio.sleep(0)
            await forget_cancelled_timers()
            watch(way.__name__, many)


async def async_cycles(wire: str, cycles: int, watch: Watch) -> None:
    async with contextlib.AsyncExitStack() as stack:
        here, there = identity(wire, stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [await stack.enter_async_context(anywire.serve(async_echo, wire, max_message=LIMIT, **here))]
        address = servers[0].addresses[0]

        async def through(kind: Callable[[anywire.Channel], Awaitable[None]]) -> None:
            channel = await anywire.connect(address, max_message=LIMIT, wait=10, **there)
            await kind(channel)
            with contextlib.suppress(anywire.PeerLost):
                await channel.close()

        ways: dict[str, Callable[[], Awaitable[None]]] = {kind.__name__: partial(through, kind) for kind in ASYNC_KINDS}
        ways["a_refused"] = partial(a_refused, address, there)
        if has_streams(wire):
            server = anywire.serve_stream(async_stream_echo, other(wire), **here)
            servers.append(await stack.enter_async_context(server))
            ways["a_stream"] = partial(a_stream, servers[1].addresses[0], there)
        for _ in range(WARM_UP):
            for way in ways.values():
                await way()
        for _ in range(3):
            await forget_cancelled_timers()
            warmed_up()
        for name, way in ways.items():
            for many in shares(name, cycles, len(ways)):
                for _ in turns(many):
                    await way()
                    await asyncio.sleep(0)       # a way that never had to wait leaves the loop its chores
                await through(a_small)           # served after all that were still in the backlog
                while any(server.connections for server in servers):
                    await asyncio.sleep(0)
                await forget_cancelled_timers()
                watch(name, many)


# ---- the blocking front ---------------------------------------------------------------------------------------------


def echo(channel: sync.Channel) -> None:
    with contextlib.suppress(*GONE):
        for message in channel:
            channel.send(message)


def stream_echo(stream: sync.Stream) -> None:
    with contextlib.suppress(*GONE, ConnectionError):
        for chunk in stream:
            stream.write(chunk)


def small(channel: sync.Channel) -> None:
    channel.send(b"small")
    assert channel.recv() == b"small"


def large(channel: sync.Channel) -> None:
    channel.send(LARGE)
    assert len(channel.recv()) == len(LARGE)
    channel.send(LARGE)
    assert channel.recv_into(bytearray(len(LARGE))) == len(LARGE)


def view(channel: sync.Channel) -> None:
    channel.send(memoryview(b"view"))
    assert bytes(channel.recv(copy=False)) == b"view"


def batches(channel: sync.Channel) -> None:
    channel.send_many([b"a", b"b", bytearray(b"c")])
    got: list[bytes] = []
    while len(got) < 3:
        got += channel.recv_many()
    loan = channel.loan(4)
    memoryview(loan)[:] = b"loan"
    channel.send(loan)
    assert channel.recv() == b"loan"
    channel.loan(100_000)          # taken and never sent


def half_close(channel: sync.Channel) -> None:
    channel.send(b"last")
    channel.send_eof()
    assert list(channel) == [b"last"]


def timed_out_receives(channel: sync.Channel) -> None:
    for receive in (channel.recv, lambda timeout: channel.recv_into(bytearray(10), timeout=timeout), channel.recv_many):
        with contextlib.suppress(anywire.TimedOut):
            receive(timeout=0)
    small(channel)


def too_large(channel: sync.Channel) -> None:
    with contextlib.suppress(anywire.TooLarge):
        channel.send(bytes(LIMIT + 1))
    small(channel)


def timed_out_send(channel: sync.Channel) -> None:
    for _ in range(3):
        with contextlib.suppress(anywire.TimedOut, anywire.TooLarge):
            channel.send(MORE_THAN_FITS, timeout=0)
    channel.abort()


def abort(channel: sync.Channel) -> None:
    channel.send(b"never read")
    channel.abort()


KINDS = [small, large, view, batches, half_close, timed_out_receives, too_large, timed_out_send, abort]


def refused(address: anywire.Address, options: Options) -> None:
    with contextlib.suppress(anywire.Refused):
        sync.connect(missing(address), **options)


def stream(address: anywire.Address, options: Options) -> None:
    with sync.connect_stream(address, **options) as stream:
        stream.write(b"line\nrest")
        assert stream.read_until(b"\n") == b"line\n"
        assert stream.read_exactly(4) == b"rest"


def both_ends() -> tuple[sync.Channel, sync.Channel]:
    """Of a pipe: attaching waits for the other end, so that takes a thread."""
    ours, theirs = sync.pipe()
    with ThreadPoolExecutor(1) as other:
        there = other.submit(sync.attach, theirs)
        return sync.attach(ours), there.result()


def pipe(wire: str) -> None:
    ours, theirs = both_ends()
    with contextlib.suppress(anywire.TimedOut):
        theirs.recv(timeout=0)
    with ThreadPoolExecutor(1) as other:
        sending = other.submit(ours.send, LARGE)
        assert len(theirs.recv()) == len(LARGE)
        sending.result()
        closing = other.submit(ours.close)
        theirs.close()
        closing.result()


def lost_pipe(wire: str) -> None:
    ours, theirs = both_ends()
    ours.send(b"never read")
    ours.abort()
    with contextlib.suppress(anywire.PeerLost):
        while True:
            theirs.recv()
    theirs.abort()


def datagrams(wire: str) -> None:
    with sync.serve(echo, "udp://127.0.0.1:0") as server:
        channel = sync.connect(server.addresses[0])
        channel.send_many([b"a", b"b"])
        got: list[bytes] = []
        while len(got) < 2:
            got += channel.recv_many(timeout=20)
        with contextlib.suppress(anywire.TooLarge):
            channel.send(LARGE)
        with contextlib.suppress(anywire.TimedOut):
            channel.recv(timeout=0)
        channel.close()
        server.abort()


def writer(wire: str) -> None:
    with (
        ThreadPoolExecutor(1) as other,
        sync.listen(wire) as listener,
        sync.connect(listener.addresses[0]) as there,
        listener.accept() as reader,
    ):
        sending = other.submit(there.send, LARGE)
        assert len(reader.recv()) == len(LARGE)
        sending.result()
        with contextlib.suppress(anywire.TimedOut):
            reader.recv(timeout=0)
        there.send_many([b"a", b"b"])
        assert reader.recv_into(bytearray(1)) == 1
        closing = other.submit(there.close)
        assert list(reader) == [b"b"]
        closing.result()
    with contextlib.suppress(anywire.Refused):
        sync.connect(wire)


def lost_writer(wire: str) -> None:
    with sync.listen(wire) as listener:
        there = sync.connect(listener.addresses[0])
        reader = listener.accept()
        with contextlib.suppress(anywire.TimedOut):
            there.send(MORE_THAN_FITS, timeout=0)
        there.abort()
        with contextlib.suppress(anywire.PeerLost):
            reader.recv()
        reader.abort()
        there = sync.connect(listener.addresses[0])     # its FIFO goes with the listener
        there.abort()


def writer_of_bytes(wire: str) -> None:
    with sync.listen_stream(wire) as listener:
        there = sync.connect_stream(listener.addresses[0])
        there.write(b"line\nrest")
        with listener.accept() as reader:
            there.abort()
            assert reader.read_until(b"\n") == b"line\n"
            assert list(reader) == [b"rest"]


def crowd(wire: str) -> None:
    with ThreadPoolExecutor(1) as other, sync.listen(wire) as listener:
        first, second = [sync.connect(listener.addresses[0]) for _ in range(2)]
        with listener.accept() as reader:
            first.send_many([b"a", b"b"])
            second.send(b"c")
            assert sorted([reader.recv(), *reader.recv_many()]) == [b"a", b"b", b"c"]
            sending = other.submit(second.send, LARGE)
            assert len(reader.recv()) == len(LARGE)
            sending.result()
            with contextlib.suppress(anywire.TimedOut):
                reader.recv(timeout=0)
            first.close()
            second.close()


def lost_crowd(wire: str) -> None:
    with sync.listen(wire) as listener:
        first, second = [sync.connect(listener.addresses[0]) for _ in range(2)]
        second.send(b"whole")
        with contextlib.suppress(anywire.TimedOut):
            first.send(MORE_THAN_FITS, timeout=0)
        first.abort()
        reader = listener.accept()
        assert reader.recv() == b"whole"
        reader.abort()
        second.abort()


def queue(wire: str) -> None:
    with sync.listen(wire) as listener, sync.connect(listener.addresses[0]) as client:
        client.send_many([b"a", b"b", b"c"])
        with listener.accept() as there:
            got: list[bytes] = []
            while len(got) < 3:
                got += there.recv_many()
            with contextlib.suppress(anywire.TimedOut):
                there.recv(timeout=0)
            there.send(b"answer")
            assert client.recv_into(bytearray(6)) == 6
            with contextlib.suppress(anywire.TooLarge):
                client.send(LARGE)
            client.send(b"last")
            listener.close()
            assert list(there) == [b"last"]


def full_queue(wire: str) -> None:
    with sync.listen(wire.replace("reply=true", "reply=false")) as listener:
        sender = sync.connect(listener.addresses[0], **mark(wire))
        sender.send_many([QUARTER] * 4)
        with contextlib.suppress(anywire.TimedOut):
            sender.send(b"5", timeout=0)
        reader = listener.accept()
        assert reader.recv() == QUARTER
        reader.abort()
        sender.abort()
    with contextlib.suppress(anywire.Refused):
        sync.connect(wire)


PAIRS = {
    "pipe": [pipe, lost_pipe],
    "udp": [datagrams],
    "fifo-one-way": [writer, lost_writer, writer_of_bytes],
    "fifo-many": [crowd, lost_crowd],
    "mq": [queue, full_queue],
    "sysv": [queue, full_queue],
}


def blocking_pairs(wire: str, cycles: int, watch: Watch) -> None:
    ways = PAIRS[pair_of(wire)]
    steady = threading.active_count()
    for way in ways:
        for _ in range(WARM_UP):
            way(wire)
    warmed_up()
    for way in ways:
        for many in shares(way.__name__, cycles, len(ways)):
            for _ in turns(many):
                way(wire)
            while threading.active_count() > steady:
                os.sched_yield()
            watch(way.__name__, many)


def blocking_cycles(wire: str, cycles: int, watch: Watch) -> None:
    with contextlib.ExitStack() as stack:
        here, there = identity(wire, stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(sync.serve(echo, wire, max_message=LIMIT, **here))]
        address = servers[0].addresses[0]

        def through(kind: Callable[[sync.Channel], None]) -> None:
            channel = sync.connect(address, max_message=LIMIT, wait=10, **there)     # the backlog may be full
            kind(channel)
            with contextlib.suppress(anywire.PeerLost):
                channel.close()

        ways: dict[str, Callable[[], None]] = {kind.__name__: partial(through, kind) for kind in KINDS}
        ways["refused"] = partial(refused, address, there)
        if has_streams(wire):
            servers.append(stack.enter_context(sync.serve_stream(stream_echo, other(wire), **here)))
            ways["stream"] = partial(stream, servers[1].addresses[0], there)
        steady = threading.active_count()
        for _ in range(WARM_UP):
            for way in ways.values():
                way()
        warmed_up()
        for name, way in ways.items():
            for many in shares(name, cycles, len(ways)):
                for _ in turns(many):
                    way()
                through(small)                   # served after all that were still in the backlog
                while any(server.connections for server in servers) or threading.active_count() > steady:
                    os.sched_yield()
                watch(name, many)


def main() -> None:
    wire, front, cycles = sys.argv[1], sys.argv[2], int(sys.argv[3])
    traced: dict[str, tracemalloc.Snapshot] = {}
    if "--trace" in sys.argv:
        tracemalloc.start(8)

    def watch(way: str, many: int) -> None:
        """Called after each share of the cycles of a way. Keeps nothing, for that would count at the next look."""
        print(json.dumps([way, many, held()]), flush=True)
        if tracemalloc.is_tracing():
            now = tracemalloc.take_snapshot()
            print(f"---- {way}", file=sys.stderr)
            for difference in now.compare_to(traced.setdefault(way, now), "traceback")[:3]:
                print(difference, *difference.traceback.format(), sep="\n", file=sys.stderr)

    if front == "async":
        asyncio.run((async_pairs if pair_of(wire) else async_cycles)(wire, cycles, watch))
    else:
        (blocking_pairs if pair_of(wire) else blocking_cycles)(wire, cycles, watch)


if __name__ == "__main__":
    main()
