"""Reading counters pages: this process's and others'.

Owns: the layout as a reader sees it (docs/design/counters.md draws it), and finding the page of another process. Called
from any thread; asks nothing of the process it reads, so it works while that one is blocked, stopped, or, once opened,
dead. What can go wrong: the process has no page, or has one of another version (NoCounters); the kernel does not let
this user look (PermissionError, as for `/proc/PID/fd`, proc(5)).

A page is foreign memory: sizes and counts in it are checked against the file before use, and a page that its owner
could shrink under the reader (which would kill the reader with SIGBUS) is refused: its seals are looked at first
(fcntl(2), F_SEAL_SHRINK).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Self

NAME = "anywire-counters"
MAGIC = b"anywctr\0"
VERSION = 1

TOTALS, OVERFLOW, CHANNEL, STREAM, LISTENER, LOOP, TRANSPORT = 1, 2, 3, 4, 5, 6, 7
KINDS = {
    TOTALS: "totals",
    OVERFLOW: "overflow",
    CHANNEL: "channel",
    STREAM: "stream",
    LISTENER: "listener",
    LOOP: "loop",
    TRANSPORT: "transport",
}

# Native byte order and the documented offsets: a page never leaves its host.
HEADER = struct.Struct("@8sIIIIIIQQQQQIIQ")
SLOT = struct.Struct("@IIIIQ16QQ32s64s")      # a loop's has the same shape
_TRANSPORT_SLOT = struct.Struct("@IIIIQ6Q80xQ32s64s")
_IDENTITY = struct.Struct("@III")              # a slot's state, generation and kind

_F_GET_SEALS, _F_SEAL_SHRINK = 1034, 2

_MemoryLike = memoryview | mmap.mmap


class NoCounters(LookupError):
    """That process has no counters page, or none that this version of anywire can read."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What one channel, stream or listener counted. All counts are since it was opened.

    `kind`: "channel", "stream", "listener", "totals" (all released slots) or "overflow". `address`: its first 64 bytes.
    `opened_ns`: CLOCK_MONOTONIC, nanoseconds. `send_waits`, `recv_waits`: how often a send found the wire full and a
    receive found it empty; `send_wait_ns`: how long sends waited in all. `queue_depth` is now, `queue_high` the most.
    `confirmed`: sent messages that the peer's application has. `losses` with `loss` (the last reason) and `loss_code`
    (its errno, or 0). `index` and `generation` together name the slot's owner, for tools that compare two readings.
    """

    kind: str = ""
    address: str = ""
    opened_ns: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    send_waits: int = 0
    recv_waits: int = 0
    send_wait_ns: int = 0
    queue_depth: int = 0
    queue_high: int = 0
    drops: int = 0
    connects: int = 0
    accepts: int = 0
    accept_errors: int = 0
    confirmed: int = 0
    losses: int = 0
    handler_errors: int = 0
    loss_code: int = 0
    loss: str = ""
    index: int = 0
    generation: int = 0


COUNTERS = tuple(each.name for each in fields(Stats))[3:19]
"""The names of the sixteen 64-bit counters, in the order of the page."""


@dataclass(frozen=True, slots=True)
class LoopCounters:
    """What one of anywire's event loops has done since it was made, and what it has to do.

    `name`: of the thread that ran it last, and that thread's number in the kernel (gettid(2)). What ends in `_ns` is in
    nanoseconds; moments are of CLOCK_MONOTONIC, 0 for none. `began_ns`: when its present run began; `ran_ns`: how long
    it ran before that; `slept_ns`: how much of all that it had nothing to do; `asleep_ns`: since when it sleeps;
    `looked_ns`: when it last looked at its descriptors, and stored all these; `read_ns`: when they were read here.
    `turns`, `callbacks`, `polls` (looks while something was ready), `sleeps` and `wakeups` (sleeps that another thread
    ended) count. `ready` callbacks, `timers` and `watched` descriptors are those of now, `ready_most` the most ever
    ready. `slow`: callbacks that took `slow_callbacks` seconds or more; the last was `culprit`, for `slow_ns`. `index`
    and `generation` together name the slot's owner.
    """

    name: str
    opened_ns: int
    began_ns: int
    ran_ns: int
    slept_ns: int
    asleep_ns: int
    looked_ns: int
    turns: int
    callbacks: int
    polls: int
    sleeps: int
    wakeups: int
    ready: int
    ready_most: int
    timers: int
    watched: int
    slow: int
    slow_ns: int
    culprit: str
    read_ns: int = field(compare=False)
    index: int
    generation: int

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self.ran_ns + (max(self.read_ns - self.began_ns, 0) if self.began_ns else 0)) / 1e9

    @property
    def utilisation(self) -> float:
        """The share of its time in which it had something to do, 0 to 1."""
        slept = self.slept_ns + (max(self.read_ns - self.asleep_ns, 0) if self.asleep_ns else 0)
        return min(max(1 - slept / 1e9 / self.seconds, 0.0), 1.0) if self.seconds else 0.0

    @property
    def stuck(self) -> float:
        """Seconds since it last looked at its descriptors, while it runs and doesn't sleep: something holds it up."""
        return max(self.read_ns - self.looked_ns, 0) / 1e9 if self.began_ns and not self.asleep_ns else 0.0


