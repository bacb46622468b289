"""Part 1 of the demo: the twelve lines over each wire, and the same work over what one would otherwise write.

Owns: the order of the turns, and the measuring. The program takes its files from a generator here;
from handing one out to being asked for the next is that file's round trip. The server says how long each digest took,
and that is subtracted: what is left is the wire's. Wires take turns, forwards and then backwards, so that nobody always
has the same neighbour. On the main thread; nothing else runs meanwhile, the display is drawn between turns.

What can go wrong: a wire that can't take part says why (`reason`), one that breaks says how (`error`), and the others
go on.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import anywire
from anywire.cli.demo import program
from anywire.cli.demo.addresses import PIPE, Place
from anywire.cli.demo.material import Material
from anywire.cli.demo.process import Act, ServerFailed, ServerProcess
from anywire.cli.demo.server import ACTS, STREAMS_LIMIT
from anywire.cli.signals import run as run_stoppable
from anywire.contract.errors import AnywireError, TooLarge, Unsupported

ROUNDS = 2
PATIENCE = 10.0             # seconds beyond its time until a wire that stands still is given up
Files = Iterable[tuple[bytes, bytes]]


@dataclass
class Contender:
    """A wire, or a peer beside it, and what came of it."""

    name: str
    act: str                                # in the server process
    place: Place | None = None              # None: no wire of ours
    note: str = ""
    reason: str = ""                        # why it takes no part
    error: str = ""
    trips_ns: list[int] = field(default_factory=list)       # round trips without the digest
    digest_ns: int = 0
    cpu_ns: int = 0                         # of both processes, without the digests
    sent: int = 0                           # bytes of files

    @property
    def messages(self) -> int:
        """Files sent and answered rightly."""
        return len(self.trips_ns)

    def figures(self) -> dict[str, float]:
        """The table's figures; only for one that has messages."""
        wire = sum(self.trips_ns)
        cuts = statistics.quantiles(self.trips_ns, n=100) if self.messages > 1 else [self.trips_ns[0]] * 99
        return {
            "messages": self.messages,
            "mb_s": self.sent / wire * 1e3,
            "messages_s": self.messages / wire * 1e9,
            "p50_us": cuts[49] / 1e3,
            "p99_us": cuts[98] / 1e3,
            "cpu_us": self.cpu_ns / self.messages / 1e3,
            "wire_s": wire / 1e9,
            "digest_s": self.digest_ns / 1e9,
        }


def contenders(places: Iterable[Place]) -> list[Contender]:
    """The wires, and beside them what one would otherwise write."""
    return [
        *(Contender(place.name, "wire", place, place.note, place.reason) for place in places),
        Contender("multiprocessing.Pipe", "mp_pipe", note="blocking; anywire.sync is beside it in `anywire bench`"),
        Contender("asyncio streams", "streams", note="tcp, framed by hand, on asyncio's own event loop"),
    ]


def run(
    found: list[Contender],
    material: Material,
    server: ServerProcess,
    seconds: float,
    progress: Callable[[Contender], None],
) -> None:
    """Each contender in each round, about `seconds` in all. Results and reasons are left in the contenders."""
    share = seconds / ROUNDS / max(1, sum(not contender.reason for contender in found))
    began = time.monotonic()
    for number in range(ROUNDS):
        if number and time.monotonic() - began > seconds * 0.75:
            break                           # a slow machine: one round is what the time allows
        for contender in found if number % 2 == 0 else reversed(found):
            if contender.reason or contender.error:
                continue
            progress(contender)
            try:
                _turn(contender, material, server, share)
            except (TooLarge, Unsupported) as error:
                contender.reason = _too_large(error, material) if isinstance(error, TooLarge) else str(error)
            except (AnywireError, ServerFailed, program.WrongDigest, OSError, TimeoutError, EOFError) as error:
                contender.error = str(error) or type(error).__name__


def _too_large(error: TooLarge, material: Material) -> str:
    larger = sum(len(data) > error.limit for data, _ in material.items)
    return (
        f"{larger:,} of {len(material.items):,} files are larger than its messages "
        f"({error.limit:,} bytes; the largest has {material.largest:,})"
    )


