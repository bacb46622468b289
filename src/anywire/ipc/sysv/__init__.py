"""System V message queues, semaphore sets and shared memory: the older primitives, found by integer keys."""

from .kernel_limits import Limits, limits
from .keys import CREATE, EXCLUSIVE, PRIVATE, ftok
from .memory import HUGE, MemoryStatus, SharedMemory
from .queue import MessageQueue, QueueStatus
from .semaphores import NOWAIT, UNDO, SemaphoreSet, SemaphoreStatus

__all__ = [
    "CREATE",
    "EXCLUSIVE",
    "HUGE",
    "NOWAIT",
    "PRIVATE",
    "UNDO",
    "Limits",
    "MemoryStatus",
    "MessageQueue",
    "QueueStatus",
    "SemaphoreSet",
    "SemaphoreStatus",
    "SharedMemory",
    "ftok",
    "limits",
]
