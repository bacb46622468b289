"""Part 2 of the demo: three promises, kept before your eyes, over the wires that took part in part 1.

kill      `kill -9` of the server while messages flow: how soon the client knows, and that what it was told adds up
pause     a reader that stops for seconds: the sender waits, and neither process grows
cancel    receives cancelled at every possible moment: each message still arrives, once and in order

Each returns a `Promise` that says whether it held and what was seen. On the main thread, with a loop of its own each.
What can go wrong: a broken promise, or an error instead of an answer, is a `Promise` that did not hold; nothing is
raised.
"""

from __future__ import annotations

import asyncio
import functools
import json
import mmap
import os
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anywire
from anywire.cli.demo import program
from anywire.cli.demo.addresses import Place
from anywire.cli.demo.process import ServerFailed, ServerProcess, memory
from anywire.cli.demo.work import served
from anywire.cli.signals import run

KILL_AFTER = 2000               # messages that the server has taken when it is killed
NUMBERED = 1024                 # bytes of such a message
CANCELS = 10_000
BLOCK = 64 << 10                # bytes of a message to the reader that pauses, where the wire takes so large ones
FLAT = 8 << 20                  # bytes a process may grow while the reader pauses
WAITED = 0.8                    # the share of the pause for which the sender must have waited
PATIENCE = 10.0                 # seconds

Tick = Callable[[str], None]


@dataclass
class Promise:
    """One promise over one wire."""

    name: str
    wire: str
    held: bool = False
    seen: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def _shown(
    name: str,
) -> Callable[[Callable[..., tuple[bool, str, dict[str, Any]]]], Callable[..., Promise]]:
    """Makes a Promise of what a function saw, or of its error."""

    def decorate(show: Callable[..., tuple[bool, str, dict[str, Any]]]) -> Callable[..., Promise]:
        @functools.wraps(show)
        def wrapped(place: Place, *arguments: Any) -> Promise:
            made = Promise(name, place.name)
            try:
                made.held, made.seen, made.figures = show(place, *arguments)
            except TimeoutError as error:
                made.seen = str(error) or f"nothing more came for {PATIENCE:.0f} s"
            except (anywire.AnywireError, ServerFailed, OSError, EOFError, program.WrongDigest) as error:
                made.seen = f"{type(error).__name__}: {error}"
            return made

        return wrapped

    return decorate


# ---- kill -9


@_shown("kill -9 in mid-flow")
def kill(place: Place, server: ServerProcess, directory: Path, pids: list[int]) -> tuple[bool, str, dict[str, Any]]:
    """Kill a server process that receives. `server`: another, which takes the name over. `pids`: gets its process."""
    own = directory / "killed"
    own.mkdir(exist_ok=True)
    page_fd = os.memfd_create("anywire demo")
    try:
        os.ftruncate(page_fd, 8)
        with mmap.mmap(page_fd, 8) as page, ServerProcess(str(own)) as victim:
            pids.append(victim.process.pid)
            with served(place, "count", victim, [page_fd]) as (_, address):
                figures = run(_flood_until_lost(address, victim, page))
            victim.process.wait()
            figures["delivered"] = _seen(page)
    finally:
        os.close(page_fd)
    again = ""
    if "/" in place.listen.partition(":///")[2]:
        # A killed process leaves its socket file; the next server replaces it, because nobody listens there.
        began = time.perf_counter()
        with served(place, "wire", server) as (_, address):
            message = b"again"
            run(program.client(address, [(message, blake2b(message, digest_size=32).digest())]))
        again = f"; the next server took the name over in {(time.perf_counter() - began) * 1e3:.0f} ms"
    adds_up = figures["accepted"] <= figures["delivered"] + figures["unconfirmed"]
    seen = (
        f"known after {figures['knew_ms']:.1f} ms; accepted {figures['accepted']:,} {'≤' if adds_up else '>'} "
        f"delivered {figures['delivered']:,} + unconfirmed {figures['unconfirmed']:,}{again}"
    )
    return adds_up, seen, figures


def _seen(page: mmap.mmap) -> int:
    number: int = struct.unpack_from("=Q", page)[0]
    return number


async def _flood_until_lost(address: str, victim: ServerProcess, page: mmap.mmap) -> dict[str, Any]:
    channel = await anywire.connect(address)
    accepted = 0
    padding = bytes(NUMBERED - 8)
    killed = 0
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                if not killed and _seen(page) >= KILL_AFTER:
                    killed = time.perf_counter_ns()
                    victim.kill()
                await channel.send(accepted.to_bytes(8, "big") + padding)
                accepted += 1
    except anywire.PeerLost as error:
        if not killed:
            raise
        return {
            "knew_ms": (time.perf_counter_ns() - killed) / 1e6,
            "accepted": accepted,
            "unconfirmed": error.unconfirmed,
        }
    finally:
        channel.abort()


