"""How fast are the operating system's own primitives? Each beside posix_ipc or sysv_ipc, in the same run.

Two processes take turns through a pair of objects; the other side is forked. On two CPUs most of a round trip is waking
the other one, which on virtual machines differs by a half from one second to the next; on one CPU it is the calls and
the switch between processes. A section for each primitive: `--only NAME` measures one.

To be shown: a round trip of 64 B through message queues no slower than posix_ipc's, on one CPU and on two; System V's
queues and semaphores no slower than sysv_ipc's, within the 5 % that two runs of one program differ by; a semaphore
taken and given back in one thread twice as fast as posix_ipc's, and two processes or threads that take turns by two of
them not slower, within the same 5 %; a robust mutex locked and unlocked in at most 1.5 times what two calls of ours
cost that do nothing but one atomic operation each. Of that the calls and the atomic operations are shown apart, all
without what the loop around them costs.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from anywire import sync
from anywire.cli.measure import turns
from anywire.ipc import MessageQueue, Mutex, Semaphore, sysv
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Report, options

try:
    import posix_ipc
except ImportError:
    posix_ipc = None
try:
    import sysv_ipc
except ImportError:
    sysv_ipc = None

OURS, POSIX, SYSV = "anywire", "posix_ipc", "sysv_ipc"
WITHIN = 0.95
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


Ends = tuple[Callable[[bytes], Any], Callable[[], Any], Callable[[], None]]


def posix_queue(name: str) -> Ends:
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


def sysv_queue(name: str) -> Ends:
    """The same of System V, of the system's default size."""
    if name == OURS:
        ours = sysv.MessageQueue.create(sysv.PRIVATE, owner=True)
        return ours.send, ours.recv, ours.close
    theirs = sysv_ipc.MessageQueue(None, sysv_ipc.IPC_CREX, max_message_size=8192)
    return theirs.send, theirs.receive, theirs.remove


def round_trips(queue: Callable[[str], Ends], name: str, message: bytes, count: int, core: int = SERVER_CORE) -> float:
    send, receive, close_there = queue(name)
    send_back, receive_back, close_back = queue(name)

    def work() -> None:
        for _ in range(count):
            send(message)
            receive_back()

    def echo() -> None:
        for _ in range(count):
            receive()
            send_back(message)

    try:
        return timed(work, count, echo, core)
    finally:
        close_there()
        close_back()


def on_one_cpu(queue: Callable[[str], Ends], name: str, message: bytes, count: int) -> float:
    return round_trips(queue, name, message, count, CLIENT_CORE)


def alone(queue: Callable[[str], Ends], name: str, message: bytes, count: int) -> float:
    """Send and receive in one thread, which never waits."""
    send, receive, close = queue(name)
    try:
        start = time.perf_counter()
        for _ in range(count):
            send(message)
            receive()
        return count / (time.perf_counter() - start)
    finally:
        close()


def compare(
    report: Report, cell: str, peer: str, here: bool, rounds: int, measure: Callable[[str, int], float], count: int
) -> None:
    """Ours and the peer's in turn, on this CPU."""
    for number in range(rounds):
        for name in turns([OURS, peer] if here else [OURS], number):
            os.sched_setaffinity(0, {CLIENT_CORE})
            report.results.add(cell, name, {"rate": measure(name, count)})
            os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
    report.rates(cell, peer, "rate")


def queues(
    report: Report, what: str, queue: Callable[[str], Ends], peer: str, here: bool, rounds: int, seconds: float,
    target: float = 1.0,
) -> None:
    cells: list[tuple[str, Callable[..., float], bytes, int]] = [
        (f"{what} 64 B there and back, one CPU", on_one_cpu, bytes(64), ROUND_TRIPS),
        (f"{what} 64 B there and back", round_trips, bytes(64), ROUND_TRIPS),
        (f"{what} 8 KiB there and back", round_trips, bytes(8192), ROUND_TRIPS),
        (f"{what} 64 B, one thread", alone, bytes(64), ROUND_TRIPS * 6),
    ]
    for cell, way, message, per_second in cells:
        def measure(name: str, count: int, way: Callable[..., float] = way, message: bytes = message) -> float:
            return way(queue, name, message, count)

        compare(report, cell, peer, here, rounds, measure, max(100, int(per_second * seconds)))
    if here:
        for cell in (cells[0][0], cells[1][0]):
            report.claim(f"{cell}, of {peer}", report.results.ratio(cell, OURS, peer, "rate"), target)


def message_queues(report: Report, rounds: int, seconds: float) -> None:
    queues(report, "message queue", posix_queue, POSIX, posix_ipc is not None, rounds, seconds)


