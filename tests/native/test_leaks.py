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
    "fifo": "fifo://{directory}/leaks?reply=true",
    "tcp": "tcp://127.0.0.1:0",
}
# One arena, and a fixed size from which malloc(3) maps: else freed memory stays resident, more or less by chance.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
# What free lists, the cached stacks of ended threads and malloc's own bookkeeping move by, however many the cycles.
MALLOCED, RESIDENT = 64 << 10, 4 << 20


def cycle(wire: str, front: str, cycles: int, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "leak_cycles.py"), wire, front, str(cycles), *more]
    return subprocess.run(
        command, env={**os.environ, **STEADY}, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.mark.no_sanitize
@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", ["async", "blocking"])
@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_left_of_thousands_of_connections(wire: str, front: str, tmp_path: Path) -> None:
    address = WIRES[wire].format(pid=os.getpid(), directory=tmp_path)
    done = cycle(address, front, CYCLES)
    assert done.returncode == 0, done.stderr
    looks: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    assert len(looks) > 8
    objects = 0.75 * CYCLES / len(looks)         # less than one a connection; free lists hold a few hundred
    assert list(tmp_path.iterdir()) == []
    for way, (before, after) in looks.items():
        grown = {key: after[key] - before[key] for key in ("objects", "malloced", "resident", "threads")}
        assert after["descriptors"] == before["descriptors"], way
        assert grown["threads"] <= 0, (way, grown)
        flat = grown["objects"] < objects and grown["malloced"] < MALLOCED and grown["resident"] < RESIDENT
        assert flat, f"{way} {grown}\n{cycle(address, front, CYCLES // 10, '--trace').stderr}"