# ---- a reader that pauses


@_shown("a reader pauses")
def pause(place: Place, server: ServerProcess, seconds: float, tick: Tick) -> tuple[bool, str, dict[str, Any]]:
    """Send to a server that sleeps for `seconds`."""
    with served(place, "pause", server) as (_, address):
        figures = run(_send_to_sleeper(address, server.process.pid, seconds, tick))
    waited, grew = figures["waited_s"] >= seconds * WAITED, max(figures["grew"], figures["reader_grew"])
    arrived = figures["arrived"] == figures["sent"] and figures["in_order"]
    seen = (
        f"paused {seconds:g} s: the sender waited {figures['waited_s']:.1f} s after {_amount(figures['ahead'])}; "
        f"memory {'flat' if grew <= FLAT else 'grew'} ({grew / 1e6:+.1f} MB); then "
        f"{'all' if arrived else 'NOT all'} {figures['sent']:,} messages arrived in order"
    )
    return waited and grew <= FLAT and arrived, seen, figures


def _amount(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


async def _send_to_sleeper(address: str, reader: int, seconds: float, tick: Tick) -> dict[str, Any]:
    sent, ahead, waited = 0, 0, 0.0
    async with anywire.connect(address) as channel:
        size = min(BLOCK, channel.max_message)      # the system's queues have small messages
        block = bytes(size - 8)
        await channel.send(str(seconds).encode())
        await channel.recv()
        before, reader_before = memory(), memory(reader)
        most, reader_most = before, reader_before
        began = time.perf_counter()

        async def look() -> None:
            nonlocal most, reader_most
            while True:
                most, reader_most = max(most, memory()), max(reader_most, memory(reader))
                tick(f"the reader pauses: {time.perf_counter() - began:.0f} s of {seconds:g} s")
                await asyncio.sleep(0.1)

        looking = asyncio.create_task(look())
        try:
            async with asyncio.timeout(seconds + PATIENCE):
                while time.perf_counter() - began < seconds * 1.02:
                    asked = time.perf_counter()
                    await channel.send(sent.to_bytes(8, "big") + block)
                    took = time.perf_counter() - asked
                    if took > waited:       # the one wait that the pause makes
                        waited, ahead = took, sent * size
                    sent += 1
                await channel.send(b"")
                answer = json.loads(await channel.recv())
        finally:
            looking.cancel()
    return {
        "paused_s": seconds,
        "waited_s": waited,
        "ahead": ahead,
        "sent": sent,
        "arrived": answer["seen"],
        "in_order": answer["in_order"],
        "grew": most - before,
        "reader_grew": reader_most - reader_before,
    }


# ---- cancelled receives


@_shown("cancelled receives")
def cancel(place: Place, server: ServerProcess, count: int, tick: Tick) -> tuple[bool, str, dict[str, Any]]:
    """Cancel `count` receives while numbered messages come in."""
    with served(place, "flow", server) as (_, address):
        figures = run(_cancel_receives(address, count, tick))
    seen = (
        f"{figures['cancelled']:,} cancelled while {figures['sent']:,} messages came: {figures['lost']:,} lost, "
        f"{'in order' if figures['in_order'] else 'OUT OF ORDER'}"
    )
    return figures["lost"] == 0 and figures["in_order"], seen, figures


async def _cancel_receives(address: str, count: int, tick: Tick) -> dict[str, Any]:
    got: list[bytes] = []
    cancelled = 0
    chance = random.Random(1)
    ourselves = asyncio.current_task()
    assert ourselves is not None
    async with anywire.connect(address) as channel, asyncio.timeout(PATIENCE):
        await channel.send(b"go")
        while cancelled < count:
            # At every moment: before it began, while it waits, and when the message is just there.
            task = asyncio.ensure_future(channel.recv())
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            task.cancel()
            try:
                got.append(await task)
            except asyncio.CancelledError:
                if ourselves.cancelling():
                    raise                       # Ctrl-C
                cancelled += 1
                if cancelled % 500 == 0:
                    tick(f"cancelled {cancelled:,} receives")
        await channel.send(b"stop")
        while not got or not got[-1].startswith(b"total "):
            got.append(await channel.recv())
    total = int(got.pop().removeprefix(b"total "))
    numbers = [int.from_bytes(message, "big") for message in got]
    return {
        "cancelled": cancelled,
        "sent": total,
        "received": len(numbers),
        "lost": total - len(set(numbers)),
        "in_order": numbers == sorted(set(numbers)),
    }
