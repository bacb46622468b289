"""The operating system's own primitives, complete, typed, awaitable; and what the wires need of it.

The public names, loaded at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anywire.ipc.commands import Command as Command
    from anywire.ipc.commands import popen as popen
    from anywire.ipc.condition import Condition as Condition
    from anywire.ipc.descriptors import ClockSet as ClockSet
    from anywire.ipc.descriptors import EventFd as EventFd
    from anywire.ipc.descriptors import TimerFd as TimerFd
    from anywire.ipc.descriptors import recv_fds as recv_fds
    from anywire.ipc.descriptors import recv_fds_async as recv_fds_async
    from anywire.ipc.descriptors import send_fds as send_fds
    from anywire.ipc.descriptors import send_fds_async as send_fds_async
    from anywire.ipc.fifos import Fifo as Fifo
    from anywire.ipc.fifos import FifoReader as FifoReader
    from anywire.ipc.files import Appender as Appender
    from anywire.ipc.files import FileLock as FileLock
    from anywire.ipc.files import Holder as Holder
    from anywire.ipc.files import append as append
    from anywire.ipc.inotify import FileEvent as FileEvent
    from anywire.ipc.inotify import Watch as Watch
    from anywire.ipc.mqueue import MessageQueue as MessageQueue
    from anywire.ipc.mqueue_notify import Notification as Notification
    from anywire.ipc.mutex import Mutex as Mutex
    from anywire.ipc.mutex import NotRecoverable as NotRecoverable
    from anywire.ipc.mutex import OwnerDied as OwnerDied
    from anywire.ipc.pipes import Pipe as Pipe
    from anywire.ipc.pipes import PipeReader as PipeReader
    from anywire.ipc.pipes import PipeWriter as PipeWriter
    from anywire.ipc.pipes import pipe as pipe
    from anywire.ipc.process import Process as Process
    from anywire.ipc.rwlock import RWLock as RWLock
    from anywire.ipc.semaphore import Semaphore as Semaphore
    from anywire.ipc.shared_memory import SharedMemory as SharedMemory
    from anywire.ipc.signals import SignalInfo as SignalInfo
    from anywire.ipc.signals import SignalQueue as SignalQueue
    from anywire.ipc.signals import sigqueue as sigqueue
    from anywire.ipc.signals import sigtimedwait as sigtimedwait
    from anywire.ipc.signals import sigtimedwait_async as sigtimedwait_async

_HOME = {
    "Appender": "files",
    "ClockSet": "descriptors",
    "Command": "commands",
    "Condition": "condition",
    "EventFd": "descriptors",
    "Fifo": "fifos",
    "FifoReader": "fifos",
    "FileEvent": "inotify",
    "FileLock": "files",
    "Holder": "files",
    "MessageQueue": "mqueue",
    "Mutex": "mutex",
    "NotRecoverable": "mutex",
    "Notification": "mqueue_notify",
    "OwnerDied": "mutex",
    "Pipe": "pipes",
    "PipeReader": "pipes",
    "PipeWriter": "pipes",
    "Process": "process",
    "RWLock": "rwlock",
    "Semaphore": "semaphore",
    "SharedMemory": "shared_memory",
    "SignalInfo": "signals",
    "SignalQueue": "signals",
    "TimerFd": "descriptors",
    "Watch": "inotify",
    "append": "files",
    "pipe": "pipes",
    "popen": "commands",
    "recv_fds": "descriptors",
    "recv_fds_async": "descriptors",
    "send_fds": "descriptors",
    "send_fds_async": "descriptors",
    "sigqueue": "signals",
    "sigtimedwait": "signals",
    "sigtimedwait_async": "signals",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'anywire.ipc' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"anywire.ipc.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
