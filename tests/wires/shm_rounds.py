"""A hostile peer, round after round: a real second process that meets by all rules and then breaks every one of them.

    python tests/wires/shm_rounds.py [--seconds 10] [--seed 1]

It writes nonsense to all that it may write: its data (records, pool), both control pages (cursors, flags, returned
extents), the socket (floods of tokens); changes records while they are read; tries what the seals forbid; leaves at a
random moment. The other side, which is this process, receives and sends meanwhile, on either front, by copy, in place
and into buffers. Each round must end within seconds, with messages or one of the library's errors. Prints what came of
the rounds; a crash or a hang ends the process with another status. Run by test_shm_hostile.py and `make evidence`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import ctypes
import errno
import faulthandler
import gc
import logging
import os
import random
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shm_peer import (
    CLOSED,
    DATA_WANTED,
    END,
    EXTENT,
    FIRST,
    HEAD,
    INLINE,
    MOST_RETURNS,
    NEXT,
    RETURNED,
    RETURNS,
    ROOM_WANTED,
    TAIL,
    TAKEN,
    UNIT,
    Memories,
    Theirs,
    meet,
)

import anywire
from anywire import sync

Outcome = collections.Counter[str]

MIB = 1 << 20
LIMIT = MIB // 2                                  # max_message: bytes
PATIENCE = 40                                     # seconds that a round may take at most
ACCEPT = 15                                       # ... and until an attacker was accepted: handshakes may take 10
RESIDENT = 700 << 10                              # KiB: all that peers may make this process hold more than at first

# --- the attacker -----------------------------------------------------------------------------------------------------


class Attacker:
    """Honest for a while, so that every state is reached; then not."""

    def __init__(self, rng: random.Random, ours: Memories, theirs: Theirs, sock: Any) -> None:
        self.rng, self.ours, self.theirs, self.sock = rng, ours, theirs, sock
        self.going: list[int] | None = None       # of a long message: [got, total, base or -1]
        sock.setblocking(False)

    def number(self) -> int:
        rng = self.rng
        return rng.choice([
            0, 1, 7, 8, 15, 16, 4095, 4096, self.ours.ring, self.ours.pool, LIMIT, LIMIT + 1, 1 << 31, (1 << 32) - 1,
            1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, rng.getrandbits(64), rng.getrandbits(rng.randrange(1, 64)),
            -rng.randrange(1, 1 << 20) & (1 << 64) - 1,
        ])  # fmt: skip

    def offset(self) -> int:
        return self.rng.randrange(self.ours.pool // UNIT) * UNIT

    def message(self) -> None:
        """A record by the rules, perhaps with one number that is not."""
        rng, ours = self.rng, self.ours
        kind = rng.choice([INLINE, INLINE, EXTENT, FIRST, NEXT, NEXT, NEXT])
        if kind == INLINE:
            data = bytes(rng.randrange(200))
        elif kind == EXTENT:
            length = rng.randrange(min(ours.pool, LIMIT))
            data = struct.pack("<QQ", rng.randrange((ours.pool - length) // UNIT + 1) * UNIT, length)
        elif kind == FIRST:
            total = rng.randrange(2, LIMIT)
            first = rng.randrange(1, min(total, ours.pool, 262144))
            contiguous = rng.random() < 0.5 and total < ours.pool
            base = rng.randrange((ours.pool - (total if contiguous else first)) // UNIT + 1) * UNIT
            data = struct.pack("<QQQQ", base, first, total, contiguous)
            self.going = [first, total, base if contiguous else -1]
        elif self.going is not None:
            got, total, base = self.going
            n = rng.choice([total - got, rng.randrange(1, total - got + 1)]) if total > got else 1
            n = min(n, ours.pool)
            at = base + got if base >= 0 else rng.randrange((ours.pool - n) // UNIT + 1) * UNIT
            data = struct.pack("<QQ", at, n)
            self.going[0] += n
        else:
            return
        if kind != NEXT and kind != FIRST:
            self.going = None
        if rng.random() < 0.05 and len(data) >= 16:
            words = bytearray(data)
            struct.pack_into("<Q", words, rng.randrange(len(words) // 8) * 8, self.number())
            data = bytes(words)
        length = None if rng.random() > 0.01 else self.number() & 0xFFFFFFFF
        kind = kind if rng.random() > 0.01 else rng.choice([2, 3, 4, 6, 99, (1 << 32) - 1])
        if ours.head + 40 + len(data) - ours.get("Q", TAIL) <= ours.ring:
            ours.record(kind, data, length)
            if rng.random() < 0.8:
                ours.show()

    def flicker(self) -> None:
        """Change the words of a record while the other side looks at it."""
        rng, ours = self.rng, self.ours
        good = struct.pack("<II", 16, EXTENT) + struct.pack("<QQ", 0, rng.randrange(1, 5000))
        bad = rng.choice([
            struct.pack("<IIQQ", 16, EXTENT, 0, min(ours.pool, LIMIT)),
            struct.pack("<IIQQ", 16, EXTENT, self.number(), self.number()),
            struct.pack("<IIQQ", self.number() & 0xFFFFFFFF, EXTENT, 0, 10),
            struct.pack("<IIQQ", 16, INLINE, 0, 10),
            struct.pack("<IIQQ", 16, NEXT, 0, LIMIT),
        ])  # fmt: skip
        if ours.ring - ours.head % ours.ring < 64 or ours.head + 64 - ours.get("Q", TAIL) > ours.ring:
            return
        at = ours.record(EXTENT, good[8:]) % ours.ring
        to = ctypes.addressof(ctypes.c_char.from_buffer(ours.data)) + at
        move = ctypes.memmove
        ours.show()
        self.ring()
        for _ in range(3000):
            move(to, bad, 24)
            move(to, good, 24)

    def nonsense(self) -> None:
        """Any value at any place that may be written."""
        rng = self.rng
        page = rng.choice([self.ours, self.theirs])
        way = rng.randrange(8)
        if way == 0:
            page.set("Q", rng.choice([HEAD, TAIL, TAKEN, RETURNED]), self.number())
        elif way == 1:
            page.set("I", rng.choice([DATA_WANTED, CLOSED, ROOM_WANTED]), rng.getrandbits(1))
        elif way == 2:
            page.set("I", RETURNS + 4 * rng.randrange(MOST_RETURNS), self.number() & 0xFFFFFFFF)
        elif way == 3:
            at = rng.randrange(4096)
            count = rng.randrange(1, 4097 - at)
            page.control[at : at + count] = rng.randbytes(count)
        elif way == 4:
            at = rng.randrange(self.ours.ring)
            count = rng.randrange(1, min(200, self.ours.ring - at + 1))
            self.ours.data[at : at + count] = rng.randbytes(count)
        elif way == 5:
            self.ours.set("Q", HEAD, self.ours.head + 8 * rng.randrange(-5, 10) & (1 << 64) - 1)
        elif way == 6:
            # Give memory back that it has, or has not.
            returned = self.theirs.get("Q", RETURNED)
            self.theirs.set("I", RETURNS + 4 * (returned % MOST_RETURNS), rng.randrange(64))
            self.theirs.set("Q", RETURNED, (returned + 1) & (1 << 64) - 1)
        else:
            self.theirs.set("Q", TAIL, (self.theirs.get("Q", TAIL) + 8 * rng.randrange(64)) & (1 << 64) - 1)

    def consume(self) -> None:
        """Take what the other side sent, as an honest consumer would who looks at nothing."""
        theirs = self.theirs
        head = theirs.get("Q", HEAD)
        tail, returned, taken = theirs.get("Q", TAIL), theirs.get("Q", RETURNED), theirs.get("Q", TAKEN)
        while tail < head and head - tail <= theirs.ring:
            at = tail % theirs.ring
            length, kind = struct.unpack_from("<II", theirs.data, at)
            if kind in (EXTENT, FIRST, NEXT) and at + 24 <= theirs.ring:
                (offset,) = struct.unpack_from("<Q", theirs.data, at + 8)
                theirs.set("I", RETURNS + 4 * (returned % MOST_RETURNS), (offset // UNIT) & 0xFFFFFFFF)
                returned += 1
                theirs.set("Q", RETURNED, returned)
            taken += kind in (INLINE, EXTENT, FIRST)
            tail += 8 + (length + 7) // 8 * 8
        theirs.set("Q", TAKEN, taken)
        theirs.set("Q", TAIL, tail)
        self.ring()

    def ring(self, count: int = 1) -> None:
        try:
            self.sock.send(b"!" * count)
        except BlockingIOError:
            pass

    def forbidden(self) -> None:
        """What the seals must not let through: a hole or a shorter file would be a SIGBUS over there."""
        for fd in (self.ours.fds[0], self.theirs.fds[0], self.ours.fds[1]):
            must_fail(lambda fd=fd: os.ftruncate(fd, 4096 if fd != self.ours.fds[1] else 0))
        for fd in (self.ours.fds[0], self.theirs.fds[0]):
            must_fail(lambda fd=fd: punch(fd))
            must_fail(lambda fd=fd: os.pwrite(fd, b"x", 0))
        must_fail(lambda: remove(self.ours.data))

    def run(self, seconds: float) -> None:
        rng = self.rng
        end = time.monotonic() + seconds
        honest = rng.random() * 0.6
        acts = [self.message] * 12 + [self.consume] * 3 + [self.ring] + [self.flicker]
        bad = [self.nonsense] * 8 + [self.flicker] * 2 + [lambda: self.ring(5000), self.forbidden]
        if rng.random() < 0.3:
            bad = [self.flicker]
        begun = time.monotonic()
        while time.monotonic() < end:
            rng.choice(acts if time.monotonic() - begun < honest * seconds or rng.random() < 0.5 else bad)()
            if rng.random() < 0.3:
                self.ring()
        if rng.random() < 0.3:
            self.ours.record(END)
            self.ours.show()
            self.ring()


def must_fail(act: Any) -> None:
    try:
        act()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.EACCES):
            raise
    else:
        raise AssertionError("the kernel let it through")


LIBC = ctypes.CDLL(None, use_errno=True)


def punch(fd: int) -> None:
    if LIBC.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):          # KEEP_SIZE | PUNCH_HOLE
        raise OSError(ctypes.get_errno(), "fallocate")


def remove(data: Any) -> None:
    at = ctypes.addressof(ctypes.c_char.from_buffer(data))
    if LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(4096), 9):           # MADV_REMOVE
        raise OSError(ctypes.get_errno(), "madvise")


def attack(address: str, seed: int) -> None:
    rng = random.Random(seed)
    pool = rng.choice([1 << 20, 1 << 20, 1 << 21, 1 << 40])
    ours = Memories(rng.choice([4096, 1 << 14, 1 << 16]), pool)
    sock, theirs = meet(address, ours)
    Attacker(rng, ours, theirs, sock).run(rng.uniform(0.005, 0.12))
    if rng.random() < 0.3:
        os.kill(os.getpid(), signal.SIGKILL)


class Attackers:
    """One process, made before this one has threads, that makes another for each attack and tells how it ended."""

    def __init__(self) -> None:
        orders, self.orders = os.pipe()
        self.ends, ends = os.pipe()
        if os.fork():
            os.close(orders)
            os.close(ends)
            return
        os.close(self.orders)
        os.close(self.ends)
        with os.fdopen(orders) as lines:
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    os._exit(attacked(*line.split()))
                _, status = os.waitpid(pid, 0)
                os.write(ends, struct.pack("<i", os.waitstatus_to_exitcode(status)))
        os._exit(0)

    def start(self, address: str, seed: int) -> None:
        os.write(self.orders, f"{address} {seed}\n".encode())

    def end(self) -> int:
        (status,) = struct.unpack("<i", os.read(self.ends, 4))
        return int(status)


def attacked(address: str, seed: str) -> int:
    try:
        attack(address, int(seed))
    except (ConnectionError, EOFError):
        pass
    except BaseException as error:
        print(f"seed {seed}: the attacker: {error!r}", file=sys.stderr, flush=True)
        return 4
    return 0


# --- the other side ---------------------------------------------------------------------------------------------------

EXPECTED = (
    anywire.BadFrame, anywire.TooLarge, anywire.PeerLost, anywire.EndOfChannel, anywire.ChannelClosed, anywire.TimedOut,
)  # fmt: skip


def receive_blocking(channel: Any, rng: random.Random, outcome: Outcome, end: float) -> None:
    views = []
    buffer = bytearray(rng.choice([10, 5000, LIMIT]))
    way = rng.randrange(5)
    while time.monotonic() < end:
        try:
            if way == 0:
                channel.recv(timeout=0.05)
            elif way == 1:
                views.append(channel.recv(copy=False, timeout=0.05))
                sum(views[-1][:: 1 + len(views[-1]) // 100])
                del views[: rng.randrange(3)]
            elif way == 2:
                channel.recv_into(buffer, timeout=0.05)
            elif way == 3:
                channel.recv_many(timeout=0.05)
            else:
                way, again = rng.randrange(4), way
                receive_blocking(channel, rng, outcome, min(end, time.monotonic() + 0.002))
                way = again
                continue
            outcome["messages"] += 1
        except BufferError:
            outcome["BufferError"] += 1
            channel.recv(timeout=0.05)
        except anywire.TimedOut:
            outcome["TimedOut"] += 1


def send_blocking(channel: Any, rng: random.Random, outcome: Outcome, end: float) -> None:
    while time.monotonic() < end:
        size = rng.choice([0, 8, 500, 70_000, 300_000, LIMIT])
        try:
            way = rng.randrange(4)
            if way == 0:
                channel.send(bytes(size), timeout=0.05)
            elif way == 1:
                loan = channel.loan(size)
                memoryview(loan)[:] = bytes(size)
                channel.send(loan, timeout=0.05)
            elif way == 2:
                channel.try_send(bytes(size))
            else:
                channel.send_many([b"x", bytes(size), b"y" * 10], timeout=0.05)
            outcome["sent"] += 1
        except anywire.TimedOut:
            outcome["TimedOut"] += 1


async def receive_async(channel: Any, rng: random.Random, outcome: Outcome, end: float) -> None:
    buffer = bytearray(rng.choice([10, 5000, LIMIT]))
    way = rng.randrange(4)
    while time.monotonic() < end:
        try:
            if way == 0:
                await channel.recv(timeout=0.05)
            elif way == 1:
                view = await channel.recv(copy=False, timeout=0.05)
                sum(view[:: 1 + len(view) // 100])
            elif way == 2:
                await channel.recv_into(buffer, timeout=0.05)
            else:
                await channel.recv_many(timeout=0.05)
            outcome["messages"] += 1
        except BufferError:
            outcome["BufferError"] += 1
            await channel.recv(timeout=0.05)
        except anywire.TimedOut:
            outcome["TimedOut"] += 1


async def send_async(channel: Any, rng: random.Random, outcome: Outcome, end: float) -> None:
    while time.monotonic() < end:
        size = rng.choice([0, 8, 500, 70_000, 300_000, LIMIT])
        try:
            if rng.random() < 0.3:
                loan = channel.loan(size)
                memoryview(loan)[:] = bytes(size)
                await channel.send(loan, timeout=0.05)
            else:
                await channel.send(bytes(size), timeout=0.05)
            outcome["sent"] += 1
        except anywire.TimedOut:
            outcome["TimedOut"] += 1
        await asyncio.sleep(0)


OPTIONS: dict[str, Any] = {"ring": "16KiB", "pool": "1MiB", "max_message": LIMIT, "handshake_timeout": 10}


class Refusals(logging.Handler):
    """What the listener says of peers that it did not accept."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()

    def counted(self, seed: int, outcome: Outcome) -> None:
        """An attacker that writes over its proof before it was looked at is refused, and nobody comes to `accept`."""
        if "did not map our memory" not in self.last:
            print(f"seed {seed}: nobody came, and the listener says {self.last!r}", file=sys.stderr, flush=True)
            os._exit(3)
        outcome["refused"] += 1
        self.last = ""


