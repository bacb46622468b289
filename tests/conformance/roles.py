"""What peers can be asked to do. Each function runs in the peer, gets its `PeerSide` and may use `peer.channel`.

Called through `Peer.call(roles.name, …)`, in the peer's only thread, with the blocking front. Results must pickle.
Messages are numbered: `message(i, size)` has its number in the first eight bytes and bytes that follow from it after
that, so a message that lost, doubled or mixed up bytes is told from a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import hashlib
import itertools
import os
import pickle
import queue
import random
import resource
import struct
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anywire
import anywire.sync
from anywire.contract import counters
from anywire.contract.handle import Handle
from anywire.contract.wire import wire_for

from .loops import on_loop, runner
from .peer import PeerSide
from .wires import client_address

FILLER = 10**8  # the number of messages that only fill the kernel's buffers
_PATTERN = bytes(range(256)) * 257


def message(number: int, size: int = 8) -> bytes:
    """Message `number`, of `size` bytes (at least 8)."""
    fill = size - 8
    start = number % 251
    if fill <= len(_PATTERN) - 256:
        return struct.pack("<Q", number) + _PATTERN[start : start + fill]
    return struct.pack("<Q", number) + (_PATTERN[start:] * (fill // (len(_PATTERN) - 256) + 1))[:fill]


def number_of(data: Any) -> int:
    """The number of a message, after checking that it is whole."""
    data = bytes(data)
    number = int(struct.unpack_from("<Q", data)[0])
    assert data == message(number, len(data)), f"message {number} of {len(data)} bytes is damaged"
    return number


def digest(data: Any) -> tuple[int, str]:
    return len(data), hashlib.blake2b(data, digest_size=16).hexdigest()


def describe(error: BaseException) -> dict[str, Any]:
    """An error as plain data: its class, the builtins that it is, its text and its attributes."""
    attributes = {key: value for key, value in vars(error).items() if isinstance(value, (int, float, str, bytes))}
    classes = [cls.__name__ for cls in type(error).__mro__]
    return {**attributes, "kind": type(error).__name__, "classes": classes, "text": str(error)}


# -- connecting ---


def listen(peer: PeerSide, *addresses: str, stream: bool = False, **options: Any) -> list[str]:
    make = anywire.sync.listen_stream if stream else anywire.sync.listen
    peer.listener = make(*addresses, **options).__enter__()
    return [str(address) for address in peer.listener.addresses]


def accept(peer: PeerSide, timeout: float = 10) -> None:
    peer.channel = peer.listener.accept(timeout=timeout)


def dial(peer: PeerSide, address: str, stream: bool = False, **options: Any) -> None:
    peer.channel = (anywire.sync.connect_stream if stream else anywire.sync.connect)(address, **options)


def dial_outcome(peer: PeerSide, address: str, **options: Any) -> dict[str, Any] | None:
    """Connect; the error if it is refused at once or at the first receive, None if it holds."""
    try:
        peer.channel = anywire.sync.connect(address, **options)
        return None
    except (anywire.AnywireError, OSError) as error:
        return describe(error)


def use_pipe(peer: PeerSide, stream: bool = False, **options: Any) -> None:
    """Open the pipe end whose descriptors came with the peer."""
    dial(peer, _pipe_address(peer), stream=stream, **options)


def _pipe_address(peer: PeerSide) -> str:
    """The pipe end whose descriptors came with the peer: (read, write), or (read,) or (write,)."""
    parts = []
    for fd in peer.fds:
        readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        parts.append(f"{'read' if readable else 'write'}={fd}")
    return "pipe:?" + "&".join(parts)


def become(peer: PeerSide, uid: int) -> None:
    """Give up root for good: the peer is another user from now on. What it may not read then, it imports before."""
    wire_for("unix:@anywire")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# -- receiving ---


def receive_digests(peer: PeerSide, count: int) -> list[tuple[int, str]]:
    return [digest(peer.channel.recv(timeout=20)) for _ in range(count)]


def receive_numbers(peer: PeerSide, count: int) -> list[int]:
    """The numbers of the next `count` messages, in batches."""
    numbers: list[int] = []
    while len(numbers) < count:
        numbers += [number_of(data) for data in peer.channel.recv_many(count - len(numbers), timeout=20)]
    return numbers


def receive_numbers_one_by_one(peer: PeerSide, count: int) -> list[int]:
    return [number_of(peer.channel.recv(timeout=20)) for _ in range(count)]


def receive_until_number(peer: PeerSide, last: int) -> list[int]:
    """The numbers that come, up to and including `last`."""
    numbers: list[int] = []
    while not numbers or numbers[-1] != last:
        numbers.append(number_of(peer.channel.recv(timeout=20)))
    return numbers


def receive_to_the_end(peer: PeerSide, report: bool = False) -> dict[str, Any]:
    """Receive numbered messages until an error: {"numbers": […], "kind": error class, …}. May report each number."""
    numbers: list[int] = []
    while True:
        try:
            data = peer.channel.recv(timeout=20)
        except anywire.AnywireError as error:
            return {**describe(error), "numbers": numbers}
        numbers.append(number_of(data))
        if report:
            peer.report(len(numbers))


def receive_and_acknowledge(peer: PeerSide, count: int) -> None:
    """Receive `count` messages, then send one: by then the front under test must know that all were handed over."""
    for _ in range(count):
        number_of(peer.channel.recv(timeout=20))
    peer.channel.send(b"all here")


def recv_outcome(peer: PeerSide, timeout: float = 10) -> dict[str, Any]:
    """The next message, {"message": …}, or the error."""
    try:
        return {"message": peer.channel.recv(timeout=timeout)}
    except anywire.AnywireError as error:
        return describe(error)


def recv_one(peer: PeerSide) -> bytes:
    return bytes(peer.channel.recv(timeout=10))


# -- sending ---


def echo(peer: PeerSide) -> str:
    """Send back everything until the end."""
    try:
        for data in peer.channel:
            peer.channel.send(data)
    except anywire.AnywireError as error:
        return type(error).__name__
    return "end"


def send_messages(peer: PeerSide, messages: list[bytes]) -> None:
    for data in messages:
        peer.channel.send(data, timeout=20)


def send_sizes(peer: PeerSide, sizes: list[int]) -> None:
    """Message number i has sizes[i] bytes; sizes below 8 are zeros."""
    for number, size in enumerate(sizes):
        peer.channel.send(message(number, size) if size >= 8 else bytes(size), timeout=20)


def send_numbers(peer: PeerSide, count: int, size: int = 8, start: int = 0, batch: int = 64) -> None:
    for first in range(start, start + count, batch):
        last = min(first + batch, start + count)
        peer.channel.send_many([message(number, size) for number in range(first, last)], timeout=20)


def send_numbers_slowly(peer: PeerSide, first: int, last: int, size: int, pause: float) -> None:
    """One by one with random pauses of up to so many seconds: the receiver often waits and often doesn't."""
    chance = random.Random(first)
    for number in range(first, last):
        peer.channel.send(message(number, size), timeout=20)
        if chance.random() < 0.3:
            time.sleep(chance.random() * pause)


