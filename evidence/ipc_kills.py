"""kill -9 on who holds a semaphore or a lock, or sends to a queue, thousands of times: what the others find then.

    python evidence/ipc_kills.py [--kills 500] [--kinds mutex,semaphore,sysv-undo,mq,sysv-queue] [--seed 1]

Each round forks a process that takes and gives back, or sends, without a pause, and kills it with SIGKILL at a random
moment; what it was about to do, it had written into shared memory. Checked each time:

mutex: a bystander takes and gives it too. Whoever locks it next gets it within seconds, and is told (OwnerDied) if what
it guards is half changed: nobody who was not told ever finds it so. After the repair it is as good as new.
semaphore: its unit may be gone, which the value and `processes()` show: then one `release` gives it back. There is
never one too many.
sysv-undo: the System V semaphore is there again as soon as the process is gone, with exactly its value.
mq, sysv-queue: all messages that were sent, and at most one that was being sent, are there: whole, in order, none
missing and none twice.

Afterwards this process holds no descriptor more than before, and nothing of a round has kept its name.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import secrets
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anywire.ipc import MessageQueue, Mutex, OwnerDied, Semaphore, sysv

PATIENCE = 10
LONGEST = 0.006                     # seconds until a victim is killed
words = memoryview(mmap.mmap(-1, 4096)).cast("Q")
"""What all processes of a round share; each word is written whole, also by a process that is killed."""
HOLDER, FIRST, SECOND, SENT, TOLD = range(5)


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A process that works until it is killed, at the latest at the end of the block; it is gone then."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child {os.getpid()}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, f"a process ended by itself, with status {status}"


def killed(work: Callable[[], None], rng: random.Random) -> None:
    """Let a process work, once it has begun, for a random time."""
    words[SENT] = 0
    with forked(work):
        begun = time.monotonic()
        while not words[SENT]:
            assert time.monotonic() < begun + PATIENCE, "nothing was done"
            time.sleep(0.0001)
        time.sleep(rng.uniform(0, LONGEST))


# Kinds: each makes its object, yields a function that does one round and returns how many deaths left a trace, and ends
# it.


def mutex(name: str) -> Iterator[Callable[[random.Random], int]]:
    def repair() -> None:
        assert words[FIRST] - words[SECOND] in (0, 1), "changed by more than one"
        words[SECOND] = words[FIRST]
        words[HOLDER] = 0
        words[TOLD] += 1

    def change() -> None:
        assert words[HOLDER] == 0 and words[FIRST] == words[SECOND], "half changed, and nobody was told"
        words[HOLDER] = os.getpid()
        words[FIRST] += 1
        words[SECOND] += 1
        words[HOLDER] = 0

    def work(*, victim: bool = True) -> None:
        mine = Mutex.open(name, repair=repair)
        while True:
            with mine:
                change()
                words[SENT] += victim

    for word in (HOLDER, FIRST, SECOND, TOLD):
        words[word] = 0
    with_one = Mutex.create(name, owner=True)

    def one(rng: random.Random) -> int:
        told = words[TOLD]
        killed(work, rng)
        try:
            with_one.lock(timeout=PATIENCE)
        except OwnerDied:
            repair()
            with_one.mark_consistent()
        change()
        with_one.unlock()
        return words[TOLD] - told

    with forked(lambda: work(victim=False)):
        yield one
    with_one.close()


def semaphore(name: str) -> Iterator[Callable[[random.Random], int]]:
    def work() -> None:
        mine = Semaphore.open(name)
        while True:
            mine.acquire()
            words[HOLDER] = os.getpid()
            words[SENT] += 1
            words[HOLDER] = 0
            mine.release()

    with_one = Semaphore.create(name, 1, owner=True)

    def one(rng: random.Random) -> int:
        words[HOLDER] = 0
        with forked(work):                                      # who waits may be killed, too
            killed(work, rng)
        value = with_one.value
        assert value in (0, 1), f"the value is {value}"
        assert value == 0 or words[HOLDER] == 0, "its unit is there, and it was killed while it had it"
        if value == 0:
            assert with_one.processes() == [os.getpid()], "somebody seems to have it"
            with_one.release()
        with_one.acquire(timeout=PATIENCE)
        with_one.release()
        assert with_one.value == 1
        return 1 - value

    yield one
    with_one.close()


def sysv_undo(name: str) -> Iterator[Callable[[random.Random], int]]:
    with_one = sysv.SemaphoreSet.create(sysv.PRIVATE, values=[3, 3], owner=True)

    def work() -> None:
        while True:
            with_one.op([(0, -2), (1, -1)], undo=True)
            words[HOLDER] = os.getpid()
            words[SENT] += 1
            words[HOLDER] = 0
            with_one.op([(1, 1), (0, 2)], undo=True)

    def one(rng: random.Random) -> int:
        words[HOLDER] = 0
        with forked(work):
            killed(work, rng)
        held = words[HOLDER] != 0
        with_one.op([(0, -3), (1, -3)], timeout=PATIENCE)
        with_one.op([(0, 3), (1, 3)])
        assert with_one.values == [3, 3], f"the values are {with_one.values}"
        return int(held)

    yield one
    with_one.close()


def whole(message: bytes, expected: int) -> None:
    number, checksum = int.from_bytes(message[:8], "little"), int.from_bytes(message[8:16], "little")
    assert checksum == zlib.crc32(message[16:]), "a message is damaged"
    assert number == expected, f"message {number} where {expected} is next"


def sending(send: Callable[[bytes], None], seed: int) -> None:
    rng = random.Random(seed)
    for number in range(1 << 40):
        body = rng.randbytes(rng.choice((0, 40, 1000, 8000)))
        send(number.to_bytes(8, "little") + zlib.crc32(body).to_bytes(8, "little") + body)
        words[SENT] = number + 1


def queue_rounds(
    send: Callable[[bytes], None], recv: Callable[[], bytes], depth: Callable[[], int]
) -> Callable[[random.Random], int]:
    def one(rng: random.Random) -> int:
        expected, seed = 0, rng.getrandbits(32)
        words[SENT] = 0
        end = rng.uniform(0, LONGEST)
        with forked(lambda: sending(send, seed)):
            begun = time.monotonic()
            while not expected or time.monotonic() < begun + end:   # so that it is full in some rounds, empty in others
                assert time.monotonic() < begun + PATIENCE, "nothing was sent"
                if depth() > rng.choice((0, 0, 9)):
                    whole(recv(), expected)
                    expected += 1
        while depth():
            whole(recv(), expected)
            expected += 1
        assert expected - words[SENT] in (0, 1), f"{expected} messages of {words[SENT]}"
        return expected - words[SENT]

    return one


def mq(name: str) -> Iterator[Callable[[random.Random], int]]:
    with MessageQueue.create(name, 10, 8192, owner=True) as queue:
        yield queue_rounds(queue.send, lambda: queue.recv(PATIENCE), lambda: queue.depth)


def sysv_queue(name: str) -> Iterator[Callable[[random.Random], int]]:
    with sysv.MessageQueue.create(sysv.PRIVATE, owner=True) as queue:
        yield queue_rounds(queue.send, lambda: queue.recv(timeout=PATIENCE)[0], lambda: queue.depth)


KINDS = {"mutex": mutex, "semaphore": semaphore, "sysv-undo": sysv_undo, "mq": mq, "sysv-queue": sysv_queue}
TRACES = {
    "mutex": "deaths told to the next one", "semaphore": "units lost and given back",
    "sysv-undo": "deaths between taking and giving back", "mq": "last messages that nobody had counted",
    "sysv-queue": "last messages that nobody had counted",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="for each kind (500)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failed = False
    for kind in arguments.kinds.split(","):
        descriptors = len(os.listdir("/proc/self/fd"))
        name = f"/anywire-kills-{secrets.token_hex(6)}"
        traces = wrong = 0
        longest = 0.0
        rounds = contextmanager(KINDS[kind])
        with rounds(name) as one:
            for seed in range(arguments.seed, arguments.seed + arguments.kills):
                start = time.monotonic()
                try:
                    traces += one(random.Random(seed))
                except (AssertionError, OSError) as error:
                    print(f"FAIL {kind} seed {seed}: {type(error).__name__}: {error}", flush=True)
                    wrong += 1
                    if wrong == 5:
                        break
                longest = max(longest, time.monotonic() - start)
        left = len(os.listdir("/proc/self/fd")) - descriptors
        names = [found for found in os.listdir("/dev/shm") if name.lstrip("/") in found]
        failed |= bool(wrong or left or names)
        print(
            f"{kind:11} {arguments.kills} rounds, {traces} {TRACES[kind]}; {wrong} wrong; longest {longest:.2f} s; "
            f"left: {left} descriptors, {len(names)} names in /dev/shm",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
