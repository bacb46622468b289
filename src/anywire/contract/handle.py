"""Handles: connections and listeners on their way to another process or front.

Owns: the descriptors, until `attach` takes them or `close` closes them. A handle is plain data beside them: it travels
to a child that multiprocessing starts (it pickles then, and only then), to a subprocess (`pass_fds=handle.fds` and
`handle.address`, for pipe ends), or over a Unix channel (`send_fds(handle.fds, handle.pack())`).

What can go wrong: a handle dropped without attach closes its descriptors with a ResourceWarning.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any


class Handle:
    """What `detach()` and `pipe()` give and `attach()` takes.

    `kind`: channel, stream, listener or pipe. `face`: channel or stream. `how`: what the descriptors are. `address`:
    where they lead. `fds`: the descriptors, in an order that `how` defines."""

    __slots__ = ("__weakref__", "_partner", "_process", "address", "face", "fds", "how", "kind", "state")

    def __init__(
        self, kind: str, face: str, how: str, address: str, fds: Iterable[int], state: dict[str, Any] | None = None
    ) -> None:
        self.kind = kind
        self.face = face
        self.how = how
        self.address = address
        self.fds = list(fds)
        self.state = state or {}
        self._process = os.getpid()
        self._partner: weakref.ref[Handle] | None = None

    def pair_with(self, other: Handle) -> None:
        """Say that `other` is the opposite end of this pipe, made in this process too."""
        self._partner, other._partner = weakref.ref(other), weakref.ref(self)

    def take(self) -> list[int]:
        """The descriptors; this handle no longer owns them. Raises ValueError when they were taken before."""
        if not self.fds:
            raise ValueError(f"the handle of {self.address} was attached or closed before")
        fds, self.fds = self.fds, []
        partner = self._partner() if self._partner is not None else None
        if partner is not None and self._process != os.getpid():
            # A forked child inherited both ends. While it kept the other one, that side's death would stay unseen.
            partner.close()
        return fds

    def close(self) -> None:
        """Close the descriptors. Safe to call more than once."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)

    def pack(self) -> bytes:
        """Everything but the descriptors, for a message that carries `fds` beside it."""
        head: dict[str, Any] = {"kind": self.kind, "face": self.face, "how": self.how, "address": self.address}
        head["fds"] = len(self.fds)
        return json.dumps([head, self.state], default=_as_json).encode()

    @classmethod
    def unpack(cls, packed: bytes, fds: Iterable[int]) -> Handle:
        """The handle of a message made with `pack` and the descriptors that came with it, in order."""
        head, state = json.loads(packed, object_hook=_from_json)
        numbers = list(fds)
        if len(numbers) != head["fds"]:
            raise ValueError(
                f"the handle of {head['address']} has {head['fds']} descriptors; {len(numbers)} were given"
            )
        return cls(head["kind"], head["face"], head["how"], head["address"], numbers, state)

    def __reduce__(self) -> tuple[Callable[..., Handle], tuple[Any, ...]]:
        from multiprocessing import context, reduction

        if context.get_spawning_popen() is None:
            raise TypeError(
                "a handle pickles only as an argument of a process being started; elsewhere send it over a unix: "
                "channel: send_fds(handle.fds, handle.pack())"
            )
        passed = [reduction.DupFd(fd) for fd in self.fds]
        return _unpickle, (self.kind, self.face, self.how, self.address, passed, self.state)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.fds:
            self.close()
            if self._process == os.getpid():  # a forked child need not care for its copy
                text = f"the handle of {self.address} was never attached or closed"
                warnings.warn(text, ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f"<anywire.Handle {self.kind} {self.address} fds={self.fds}>"


def _unpickle(kind: str, face: str, how: str, address: str, passed: list[Any], state: dict[str, Any]) -> Handle:
    return Handle(kind, face, how, address, [duplicate.detach() for duplicate in passed], state)


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    raise TypeError(f"a handle's state can't hold {value!r}")


def _from_json(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["hex"]) if set(value) == {"hex"} else value
