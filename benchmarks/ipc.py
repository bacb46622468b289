"""How fast are the operating system's own primitives? Each beside posix_ipc or sysv_ipc, in the same run.

Two processes take turns through a pair of objects; the other side is forked. On two CPUs most of a round trip is waking
the other one, which on virtual machines differs by a half from one second to the next; on one CPU it is the calls and
the switch between processes. A section for each primitive: `--only NAME` measures one.

To be shown: a round trip of 64 B through message queues no slower than posix_ipc's, on one CPU and on two.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

from anywire.cli.measure import turns
from anywire.ipc import MessageQueue
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Report, options

try:
    import posix_ipc
except ImportError:
    posix_ipc = None

OURS, POSIX = "anywire", "posix_ipc"
ROUND_TRIPS = 80_000                # in a second; a guess that only sets how long a measurement lasts


def beside(work: Callable[[], None], core: int) -> int:
    """A forked child on that CPU."""
    pid = os.fork()
    if pid == 0:
        gc.freeze()
        os.sched_setaffinity(0, {core})
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def timed(work: Callable[[], None], count: int, other: Callable[[], None], core: int) -> float:
    """How often a second: `work` here while `other` runs in a child."""
    pid = beside(other, core)
    try:
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(pid, 0)


# --- message queues --------------------------------------------------------------------------------------------------


def queue_of(name: str) -> tuple[Callable[[bytes], Any], Callable[[], Any], Callable[[], None]]:
    """A queue of ten messages of 8 KiB, the system's default: its send, its receive, and what closes it."""
    path = f"/anywire-bench-{secrets.token_hex(6)}"
    if name == OURS:
        ours = MessageQueue.create(path, 10, 8192, owner=True)
        return ours.send, ours.recv, ours.close
    theirs = posix_ipc.MessageQueue(path, posix_ipc.O_CREX, max_messages=10, max_message_size=8192)

    def close() -> None:
        theirs.close()
        theirs.unlink()

    return theirs.send, theirs.receive, close


def round_trips(name: str, message: bytes, count: int, core: int = SERVER_CORE) -> float:
    send, _, close_there = there = queue_of(name)
    send_back, receive_back, close_back = queue_of(name)

    def work() -> None:
        for _ in range(count):
            send(message)
            receive_back()

    def echo() -> None:
        receive = there[1]
        for _ in range(count):
            receive()
            send_back(message)

    try:
        return timed(work, count, echo, core)
    finally:
        close_there()
        close_back()


def on_one_cpu(name: str, message: bytes, count: int) -> float:
    return round_trips(name, message, count, CLIENT_CORE)


def alone(name: str, message: bytes, count: int) -> float:
    """Send and receive in one thread, which never waits."""
    send, receive, close = queue_of(name)
    try:
        start = time.perf_counter()
        for _ in range(count):
            send(message)
            receive()
        return count / (time.perf_counter() - start)
    finally:
        close()


def message_queues(report: Report, rounds: int, seconds: float) -> None:
    names = [OURS] + ([POSIX] if posix_ipc is not None else [])
    cells: list[tuple[str, Callable[[str, bytes, int], float], bytes, int]] = [
        ("message queue 64 B there and back, one CPU", on_one_cpu, bytes(64), ROUND_TRIPS),
        ("message queue 64 B there and back", round_trips, bytes(64), ROUND_TRIPS),
        ("message queue 8 KiB there and back", round_trips, bytes(8192), ROUND_TRIPS),
        ("message queue 64 B, one thread", alone, bytes(64), ROUND_TRIPS * 6),
    ]
    for cell, measure, message, per_second in cells:
        count = max(100, int(per_second * seconds))
        for number in range(rounds):
            for name in turns(names, number):
                os.sched_setaffinity(0, {CLIENT_CORE})
                report.results.add(cell, name, {"rate": measure(name, message, count)})
                os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
        report.rates(cell, POSIX, "rate")
    if posix_ipc is not None:
        for cell in (cells[0][0], cells[1][0]):
            report.claim(f"{cell}, of posix_ipc", report.results.ratio(cell, OURS, POSIX, "rate"), 1.0)


SECTIONS = {"message_queues": message_queues}


def main() -> None:
    parser = options(__doc__, rounds=9, seconds=0.3)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    arguments = parser.parse_args()
    report = Report("ipc: the system's primitives, two processes", ("anywire", "posix_ipc", "sysv_ipc"))
    report.begin()
    if posix_ipc is None:
        report.note("posix_ipc is not installed, so not compared")
    for name, section in SECTIONS.items():
        if arguments.only in (None, name):
            section(report, arguments.rounds, arguments.seconds)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