# --- System V --------------------------------------------------------------------------------------------------------


def sysv_semaphore(name: str, value: int) -> Ends:
    """A semaphore: its release, its acquire, and what removes it."""
    if name == OURS:
        ours = sysv.SemaphoreSet.create(sysv.PRIVATE, values=[value], owner=True)
        return lambda _: ours.release(), ours.acquire, ours.close
    theirs = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, initial_value=value)
    return lambda _: theirs.release(), theirs.acquire, theirs.remove


def sysv_pairs(name: str, count: int) -> float:
    """Acquire and release in one thread, which never waits."""
    if name == OURS:
        ours = sysv.SemaphoreSet.create(sysv.PRIVATE, owner=True)
        acquire, release, close = ours.acquire, ours.release, ours.close
    else:
        theirs = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, initial_value=1)
        acquire, release, close = theirs.acquire, theirs.release, theirs.remove
    try:
        start = time.perf_counter()
        for _ in range(count):
            acquire()
            release()
        return count / (time.perf_counter() - start)
    finally:
        close()


def system_v(report: Report, rounds: int, seconds: float) -> None:
    here = sysv_ipc is not None
    queues(report, "System V queue", sysv_queue, SYSV, here, rounds, seconds, WITHIN)

    def handed_over(name: str, count: int) -> float:
        return round_trips(lambda name: sysv_semaphore(name, 0), name, b"", count, CLIENT_CORE)

    cells = [
        ("System V semaphore, one thread", sysv_pairs, ROUND_TRIPS * 12),
        ("System V semaphore there and back, one CPU", handed_over, ROUND_TRIPS),
    ]
    for cell, measure, per_second in cells:
        compare(report, cell, SYSV, here, rounds, measure, max(100, int(per_second * seconds)))
        if here:
            report.claim(f"{cell}, of sysv_ipc", report.results.ratio(cell, OURS, SYSV, "rate"), WITHIN)


# --- semaphores ------------------------------------------------------------------------------------------------------


def semaphore_of(name: str, value: int) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
    """A semaphore with a name: its taking, its giving back, and what closes it."""
    path = f"/anywire-bench-{secrets.token_hex(6)}"
    if name == OURS:
        ours = Semaphore.create(path, value, owner=True)
        return ours.acquire, ours.release, ours.close
    theirs = posix_ipc.Semaphore(path, posix_ipc.O_CREX, initial_value=value)

    def close() -> None:
        theirs.unlink()
        theirs.close()

    return theirs.acquire, theirs.release, close


def pairs(first: Callable[[], Any], second: Callable[[], Any], count: int) -> float:
    """Two calls in turn, how many pairs a second."""
    start = time.perf_counter()
    for _ in range(count):
        first()
        second()
    return count / (time.perf_counter() - start)


def uncontended(name: str, count: int) -> float:
    take, give, close = semaphore_of(name, 1)
    try:
        return pairs(take, give, count)
    finally:
        close()


def taking_turns(name: str, count: int, core: int | None) -> float:
    """Two processes, or without a core two threads, that wake each other."""
    take, give_here, close = semaphore_of(name, 0)
    take_there, give, close_there = semaphore_of(name, 0)

    def work() -> None:
        for _ in range(count):
            give()
            take()

    def other() -> None:
        for _ in range(count):
            take_there()
            give_here()

    try:
        if core is not None:
            return timed(work, count, other, core)
        thread = threading.Thread(target=other)
        thread.start()
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        thread.join()
        return count / took
    finally:
        close()
        close_there()


def semaphores(report: Report, rounds: int, seconds: float) -> None:
    names = [OURS] + ([POSIX] if posix_ipc is not None else [])
    cells: list[tuple[str, Callable[[str, int], float], int, float]] = [
        ("semaphore taken and given back, one thread", uncontended, ROUND_TRIPS * 80, 2.0),
        ("two semaphores, two processes, one CPU", lambda n, c: taking_turns(n, c, CLIENT_CORE), ROUND_TRIPS, WITHIN),
        ("two semaphores, two processes", lambda n, c: taking_turns(n, c, SERVER_CORE), ROUND_TRIPS, WITHIN),
        ("two semaphores, two threads", lambda n, c: taking_turns(n, c, None), ROUND_TRIPS, WITHIN),
    ]
    for cell, measure, per_second, target in cells:
        for number in range(rounds):
            for name in turns(names, number):
                os.sched_setaffinity(0, {CLIENT_CORE})
                report.results.add(cell, name, {"rate": measure(name, max(100, int(per_second * seconds)))})
                os.sched_setaffinity(0, {SERVER_CORE, CLIENT_CORE})
        report.rates(cell, POSIX, "rate")
        if posix_ipc is not None:
            report.claim(f"{cell}, of posix_ipc", report.results.ratio(cell, OURS, POSIX, "rate"), target)


