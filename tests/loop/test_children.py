"""Subprocesses: the loop hears of their end by a descriptor, without a thread for each."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import anywire

SLEEPER = (sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)")


def watchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "waitpid" in thread.name]


def pidfds() -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += "pidfd" in os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            pass                            # the directory's own
    return found


@pytest.fixture
def policy() -> Iterator[Any]:
    """A policy for which nobody has set a watcher."""
    former = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
    yield asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(former)


async def three() -> list[int]:
    children = [await asyncio.create_subprocess_exec(*SLEEPER, stdin=asyncio.subprocess.PIPE) for _ in range(3)]
    assert watchers() == [] and pidfds() == 3
    await asyncio.gather(*(child.communicate(b"") for child in children))
    return [child.returncode for child in children if child.returncode is not None]


def test_no_thread_waits_for_them(policy: Any) -> None:
    for _ in range(2):                      # each on a loop of its own
        assert anywire.run(three()) == [7, 7, 7]
        assert pidfds() == 0


def test_in_another_thread(policy: Any) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.extend(anywire.run(three())))
    thread.start()
    thread.join()
    assert codes == [7, 7, 7]


def test_one_that_cannot_be_started_leaves_nothing(policy: Any) -> None:
    async def main() -> None:
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                await asyncio.create_subprocess_exec("/nowhere/at/all")
        assert pidfds() == 0

    anywire.run(main())


def test_a_watcher_that_somebody_set_is_used(policy: Any) -> None:
    asked: list[int] = []

    async def main() -> int:
        child = await asyncio.create_subprocess_exec(*SLEEPER, stdin=asyncio.subprocess.PIPE)
        assert asked == [child.pid]
        await child.communicate(b"")
        return await child.wait()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)       # 3.12 wants them gone, and has them

        class Watcher(asyncio.ThreadedChildWatcher):
            def add_child_handler(self, pid: int, callback: Any, *arguments: Any) -> None:
                asked.append(pid)
                super().add_child_handler(pid, callback, *arguments)

        policy.set_child_watcher(Watcher())
        assert anywire.run(main()) == 7