REFUSALS = Refusals()


def blocking_round(attackers: Attackers, address: str, seed: int, rng: random.Random, outcome: Outcome) -> None:
    import threading

    with sync.listen(address, waiting=rng.choice(["adaptive", "sleep", "spin"]), **OPTIONS) as listener:
        attackers.start(address, seed)
        try:
            channel = listener.accept(timeout=ACCEPT)
        except anywire.TimedOut:
            REFUSALS.counted(seed, outcome)
            return
    end = time.monotonic() + 0.15

    def run(act: Any, own: random.Random) -> None:
        try:
            act(channel, own, outcome, end)
        except EXPECTED as error:
            outcome[type(error).__name__] += 1
        except BaseException as error:
            print(f"seed {seed}: {act.__name__}: {error!r}", file=sys.stderr, flush=True)
            os._exit(3)

    acts = (receive_blocking, send_blocking)
    threads = [threading.Thread(target=run, args=(act, random.Random(rng.random()))) for act in acts]
    chosen = rng.choice([threads, threads[:1], threads[1:]])
    for thread in chosen:
        thread.start()
    for thread in chosen:
        thread.join()
    try:
        if rng.random() < 0.5:
            channel.close(timeout=0.2)
    except EXPECTED as error:
        outcome[type(error).__name__] += 1
    channel.abort()


