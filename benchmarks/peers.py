"""Two processes that talk through shared memory, and the peers beside them: what `aio_ipc` and `shm_blocking` compare.

The openers that `anywire bench` has too are `anywire.cli.contenders`'; here are those that only these two benchmarks
need, and their phases. Run as a program (`python -m benchmarks.peers NAME ROLE CORE ADDRESS`) it is one side of one of
PEERS; `Duo` starts both. Messages are looked at before the clock runs where the clock is for passing them in place.

phases   echo   the client sends `depth` messages, then one more for each that comes back, `count` in all
         flow   the client sends `count` messages, the server takes them
         pause  an echo after each millisecond of sleep; the time is that of the median trip, without the sleep
         idle   the client sleeps for `pause` seconds, with the server in its receive, then one echo
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anywire.cli import contenders as known
from anywire.cli.calls import calls_more, strace
from anywire.cli.contenders import Announce, AsyncCalls, AsyncSide, Bytes, Calls, Contender, Side, payload, say
from anywire.cli.pair import PATIENCE, Pair
from benchmarks import loops
from benchmarks.harness import CLIENT_CORE, SERVER_CORE

REST = 0.001                            # seconds of sleep before each trip of the phase `pause`


@dataclass(frozen=True)
class Peer(Contender):
    """A contender; `loop` is one of `loops.LOOPS`, made with `loop_options`."""

    loop: str = "asyncio"
    loop_options: Mapping[str, Any] = field(default_factory=dict)


SHM, UNIX, SOCKET = "shm://{name}", "unix://{directory}/s", "{directory}/s"
SPIN = SHM + "?waiting=spin"
ZMQ = {"address": "ipc://{directory}/zmq", "module": "zmq", "needs": "pyzmq"}
PEERS = (
    Peer("anywire shm", "asyncio", "anywire", SHM),
    Peer("anywire shm, spin_us=50", "asyncio", "anywire", SHM + "?spin_us=50"),
    Peer("anywire shm, busy_poll", "asyncio", "anywire", SHM, loop="anywire", loop_options={"busy_poll": 1000}),
    Peer("anywire unix", "asyncio", "anywire", UNIX),
    Peer("pyzmq asyncio", "asyncio", "zmq", **ZMQ),
    Peer("asyncio streams", "asyncio", "lean_streams", SOCKET),
    Peer("uvloop streams", "asyncio", "lean_streams", SOCKET, module="uvloop", needs="uvloop", loop="uvloop"),
    Peer("anywire shm, spin", "blocking", "anywire", SPIN),
    Peer("anywire shm, spin, recv_into", "blocking", "anywire_into", SPIN),
    Peer("anywire shm, spin, many", "blocking", "anywire_many", SPIN, batched=True, phases=("flow",)),
    Peer("anywire shm, spin, loans", "blocking", "anywire_loan", SPIN),
    Peer("anywire shm, adaptive", "blocking", "anywire", SHM),
    Peer("anywire shm, sleep", "blocking", "anywire", SHM + "?waiting=sleep"),
    Peer("anywire unix", "blocking", "anywire", UNIX),
    Peer("iceoryx2, spin", "blocking", "iceoryx2", "{name}", module="iceoryx2", needs="iceoryx2"),
    Peer("iceoryx2, spin, in place", "blocking", "iceoryx2_in_place", "{name}", module="iceoryx2", needs="iceoryx2"),
    Peer("multiprocessing.Pipe", "blocking", "mp_pipe", inherits="socketpair"),
    Peer("bare socket pair", "blocking", "socketpair", inherits="socketpair"),
    Peer("pyzmq", "blocking", "zmq", **ZMQ),
)


def peer(name: str, front: str) -> Peer:
    return next(one for one in PEERS if (one.name, one.front) == (name, front))


class Duo(Pair):
    """The two processes of a peer, pinned as all benchmarks pin theirs."""

    program = "benchmarks.peers"

    def __init__(self, peer: Peer, wrap: Sequence[str] = ()) -> None:
        super().__init__(peer, SERVER_CORE, CLIENT_CORE, wrap)

    def trips(self, size: int, count: int) -> dict[str, float]:
        """Echoes after a rest: how many would fit into a second, the median one's µs, both sides' CPU µs for one."""
        server, client = self.order(phase="pause", size=size, count=count)
        spent = (server["cpu"] + client["cpu"]) / count / 1e3
        return {"rate": 1e9 / client["trip"], "trip_us": client["trip"] / 1e3, "cpu_us": spent}

    def idle(self, seconds: float) -> float:
        """CPU seconds that both sides take to wait for so long."""
        server, client = self.order(phase="idle", size=64, count=1, pause=seconds)
        spent: float = (server["cpu"] + client["cpu"]) / 1e9
        return spent

    def order(self, **order: Any) -> list[dict[str, Any]]:
        self.server.tell(order)
        self.client.tell(order)
        return self.answers(PATIENCE)


def calls_per_message(one: Peer, size: int, depth: int, count: int) -> tuple[float | None, str]:
    """System calls of both processes for one message that is echoed, and how they were counted (or why not).

    perf counts without slowing anybody; under strace processes sleep more often than otherwise.
    """

    def work(duo: Duo, messages: int) -> None:
        duo.phase("echo", size, messages, depth=depth)

    if _perf():
        few, many = (_counted(one, lambda duo, n=n: work(duo, n)) for n in (count, 11 * count))
        return (many - few) / (10 * count), "perf stat -e raw_syscalls:sys_enter"
    if strace():
        added = calls_more(lambda wrap: Duo(one, wrap), work, count, 11 * count)
        return sum(added.values()), "strace -f -c"
    return None, "neither perf (as root) nor strace is here"


PERF = ["perf", "stat", "-x,", "-e", "raw_syscalls:sys_enter"]


def _perf() -> bool:
    if shutil.which("perf") is None:
        return False
    return subprocess.run([*PERF, "true"], capture_output=True, check=False).returncode == 0


def _counted(one: Peer, work: Callable[[Duo], None]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        # One file a process; `exec`, so that signals reach perf.
        wrap = ["sh", "-c", f'exec {" ".join(PERF)} -o "{directory}/$$" "$@"', "perf"]
        with Duo(one, wrap) as duo:
            work(duo)
        lines = [line for file in Path(directory).iterdir() for line in file.read_text().splitlines()]
    return sum(int(line.partition(",")[0]) for line in lines if "raw_syscalls" in line)


# ---- openers that only these benchmarks need


def open_loan(role: str, address: str, announce: Announce, stack: ExitStack) -> Side:
    """In place: nobody writes or reads the message while the clock runs, as with iceoryx2 below."""
    channel = known.anywire_channel(role, address, announce, stack)
    send, recv, loan = channel.send, channel.recv, channel.loan

    def side(size: int) -> Calls:
        message = payload(size)
        for turn in ("client", "server"):
            if role == turn:
                first = loan(size)
                with memoryview(first) as memory:
                    memory[:] = message
                send(first)
            else:
                with recv(copy=False) as got:
                    if bytes(got) != message:
                        raise SystemExit("the message in place is not what was sent")

        def send_loan(message: object) -> None:
            send(loan(size))

        def recv_in_place() -> bytes:
            recv(copy=False).release()
            return message

        return send_loan, recv_in_place

    return side


def open_iceoryx2(
    role: str, address: str, announce: Announce, stack: ExitStack, in_place: bool = False
) -> Side:
    """A service each way and for each size; both sides look for the next sample in a loop.

    The receiver looks at the sample where it lies. The sender copies its message there; `in_place`: leaves it as it is.
    """
    iox = importlib.import_module("iceoryx2")
    iox.set_log_level(iox.LogLevel.Error)
    node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
    if role == "server":
        announce(address)
    sides: dict[int, Calls] = {}

    def service(size: int, to: str) -> Any:
        name = iox.ServiceName.new(f"{address}/{size}/{to}")
        builder = node.service_builder(name).publish_subscribe(iox.Slice[ctypes.c_uint8])
        return builder.enable_safe_overflow(False).subscriber_max_buffer_size(depth_for(size)).open_or_create()

    def side(size: int) -> Calls:
        if size not in sides:
            mine, other = service(size, role), service(size, "client" if role == "server" else "server")
            publisher = mine.publisher_builder().initial_max_slice_len(size)
            publisher = publisher.backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered).create()
            subscriber = other.subscriber_builder().create()
            while not (mine.dynamic_config.number_of_subscribers and other.dynamic_config.number_of_publishers):
                time.sleep(0.001)       # the other side is about to make its own
            sides[size] = _iceoryx2(publisher, subscriber, size, in_place)
            stack.callback(sides.clear)
        return sides[size]

    return side


def _iceoryx2(publisher: Any, subscriber: Any, size: int, in_place: bool) -> Calls:
    loan, receive, message, copy = publisher.loan_slice_uninit, subscriber.receive, payload(size), ctypes.memmove

    def send(message: bytes) -> None:
        sample = loan(size)
        copy(sample.payload_ptr, message, size)
        sample.assume_init().send()

    def send_in_place(message: object) -> None:
        loan(size).assume_init().send()

    def recv() -> bytes:
        while receive() is None:
            pass
        return message

    return send_in_place if in_place else send, recv


def depth_for(size: int) -> int:
    """Messages under way in 8 MiB, 2 at least, as in native/shm_ring.c."""
    return max(2, min(64, (8 << 20) // size))


known.BLOCKING |= {
    "anywire_loan": open_loan,
    "iceoryx2": open_iceoryx2,
    "iceoryx2_in_place": functools.partial(open_iceoryx2, in_place=True),
}
# An echo bounds what is under way by itself.
known.ASYNCIO["lean_streams"] = functools.partial(known.open_streams, drain=False)


# ---- the phases


def blocking_phase(role: str, calls: Calls, message: bytes, order: dict[str, Any]) -> tuple[Bytes, dict[str, Any]]:
    phase, count = order["phase"], order["count"]
    if phase in ("echo", "flow"):
        return known.blocking_phase(role, phase, calls, message, count), {}
    if role == "server":
        return known.blocking_phase(role, "echo", calls, message, count), {}
    send, recv = calls
    trips = []
    for _ in range(count):
        time.sleep(order.get("pause", REST))
        began = time.perf_counter_ns()
        send(message)
        last: Bytes = recv()
        trips.append(time.perf_counter_ns() - began)
    return last, {"trip": statistics.median(trips)}


async def asyncio_phase(
    role: str, calls: AsyncCalls, message: bytes, order: dict[str, Any]
) -> tuple[Bytes, dict[str, Any]]:
    send, recv = calls
    count, depth = order["count"], order.get("depth", 1)
    last: Bytes = message
    if role == "server" and order["phase"] != "flow":
        for _ in range(count):
            last = await recv()
            await send(last)
    elif order["phase"] == "echo":
        depth = min(depth, count)
        for _ in range(depth):
            await send(message)
        for _ in range(count - depth):
            last = await recv()
            await send(message)
        for _ in range(depth):
            last = await recv()
    elif order["phase"] == "idle":
        await asyncio.sleep(order["pause"])
        await send(message)
        last = await recv()
    else:
        last = await known.asyncio_phase(role, "flow", calls, message, count)
    return last, {}


def meet(role: str, calls: Calls, message: Any) -> None:
    """One echo, so that both sides' clocks start when both are ready: making 16 MiB takes a while."""
    send, recv = calls
    if role == "client":
        send(message)
    recv()
    if role == "server":
        send(message)