def _turn(contender: Contender, material: Material, server: ServerProcess, share: float) -> None:
    """One turn: connect, all files, again while there is time, end."""
    trips: list[int] = []
    files = timed(material.items, share, trips)
    with _server_side(contender, server) as (act, client):
        began = time.process_time_ns()
        client(files)
        cpu = time.process_time_ns() - began
    if len(act.digest_ns) != len(trips):
        raise ServerFailed(f"{len(trips)} answers came, but the server made {len(act.digest_ns)} digests")
    # The digests are made while this process waits, on one CPU: their time is the server's CPU time too.
    digests = sum(act.digest_ns)
    contender.trips_ns += [trip - made for trip, made in zip(trips, act.digest_ns, strict=True)]
    contender.digest_ns += digests
    contender.cpu_ns += max(0, cpu + act.cpu_ns - digests)
    passes, rest = divmod(len(trips), len(material.items))
    contender.sent += passes * material.total + sum(len(data) for data, _ in material.items[:rest])


def timed(items: list[tuple[bytes, bytes]], seconds: float, trips: list[int]) -> Iterator[tuple[bytes, bytes]]:
    """The files, once at least and then again as long as another pass fits into `seconds`; appends each one's time."""
    began = time.perf_counter()
    while True:
        start = time.perf_counter()
        for item in items:
            asked = time.perf_counter_ns()
            yield item
            trips.append(time.perf_counter_ns() - asked)
        now = time.perf_counter()
        if now + (now - start) / 2 > began + seconds:
            return


@contextmanager
def served(
    place: Place, name: str, server: ServerProcess, fds: Sequence[int] = ()
) -> Iterator[tuple[Act, str]]:
    """An act on the server's side during the block, at a wire's place: (the act, what a client connects to)."""
    if place.threaded:
        with _thread(name, place.listen) as act:
            yield act, act.address
    elif place.listen == PIPE:
        ours, theirs = anywire.pipe()
        with ours, theirs:
            act = server.start_act(name, PIPE, [*fds, *theirs.fds])
            theirs.close()
            read, write = ours.take()
        try:
            yield act, f"pipe:?read={read}&write={write}"
        finally:
            server.finish(act)
    else:
        with server.act(name, place.listen, fds) as act:
            yield act, place.reach(act.address)


@contextmanager
def _server_side(contender: Contender, server: ServerProcess) -> Iterator[tuple[Act, Callable[[Files], None]]]:
    """The act on the server's side, and the client that goes with it."""
    if contender.place is not None:
        with served(contender.place, contender.act, server) as (act, address):
            yield act, lambda files: _run(program.client(address, files))
    elif contender.act == "mp_pipe":
        here, there = socket.socketpair()           # what multiprocessing.Pipe() makes
        with Connection(here.detach()) as connection, there:
            act = server.start_act("mp_pipe", fds=[there.fileno()])
            there.close()
            try:
                yield act, lambda files: _ask_connection(connection, files)
            finally:
                connection.close()                  # its end is how the server's side knows
                server.finish(act)
    else:
        with server.act(contender.act) as act:
            yield act, lambda files: _run(_ask_streams(int(act.address), files), asyncio.new_event_loop)


def _run(work: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop] = anywire.new_event_loop) -> None:
    async def bounded() -> None:
        # udp may lose a message; then nothing more comes.
        async with asyncio.timeout(PATIENCE * 2):
            await work

    run_stoppable(bounded(), loop_factory)


def _ask_connection(connection: Any, files: Files) -> None:
    for file, wanted in files:
        connection.send_bytes(file)
        program.check(wanted, connection.recv_bytes())


async def _ask_streams(port: int, files: Files) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=STREAMS_LIMIT)
    try:
        for file, wanted in files:
            writer.write(struct.pack("!I", len(file)))
            writer.write(file)
            await writer.drain()
            (size,) = struct.unpack("!I", await reader.readexactly(4))
            program.check(wanted, await reader.readexactly(size))
    finally:
        writer.close()
        await writer.wait_closed()


@contextmanager
def _thread(name: str, address: str) -> Iterator[Act]:
    """An act of the server's in a thread of this process."""
    del program.digest_times[:]
    told = threading.Event()
    failures: list[BaseException] = []
    stop: list[Callable[[], object]] = []

    async def ready(real: object) -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        told.set()
        await ended.wait()

    def work() -> None:
        try:
            anywire.run(ACTS[name](address, [], ready))
        except BaseException as error:
            failures.append(error)
        finally:
            told.set()

    thread = threading.Thread(target=work, name="demo server", daemon=True)
    thread.start()
    told.wait()
    act = Act(address)
    try:
        if failures:
            raise failures[0]
        yield act
    finally:
        if stop:
            stop[0]()
        thread.join(PATIENCE)
    act.digest_ns = list(program.digest_times)      # its CPU time is in this process's already
