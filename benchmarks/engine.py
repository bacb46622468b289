"""What do the engine's timers, triggers and budgets do?

Four questions, on the bare engine:

- timers: adding, cancelling and popping 100 000, beside heapq of tuples (as asyncio has them) with marks for what
  was cancelled.
- wakes: four threads watch one listener, each by an epoll of its own, and clients come one by one: how many threads
  does a client wake: level-triggered, edge-triggered, exclusive? The second figure is how many of them found nothing.
- wakeups: how long from another thread's `wake` to the return of `wait` and back, for each kind; and how many writes
  a flood of wakes costs.
- fairness: a server with 100 quiet connections answers a ping in how long, alone, beside one that floods it, and beside
  one that floods it when a handler reads on as long as there is something (no budget for a turn)?
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

from anywire.cli.measure import turns
from anywire.engine import BufferedConnection, Condition, Reactor, TimerQueue, Trigger, Wakeup
from anywire.engine.demultiplexers import by_name, default
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Child, Report, options

TIMERS = 100_000
THREADS = 4
QUIET = 100


def ours_timers(deadlines: list[float]) -> dict[str, float]:
    queue = TimerQueue()
    before = time.perf_counter()
    entries = [queue.add(deadline, None) for deadline in deadlines]
    added = time.perf_counter()
    for entry in entries[::2]:
        entry.cancel()
    cancelled = time.perf_counter()
    assert len(queue.due(2.0)) == TIMERS // 2
    return figures(before, added, cancelled)


def heapq_timers(deadlines: list[float]) -> dict[str, float]:
    heap: list[tuple[float, int, list[bool]]] = []
    before = time.perf_counter()
    entries = []
    for number, deadline in enumerate(deadlines):
        entry = (deadline, number, [False])
        heapq.heappush(heap, entry)
        entries.append(entry)
    added = time.perf_counter()
    for entry in entries[::2]:
        entry[2][0] = True
    cancelled = time.perf_counter()
    popped = 0
    while heap:
        popped += not heapq.heappop(heap)[2][0]
    assert popped == TIMERS // 2
    return figures(before, added, cancelled)


def figures(before: float, added: float, cancelled: float) -> dict[str, float]:
    ended = time.perf_counter()
    return {
        "rate": TIMERS / (ended - before),
        "add_ns": (added - before) / TIMERS * 1e9,
        "cancel_ns": (cancelled - added) / TIMERS * 2e9,
        "pop_ns": (ended - cancelled) / TIMERS * 2e9,
    }


def woken(trigger: Trigger, clients: int = 200) -> dict[str, float]:
    """How many threads one client wakes."""
    waits, nothing = [0] * THREADS, [0] * THREADS
    accepted = threading.Semaphore(0)
    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        def accept(mine: int) -> None:
            with by_name("epoll") as epoll, wakeups[mine]:
                epoll.add(listener, Condition.READ, trigger)
                epoll.add(wakeups[mine], Condition.READ)
                while not ending.is_set():
                    epoll.wait()
                    if ending.is_set():
                        break
                    waits[mine] += 1
                    try:
                        listener.accept()[0].close()
                    except BlockingIOError:
                        nothing[mine] += 1
                    else:
                        accepted.release()

        wakeups = [Wakeup() for _ in range(THREADS)]
        threads = [threading.Thread(target=accept, args=(mine,)) for mine in range(THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        for _ in range(clients):
            socket.create_connection(listener.getsockname()).close()
            accepted.acquire()
            time.sleep(0.0005)  # all that were woken have looked
        ending.set()
        for wakeup in wakeups:
            wakeup.wake()
        for thread in threads:
            thread.join()
    return {"woken": sum(waits) / clients, "for_nothing": sum(nothing) / clients}


def round_trip(kind: str, seconds: float) -> dict[str, float]:
    """Two threads that wake each other; then a flood from one."""
    ends = Wakeup(kind), Wakeup(kind)
    stopping = threading.Event()

    def answer() -> None:
        with default() as waiting:
            waiting.add(ends[0], Condition.READ)
            while not stopping.is_set():
                waiting.wait()
                ends[0].drain()
                ends[1].wake()

    thread = threading.Thread(target=answer)
    thread.start()
    count, deadline = 0, time.perf_counter() + seconds
    with default() as waiting:
        waiting.add(ends[1], Condition.READ)
        before = time.perf_counter()
        while time.perf_counter() < deadline:
            ends[0].wake()
            waiting.wait()
            ends[1].drain()
            count += 1
        took = time.perf_counter() - before
    stopping.set()
    ends[0].wake()
    thread.join()
    writes = ends[0].writes
    for _ in range(1000):
        ends[0].wake()
    found = {"round_trip_us": took / count * 1e6, "writes_of_1000": float(ends[0].writes - writes)}
    for end in ends:
        end.close()
    return found


def quiet(fds: list[int]) -> None:
    """A child: pings the connections in rotation, one at a time, for as long as it is told."""
    ends = [socket.socket(fileno=fd) for fd in fds]
    print("READY", flush=True)
    for line in sys.stdin:
        took: list[float] = []
        deadline = time.perf_counter() + float(line)
        while time.perf_counter() < deadline:
            end = ends[len(took) % len(ends)]
            before = time.perf_counter()
            end.sendall(b"ping")
            end.recv(100)
            took.append(time.perf_counter() - before)
        took.sort()
        print(json.dumps({"p50_us": statistics.median(took) * 1e6, "p99_us": took[len(took) * 99 // 100] * 1e6,
                          "most_us": took[-1] * 1e6}), flush=True)  # fmt: skip


def flood(fds: list[int]) -> None:
    """A child: writes for ever."""
    end, data = socket.socket(fileno=fds[0]), bytes(1 << 18)
    print("READY", flush=True)
    try:
        while True:
            end.sendall(data)
    except OSError:
        pass


def answered(flooded: bool, budget: bool, seconds: float) -> dict[str, float]:
    """How long a quiet connection waits for its answer."""
    pairs = [socket.socketpair() for _ in range(QUIET)]
    flooding, sink = socket.socketpair()
    fds = [theirs.fileno() for _, theirs in pairs]
    found: dict[str, float] = {}
    with (
        Reactor() as reactor,
        Child(CLIENT_CORE, *command("quiet", fds), fds=fds) as pinging,
        Child(CLIENT_CORE, *command("flood", [flooding.fileno()]), fds=[flooding.fileno()]) as pouring,
    ):
        flooding.close()
        pinging.line()
        pouring.line()
        for _, theirs in pairs:
            theirs.close()
        connections = [BufferedConnection(reactor, ours, on_data=lambda c: c.write(c.input)) for ours, _ in pairs]
        total = [0]

        def swallow(c: BufferedConnection) -> None:
            while True:
                total[0] += len(c.input)
                c.input.skip(len(c.input))
                if budget or not c.input.fill(sink.fileno()):
                    break

        if flooded:
            connections.append(BufferedConnection(reactor, sink, on_data=swallow))

        def ask() -> None:
            pinging.tell(str(seconds))
            found.update(json.loads(pinging.line()))
            reactor.post(reactor.stop)

        asking = threading.Thread(target=ask)
        asking.start()
        reactor.run()
        asking.join()
        found["flood_mib_s"] = total[0] / seconds / (1 << 20)
        for each in connections:
            each.close()
        sink.close()
    return found


def command(name: str, fds: list[int]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.engine", "--serve", f"{name}:{','.join(map(str, fds))}"]


def main() -> None:
    arguments: argparse.Namespace = options(__doc__, rounds=5, seconds=0.5).parse_args()
    if arguments.serve:
        name, _, fds = arguments.serve.partition(":")
        {"quiet": quiet, "flood": flood}[name]([int(fd) for fd in fds.split(",")])
        return
    os.sched_setaffinity(0, {SERVER_CORE})
    report = Report("engine: timers, triggers, wakeups, fairness", ("anywire",))
    report.begin()
    deadlines = [random.random() for _ in range(TIMERS)]
    cells: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        "timers": {"anywire": lambda: ours_timers(deadlines), "heapq": lambda: heapq_timers(deadlines)},
        "wakes": {
            "level": lambda: woken(Trigger.LEVEL),
            "edge": lambda: woken(Trigger.EDGE),
            "exclusive": lambda: woken(Trigger.EXCLUSIVE),
        },
        "wakeups": {
            kind: lambda kind=kind: round_trip(kind, arguments.seconds / 4)
            for kind in ("eventfd", "socketpair", "pipe", "loopback")
        },
        "fairness": {
            "alone": lambda: answered(False, True, arguments.seconds),
            "beside a flood": lambda: answered(True, True, arguments.seconds),
            "no budget": lambda: answered(True, False, arguments.seconds),
        },
    }
    for number in range(arguments.rounds):
        for cell, contenders in cells.items():
            # Threads that are to be woken run on all CPUs, the rest on the server's.
            os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE} if cell in ("wakes", "wakeups") else {SERVER_CORE})
            for name in turns(list(contenders), number):
                report.results.add(cell, name, contenders[name]())
    report.rates("timers", "heapq", "rate", ("add_ns", "cancel_ns", "pop_ns"))
    report.rates("wakes", "level", "woken", ("for_nothing",), unit="threads a client")
    report.rates("wakeups", "eventfd", "round_trip_us", ("writes_of_1000",), unit="")
    report.rates("fairness", "alone", "p50_us", ("p99_us", "most_us", "flood_mib_s"), unit="")
    median = report.results.median
    timers = report.results.ratio("timers", "anywire", "heapq", "rate")
    report.claim("timers: add 100 000, cancel half, pop half, of heapq", timers, 1)
    exclusive, writes = median("wakes", "exclusive", "woken"), median("wakeups", "eventfd", "writes_of_1000")
    report.claim("threads that a client of an exclusive listener wakes", exclusive, 1.1, "threads", at_most=True)
    report.claim("writes of 1000 wakes", writes, 1, "writes", at_most=True)
    # Both clients share a CPU, so what the scheduler adds to the slowest answers is in all of them but those alone.
    slower = report.results.ratio("fairness", "beside a flood", "alone", "p50_us")
    report.claim("a quiet connection's answer beside a flood, of alone", slower, 2, at_most=True)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
