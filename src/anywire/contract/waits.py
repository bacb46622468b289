"""What an establishment generator asks for: waiting is data.

Owns: the requests. Connecting, accepting, the preamble and closing are generators that never block: they yield one
of these and get the answer back. `driver.run` answers them from an event loop, `run_blocking` from `poll(2)`, so both
fronts run the same code. Generators run on the thread of whoever drives them; a request is used once.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias, TypeVar

READ = 1
WRITE = 2


class Wait:
    """Wait until a descriptor is ready. `yield` gives `list[(fd, mask)]` of those ready; `[]` when `timeout` passed.

    `watch`: pairs of a descriptor and READ, WRITE or both. None at all with a timeout is a plain sleep.
    `timeout`: seconds; None waits for ever. An error or hang-up on a descriptor counts as ready for all it asked.
    """

    __slots__ = ("timeout", "watch")

    def __init__(self, watch: Sequence[tuple[int, int]], timeout: float | None = None) -> None:
        self.watch = watch
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Wait({self.watch!r}, timeout={self.timeout!r})"


class Resolve:
    """Look a name up. `yield` gives the list that `socket.getaddrinfo` does, or raises its `gaierror`."""

    __slots__ = ("family", "host", "port", "type")

    def __init__(self, host: str, port: int, family: int = socket.AF_UNSPEC, type: int = socket.SOCK_STREAM) -> None:
        self.host = host
        self.port = port
        self.family = family
        self.type = type

    def __repr__(self) -> str:
        return f"Resolve({self.host!r}, {self.port!r}, family={self.family!r}, type={self.type!r})"


T = TypeVar("T")

Steps: TypeAlias = Generator["Wait | Resolve", Any, T]
"""A generator that yields requests and returns a T."""
