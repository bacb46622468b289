"""What do the parts of an event loop cost? Operations a second, one process a loop and round, on all loops in one run.

    call_soon chain     a callback that schedules the next one: one callback a turn
    call_soon batch     many callbacks in one turn
    call_later          timers in random order, every other one cancelled, the rest waited for
    time-outs           a timer set and cancelled at once, 30 s ahead: what every `wait_for` does
    create_task         a task that does nothing, awaited
    sleep(0)            one task giving way
    thread-safe         a thread on the other CPU: call_soon_threadsafe, then wait for the callback
    thread-safe, 1 CPU  the same on one CPU
    thread-safe flood   a thread on the other CPU schedules as fast as it can
    flood, 1 CPU        the same on one CPU
    sock_recv           64 B there and back between two tasks of the loop, by sock_recv and sock_sendall
    add_reader          64 B there and back between two descriptors' readers

To be shown for anywire's loop: each at least as fast as rloop, and 2 × uvloop for call_soon, timers and the flood.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from anywire.cli.measure import turns
from benchmarks import loops
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Child, Report, options

CLOCK = time.perf_counter
Measure = Callable[[float], Awaitable[float]]
TWICE_UVLOOP = ("call_soon chain", "call_soon batch", "call_later", "time-outs", "thread-safe flood", "flood, 1 CPU")
# Operations of one measurement at --seconds 0.1, as asyncio takes about that long for them.
COUNTS = {
    "call_soon chain": 60_000,
    "call_soon batch": 100_000,
    "call_later": 20_000,
    "time-outs": 60_000,
    "create_task": 20_000,
    "sleep(0)": 30_000,
    "thread-safe": 2_000,
    "thread-safe, 1 CPU": 2_000,
    "thread-safe flood": 50_000,
    "flood, 1 CPU": 50_000,
    "sock_recv": 3_000,
    "add_reader": 5_000,
}


async def call_soon_chain(count: int) -> float:
    loop = asyncio.get_running_loop()
    done, left = loop.create_future(), count

    def step() -> None:
        nonlocal left
        left -= 1
        if left:
            loop.call_soon(step)
        else:
            done.set_result(None)

    start = CLOCK()
    loop.call_soon(step)
    await done
    return CLOCK() - start


def nothing() -> None:
    pass


async def call_soon_batch(count: int) -> float:
    loop = asyncio.get_running_loop()
    done, call_soon = loop.create_future(), loop.call_soon
    start = CLOCK()
    for _ in range(count - 1):
        call_soon(nothing)
    call_soon(done.set_result, None)
    await done
    return CLOCK() - start


async def call_later(count: int) -> float:
    loop = asyncio.get_running_loop()
    done, left, chance = loop.create_future(), count - count // 2, random.Random(7)
    delays = [chance.random() / 200 for _ in range(count)]

    def fired() -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set_result(None)

    start = CLOCK()
    handles = [loop.call_later(delay, fired) for delay in delays]
    for handle in handles[1::2]:
        handle.cancel()
    await done
    return CLOCK() - start


async def time_outs(count: int) -> float:
    loop = asyncio.get_running_loop()
    start = CLOCK()
    for _ in range(count):
        loop.call_later(30.0, nothing).cancel()
    return CLOCK() - start


async def create_task(count: int) -> float:
    async def no_work() -> None:
        pass

    loop = asyncio.get_running_loop()
    start = CLOCK()
    for _ in range(count):
        await loop.create_task(no_work())
    return CLOCK() - start


async def sleep_zero(count: int) -> float:
    start = CLOCK()
    for _ in range(count):
        await asyncio.sleep(0)
    return CLOCK() - start


async def in_thread(work: Callable[[Callable[[], None]], None], core: int) -> float:
    """Run `work(finish)` in a thread on this CPU; the time until `finish` has been heard here."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        os.sched_setaffinity(0, {core})
        ready.wait()
        work(lambda: done.set_result(None))

    ready = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.sleep(0.005)              # it has moved to its CPU
    start = CLOCK()
    ready.set()
    await done
    took = CLOCK() - start
    thread.join()
    return took


async def thread_safe(count: int, core: int = CLIENT_CORE) -> float:
    loop, heard = asyncio.get_running_loop(), threading.Semaphore(0)

    def work(finish: Callable[[], None]) -> None:
        for _ in range(count - 1):
            loop.call_soon_threadsafe(heard.release)
            heard.acquire()
        loop.call_soon_threadsafe(finish)

    return await in_thread(work, core)


