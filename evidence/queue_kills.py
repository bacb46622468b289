"""kill -9 on users of queues and pipes, thousands of times: what the others get, and that they go on.

    python evidence/queue_kills.py [--kills 500] [--kinds Queue,bounded,SimpleQueue,JoinableQueue,Pipe] [--seed 1]

Each round forks producers and consumers of one queue (or of the two ends of one pipe, shared by several), whose ring
is small, so that it is full most of the time and long messages go in pieces; and kills all but one producer and one
consumer with SIGKILL at random moments. Messages have a number and a checksum, and sizes from nothing to three times
the ring. Everybody counts in shared memory what it put and got. Checked each time: whatever is received is whole and,
from each producer, in order; the survivors go on, to their end, within seconds; nothing that a survivor put is
missing, but one message for each killed consumer, which had taken it; nothing comes twice; `qsize` is right at the
end. Afterwards this process holds no descriptor more than before, and /dev/shm nothing.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import random
import signal
import sys
import time
import zlib

from anywire.multiprocessing import connection, queues

RING = 1 << 16
PRODUCERS = 3
CONSUMERS = 3
MESSAGES = 150
PATIENCE = 10
STOP = b"stop"


class Array:
    """A buffer that goes beside the pickle, as NumPy's do."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: int) -> object:
        return Array, (pickle.PickleBuffer(self.data),)


class Counts:
    """Words in memory that all processes of a round share; each is written whole, also by a process that is killed."""

    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, 8 * (PRODUCERS + CONSUMERS))).cast("Q")

    def __getitem__(self, index: int) -> int:
        return self.words[index]

    def add(self, index: int) -> None:
        self.words[index] += 1


