"""Queue, SimpleQueue and JoinableQueue over a ring in shared memory.

What is as in the standard library: the names, the arguments, what waits and what raises, who may share them (children,
by inheritance), `maxsize` counted in objects, and that a put never waits for a reader unless `maxsize` says so.

What is different:

- There is no feeder thread, until the ring is full. Then a put waits while its reader reads (at most a second; 5 ms
  for one that doesn't, less where that was in vain), and leaves the object to a thread of its process, which is the
  standard library's feeder: `close`, `join_thread`, `cancel_join_thread` and the end of the process treat it as they
  do there. So a program that puts 100 MB and starts the reader later works, and one whose reader keeps up has no
  second thread.
- Therefore an object is pickled by `put`, which raises what pickling raises, and later changes of it are not sent.
- Buffers of 1 KiB or more that support pickle's protocol 5 (NumPy arrays, PickleBuffer) are not pickled: they are
  copied into shared memory as they are, and out of it into a buffer of their own.
- A process that is killed takes with it what it had got, and what waited in its feeder; nothing else. Locks it held go
  to the next process, what it wrote half is dropped, and `maxsize` and `join()` don't count it any longer.

Any thread of any process that inherited a queue may use it. What can go wrong: queue.Full and queue.Empty, ValueError
when closed, what pickle raises, OSError.
"""

from __future__ import annotations

import collections
import errno
import os
import queue
import threading
import time
import weakref
from multiprocessing import context, queues, util
from multiprocessing.reduction import DupFd
from typing import Any

from anywire.multiprocessing._ring import Core, Memory, Ring, SimpleCore, Turnstile
from anywire.multiprocessing.connection import Connection, bells

SIZE = 1 << 21
"""Bytes of a queue's ring. What is longer than a quarter of it goes in pieces."""
IDLE = 1.0
"""Seconds after which a feeder with nothing to do ends."""
STALLED = 0.05
"""Seconds that a feeder stays in mid-message when nobody reads, before it lets other writers in and starts again."""
UNLIMITED = 2**31 - 1

_END = object()
_STANDARD_HOOK: Any = getattr(queues.Queue, "_on_queue_feeder_error")  # noqa: B009


def _ends(memory: Memory, reader: int, writer: int) -> tuple[Ring, Connection, Connection]:
    """A queue's two ends in this process. They don't own the memory's descriptor: the queue does."""
    ring = Ring(memory)
    first, second = Connection(Memory(-1), ring, None, reader), Connection(Memory(-1), None, ring, writer)
    first.lent = second.lent = memory
    return ring, first, second


def _handed(connection: Connection) -> Any:
    return None if connection.closed else DupFd(connection.bell_fd)


def _received(handed: Any) -> int:
    """The descriptor of an end, or of one that was closed before it travelled."""
    return -1 if handed is None else int(handed.detach())


class SimpleQueue(SimpleCore, queues.SimpleQueue):  # type: ignore[type-arg]
    """A queue whose `put` waits while its memory is full. Pool's queues are such ones."""

    def __init__(self, *, ctx: Any = None) -> None:
        self._open(Memory.create(SIZE), *bells())

    def _open(self, memory: Memory, reader: int, writer: int) -> None:
        self._memory = memory
        self._ring, self._reader, self._writer = _ends(memory, reader, writer)
        self._rlock = self._wlock = Turnstile(self._ring)
        self._poll = self._reader.poll

    def __getstate__(self) -> Any:
        context.assert_spawning(self)
        return DupFd(self._memory.fd), _handed(self._reader), _handed(self._writer)

    def __setstate__(self, state: Any) -> None:
        memory, reader, writer = state
        self._open(Memory(memory.detach()), _received(reader), _received(writer))

    def close(self) -> None:
        """Close both ends in this process."""
        self._reader.close()
        self._writer.close()


