"""For whole directories of tests, by their conftest.py: each leaves the descriptors and threads that it found."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import pytest


def held() -> tuple[set[str], set[threading.Thread]]:
    """What is open now, as names of descriptors with what they lead to, and the threads that run."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):   # the one that lists them
            found.add(f"{number} -> {os.readlink(f'/proc/self/fd/{number}')}")
    # The page of counters is the process's, from its first connection to its end.
    return {one for one in found if "anywire-counters" not in one}, set(threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    descriptors, threads = held()
    yield
    left, running = held()
    if left - descriptors or running - threads:
        for thread in running - threads:
            thread.join(10)                            # it may be on its way out
        gc.collect()                                   # what a cycle still holds is no leak; seldom, for it takes long
        left, running = held()
    assert not left - descriptors, f"left open: {sorted(left - descriptors)}"
    assert not running - threads, f"still running: {running - threads}"
