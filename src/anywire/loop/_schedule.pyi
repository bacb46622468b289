import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

from anywire.engine._watches import Watcher
from anywire.loop._handles import Caller

_Ts = TypeVarTuple("_Ts")

FORKED: str

class Waker(Watcher): ...

class Schedule(Caller):
    _closed: bool
    def __new__(cls, *args: Any, **options: Any) -> Schedule: ...
    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None,
    ) -> asyncio.Handle: ...
    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None,
    ) -> asyncio.Handle: ...
    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None,
    ) -> asyncio.TimerHandle: ...
    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None,
    ) -> asyncio.TimerHandle: ...
    def time(self) -> float: ...