async def meet_async(role: str, calls: AsyncCalls, message: bytes) -> None:
    send, recv = calls
    if role == "client":
        await send(message)
    await recv()
    if role == "server":
        await send(message)


def answer(began: int, cpu: int, last: Bytes, message: bytes, more: dict[str, Any]) -> None:
    ended, spent = time.monotonic_ns(), time.process_time_ns() - cpu
    if last != message:
        raise SystemExit("the last message is not what was sent")
    say({"began": began, "ended": ended, "cpu": spent, **more})


def run_blocking(one: Peer, role: str, address: str) -> None:
    with ExitStack() as stack:
        side: Side = known.BLOCKING[one.opener](role, address, known.announce, stack)
        if role == "client" and one.inherits != "socketpair":
            known.announce(address)
        while line := sys.stdin.readline():
            order = json.loads(line)
            message, calls = payload(order["size"]), side(order["size"])
            meet(role, calls, [message] if one.batched else message)
            cpu, began = time.process_time_ns(), time.monotonic_ns()
            if one.batched:
                last, more = known.blocking_batches(role, calls, message, order["count"]), {}
            else:
                last, more = blocking_phase(role, calls, message, order)
            answer(began, cpu, last, message, more)
            del last, message, calls    # 32 MiB perhaps, which must not be given back while the clock runs again


async def run_asyncio(one: Peer, role: str, address: str) -> None:
    opener: Callable[[str, str, Announce, AsyncExitStack], Awaitable[AsyncSide]] = known.ASYNCIO[one.opener]
    async with AsyncExitStack() as stack:
        side = await opener(role, address, known.announce, stack)
        if role == "client":
            known.announce(address)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            message, calls = payload(order["size"]), side(order["size"])
            await meet_async(role, calls, message)
            cpu, began = time.process_time_ns(), time.monotonic_ns()
            last, more = await asyncio_phase(role, calls, message, order)
            answer(began, cpu, last, message, more)
            del last, message, calls


def main() -> None:
    name, role, core, address = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    one = next(one for one in PEERS if known.key(one) == name)
    if one.front == "blocking":
        run_blocking(one, role, address)
    else:
        loops.run(one.loop, run_asyncio(one, role, address), **one.loop_options)


if __name__ == "__main__":
    main()
