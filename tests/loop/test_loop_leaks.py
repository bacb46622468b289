"""Nothing is left of connections, TLS handshakes, timers and errors on our loop: objects, memory, descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("loop_cycles.py")
CYCLES = int(os.environ.get("ANYWIRE_LOOP_CYCLES", "1000"))
"""Connections, handshakes and timers, each. `make evidence` makes more."""
LOOP = os.environ.get("ANYWIRE_LEAK_LOOP", "anywire:new_event_loop")
# One arena, and a fixed size from which malloc(3) maps: else freed memory stays resident, more or less by chance.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
# What free lists, cached stacks of threads and malloc's own bookkeeping move by, however many the cycles.
OBJECTS, MALLOCED, RESIDENT = 300, 64 << 10, 6 << 20


def looks(cycles: int, *ways: str) -> dict[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, PROGRAM, LOOP, str(cycles), *ways], env={**os.environ, **STEADY},
        capture_output=True, text=True, check=False, timeout=1700,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def leaking(cycles: int, *ways: str) -> dict[str, dict[str, int]]:
    """The ways after which more is held than before, and what of it is too much."""
    found = {}
    for way, (before, after) in looks(cycles, *ways).items():
        grown = {key: after[key] - before[key] for key in ("objects", "malloced", "resident", "threads")}
        print(f"{way:20} {cycles:6} {grown['objects']:8} {grown['malloced']:9} {grown['resident']:10}")
        assert after["descriptors"] == before["descriptors"], way
        assert grown["threads"] <= 0, (way, grown)
        bounds = {"objects": OBJECTS, "malloced": MALLOCED, "resident": RESIDENT}
        if over := {key: grown[key] for key, bound in bounds.items() if grown[key] >= bound}:
            found[way] = over
    return found


@pytest.mark.no_sanitize
@pytest.mark.timeout(3600)
def test_nothing_is_left() -> None:
    found = leaking(CYCLES)
    if found:
        # The interpreter's own tables double now and then, once: a leak is there again, of the same kind.
        again = leaking(2 * CYCLES, *found)
        found = {way: grown for way, grown in found.items() if grown.keys() & again.get(way, {}).keys()}
    assert not found


@pytest.mark.no_sanitize
@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"PYTHONDEVMODE": "1"}, {"PYTHONMALLOC": "debug"}], ids=["development", "malloc"])
def test_the_interpreters_own_checks_are_content(mode: dict[str, str]) -> None:
    """Development mode complains of what is not closed or awaited; the allocator, of what is written past its end."""
    done = subprocess.run(
        [sys.executable, "-Werror::ResourceWarning", PROGRAM, LOOP, "20"], env={**os.environ, **mode},
        capture_output=True, text=True, check=False, timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