def send_until_blocked(peer: PeerSide, size: int) -> int:
    """Send as long as the channel takes messages without waiting: how many it took. They are numbered from 0."""
    number = 0
    while peer.channel.try_send(message(number, size)):
        number += 1
        assert number * size < 1 << 30, "a gigabyte was taken with nobody reading"
    return number


def send_outcome(peer: PeerSide, data: bytes, timeout: float = 10) -> dict[str, Any] | None:
    try:
        peer.channel.send(data, timeout=timeout)
        return None
    except anywire.AnywireError as error:
        return describe(error)


def send_until_error(peer: PeerSide, data: bytes) -> dict[str, Any]:
    """Send the same message until the channel fails; how."""
    try:
        while True:
            peer.channel.send(data, timeout=10)
    except anywire.AnywireError as error:
        return describe(error)


def send_eof(peer: PeerSide) -> None:
    peer.channel.send_eof()


# -- ending ---


def close(peer: PeerSide, timeout: float = 5) -> None:
    peer.channel.close(timeout=timeout)


def close_listener(peer: PeerSide) -> None:
    peer.listener.close()


def abort(peer: PeerSide) -> None:
    peer.channel.abort()


def unconfirmed(peer: PeerSide) -> int:
    return int(peer.channel.unconfirmed)