@dataclass(frozen=True, slots=True)
class TransportCounters:
    """What one TCP or Unix connection of a loop with `count_transports` has done since it was opened.

    `address`: the peer's, its first 64 bytes, empty for a Unix socket without a name. `local`: this side's, its last 32
    bytes. `queued`: bytes that wait for room in the kernel, `queued_most` the most. `reading_paused`, `writing_paused`:
    the protocol wants no more now, and it was told to write no more; each with how often. `opened_ns`: CLOCK_MONOTONIC.
    """

    address: str
    local: str
    opened_ns: int
    bytes_received: int
    bytes_sent: int
    queued: int
    queued_most: int
    reading_pauses: int
    writing_pauses: int
    reading_paused: bool
    writing_paused: bool
    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Page:
    """One reading of a process's page. `slots`: the channels, streams and listeners, by index; `loops`: anywire's event
    loops; `transports`: their TCP and Unix connections, where they count those.

    `connect_retries`: attempts to connect that failed and were made again, over the whole life of the process.
    """

    pid: int
    version: int
    started_realtime_ns: int
    started_monotonic_ns: int
    claims: int
    releases: int
    overflows: int
    connect_retries: int
    totals: Stats
    overflow: Stats
    slots: tuple[Stats, ...]
    loops: tuple[LoopCounters, ...] = ()
    transports: tuple[TransportCounters, ...] = ()

    def sum(self, counter: str) -> int:
        """A counter over the whole life of the process: released, open and overflowed slots. `queue_high`: the most."""
        values = [getattr(stats, counter) for stats in (self.totals, self.overflow, *self.slots)]
        return max(values) if counter == "queue_high" else sum(values)


def read_slot(memory: _MemoryLike, offset: int, index: int = 0) -> Stats:
    """The slot at `offset` in `memory`."""
    values = SLOT.unpack_from(memory, offset)
    kind = KINDS.get(values[2], f"kind {values[2]}" if values[2] else "")
    opened_and_counters = values[4:21]
    ends = (values[3], _text(values[22]), index, values[1])
    return Stats(*(kind, _text(values[23]), *opened_and_counters, *ends))


def _read_loop(memory: _MemoryLike, offset: int, index: int) -> LoopCounters:
    values = SLOT.unpack_from(memory, offset)
    opened_and_figures = values[4:21]
    ends = (_text(values[23]), time.clock_gettime_ns(time.CLOCK_MONOTONIC), index, values[1])
    return LoopCounters(*(_text(values[22]), *opened_and_figures, *ends))


def _read_transport(memory: _MemoryLike, offset: int, index: int) -> TransportCounters:
    values = _TRANSPORT_SLOT.unpack_from(memory, offset)
    ends = (bool(values[3] & 1), bool(values[3] & 2), index, values[1])
    return TransportCounters(*(_text(values[13]), _text(values[12]), *values[4:11], *ends))


