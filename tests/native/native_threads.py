"""Threads that do something at the same time, for the tests of native code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

PATIENCE = 50.0     # seconds until a test gives up on a thread; the test itself has 60


def together(*works: Callable[[], Any]) -> None:
    """Run all at the same time; the first error of any is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        try:
            barrier.wait(20)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread still waits"
    if errors:
        raise errors[0]