def exit_now(peer: PeerSide, code: int = 0) -> None:
    """End the process as `sys.exit` never would: nothing is closed, nothing flushed."""
    os._exit(code)


# -- streams ---


def write(peer: PeerSide, data: bytes) -> None:
    peer.channel.write(data, timeout=20)


def skip(peer: PeerSide, size: int) -> None:
    peer.channel.read_exactly(size, timeout=20)


def write_and_close(peer: PeerSide, data: bytes) -> None:
    peer.channel.write(data, timeout=20)
    peer.channel.close()


def read_to_the_end(peer: PeerSide, hold: bool = False) -> tuple[int, str]:
    """How many bytes came until the end, and their digest. Then the other direction is closed too, if not to `hold`."""
    size, total = 0, hashlib.blake2b(digest_size=16)
    while chunk := peer.channel.read(timeout=20):
        size += len(chunk)
        total.update(chunk)
    if not hold:
        peer.channel.close()
    return size, total.hexdigest()


def read_runs(peer: PeerSide) -> list[tuple[int, int]]:
    """The bytes until the end, as runs of (byte, how many in a row)."""
    runs: list[tuple[int, int]] = []
    while chunk := peer.channel.read(timeout=20):
        for byte, group in itertools.groupby(chunk):
            size = sum(1 for _ in group)
            if runs and runs[-1][0] == byte:
                runs[-1] = (byte, runs[-1][1] + size)
            else:
                runs.append((byte, size))
    peer.channel.close()
    return runs


# -- fork ---


def fork_with_a_channel(
    peer: PeerSide, address: str, front: str, options: dict[str, Any], two_way: bool, announced: bool
) -> tuple[dict[str, str], bytes]:
    """Open both ends here, fork, use them in the child: the name of each call's error; a message from the parent.

    On a one-way wire the child sends with one end and receives with the other."""
    if front == "blocking":
        with _both_ends(address, options, two_way, announced) as (channel, other):
            calls = _calls(channel, channel if two_way else other)
            refused = _in_a_child(lambda: {name: _error_of(call) for name, call in calls.items()})
            channel.send(b"the parent goes on")
            return refused, other.recv(timeout=10)

    async def main() -> tuple[dict[str, str], bytes]:
        async with _both_ends_async(address, options, two_way, announced) as (channel, other):
            calls = _calls(channel, channel if two_way else other)
            refused = _in_a_child(
                lambda: {name: _error_of(lambda call=call: _step(call())) for name, call in calls.items()}
            )
            await channel.send(b"the parent goes on")
            return refused, await other.recv()

    return on_loop(main())


@contextlib.contextmanager
def _both_ends(address: str, options: dict[str, Any], two_way: bool, announced: bool) -> Iterator[tuple[Any, Any]]:
    """Both ends of a connection in this process; the first sends."""
    with contextlib.ExitStack() as stack:
        if address.startswith("pipe:"):
            here, there = anywire.sync.pipe(duplex=two_way)  # one way: the writing end first
            accept, connect = partial(anywire.sync.attach, there), partial(anywire.sync.attach, here)
        else:
            listener = stack.enter_context(anywire.sync.listen(address))
            accept = partial(listener.accept, timeout=10)
            connect = partial(anywire.sync.connect, client_address(listener.addresses[0]), **options)
        dialed: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def dial() -> None:
            channel = connect()
            if not announced:
                channel.send(b"it is me")
            dialed.put(channel)

        dialing = threading.Thread(target=dial)
        dialing.start()
        other = accept()
        stack.callback(other.abort)
        dialing.join()
        channel = dialed.get(timeout=10)
        stack.callback(channel.abort)
        if not announced:
            assert other.recv(timeout=10) == b"it is me"
        yield channel, other


