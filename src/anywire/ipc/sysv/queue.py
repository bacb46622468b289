"""System V message queues: messages with a type each, chosen by it; kept by the kernel until they are taken.

    with MessageQueue.create(ftok("/etc/hostname"), owner=True) as queue:
        queue.send(b"hello", type=3)
        queue.recv(type=3)                      # (b"hello", 3)

The calls are made in _queue.pyx; the waits of tasks go through anywire.ipc.helpers. Any thread; a queue belongs to no
process. What can go wrong: the limits of msgmni, msgmax and msgmnb, each named by the error with how to raise it; the
queue is removed (OSError, EIDRM).
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from anywire.ipc._interrupt import Interrupt
from anywire.ipc.helpers import Turns, submit

from . import _calls, kernel_limits, keys
from ._queue import Queue
from .objects import Object, create_or_open

if TYPE_CHECKING:
    from typing_extensions import Buffer


class QueueStatus(NamedTuple):
    """What the kernel says of a queue (struct msqid_ds). Times are seconds of the epoch, 0 for never."""

    key: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int
    depth: int
    """Messages in it."""
    bytes: int
    """Bytes of them."""
    max_bytes: int
    """Bytes of messages that it may hold."""
    last_send_pid: int
    last_recv_pid: int
    last_send_time: int
    last_recv_time: int
    change_time: int


def _get(key: int, flags: int) -> int:
    try:
        return _calls.msgget(key, flags)
    except OSError as error:
        kernel_limits.refuse_get(
            error.errno or 0, keys.name_of(key, 0), "queue", flags, ("msgmni",), "the kernel refuses these flags"
        )


class MessageQueue(Queue, Object):
    """A reference to a queue. Constructing opens it: `MessageQueue(key)`, with `flags` CREATE and EXCLUSIVE as
    msgget(2) has them; `create`, `open`, `create_or_open` and `from_id` say what they mean.

    `mode`: the rights of a new queue, 0o600: this user reads and writes. `owner`: the end of this reference removes the
    queue. OSErrors: FileNotFoundError, FileExistsError, PermissionError, ENOSPC (names msgmni)."""

    _what = "queue"
    _remove = staticmethod(_calls.msg_remove)

    def __init__(self, key: int, flags: int = 0, mode: int = 0o600, *, owner: bool = False) -> None:
        key = keys.key_of(key)
        if key == keys.PRIVATE or flags & keys.CREATE:
            flags |= mode & 0o777
        self._begin(create_or_open(key, flags, _get), key, owner)

    def _begin(self, ident: int, key: int, owner: bool) -> None:
        Queue.__init__(self, ident, key, keys.name_of(key, ident))
        self._turns = Turns()
        self.owner = owner

    @classmethod
    def create(cls, key: int | None, mode: int = 0o600, *, max_bytes: int | None = None, owner: bool = False) -> Self:
        """A new queue. `key`: PRIVATE for one without a key; None for a random key that nobody had. `max_bytes`: how
        many bytes of messages it may hold, in place of kernel.msgmnb. FileExistsError: the key has a queue."""
        flags = keys.CREATE | keys.EXCLUSIVE | mode & 0o777
        if key is None:
            key, ident = keys.made_up(lambda key: _get(key, flags))
        else:
            key = keys.key_of(key)
            ident = _get(key, flags)
        queue = cls._of(ident, key, owner)
        if max_bytes is not None:
            try:
                queue.set(max_bytes=max_bytes)
            except BaseException:
                queue.remove()
                raise
        return queue

    @classmethod
    def open(cls, key: int, *, owner: bool = False) -> Self:
        """The queue of this key. FileNotFoundError: there is none."""
        key = keys.key_of(key)
        if key == keys.PRIVATE:
            raise ValueError("a private queue has no key to open it by; from_id(id) opens it, or a pickled reference")
        return cls(key, owner=owner)

    @classmethod
    def create_or_open(cls, key: int, mode: int = 0o600, *, owner: bool = False) -> Self:
        """The queue of this key; a new one of this mode if there is none."""
        return cls(key, keys.CREATE, mode, owner=owner)

    @classmethod
    def from_id(cls, ident: int) -> Self:
        """A reference by id, as ipcs(1) shows them: the only way to a private queue of another process."""
        try:
            key = _calls.msg_status(ident)[0]
        except PermissionError:
            key = keys.PRIVATE                  # it may be written to all the same
        except OSError as error:
            kernel_limits.refuse_id(error, ident, cls._what)
        return cls._of(ident, key, owner=False)

    @classmethod
    def _of(cls, ident: int, key: int, owner: bool) -> Self:
        queue = cls.__new__(cls)
        queue._begin(ident, key, owner)
        return queue

    @staticmethod
    def unlink(key: int) -> None:
        """Remove the queue of this key. FileNotFoundError: there is none."""
        MessageQueue.open(key).remove()

    # send, recv and recv_into: _queue.pyx.

    def peek(self, index: int = 0) -> tuple[bytes, int]:
        """The message at this place, which stays in the queue; 0 is the oldest. IndexError: there are not so many.
        OSError ENOSYS: a kernel without MSG_COPY."""
        return self.copy_message(index)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """Take messages as they come, until the queue is removed."""
        while True:
            try:
                yield self.recv_message(0, None, None, None, True, None)
            except OSError as error:
                if error.errno != errno.EIDRM:
                    raise
                return

    # In an event loop.

    async def send_async(self, message: Buffer, type: int = 1, *, timeout: float | None = None) -> None:
        """`send`, without keeping the loop from its work. Cancelled: the message was not sent, unless it had gone by
        then; a message can't be taken back out of a queue."""
        key = "room"
        if not self._turns.busy(key):
            try:
                self.send_message(message, type, None, False, None)
                return
            except BlockingIOError:
                pass
        # The caller may go on changing a buffer of its own when it is cancelled, while the helper's thread ends.
        data = bytes(message)

        def call(interrupt: Interrupt, left: float | None) -> None:
            self.send_message(data, type, left, True, interrupt)

        await self._turns.wait(key, call, lambda _: None, timeout, lambda seconds: self._late("room", seconds))

    async def recv_async(
        self, type: int = 0, *, excluding: int | None = None, timeout: float | None = None
    ) -> tuple[bytes, int]:
        """`recv`, without keeping the loop from its work.

        Cancelled: nothing was taken. A message that the kernel had handed over just then is put back, as the newest of
        the queue: those that came after it are before it now. (If the queue is full by then, it is put back as soon as
        there is room.)"""
        key = (type, excluding)
        if not self._turns.busy(key):
            try:
                return self.recv_message(type, excluding, None, None, False, None)
            except BlockingIOError:
                pass

        def call(interrupt: Interrupt, left: float | None) -> tuple[bytes, int]:
            return self.recv_message(type, excluding, None, left, True, interrupt)

        return await self._turns.wait(
            key, call, self._put_back, timeout, lambda seconds: self._late("such message", seconds)
        )

    async def __aiter__(self) -> AsyncIterator[tuple[bytes, int]]:
        """Take messages as they come, until the queue is removed."""
        while True:
            try:
                message = await self.recv_async()
            except OSError as error:
                if error.errno != errno.EIDRM:
                    raise
                return
            yield message

    def _put_back(self, message: tuple[bytes, int]) -> None:
        queue = Queue(self.id, self.key, self.name)         # this one may be closed by now

        def wait() -> None:
            try:
                queue.send_message(*message, None, True, None)
            except OSError:
                pass                                        # removed, and its messages with it

        try:
            queue.send_message(*message, None, False, None)
        except BlockingIOError:
            submit(wait)
        except OSError:
            pass

    def _late(self, what: str, seconds: float) -> NoReturn:
        raise TimeoutError(errno.ETIMEDOUT, f"the queue had no {what} for {seconds:g} s", self.name)

    # What the kernel says of it.

    def stat(self) -> QueueStatus:
        """The queue's status. OSError: EIDRM, removed; PermissionError, the mode lets this user not read."""
        try:
            return QueueStatus(*_calls.msg_status(self.id))
        except OSError as error:
            self._refuse(error)

    @property
    def depth(self) -> int:
        """How many messages are in it now."""
        return self.stat().depth

    def set(
        self, *, uid: int | None = None, gid: int | None = None, mode: int | None = None, max_bytes: int | None = None
    ) -> None:
        """Change its owner, group, mode, or how many bytes of messages it may hold; above kernel.msgmnb only with
        CAP_SYS_RESOURCE."""
        try:
            _calls.msg_set(self.id, uid, gid, mode, max_bytes)
        except OSError as error:
            most = kernel_limits.limits().msgmnb
            if isinstance(error, PermissionError) and max_bytes is not None and max_bytes > most >= 0:
                why = f"max_bytes={max_bytes} needs CAP_SYS_RESOURCE: {kernel_limits.explain('msgmnb')}"
                kernel_limits.refuse(error.errno or 0, self.name, why)
            self._refuse(error)