# --- locks -----------------------------------------------------------------------------------------------------------


def nothing(count: int) -> float:
    """The loop of `pairs` alone."""
    start = time.perf_counter()
    for _ in range(count):
        pass
    return count / (time.perf_counter() - start)


def locks(report: Report, rounds: int, seconds: float) -> None:
    cell = "robust mutex locked and unlocked, one thread"
    empty, atomic = "two calls that do nothing", "two calls with an atomic operation each"
    loop, count = "the loop around them", max(100, int(ROUND_TRIPS * 150 * seconds))
    mutex = Mutex.create(f"/anywire-bench-{secrets.token_hex(6)}", owner=True)
    lock = threading.Lock()
    works = {
        OURS: lambda: pairs(mutex.lock, mutex.unlock, count),
        empty: lambda: pairs(mutex._no_lock, mutex._no_unlock, count),
        atomic: lambda: pairs(mutex._atomic_lock, mutex._atomic_unlock, count),
        "threading.Lock (one process only)": lambda: pairs(lock.acquire, lock.release, count),
        loop: lambda: nothing(count),
    }
    for number in range(rounds):
        for name in turns(list(works), number):
            report.results.add(cell, name, {"rate": works[name]()})
    mutex.close()
    report.rates(cell, empty, "rate")
    took = {name: 1e9 / (report.results.median(cell, name, "rate") or float("nan")) for name in works}
    ours, calls, both = (took[name] - took[loop] for name in (OURS, empty, atomic))
    report.note(
        f"locked and unlocked: {ours:.1f} ns; two calls that do nothing: {calls:.1f} ns, and two atomic operations in "
        f"them: {both - calls:.1f} ns more; all without the loop's {took[loop]:.1f} ns"
    )
    what = "robust mutex locked and unlocked, time of two empty calls and two atomic operations"
    report.claim(what, ours / both, 1.5, at_most=True)


# --- the wires on queues ---------------------------------------------------------------------------------------------


def channels(scheme: str, message: bytes, count: int, core: int) -> float:
    """The round trips of a blocking channel over a pair of queues."""
    some = secrets.randbelow(1 << 24)
    place = f"mq:///anywire-bench-{some}?depth=10&" if scheme == "mq" else f"sysv://{0x44000000 | some:#x}?"
    address = f"{place}reply=true"

    def echo() -> None:
        with sync.listen(address) as listener, listener.accept() as channel:
            for _ in range(count + 1):
                channel.send(channel.recv())
            channel.recv()                          # nobody but the other side knows when it has all

    pid = beside(echo, core)
    try:
        with sync.connect(address, wait=10) as channel:
            channel.send(message)
            channel.recv()
            start = time.perf_counter()
            for _ in range(count):
                channel.send(message)
                channel.recv()
            took = time.perf_counter() - start
            channel.send(b"that was all")
            os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return count / took


def wires(report: Report, rounds: int, seconds: float) -> None:
    sides: list[tuple[str, Callable[[str], Ends], str, bool]] = [
        ("mq", posix_queue, POSIX, posix_ipc is not None), ("sysv", sysv_queue, SYSV, sysv_ipc is not None),
    ]
    for scheme, queue, peer, here in sides:
        for where, core in (("one CPU", CLIENT_CORE), ("two CPUs", SERVER_CORE)):
            def measure(
                name: str, count: int, scheme: str = scheme, queue: Callable[[str], Ends] = queue, core: int = core
            ) -> float:
                if name == OURS:
                    return channels(scheme, bytes(64), count, core)
                return round_trips(queue, name, bytes(64), count, core)

            cell = f"{scheme}:// 64 B there and back, {where}, of bare queues"
            compare(report, cell, peer, here, rounds, measure, max(100, int(ROUND_TRIPS * seconds)))


SECTIONS = {
    "message_queues": message_queues, "system_v": system_v, "semaphores": semaphores, "locks": locks,
    "wires": wires,
}


def main() -> None:
    parser = options(__doc__, rounds=9, seconds=0.3)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    arguments = parser.parse_args()
    report = Report("ipc: the system's primitives, two processes", ("anywire", "posix_ipc", "sysv_ipc"))
    report.begin()
    if posix_ipc is None:
        report.note("posix_ipc is not installed, so not compared")
    if sysv_ipc is None:
        report.note("sysv_ipc is not installed, so not compared")
    for name, section in SECTIONS.items():
        if arguments.only in (None, name):
            section(report, arguments.rounds, arguments.seconds)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
