"""The event loop that the suite runs on: asyncio's own, or with ANYWIRE_CONFORMANCE_LOOP=anywire ours, or =polling
ours that polls before it sleeps.

A wire must keep its promises on all; ours takes other ways into the connection (`contract/front.pyx`: `Watched`,
`Seen`).
Peers are processes of their own and inherit the choice.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

import anywire

T = TypeVar("T")
LOOP = os.environ.get("ANYWIRE_CONFORMANCE_LOOP", "asyncio")
FACTORIES: dict[str, Any] = {"asyncio": None, "anywire": anywire.new_event_loop,
                             "polling": functools.partial(anywire.new_event_loop, busy_poll=100)}


def runner() -> asyncio.Runner:
    """A runner with that loop."""
    return asyncio.Runner(loop_factory=FACTORIES[LOOP])


def on_loop(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run(), on that loop."""
    with runner() as one:
        return one.run(main)
