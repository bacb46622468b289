"""How many system calls two processes make: a run of its own under strace(1), never the run that is timed.

Used by `anywire bench copies --calls` and by benchmarks of this repository, on the main thread. strace is no
requirement: `strace()` is None where it is not installed, and the caller says so.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def strace() -> str | None:
    """Where it is."""
    return shutil.which("strace")


def calls(start: Callable[[Sequence[str]], AbstractContextManager[T]], work: Callable[[T], Any]) -> dict[str, int]:
    """System calls by name, of all processes that `start(wrap)` starts under the command `wrap`, until they end."""
    with tempfile.TemporaryDirectory() as directory:
        # One file a process, since two of them can't share one.
        wrap = ["sh", "-c", f'exec strace -f -c -o "{directory}/$$" "$@"', "strace"]
        with start(wrap) as children:
            work(children)
        found: dict[str, int] = {}
        for file in Path(directory).iterdir():
            for line in file.read_text().splitlines():
                words = line.split()
                # % time, seconds, usecs/call, calls, (errors,) name
                if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
                    found[words[-1]] = found.get(words[-1], 0) + int(words[3])
    return found


def calls_more(
    start: Callable[[Sequence[str]], AbstractContextManager[T]], work: Callable[[T, int], Any], few: int, many: int
) -> dict[str, float]:
    """System calls for one unit of `work(children, units)`, by name: what `many` units need beyond `few`."""
    base = calls(start, lambda children: work(children, few))
    whole = calls(start, lambda children: work(children, many))
    added = {name: (whole[name] - base.get(name, 0)) / (many - few) for name in whole}
    return {name: number for name, number in sorted(added.items()) if number > 0}