async def async_round(attackers: Attackers, address: str, seed: int, rng: random.Random, outcome: Outcome) -> None:
    async with anywire.listen(address, spin_us=rng.choice([0, 20]), **OPTIONS) as listener:
        attackers.start(address, seed)
        try:
            channel = await asyncio.wait_for(listener.accept(), ACCEPT)
        except TimeoutError:
            REFUSALS.counted(seed, outcome)
            return
    end = time.monotonic() + 0.15
    acts = [act(channel, random.Random(rng.random()), outcome, end) for act in (receive_async, send_async)]
    chosen = [asyncio.create_task(act) for act in acts]
    for result in await asyncio.gather(*chosen, return_exceptions=True):
        if isinstance(result, EXPECTED):
            outcome[type(result).__name__] += 1
        elif isinstance(result, BaseException):
            print(f"seed {seed}: {result!r}", file=sys.stderr, flush=True)
            os._exit(3)
    try:
        if rng.random() < 0.5:
            await channel.close(timeout=0.2)
    except EXPECTED as error:
        outcome[type(error).__name__] += 1
    channel.abort()


def one(attackers: Attackers, seed: int, outcome: Outcome) -> None:
    rng = random.Random(seed * 7919)
    address = f"shm://anywire-hostile-{os.getpid()}-{seed}"
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    if rng.random() < 0.5:
        blocking_round(attackers, address, seed, rng, outcome)
    else:
        asyncio.run(async_round(attackers, address, seed, rng, outcome))
    status = attackers.end()
    faulthandler.cancel_dump_traceback_later()
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--rounds", type=int, default=1 << 60, help="at most")
    arguments = parser.parse_args()
    attackers = Attackers()
    logging.getLogger("anywire").addHandler(REFUSALS)
    logging.getLogger("anywire").setLevel(logging.INFO)
    faulthandler.enable()
    outcome: Outcome = collections.Counter()
    end = time.monotonic() + arguments.seconds
    seed = arguments.seed
    one(attackers, 0, outcome)                               # what is imported late has its descriptors now
    descriptors = len(os.listdir("/proc/self/fd"))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < end and seed < arguments.seed + arguments.rounds:
        one(attackers, seed, outcome)
        seed += 1
    gc.collect()
    left = len(os.listdir("/proc/self/fd")) - descriptors
    maps = Path("/proc/self/maps").read_text().count("shm-")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    print(f"{seed - arguments.seed} rounds: {dict(sorted(outcome.items()))}")
    print(f"descriptors left: {left}, mappings left: {maps}, at most {grown >> 10} MiB more resident")
    if left or maps or grown > RESIDENT:
        raise SystemExit(5)


if __name__ == "__main__":
    main()
