"""The program that `anywire demo` prints and runs. Over each wire it is the same; only the address differs.

`answer` and `server` run in the server process (for inproc: in a thread), `client` in the demo's own. Below them is
what they call: `digest`, which keeps the time it took, so that the wire's time is told apart.
"""

from __future__ import annotations

import inspect
import time
from array import array
from collections.abc import Awaitable, Callable, Iterable
from hashlib import blake2b

import anywire

Ready = Callable[[anywire.Address], Awaitable[None]]        # how the server says where it listens
Files = Iterable[tuple[bytes, bytes]]                       # contents and digest


async def answer(channel: anywire.Channel) -> None:
    async for file in channel:
        await channel.send(digest(file))


async def server(address: str, ready: Ready) -> None:
    async with anywire.serve(answer, address) as running:
        await ready(running.addresses[0])


async def client(address: str, files: Files) -> None:
    async with anywire.connect(address) as channel:
        for file, wanted in files:
            await channel.send(file)
            check(wanted, await channel.recv())


class WrongDigest(Exception):
    """What came back is not the digest of what was sent."""


digest_times = array("q")
"""Nanoseconds of each digest made in this process, in order."""


def digest(file: bytes) -> bytes:
    """BLAKE2b of `file` (RFC 7693), timed."""
    began = time.perf_counter_ns()
    made = blake2b(file, digest_size=32).digest()
    digest_times.append(time.perf_counter_ns() - began)
    return made


def check(wanted: bytes, got: bytes) -> None:
    """Raise WrongDigest unless both are the same."""
    if wanted != got:
        raise WrongDigest(f"expected {wanted.hex()}, got {got[:40].hex()} ({len(got)} bytes)")


def text() -> str:
    """The twelve lines, as they run."""
    return "\n".join(["import anywire\n", *(inspect.getsource(part) for part in (answer, server, client))])
