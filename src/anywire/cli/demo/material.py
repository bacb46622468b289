"""The files that travel: a real directory tree, read before anything is timed.

Owns: which files, and their digests. Runs once, on the main thread. What can go wrong: no files there, or none readable
(`NoFiles`, which says so); files over the limit of a message are left out and counted.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

LARGEST = 16 << 20              # bytes: the default limit of a message
PER_FILE = 150e-6               # seconds a file and a byte take on a slow wire: only to choose how many files
PER_BYTE = 1 / 150e6
NOT_SOURCES = {"__pycache__", "site-packages", "dist-packages"}


def amount(limit: int) -> str:
    """A limit in words."""
    return f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit >> 10} KiB"


class NoFiles(Exception):
    """There is nothing to send."""


@dataclass(frozen=True)
class Material:
    """Files with their digests, the largest first: a wire with a limit shows it at once."""

    root: Path
    items: list[tuple[bytes, bytes]]
    total: int                  # bytes
    found: int                  # files in the tree
    left_out: int               # of these, over the limit
    limit: int = LARGEST        # bytes

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return len(self.items[0][0])


def _sizes(root: Path, suffix: str) -> Iterator[tuple[int, str]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_SOURCES and not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(suffix) and os.path.isfile(path) and not os.path.islink(path):
                try:
                    yield os.stat(path).st_size, path
                except OSError:
                    continue    # it has gone meanwhile


def read(root: Path | None, seconds: float, limit: int = LARGEST) -> Material:
    """Read the files below `root` (default: the sources of the running Python's standard library) of at most `limit`
    bytes, or every n-th of them, so that one pass over a wire takes about `seconds`. Raises NoFiles."""
    suffix = ".py" if root is None else ""
    root = root if root is not None else Path(sysconfig.get_path("stdlib"))
    found = list(_sizes(root, suffix)) if root.is_dir() else [(root.stat().st_size, str(root))]
    usable = [entry for entry in found if entry[0] <= limit]
    cost = sum(PER_FILE + size * PER_BYTE for size, _ in usable)
    every = max(1, round(cost / seconds + 0.5)) if cost > seconds else 1
    items = []
    for _, path in usable[::every]:
        try:
            data = Path(path).read_bytes()
        except OSError:
            continue            # not ours to read
        if len(data) <= limit:
            items.append((data, blake2b(data, digest_size=32).digest()))
    if not items:
        raise NoFiles(f"{root}: no files that can be read and have at most {amount(limit)}")
    items.sort(key=lambda item: -len(item[0]))
    return Material(root, items, sum(len(data) for data, _ in items), len(found), len(found) - len(usable), limit)
