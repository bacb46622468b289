"""Descriptors 0, 1 and 2 at the start of the command line.

Owns: filling those that the caller closed (`<&-`, `>&-`). Otherwise the next thing that is opened, a socket perhaps,
gets the number, and is read as standard input or written to as standard output. Called once, by the main thread, before
anything else opens a descriptor. What can go wrong: /dev/null can't be opened (OSError).
"""

from __future__ import annotations

import io
import os
import sys

CONTRARY = {0: os.O_WRONLY, 1: os.O_RDONLY, 2: os.O_RDONLY}
"""So that reading or writing them is still the error that it is on a closed one: EBADF, "Bad file descriptor". gnulib's
stdopen does the same for coreutils."""


def reserve() -> None:
    """Open /dev/null, the wrong way round, on each of the three that is closed; child processes inherit it."""
    for fd, mode in CONTRARY.items():
        try:
            os.fstat(fd)
        except OSError:
            # open(2) takes the lowest free number: all below are open.
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdout is None:
        # Python found it closed and has no stream for it, and click prints nothing to none. Nothing is buffered here:
        # it could only be lost, and complained about a second time at exit.
        raw = io.FileIO(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
