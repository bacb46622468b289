"""One queue for several event threads, with one descriptor that all of them watch (as the notification pipe of MySQL
Proxy's event threads): each that wakes takes from the queue, and the descriptor stays readable while something is left.
"""

from collections import deque
from typing import Generic, TypeVar

from ._wakeup import Wakeup

T = TypeVar("T")


class SharedQueue(Generic[T]):
    """A queue whose descriptor is readable while it isn't empty. Thread-safe.

    Watch it in each thread's own demultiplexer for READ, level-triggered; all are woken, or with Trigger.EXCLUSIVE
    some. A thread that is woken calls `take`, which may find that others were faster.

    Args:
        kind: of `Wakeup`.

    >>> queue = SharedQueue()
    >>> queue.put("work")
    >>> queue.take(), queue.take()
    ('work', None)
    """

    def __init__(self, kind: str = "eventfd") -> None:
        self._items: deque[T] = deque()
        self._wakeup = Wakeup(kind)

    def fileno(self) -> int:
        """The descriptor to watch. ValueError: it is closed."""
        return self._wakeup.fileno()

    def put(self, item: T) -> None:
        """Add an item and wake the threads. From signal handlers, too. ValueError: it is closed."""
        self._wakeup.fileno()
        self._items.append(item)
        self._wakeup.wake()

    def take(self) -> T | None:
        """The next item; None when the queue is empty (so None makes no good item)."""
        try:
            return self._items.popleft()
        except IndexError:
            pass
        # Drained first, looked at afterwards: whoever puts something there from now on wakes anew.
        self._wakeup.drain()
        try:
            item = self._items.popleft()
        except IndexError:
            return None
        # More may have come with it, whose wake was just drained.
        self._wakeup.wake()
        return item

    def __len__(self) -> int:
        return len(self._items)

    def close(self) -> None:
        """Close the descriptor. Items that are left stay with `take` no longer."""
        self._items.clear()
        self._wakeup.close()
