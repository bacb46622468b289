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
CYCLES = 960
"""Connections a wire and front, shared out among a dozen ways to use and end one. `evidence/leaks.py` makes more."""
WIRES = {
    "inproc": "inproc://leaks",
    "unix": "unix:@anywire-leaks-{pid}",
    "seqpacket": "unix:@anywire-leaks-{pid}?type=seqpacket",
    "shm": "shm://anywire-leaks-{pid}?pool=1MiB",
    "fifo": "fifo://{directory}/leaks?reply=true",
    "fifo-one-way": "fifo://{directory}/leaks",
    "fifo-many": "fifo://{directory}/leaks?writers=many",
    "mq": "mq:///anywire-leaks-{pid}?reply=true&depth=4&message_size=1000",
    "sysv": "sysv://{key:#x}?reply=true&max_bytes=1000",
    "tcp": "tcp://127.0.0.1:0",
    "tls": "tls://127.0.0.1:0",
    "udp": "udp",
    "pipe": "pipe",
}
SLOWER = {"tls": 1.5, "udp": 4, "pipe": 2, "fifo-one-way": 2, "fifo-many": 2, "mq": 2, "sysv": 2}
"""By how much fewer cycles are made of these, which are slower or have fewer ways."""
LEFT_TO_CI = {"unix", "seqpacket", "tls", "udp", "fifo", "fifo-one-way", "fifo-many"}
"""Those that take longest; what is native in them is tested by others, too."""
# One arena, and a fixed size from which malloc(3) maps: else freed memory stays resident, more or less by chance.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
LEAK = {"objects": 0.6, "malloced": 200, "resident": 3 << 10}
"""What is too much for each connection: less than one object, a few words of native code, less than one page."""


def looks(address: str, front: str, cycles: int, *more: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """By way: (how many connections, what is held after them), several times one after the other."""
    command = [sys.executable, str(HERE / "leak_cycles.py"), address, front, str(cycles), *more]
    done = subprocess.run(
        command, env={**os.environ, **STEADY}, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    if done.stderr:
        print(done.stderr)
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for line in done.stdout.splitlines():
        way, many, held = json.loads(line)
        found.setdefault(way, []).append((many, held))
    return found


def leaking(address: str, front: str, cycles: int, *more: str) -> dict[str, dict[str, float]]:
    """The ways that leave something, and how much of what a connection.

    A leak grows with each connection, so in all parts of a run but perhaps one, where something else was given back.
    """
    found = {}
    for way, ((_, before), *parts) in looks(address, front, cycles, *more).items():
        after = parts[-1][1]
        assert after["descriptors"] == before["descriptors"], way
        assert after["threads"] <= before["threads"], (way, before["threads"], after["threads"])
        starts = [before, *(held for _, held in parts[:-1])]
        for key, bound in LEAK.items():
            grown = [(held[key] - old[key]) / many for old, (many, held) in zip(starts, parts, strict=True)]
            if sorted(grown)[1] >= bound:
                found.setdefault(way, {})[key] = sorted(grown)[1]
    return found


@pytest.mark.no_sanitize
@pytest.mark.timeout(300)
@pytest.mark.parametrize("front", ["async", "blocking"])
@pytest.mark.parametrize(
    "wire", [pytest.param(wire, marks=pytest.mark.slow if wire in LEFT_TO_CI else ()) for wire in WIRES]
)
def test_nothing_is_left_of_hundreds_of_connections(wire: str, front: str, tmp_path: Path) -> None:
    address = WIRES[wire].format(pid=os.getpid(), key=0x42000000 | os.getpid(), directory=tmp_path)
    cycles = int(CYCLES / SLOWER.get(wire, 1))
    found = leaking(address, front, cycles)
    if found:
        # What fills up slowly (some tables of the interpreter do for hundreds of TLS handshakes) can look like a leak
        # of so few. It doesn't of fifteen times as many, and a leak does.
        again = leaking(address, front, 15 * cycles, f"--ways={','.join(found)}")
        found = {way: grown for way, grown in again.items() if grown.keys() & found[way].keys()}
    if found:
        looks(address, front, cycles // 10, f"--ways={','.join(list(found)[:3])}", "--trace")
    assert not found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.no_sanitize
@pytest.mark.parametrize("front", ["async", "blocking"])
def test_one_object_left_of_each_connection_is_seen(front: str) -> None:
    address = WIRES["inproc"].format()
    ways = looks(address, front, 60)
    found = leaking(address, front, CYCLES, "--leak")
    assert found.keys() == ways.keys()
    # Objects are few beside what comes and goes; in one way or another the last look may hide them.
    assert all("malloced" in grown for grown in found.values())
    assert sum("objects" in grown for grown in found.values()) > len(ways) // 2