@contextlib.asynccontextmanager
async def _both_ends_async(
    address: str, options: dict[str, Any], two_way: bool, announced: bool
) -> AsyncIterator[tuple[Any, Any]]:
    async with contextlib.AsyncExitStack() as stack:
        if address.startswith("pipe:"):
            channel, other = await asyncio.gather(*map(anywire.attach, anywire.pipe(duplex=two_way)))
        else:
            listener = await stack.enter_async_context(anywire.listen(address))
            dialing = asyncio.ensure_future(_connect(client_address(listener.addresses[0]), options))
            if not announced:
                await (await dialing).send(b"it is me")
            other = await listener.accept()
            channel = await dialing
        stack.callback(other.abort)
        stack.callback(channel.abort)
        if not announced:
            assert await other.recv() == b"it is me"
        yield channel, other


async def _connect(address: str, options: dict[str, Any]) -> Any:
    return await anywire.connect(address, **options)


def _calls(sender: Any, receiver: Any) -> dict[str, Callable[[], Any]]:
    return {
        "send": lambda: sender.send(b"x"),
        "try_send": lambda: sender.try_send(b"x"),
        "send_many": lambda: sender.send_many([b"x"]),
        "recv": lambda: receiver.recv(),
        "recv_into": lambda: receiver.recv_into(bytearray(10)),
        "recv_many": lambda: receiver.recv_many(),
    }


def _step(awaitable: Any) -> None:
    """Run an awaitable up to its first wait, without a loop."""
    if hasattr(awaitable, "send"):
        awaitable.send(None)


def _error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except BaseException as error:
        return type(error).__name__
    return "no error"


def _in_a_child(function: Callable[[], Any]) -> Any:
    """What `function` gives in a forked child, which then ends as a child of `multiprocessing` does."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, pickle.dumps(function()))
            gc.collect()
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)


def dial_fork_and_send(peer: PeerSide, address: str, front: str, options: dict[str, Any]) -> int:
    """Connect, let a forked child exit with the channel in its memory, then send. The child drops the channel first."""
    if address == "pipe:":
        address = _pipe_address(peer)
    holder: list[Any] = []

    def child() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            holder.clear()
            gc.collect()
        return 0

    if front == "blocking":
        holder.append(anywire.sync.connect(address, **options))
        code = _in_a_child(child)
        holder[0].send(b"the child is gone")
        peer.channel = holder[0]
        return int(code)

    async def main() -> int:
        holder.append(await anywire.connect(address, **options))
        code = _in_a_child(child)
        await holder[0].send(b"the child is gone")
        return int(code)

    peer.kept["runner"] = runner()  # its loop stays, and with it the channel
    peer.kept["holder"] = holder
    return int(peer.kept["runner"].run(main()))


# -- interrupts ---


class Driven:
    """A channel of either front whose calls block here and end with KeyboardInterrupt on Ctrl-C."""

    def __init__(self, address: str, front: str, options: dict[str, Any]) -> None:
        self.runner = runner() if front == "async" else None
        if self.runner is not None:
            self.channel = self.runner.run(_connect(address, options))
        else:
            self.channel = anywire.sync.connect(address, **options)

    def call(self, name: str, *args: Any) -> Any:
        if self.runner is None:
            return getattr(self.channel, name)(*args)

        async def run() -> Any:
            return await getattr(self.channel, name)(*args)

        return self.runner.run(run())


def receive_despite_interrupts(
    peer: PeerSide, address: str, front: str, options: dict[str, Any], count: int
) -> list[int]:
    driven = Driven(address, front, options)
    peer.kept["driven"] = driven
    peer.report("connected")
    numbers: list[int] = []
    while len(numbers) < count:
        try:
            data = driven.call("recv")
        except KeyboardInterrupt:
            peer.report("interrupted")
        else:
            numbers.append(number_of(data))
    return numbers


def send_despite_interrupts(
    peer: PeerSide, address: str, front: str, options: dict[str, Any], count: int, size: int
) -> int:
    """Send `count` large messages to a peer that doesn't read, each until it is interrupted, then one small one."""
    driven = Driven(address, front, options)
    peer.kept["driven"] = driven
    while driven.channel.try_send(message(FILLER, min(size, 50_000))):
        pass
    interrupted = 0
    for number in range(count):
        try:
            peer.report("sending")
            driven.call("send", message(number, size))
        except KeyboardInterrupt:
            interrupted += 1
            peer.report("interrupted")
    driven.call("send", message(10**9))
    driven.call("close")
    return interrupted