_READERS: dict[int, Callable[[_MemoryLike, int, int], Stats | LoopCounters | TransportCounters]] = {
    LOOP: _read_loop,
    TRANSPORT: _read_transport,
}


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def read_page(memory: _MemoryLike) -> Page:
    """Read a mapped page. Raises NoCounters if it is none that this version reads."""
    size = len(memory)
    if size < HEADER.size or memory[:8] != MAGIC:
        raise NoCounters("this is no counters page")
    head = HEADER.unpack_from(memory)
    _, version, header_size, slot_size, slot_count, pid, used, realtime, monotonic = head[:9]
    claims, releases, overflows, _, _, connect_retries = head[9:]
    if version != VERSION:
        raise NoCounters(f"a counters page of version {version}; this anywire reads version {VERSION}")
    # Later minor layouts may append to header and slot; what can't hold ours, or is larger than the file, is none.
    if header_size < HEADER.size or slot_size < SLOT.size or header_size % 8 or slot_size % 8:
        raise NoCounters("this counters page has impossible sizes")
    used = min(used, slot_count, (size - header_size) // slot_size)
    if used < 2:
        raise NoCounters("this counters page is not set up yet")
    slots: list[Stats] = []
    loops: list[LoopCounters] = []
    transports: list[TransportCounters] = []
    for index in range(2, used):
        found = _read_used(memory, header_size + index * slot_size, index)
        if isinstance(found, Stats):
            slots.append(found)
        elif isinstance(found, LoopCounters):
            loops.append(found)
        elif found is not None:
            transports.append(found)
    return Page(
        pid,
        version,
        realtime,
        monotonic,
        claims,
        releases,
        overflows,
        connect_retries,
        read_slot(memory, header_size, 0),
        read_slot(memory, header_size + slot_size, 1),
        tuple(slots),
        tuple(loops),
        tuple(transports),
    )


def _read_used(memory: _MemoryLike, offset: int, index: int) -> Stats | LoopCounters | TransportCounters | None:
    # The owner may release the slot, and another claim it, while it is read: then look again rather than mix the two.
    for _ in range(3):
        before = _IDENTITY.unpack_from(memory, offset)
        if not before[0] or before[2] not in KINDS:
            return None
        stats = _READERS.get(before[2], read_slot)(memory, offset, index)
        if _IDENTITY.unpack_from(memory, offset) == before:
            return stats
    return None


class Reader:
    """Another process's page, opened. It can be read again and again, also after that process has died.

    A context manager; `close()` unmaps the page. Made by `open_page`.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def read(self) -> Page:
        """Read the page now."""
        return read_page(self._memory)

    def close(self) -> None:
        """Unmap the page. Safe to call twice."""
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_page(pid: int) -> Reader:
    """Map the counters page of a process of this user. Raises NoCounters, PermissionError.

    The page is found among its descriptors by the memfd's name, and taken only if it says that it is this process's: a
    child that is between fork and exec still holds its parent's.
    """
    refusal = f"process {pid} has no counters page: it has no channel, stream, listener or event loop of anywire's"
    try:
        numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
        own_numbers = _pid_in_namespaces(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise NoCounters(f"there is no process {pid}") from None
    for number in numbers:
        place = f"/proc/{pid}/fd/{number}"
        try:
            if not os.readlink(place).startswith(f"/memfd:{NAME}"):
                continue
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed since it was listed
        try:
            reader = _map(fd)
        except NoCounters as error:
            refusal = f"process {pid}: {error}"
            continue
        finally:
            os.close(fd)
        try:
            if reader.read().pid in own_numbers:
                return reader
        except NoCounters as error:
            refusal = f"process {pid}: {error}"
        reader.close()
    raise NoCounters(refusal)


def _map(fd: int) -> Reader:
    if not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK:
        raise NoCounters("its counters page is not sealed")
    size = os.fstat(fd).st_size
    if size < HEADER.size:
        raise NoCounters("its counters page is not set up yet")
    return Reader(mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))


def _pid_in_namespaces(pid: int) -> set[int]:
    """All numbers that the process has, one in each pid namespace (proc(5), NSpid): it wrote its innermost one."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return {pid, *map(int, line.split()[1:])}
    return {pid}
