"""The start methods: the standard library's contexts, with queues and pipes of shared memory.

A context makes everything else exactly as its standard parent does, so Pool, Manager, locks and ProcessPoolExecutor
(`mp_context=`) are the standard library's, and use these queues where they ask their context for one.

What can go wrong: ValueError for an unknown start method, RuntimeError when it is set twice, as in the standard
library.
"""

from __future__ import annotations

from multiprocessing import context
from typing import Any


class Queues:
    """What a context here has of its own. Imported at the first use, as in the standard library."""

    def Pipe(self, duplex: bool = True) -> Any:  # noqa: N802
        """Two connected ends. With `duplex` both send and receive; else the first receives and the second sends."""
        from anywire.multiprocessing.connection import Pipe

        return Pipe(duplex)

    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802
        """A queue of objects, at most `maxsize` of them (0: any number)."""
        from anywire.multiprocessing.queues import Queue

        return Queue(maxsize, ctx=self)

    def JoinableQueue(self, maxsize: int = 0) -> Any:  # noqa: N802
        """A Queue with task_done() and join()."""
        from anywire.multiprocessing.queues import JoinableQueue

        return JoinableQueue(maxsize, ctx=self)

    def SimpleQueue(self) -> Any:  # noqa: N802
        """A queue with get, put and empty alone."""
        from anywire.multiprocessing.queues import SimpleQueue

        return SimpleQueue(ctx=self)

    def get_context(self, method: str | None = None) -> Any:
        """This context, or the one of a start method: "fork", "spawn" or "forkserver"."""
        if method is None:
            return self
        try:
            found = contexts[method]
        except KeyError:
            raise ValueError(f"cannot find context for {method!r}") from None
        found._check_available()
        return found


class ForkContext(Queues, context.ForkContext):
    """Children are forked."""


class SpawnContext(Queues, context.SpawnContext):
    """Children are new interpreters."""


class ForkServerContext(Queues, context.ForkServerContext):
    """Children are forked from a server that has no threads."""


contexts: dict[str, Any] = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


class DefaultContext(Queues, context.DefaultContext):
    """Follows the standard library's start method, and set_start_method() here sets it there."""

    def __init__(self) -> None:
        super().__init__(contexts["fork"])

    def get_context(self, method: str | None = None) -> Any:
        """The context of the start method that is set, or of another."""
        if method is not None:
            return Queues.get_context(self, method)
        return contexts[context._default_context.get_start_method()]

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """How children are started from now on, here and in the standard library."""
        context._default_context.set_start_method(method, force)

    def get_start_method(self, allow_none: bool = False) -> Any:
        """The name of the start method that is set."""
        return context._default_context.get_start_method(allow_none)


default = DefaultContext()