# -- moving and cycling ---


def attach_and_receive(peer: PeerSide, packed: bytes, count: int) -> list[int]:
    peer.channel = anywire.sync.attach(Handle.unpack(packed, peer.fds))
    return [number_of(peer.channel.recv(timeout=10)) for _ in range(count)]


def attach_listener(peer: PeerSide, packed: bytes) -> list[str]:
    peer.listener = anywire.sync.attach(Handle.unpack(packed, peer.fds))
    return [str(address) for address in peer.listener.addresses]


def connect_and_close(peer: PeerSide, address: str, front: str, count: int, options: dict[str, Any]) -> None:
    """Connections one after another: half close politely after an echo, some just vanish."""
    if front == "blocking":
        for number in range(count):
            channel = anywire.sync.connect(address, **options)
            channel.send(message(number))
            assert number_of(channel.recv(timeout=10)) == number
            channel.abort() if number % 10 == 0 else channel.close()
        return

    async def main() -> None:
        for number in range(count):
            channel = await anywire.connect(address, **options)
            await channel.send(message(number))
            assert number_of(await channel.recv(timeout=10)) == number
            if number % 10 == 0:
                channel.abort()
            else:
                await channel.close()

    on_loop(main())


# -- servers in the front under test ---


def start_limited_server(peer: PeerSide, address: str, front: str, descriptors: int) -> str:
    """An echo server of either front, in a thread, in a process that may open only so many descriptors more."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    started: queue.SimpleQueue[str] = queue.SimpleQueue()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + descriptors, hard))

    def echo_back(channel: Any) -> None:
        for data in channel:
            channel.send(data)

    async def echo_back_async(channel: Any) -> None:
        async for data in channel:
            await channel.send(data)

    async def main() -> None:
        async with anywire.serve(echo_back_async, address) as server:
            limit()
            started.put(str(server.addresses[0]))
            await server.serve_forever()

    def blocking_main() -> None:
        with anywire.sync.serve(echo_back, address) as server:
            limit()
            started.put(str(server.addresses[0]))
            server.serve_forever()

    target = blocking_main if front == "blocking" else lambda: on_loop(main())
    threading.Thread(target=target, daemon=True).start()
    return started.get(timeout=10)


def take_connections(peer: PeerSide, address: str, count: int, options: dict[str, Any]) -> int:
    """Connect as often as the server lets us, at most `count` times; how often. Some connects only fill the backlog."""
    peer.kept["taken"] = []
    for _ in range(count):
        try:
            peer.kept["taken"].append(anywire.sync.connect(address, timeout=1.0, **options))
        except (anywire.AnywireError, OSError):
            break
    return len(peer.kept["taken"])


def drop_connections(peer: PeerSide) -> None:
    for channel in peer.kept.pop("taken"):
        channel.abort()


# -- the process itself ---


def resources(peer: PeerSide | None = None) -> dict[str, int]:
    """What this process holds: descriptors, threads, resident bytes."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # listdir's own
        "threads": threading.active_count(),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
    }


def cpu_seconds(peer: PeerSide | None = None) -> float:
    return time.process_time()


def accept_errors(peer: PeerSide) -> int:
    return counters.snapshot().sum("accept_errors")


def run(peer: PeerSide, function: Callable[..., Any], *args: Any) -> Any:
    """Run any importable function without the peer."""
    return function(*args)
