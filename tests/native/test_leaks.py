"""Nothing is left of a connection: objects, memory of the native code, pages, descriptors, threads; on every wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CYCLES = int(os.environ.get("ANYWIRE_LEAK_CYCLES", "4000"))
"""Connections a wire and front, shared out among a dozen ways to use and end one. `make evidence` makes more."""
WIRES = {
    "inproc": "inproc://leaks",
    "unix": "unix:@anywire-leaks-{pid}",
    "seqpacket": "unix:@anywire-leaks-{pid}?type=seqpacket",
    "shm": "shm://anywire-leaks-{pid}?pool=1MiB",
    "fifo": "fifo://{directory}/leaks?reply=true",
    "fifo-one-way": "fifo://{directory}/leaks",
    "fifo-many": "fifo://{directory}/leaks?writers=many",
    "tcp": "tcp://127.0.0.1:0",
    "tls": "tls://127.0.0.1:0",
    "udp": "udp",
    "pipe": "pipe",
}
SLOWER = {"tls": 3, "shm": 2, "udp": 2, "pipe": 2, "fifo-one-way": 2, "fifo-many": 4}
"""By how much fewer cycles are made of these, so that the tests stay short."""
# One arena, and a fixed size from which malloc(3) maps: else freed memory stays resident, more or less by chance.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
# What free lists, the cached stacks of ended threads and malloc's own bookkeeping move by, however many the cycles.
MALLOCED, RESIDENT = 64 << 10, 4 << 20


def cycle(wire: str, front: str, cycles: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "leak_cycles.py"), wire, front, str(cycles), *more]
    return subprocess.run(
        command, env={**os.environ, **STEADY}, capture_output=True, text=True, check=False, timeout=280
    )


def leaking(address: str, front: str, cycles: int) -> dict[str, dict[str, int]]:
    """The ways after which more is held than before, and what of it is too much."""
    done = cycle(address, front, cycles)
    assert done.returncode == 0, done.stderr
    looks: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    objects = 0.75 * cycles / len(looks)         # less than one a connection; free lists hold a few hundred
    found = {}
    for way, (before, after) in looks.items():
        grown = {key: after[key] - before[key] for key in ("objects", "malloced", "resident", "threads")}
        assert after["descriptors"] == before["descriptors"], way
        assert grown["threads"] <= 0, (way, grown)
        bounds = {"objects": objects, "malloced": MALLOCED, "resident": RESIDENT}
        if over := {key: grown[key] for key, bound in bounds.items() if grown[key] >= bound}:
            found[way] = over
    return found


@pytest.mark.no_sanitize
@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", ["async", "blocking"])
@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_left_of_thousands_of_connections(wire: str, front: str, tmp_path: Path) -> None:
    address = WIRES[wire].format(pid=os.getpid(), directory=tmp_path)
    cycles = CYCLES // SLOWER.get(wire, 1)
    found = leaking(address, front, cycles)
    if found:
        # The interpreter's own tables double after so many connections (interned strings, which come and go): that
        # happens once, and elsewhere with another number; and of few connections, free lists can hold as many objects.
        # A leak is there again, of the same kind, and twice as large.
        again = leaking(address, front, 2 * cycles)
        found = {way: grown for way, grown in found.items() if grown.keys() & again.get(way, {}).keys()}
    assert not found, f"{found}\n{cycle(address, front, cycles // 10, '--trace').stderr}"
    assert list(tmp_path.iterdir()) == []