def size_of(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.6:
        return rng.randrange(0, 200)
    return rng.randrange(0, RING // 4) if kind < 0.9 else rng.randrange(RING // 4, 3 * RING)


def produce(put: object, number: int, seed: int, counts: Counts, limit: int | None) -> None:
    """Put numbered messages: `limit` of them, or until killed."""
    rng = random.Random(seed)
    sequence = 0
    while limit is None or sequence < limit:
        body = rng.randbytes(size_of(rng))
        head = (number, sequence, zlib.crc32(body))
        shape = rng.random()
        message = (*head, body) if shape < 0.5 else (*head, Array(body)) if shape < 0.8 else pickle.dumps((*head, body))
        put(message)  # type: ignore[operator]
        counts.add(number)
        sequence += 1


def consume(get: object, number: int, counts: Counts) -> dict[int, int]:
    """Get until told to stop: how many came from each producer. Raises AssertionError for anything that is wrong."""
    last: dict[int, int] = {}
    many: dict[int, int] = {}
    while True:
        message = get()  # type: ignore[operator]
        if message == STOP:
            return many
        if isinstance(message, bytes):
            message = pickle.loads(message)  # noqa: S301 - our own
        producer, sequence, checksum, body = message
        data = body.data if isinstance(body, Array) else body
        assert zlib.crc32(data) == checksum, "a message is damaged"
        assert sequence > last.get(producer, -1), f"from {producer}: {sequence} after {last.get(producer)}"
        last[producer] = sequence
        many[producer] = many.get(producer, 0) + 1
        counts.add(PRODUCERS + number)


def forked(work: object) -> int:
    """Run it in a child, which ends with status 0 when nothing was wrong."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()  # type: ignore[operator]
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        print(f"child {os.getpid()}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)


def finished(pid: int, what: str) -> None:
    """Wait for a survivor; AssertionError when it failed or hangs."""
    deadline = time.monotonic() + PATIENCE
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            break
        assert time.monotonic() < deadline, f"{what} hangs"
        time.sleep(0.001)
    assert status == 0, f"{what} ended with {os.waitstatus_to_exitcode(status)}"


def one(kind: str, seed: int) -> tuple[int, int]:
    """One round. Returns how many were killed and how many messages were received."""
    rng = random.Random(seed)
    queues.SIZE = connection.SIZE = RING
    counts = Counts()
    pipe = queue = None
    if kind == "Pipe":
        pipe = connection.Pipe(duplex=rng.random() < 0.5)
        get, put = pipe[0].recv, pipe[1].send
    elif kind == "SimpleQueue":
        queue = queues.SimpleQueue()
        get, put = queue.get, queue.put
    else:
        make = queues.JoinableQueue if kind == "JoinableQueue" else queues.Queue
        queue = make(rng.randrange(1, 8) if kind == "bounded" else 0)
        get, put = queue.get, queue.put

    def producer(number: int, limit: int | None) -> None:
        produce(put, number, seed * 100 + number, counts, limit)
        if isinstance(queue, queues.Queue):
            queue.close()
            queue.join_thread()

    children: list[int] = []
    victims: list[int] = []
    try:
        producers = [forked(lambda n=n: producer(n, None if n else MESSAGES)) for n in range(PRODUCERS)]
        consumers = [forked(lambda n=n: consume(get, n, counts)) for n in range(CONSUMERS)]
        children = [*producers, *consumers]
        victims = [*producers[1:], *consumers[1:]]
        rng.shuffle(victims)
        for victim in list(victims):
            time.sleep(rng.uniform(0, 0.008))
            os.kill(victim, signal.SIGKILL)
            if rng.random() < 0.5:                              # not reaped yet: a zombie is dead, too
                os.waitpid(victim, 0)
                children.remove(victim)
                victims.remove(victim)
        finished(producers[0], "the producer that survived")
        children.remove(producers[0])
        put(STOP)
        finished(consumers[0], "the consumer that survived")
        children.remove(consumers[0])
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    accepted = sum(counts[n] for n in range(PRODUCERS))
    received = sum(counts[PRODUCERS + n] for n in range(CONSUMERS))
    killed = PRODUCERS + CONSUMERS - 2
    assert received <= accepted + PRODUCERS - 1, f"{received} received of {accepted} accepted"
    # A victim's last message may be published and not counted; what waited in its feeder is lost with it.
    if kind in ("SimpleQueue", "Pipe"):
        assert received >= accepted - (CONSUMERS - 1), f"{received} received of {accepted} accepted"
    else:
        assert received >= MESSAGES - (CONSUMERS - 1), f"{received} received, {MESSAGES} by the survivor alone"
        assert queue.qsize() == 0 and queue.empty(), f"qsize is {queue.qsize()} at the end"
        queue.put(b"one more")
        assert queue.get(timeout=PATIENCE) == b"one more"
        queue.close()
        queue.join_thread()
    if pipe is not None:
        pipe[0].close()
        pipe[1].close()
    elif kind == "SimpleQueue":
        queue.close()
    return killed, received


def names_of_ours() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "anywire" in name}


def names_left(before: set[str]) -> set[str]:
    """What is in /dev/shm that was not, and stays: the names of other programs on this machine go again."""
    left, end = names_of_ours() - before, time.monotonic() + PATIENCE
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left &= names_of_ours()
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="for each kind (500)")
    parser.add_argument("--kinds", default="Queue,bounded,SimpleQueue,JoinableQueue,Pipe")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    failed = False
    for kind in arguments.kinds.split(","):
        one(kind, 0)
        descriptors, names = len(os.listdir("/proc/self/fd")), names_of_ours()
        killed = received = rounds = 0
        longest = 0.0
        while killed < arguments.kills:
            seed = arguments.seed + rounds
            rounds += 1
            start = time.monotonic()
            try:
                more, got = one(kind, seed)
                killed, received = killed + more, received + got
            except AssertionError as error:
                print(f"FAIL {kind} seed {seed}: {error}", flush=True)
                failed, killed = True, killed + PRODUCERS + CONSUMERS - 2
            longest = max(longest, time.monotonic() - start)
        left = len(os.listdir("/proc/self/fd")) - descriptors
        names = names_left(names)
        failed |= left != 0 or bool(names)
        print(
            f"{kind:13} {killed} kills in {rounds} rounds, {received} messages, longest round {longest:.2f} s; "
            f"left: {left} descriptors, {len(names)} names in /dev/shm",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
