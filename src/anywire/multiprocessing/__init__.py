"""The standard library's multiprocessing, with queues and pipes in shared memory.

    from anywire import multiprocessing      # instead of: import multiprocessing

`Pipe`, `Queue`, `SimpleQueue` and `JoinableQueue` are ours; every other name is the standard library's, made by a
context whose queues are ours (`get_context("spawn")`), so `Pool` and
`concurrent.futures.ProcessPoolExecutor(mp_context=...)` use them. `queues` says what is different and `connection` how
a pipe works. Pickle is used in this package and nowhere else in anywire: only between processes of one program.
"""

from __future__ import annotations

import multiprocessing as _standard
from typing import TYPE_CHECKING, Any

from anywire.multiprocessing.context import default as _default

if TYPE_CHECKING:
    from anywire.multiprocessing.connection import Pipe as Pipe
    from anywire.multiprocessing.queues import JoinableQueue as JoinableQueue
    from anywire.multiprocessing.queues import Queue as Queue
    from anywire.multiprocessing.queues import SimpleQueue as SimpleQueue

__all__ = list(_standard.__all__)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # As the standard module does it: its names are methods of the default context.
    value = getattr(_default if name in __all__ else _standard, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
