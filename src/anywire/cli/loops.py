"""The event loops that commands can run on, and that are compared: asyncio's own, and what is installed beside it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections.abc import Callable

LOOPS = {"anywire": "anywire", "asyncio": "asyncio", "uvloop": "uvloop", "rloop": "rloop"}
"""Name, and the module whose `new_event_loop()` makes one; each is also what to install."""


def is_here(name: str) -> bool:
    """Whether a loop of LOOPS is installed."""
    return importlib.util.find_spec(LOOPS[name]) is not None


def loop_factory(name: str = "asyncio") -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the event loops of this name."""
    make: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module(LOOPS[name]).new_event_loop
    return make