async def thread_safe_one_cpu(count: int) -> float:
    return await thread_safe(count, SERVER_CORE)


async def flood(count: int, core: int = CLIENT_CORE) -> float:
    loop = asyncio.get_running_loop()

    def work(finish: Callable[[], None]) -> None:
        for _ in range(count - 1):
            loop.call_soon_threadsafe(nothing)
        loop.call_soon_threadsafe(finish)

    return await in_thread(work, core)


async def flood_one_cpu(count: int) -> float:
    return await flood(count, SERVER_CORE)


def two_sockets() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
    return pair


async def sock_recv(count: int) -> float:
    loop = asyncio.get_running_loop()
    here, there = two_sockets()
    message = os.urandom(64)

    async def peer() -> None:
        for _ in range(count):
            await loop.sock_sendall(there, await loop.sock_recv(there, 64))

    task = loop.create_task(peer())
    start = CLOCK()
    for _ in range(count):
        await loop.sock_sendall(here, message)
        data = await loop.sock_recv(here, 64)
    took = CLOCK() - start
    await task
    if data != message:
        raise SystemExit("not what was sent")
    here.close()
    there.close()
    return took


async def add_reader(count: int) -> float:
    loop = asyncio.get_running_loop()
    here, there = two_sockets()
    done, left, message = loop.create_future(), count, os.urandom(64)

    def answer() -> None:
        there.send(there.recv(64))

    def heard() -> None:
        nonlocal left
        data = here.recv(64)
        left -= 1
        if left:
            here.send(data)
        else:
            done.set_result(data)

    loop.add_reader(here.fileno(), heard)
    loop.add_reader(there.fileno(), answer)
    start = CLOCK()
    here.send(message)
    last = await done
    took = CLOCK() - start
    if last != message:
        raise SystemExit("not what was sent")
    for end in (here, there):
        loop.remove_reader(end.fileno())
        end.close()
    return took


PARTS: dict[str, Callable[[int], Awaitable[float]]] = {
    "call_soon chain": call_soon_chain,
    "call_soon batch": call_soon_batch,
    "call_later": call_later,
    "time-outs": time_outs,
    "create_task": create_task,
    "sleep(0)": sleep_zero,
    "thread-safe": thread_safe,
    "thread-safe, 1 CPU": thread_safe_one_cpu,
    "thread-safe flood": flood,
    "flood, 1 CPU": flood_one_cpu,
    "sock_recv": sock_recv,
    "add_reader": add_reader,
}


async def measure(seconds: float) -> None:
    """Each part once, after a short one that warms up; prints a JSON object of operations a second, or the error."""
    figures: dict[str, Any] = {}
    for name, part in PARTS.items():
        count = max(10, int(COUNTS[name] * seconds / 0.1))
        try:
            await asyncio.wait_for(part(count // 10), 30)
            figures[name] = count / await asyncio.wait_for(part(count), 60)
        except Exception as error:
            figures[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(figures), flush=True)


def main() -> None:
    arguments = options(__doc__, rounds=7, seconds=0.1).parse_args()
    if arguments.serve:
        # Not before: the harness asks which CPUs there are.
        os.sched_setaffinity(0, {SERVER_CORE})
        loops.run(arguments.serve, measure(arguments.seconds))
        return
    report = Report("loop_micro: the parts of an event loop", loops.PACKAGES)
    report.begin()
    here = loops.installed(report)
    command = (sys.executable, "-m", "benchmarks.loop_micro", "--seconds", str(arguments.seconds), "--serve")
    for number in range(arguments.rounds):
        for name in turns(here, number):
            with Child(None, *command, name) as child:
                try:
                    figures = json.loads(child.line(120))
                except RuntimeError as error:
                    figures = dict.fromkeys(PARTS, str(error))
            for part, rate in figures.items():
                report.results.add(part, name, rate if isinstance(rate, str) else {"rate": rate})
    for part in PARTS:
        report.rates(part, "asyncio", "rate")
    if "anywire" in here:
        for part in PARTS:
            report.claim(f"{part}, of rloop", report.results.ratio(part, "anywire", "rloop", "rate"), 1.0)
            if part in TWICE_UVLOOP:
                report.claim(f"{part}, of uvloop", report.results.ratio(part, "anywire", "uvloop", "rate"), 2.0)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
