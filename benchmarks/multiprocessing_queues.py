"""How fast are anywire.multiprocessing's queues and pipes? Beside the standard library's, and faster-fifo.

Producers are forked, one or four; this process consumes. A message is a number and some bytes in a tuple, so all
pickle it; "array" is a buffer of pickle's protocol 5, as NumPy's arrays are. One way: messages per second, from the
start of the producers to the last message. There and back: through a pair of pipes' ends or queues, one message at a
time. With one producer both processes are pinned to CPUs of their own.

To be shown: Queue at least 3 x the standard one at 1 KiB, and not slower than faster-fifo with one producer; Pipe
faster than the standard one, both ways.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

from anywire import multiprocessing as ours
from anywire.cli.measure import size_name, turns
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Report, options

try:
    import faster_fifo
except ImportError:
    faster_fifo = None

SIZES = (64, 1 << 10, 1 << 20)
# How many messages of a size one second of measurement takes; a guess that only sets how long it lasts.
PER_SECOND = {64: 250_000, 1 << 10: 200_000, 1 << 20: 1_500}
OURS, STANDARD, FIFO = "anywire", "multiprocessing", "faster-fifo"
PRODUCERS = (1, 4)


class Array:
    """Pickled as a NumPy array is: its memory goes beside the pickle where that is possible."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: int) -> Any:
        return Array, (pickle.PickleBuffer(self.data) if protocol >= 5 else bytes(self.data),)


def fork(work: Callable[[], None], core: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        gc.freeze()
        if core is not None:
            os.sched_setaffinity(0, {core})
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def one_way(get: Callable[[], Any], put: Callable[[Any], Any], message: Any, producers: int, count: int,
            finish: Callable[[], None]) -> float:
    """Messages per second from producers to this process."""
    share = count // producers
    waiting, go = os.pipe()

    def produce() -> None:
        os.close(go)
        os.read(waiting, 1)                     # its end is the start
        for _ in range(share):
            put(message)
        finish()

    children = [fork(produce, SERVER_CORE if producers == 1 else None) for _ in range(producers)]
    os.close(waiting)
    start = time.perf_counter()
    os.close(go)
    try:
        for _ in range(share * producers):
            get()
        seconds = time.perf_counter() - start
    except BaseException:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        for pid in children:
            os.waitpid(pid, 0)
    return share * producers / seconds


def there_and_back(get: Callable[[], Any], put: Callable[[Any], Any], echo: Callable[[int], None], message: Any,
                   count: int) -> float:
    pid = fork(lambda: echo(count), SERVER_CORE)
    start = time.perf_counter()
    try:
        for _ in range(count):
            put(message)
            get()
        return count / (time.perf_counter() - start)
    finally:
        os.waitpid(pid, 0)


def queue_of(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any], Callable[[], None]]:
    """A queue's get and put, and what a producer does at its end."""
    if name == FIFO:
        fifo = faster_fifo.Queue(max_size_bytes=8 << 20)
        return functools.partial(fifo.get, timeout=60), functools.partial(fifo.put, timeout=60), lambda: None
    q: Any = (ours if name == OURS else multiprocessing).Queue()

    def finish() -> None:
        q.close()
        q.join_thread()

    return q.get, q.put, finish


def measure(name: str, kind: str, size: int, producers: int, count: int) -> float:
    data = os.urandom(size)
    message: Any = Array(bytearray(data)) if kind == "array" else (1, data)
    if kind in ("queue", "array"):
        get, put, finish = queue_of(name)
        return one_way(get, put, message, producers, count, finish)
    module = ours if name == OURS else multiprocessing
    if kind == "pipe":
        receiver, sender = module.Pipe(duplex=False)
        with receiver, sender:
            return one_way(receiver.recv, sender.send, message, producers, count, lambda: None)
    if kind == "pipe there and back":
        near, far = module.Pipe()

        def echo(number: int) -> None:
            for _ in range(number):
                far.send(far.recv())

        with near, far:
            return there_and_back(near.recv, near.send, echo, message, count)
    _, put, _ = first = queue_of(name)
    get, back, _ = queue_of(name)

    def answer(number: int) -> None:
        take = first[0]
        for _ in range(number):
            back(take())
        if name == STANDARD:
            back.__self__.close()  # type: ignore[attr-defined]
            back.__self__.join_thread()  # type: ignore[attr-defined]

    return there_and_back(get, put, answer, message, count)


def cells() -> list[tuple[str, str, int, int]]:
    """(title, kind, size, producers) of all there is to measure."""
    found = []
    for size in SIZES:
        for producers in PRODUCERS:
            plural = "s" if producers > 1 else ""
            found.append((f"queue {size_name(size)} {producers} producer{plural}", "queue", size, producers))
        found.append((f"pipe {size_name(size)} one way", "pipe", size, 1))
    found.append(("queue 1 MiB array 1 producer", "array", 1 << 20, 1))
    for size in (64, 1 << 10):
        found.append((f"pipe {size_name(size)} there and back", "pipe there and back", size, 1))
        found.append((f"queue {size_name(size)} there and back", "queue there and back", size, 1))
    return found


def main() -> None:
    parser = options(__doc__, rounds=7, seconds=0.4)
    arguments = parser.parse_args()
    report = Report("multiprocessing_queues: one host, forked producers, pickled messages", ("anywire", "faster-fifo"))
    report.begin()
    queues = [OURS, STANDARD] + ([FIFO] if faster_fifo is not None else [])
    if faster_fifo is None:
        report.note("faster-fifo is not installed, so not compared")
    os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
    for title, kind, size, producers in cells():
        names = [OURS, STANDARD] if kind.startswith("pipe") else queues
        back = kind.endswith("back")
        count = max(20, int(PER_SECOND[size] * arguments.seconds / (8 if back else 1)))
        for number in range(arguments.rounds):
            for name in turns(names, number):
                if producers == 1:
                    os.sched_setaffinity(0, {CLIENT_CORE})
                # The standard ones take several times as long for as many.
                some = count // 4 if name == STANDARD else count
                report.results.add(title, name, {"rate": measure(name, kind, size, producers, max(some, 20))})
                os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
        report.rates(title, STANDARD, "rate")
    results = report.results
    for producers in ("1 producer", "4 producers"):
        cell = f"queue 1 KiB {producers}"
        report.claim(f"{cell}, of multiprocessing.Queue", results.ratio(cell, OURS, STANDARD, "rate"), 3.0)
    if FIFO in queues:
        for size in SIZES:
            cell = f"queue {size_name(size)} 1 producer"
            report.claim(f"{cell}, of faster-fifo", results.ratio(cell, OURS, FIFO, "rate"), 1.0)
    for size in SIZES:
        cell = f"pipe {size_name(size)} one way"
        report.claim(f"{cell}, of multiprocessing.Pipe", results.ratio(cell, OURS, STANDARD, "rate"), 1.0)
    for size in (64, 1 << 10):
        cell = f"pipe {size_name(size)} there and back"
        report.claim(f"{cell}, of multiprocessing.Pipe", results.ratio(cell, OURS, STANDARD, "rate"), 1.0)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