class Queue(Core, queues.Queue):  # type: ignore[type-arg]
    """A queue of objects, at most `maxsize` of them (0: any number)."""

    def __init__(self, maxsize: int = 0, *, ctx: Any = None) -> None:
        self._maxsize = maxsize if maxsize > 0 else UNLIMITED
        self._ignore_epipe = False
        self._opid = os.getpid()
        self._open(Memory.create(SIZE), *bells())

    def _open(self, memory: Memory, reader: int, writer: int) -> None:
        self._memory = memory
        self._limit(self._maxsize if self._maxsize < UNLIMITED else 0)
        self._ring, self._reader, self._writer = _ends(memory, reader, writer)
        self._rlock = self._wlock = Turnstile(self._ring)
        self._reset()
        util.register_after_fork(self, Queue._after_fork)

    def __getstate__(self) -> Any:
        context.assert_spawning(self)
        return (
            self._ignore_epipe, self._maxsize, DupFd(self._memory.fd), _handed(self._reader), _handed(self._writer),
            self._opid,
        )

    def __setstate__(self, state: Any) -> None:
        self._ignore_epipe, self._maxsize, memory, reader, writer, self._opid = state
        self._open(Memory(memory.detach()), _received(reader), _received(writer))

    def _after_fork(self) -> None:
        self._reset()

    def _reset(self, after_fork: bool = False) -> None:
        """Nothing waits in this process, which is new, or forked: what its parent's feeder has is the parent's."""
        self._pid = os.getpid()
        self._buffer: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._jointhread: Any = None
        self._joincancelled = False
        self._closed = False
        self._used = False
        self._waits = False
        self._close: Any = None
        self._slot_forget()

    def _overflow(self, data: bytes, content: int, buffers: int, block: bool, timeout: float | None) -> None:
        """Leave a message to the feeder, for the ring is full, or others wait there already."""
        if self._pid != os.getpid():    # forked by os.fork(), which tells nobody
            self._reset()
        deadline = self._deadline(block, timeout)
        while True:
            with self._changed:         # the feeder needs it, so never wait for others with it
                if self._thread is None and not self._start_thread():
                    break
                if self._slot_reserve():
                    self._buffer.append((data, content, buffers))
                    self._changed.notify()
                    return
            self._slot_wait(deadline)
        # Too many processes have feeders: wait for room.
        while not self._put_flat(data, content, buffers, False, 1.0):
            pass

    def _caught_up(self, patience: float) -> bool:
        """Whether what waits in the feeder has gone, before nothing was read for `patience` seconds. So a writer that
        is faster than its reader waits for it, up to a second, instead of piling up its messages."""
        if self._pid != os.getpid():    # forked by os.fork(), which tells nobody
            self._reset()
        deadline = time.monotonic() + 1
        with self._changed:
            while self._buffer:
                before = self._reading()
                self._waits = True
                if not self._changed.wait(patience) and (before == self._reading() or time.monotonic() > deadline):
                    return not self._buffer
        return True

    def _start_thread(self) -> bool:
        """Start the feeder, with `_changed` held. Whether it got a place to count its messages."""
        started: queue.SimpleQueue[bool] = queue.SimpleQueue()
        thread = threading.Thread(target=self._feed_ring, args=(started,), name="QueueFeederThread", daemon=True)
        thread.start()
        if not started.get():
            return False
        self._thread = thread
        if self._jointhread is not None:
            self._jointhread.cancel()
            self._jointhread = None
        if not self._joincancelled:
            self._jointhread = util.Finalize(thread, Queue._finalize_join, [weakref.ref(thread)], exitpriority=-5)
        if self._close is None:
            self._close = util.Finalize(self, Queue._finalize_close, [self._buffer, self._changed], exitpriority=10)
        return True

    @staticmethod
    def _finalize_join(reference: Any) -> None:
        thread = reference()
        if thread is not None:
            thread.join()

    @staticmethod
    def _finalize_close(buffer: Any, changed: Any) -> None:
        with changed:
            buffer.append(_END)
            changed.notify()

    def _feed_ring(self, started: queue.SimpleQueue[bool]) -> None:
        """The feeder: moves what waits into the ring, in order. It keeps a lock that tells other processes, by being
        released or orphaned, that its messages don't count any longer."""
        if not self._slot_take():
            started.put(False)
            return
        started.put(True)
        buffer, changed = self._buffer, self._changed
        try:
            while True:
                with changed:
                    while not buffer:
                        if not changed.wait(IDLE) and not buffer:
                            self._thread = None
                            return
                    message = buffer[0]
                if message is _END:
                    self._close_ends()
                    return
                data, content, buffers = message
                while not self._put_flat(data, content, buffers, True, STALLED):
                    self._wait_room(len(data), 1.0)
                buffer.popleft()        # only now: while it is there, puts stay behind it
                if not buffer and self._waits:
                    with changed:
                        self._waits = False
                        changed.notify_all()
        except BrokenPipeError as error:
            buffer.clear()
            if not self._ignore_epipe and not util.is_exiting():
                self._hook(error, None)
        finally:
            self._slot_release()

    @property
    def _hook(self) -> Any:
        """What a subclass has for errors of the feeder, as concurrent.futures does."""
        return getattr(self, "_on_queue_feeder_error")  # noqa: B009 - typeshed doesn't know it

    def _not_pickled(self, error: Exception, obj: object) -> None:
        """An object can't be pickled: raise that, or tell the hook that a subclass has for it."""
        if self._hook is _STANDARD_HOOK:
            raise error
        self._hook(error, obj)

    def _no_reader(self) -> None:
        """All reading ends are closed."""
        if not self._ignore_epipe:
            raise BrokenPipeError(errno.EPIPE, "all reading ends of this queue are closed")

    def _close_ends(self) -> None:
        self._reader.close()
        self._writer.close()
        self._memory.close()

    def close(self) -> None:
        """Say that this process puts and gets no more. What waits in its feeder still goes."""
        if self._pid != os.getpid():
            self._reset()
        self._closed = True
        with self._changed:
            close, self._close = self._close, None
            if self._thread is None:
                close = None
        if close is not None:
            close()
        elif self._used:                # an unused queue stays as it is, as in the standard library
            self._close_ends()

    def join_thread(self) -> None:
        """Wait until what this process put has left it. Only after close()."""
        assert self._closed, f"Queue {self!r} not closed"
        if self._jointhread is not None:
            self._jointhread()

    def cancel_join_thread(self) -> None:
        """Don't wait at the end of the process for what nobody has taken: it may be lost."""
        self._joincancelled = True
        if self._jointhread is not None:
            self._jointhread.cancel()
            self._jointhread = None

    def _terminate_broken(self) -> None:
        """As concurrent.futures wants it: let a feeder that nobody reads from end."""
        self._reader.close()
        self.close()
        self.join_thread()


class JoinableQueue(Queue, queues.JoinableQueue):  # type: ignore[type-arg]
    """A Queue that knows how many of its objects are still worked on."""

    def task_done(self) -> None:
        """Say that the work on an object that was got is done. Raises ValueError when said more often than put."""
        if not self._task_done():
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until task_done() was called for each object that was put."""
        self._join()
