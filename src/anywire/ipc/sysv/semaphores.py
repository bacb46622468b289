"""System V semaphore sets: several counters, changed together by lists of operations that happen whole or not at all.

    with SemaphoreSet.create(PRIVATE, values=[1, 0], owner=True) as s:
        s.acquire(0, undo=True)
        s.op([(0, +1), (1, +1)], undo=True)

The initialisation race: semget(2) makes a set of zeros, and its values come later. Here the creator sets all values by
one operation, which is atomic and leaves its mark, sem_otime; who opens the set waits for that mark (W. R. Stevens,
"UNIX Network Programming", vol. 2, 11.6). The calls are made in _semaphores.pyx; the waits of tasks go through
anywire.ipc.helpers.

Any thread. What can go wrong: the limits of kernel.sem, named by the error with how to raise them; the set is removed
(OSError, EIDRM); a process that is killed with what it acquired without `undo` never gives it back.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn, Self

from anywire.ipc._interrupt import Interrupt
from anywire.ipc.helpers import Turns

from . import _calls, kernel_limits, keys
from ._semaphores import Set
from .objects import Object, create_or_open

NOWAIT = 0o4000
"""The flag IPC_NOWAIT of one operation: if just this one would have to wait, BlockingIOError."""

UNDO = 0x1000
"""The flag SEM_UNDO of one operation: when the process ends, the kernel takes it back."""


Operation = tuple[int, int] | tuple[int, int, int]
"""(index, change) or (index, change, flags)."""


class SemaphoreStatus(NamedTuple):
    """What the kernel says of a set (struct semid_ds). Times are seconds of the epoch, 0 for never."""

    key: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int
    semaphores: int
    """How many are in it."""
    operation_time: int
    change_time: int


def _get(key: int, count: int, flags: int) -> int:
    try:
        return _calls.semget(key, count, flags)
    except OSError as error:
        wrong = f"a set of {count} semaphores: {kernel_limits.explain('semmsl')}, or the set of this key has fewer"
        kernel_limits.refuse_get(
            error.errno or 0, keys.name_of(key, 0), "semaphore set", flags, ("semmni", "semmns"), wrong
        )


class SemaphoreSet(Set, Object):
    """A reference to a set. Constructing opens it: `SemaphoreSet(key)`, with `flags` CREATE and EXCLUSIVE as semget(2)
    has them; `create`, `open`, `create_or_open` and `from_id` say what they mean.

    `values`: the values of a new set, one for each semaphore; 0 to 32767. `mode`: the rights of a new set.
    `initialised`: wait until the set has had an operation, which our creators make with its values; False for sets of
    programs that never do. `timeout`: seconds of that wait. `owner`: the end of this reference removes the set.
    OSErrors: FileNotFoundError, FileExistsError, PermissionError, TimeoutError (nobody initialised it), ENOSPC (names
    the limit)."""

    _what = "semaphore set"
    _remove = staticmethod(_calls.sem_remove)
    _change = staticmethod(_calls.sem_set)

    def __init__(
        self, key: int, flags: int = 0, mode: int = 0o600, *, values: Sequence[int] = (1,), initialised: bool = True,
        timeout: float | None = 10.0, owner: bool = False,
    ) -> None:
        key = keys.key_of(key)
        if key == keys.PRIVATE or flags & keys.CREATE:
            # Exclusive first: only who made the set may initialise it.
            made = flags | keys.CREATE | keys.EXCLUSIVE | (mode | 0o600) & 0o777
            while True:
                try:
                    ident = _get(key, len(_checked(values)), made)
                except FileExistsError:
                    if flags & keys.EXCLUSIVE:
                        raise
                else:
                    _initialise(ident, values, mode)
                    self._begin(ident, key, len(values), owner)
                    return
                try:
                    ident = create_or_open(key, flags & ~keys.CREATE, lambda key, flags: _get(key, 0, flags))
                    break
                except FileNotFoundError:
                    continue                    # removed just now
        else:
            ident = _get(key, 0, 0)
        if initialised:
            _wait_for_initialisation(ident, keys.name_of(key, ident), timeout)
        self._begin(ident, key, _status(ident, keys.name_of(key, ident)).semaphores, owner)

    def _begin(self, ident: int, key: int, count: int, owner: bool) -> None:
        Set.__init__(self, ident, key, keys.name_of(key, ident), count)
        self._turns = Turns()
        self.owner = owner

    @classmethod
    def create(cls, key: int | None, mode: int = 0o600, *, values: Sequence[int] = (1,), owner: bool = False) -> Self:
        """A new set of these values. `key`: PRIVATE for one without a key; None for a random key that nobody had.
        FileExistsError: the key has a set."""
        if key is None:
            return keys.made_up(lambda key: cls.create(key, mode, values=values, owner=owner))[1]
        return cls(key, keys.CREATE | keys.EXCLUSIVE, mode, values=values, owner=owner)

    @classmethod
    def open(
        cls, key: int, *, initialised: bool = True, timeout: float | None = 10.0, owner: bool = False
    ) -> Self:
        """The set of this key, when it has been initialised. FileNotFoundError: there is none."""
        key = keys.key_of(key)
        if key == keys.PRIVATE:
            raise ValueError("a private set has no key to open it by; from_id(id) opens it, or a pickled reference")
        return cls(key, initialised=initialised, timeout=timeout, owner=owner)

    @classmethod
    def create_or_open(
        cls, key: int, mode: int = 0o600, *, values: Sequence[int] = (1,), initialised: bool = True,
        timeout: float | None = 10.0, owner: bool = False,
    ) -> Self:
        """The set of this key, when it has been initialised; a new one of these values if there is none."""
        return cls(
            key, keys.CREATE, mode, values=values, initialised=initialised, timeout=timeout, owner=owner
        )

    @classmethod
    def from_id(cls, ident: int) -> Self:
        """A reference by id, as ipcs(1) shows them: the only way to a private set of another process."""
        try:
            status = SemaphoreStatus(*_calls.sem_status(ident))
        except OSError as error:
            kernel_limits.refuse_id(error, ident, cls._what)
        found = cls.__new__(cls)
        found._begin(ident, status.key, status.semaphores, owner=False)
        return found

    @staticmethod
    def unlink(key: int) -> None:
        """Remove the set of this key. FileNotFoundError: there is none."""
        SemaphoreSet.open(key, initialised=False).remove()

    # acquire, release and wait_zero: _semaphores.pyx.

    def op(
        self, operations: Iterable[Operation], *, undo: bool = False, timeout: float | None = None, block: bool = True
    ) -> None:
        """Make all operations at once, or wait until that is possible: semtimedop(2).

        `operations`: (index, change) each, or (index, change, flags) with NOWAIT and UNDO. A positive change releases,
        a negative one acquires, 0 waits for zero; a later one of the list sees what the earlier did. `undo`: UNDO for
        all of them. `timeout`: seconds to wait, None for ever. TimeoutError; BlockingIOError with `block=False` or
        NOWAIT. OSError: EIDRM, ERANGE, E2BIG (names semopm); PermissionError, IndexError, ValueError."""
        self.operate(operations, undo, timeout, block, None)

    @contextmanager
    def held(self, index: int = 0, n: int = 1, *, undo: bool = True, timeout: float | None = None) -> Iterator[None]:
        """A `with` block that has acquired n and releases them at its end; also if the process is killed inside it."""
        self.acquire(index, n, undo=undo, timeout=timeout)
        try:
            yield
        finally:
            self.release(index, n, undo=undo)

    # In an event loop.

    async def op_async(
        self, operations: Iterable[Operation], *, undo: bool = False, timeout: float | None = None
    ) -> None:
        """`op`, without keeping the loop from its work. Cancelled: nothing was changed, or it was changed
        back (except what others have taken of what was given)."""
        wanted = list(operations)
        key = (tuple(tuple(operation) for operation in wanted), undo)
        if not self._turns.busy(key):
            try:
                self.operate(wanted, undo, None, False, None)
                return
            except BlockingIOError:
                pass

        def call(interrupt: Interrupt, left: float | None) -> None:
            self.operate(wanted, undo, left, True, interrupt)

        def give_back(_: None) -> None:
            back: list[Operation] = [
                (operation[0], -operation[1], (operation[2] & UNDO if len(operation) == 3 else 0) | NOWAIT)
                for operation in reversed(wanted)
                if operation[1]
            ]
            with suppress(OSError):             # removed; or what was given has been taken by others
                self.operate(back, undo, None, True, None)

        await self._turns.wait(key, call, give_back, timeout, self._late)

    async def acquire_async(
        self, index: int = 0, n: int = 1, *, undo: bool = False, timeout: float | None = None
    ) -> None:
        """`acquire`, without keeping the loop from its work. Cancelled: nothing was taken, or it was given back."""
        if n < 1:
            raise ValueError(f"acquire takes 1 or more, not {n}")
        await self.op_async([(index, -n)], undo=undo, timeout=timeout)

    async def wait_zero_async(self, index: int = 0, *, timeout: float | None = None) -> None:
        """`wait_zero`, without keeping the loop from its work."""
        await self.op_async([(index, 0)], timeout=timeout)

    def _late(self, seconds: float) -> NoReturn:
        raise TimeoutError(errno.ETIMEDOUT, f"the operations could not be made for {seconds:g} s", self.name)

    # Values, and what the kernel says of it.

    def __len__(self) -> int:
        return self.count

    def value(self, index: int = 0) -> int:
        """The value of a semaphore now."""
        return self._control(index, _calls.CONTROL_GETVAL)

    def set_value(self, index: int, value: int) -> None:
        """Set a semaphore; what processes have to undo of it is forgotten. Wakes who can go on then."""
        self._index(index)
        _checked([value])
        try:
            _calls.sem_set_value(self.id, index, value)
        except OSError as error:
            self._refuse(error)

    @property
    def values(self) -> list[int]:
        """The values of all semaphores at one moment; settable, as `set_value` for all at once."""
        try:
            return _calls.sem_values(self.id, self.count)
        except OSError as error:
            self._refuse(error)

    @values.setter
    def values(self, values: Sequence[int]) -> None:
        if len(values) != self.count:
            raise ValueError(f"the set ({self.name}) has {self.count} semaphores, not {len(values)}")
        try:
            _calls.sem_set_values(self.id, list(_checked(values)))
        except OSError as error:
            self._refuse(error)

    def waiting(self, index: int = 0) -> int:
        """How many threads and processes wait to acquire this semaphore (GETNCNT)."""
        return self._control(index, _calls.CONTROL_GETNCNT)

    def waiting_zero(self, index: int = 0) -> int:
        """How many wait until this semaphore is zero (GETZCNT)."""
        return self._control(index, _calls.CONTROL_GETZCNT)

    def last_pid(self, index: int = 0) -> int:
        """The process that changed this semaphore last (GETPID); 0: none."""
        return self._control(index, _calls.CONTROL_GETPID)

    def stat(self) -> SemaphoreStatus:
        """The set's status. OSError: EIDRM, removed; PermissionError, the mode lets this user not read."""
        return _status(self.id, self.name)

    @property
    def initialised(self) -> bool:
        """Whether the set has had an operation."""
        return self.stat().operation_time != 0

    def _index(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"the set ({self.name}) has {self.count} semaphores, 0 to {self.count - 1}; not {index}")

    def _control(self, index: int, command: int) -> int:
        self._index(index)
        try:
            return _calls.sem_control(self.id, index, command)
        except OSError as error:
            self._refuse(error)


def _status(ident: int, name: str) -> SemaphoreStatus:
    try:
        return SemaphoreStatus(*_calls.sem_status(ident))
    except OSError as error:
        kernel_limits.refuse_use(error, name, SemaphoreSet._what)


def _checked(values: Sequence[int]) -> Sequence[int]:
    for value in values:
        if not 0 <= value <= 32767:
            raise ValueError(f"a semaphore's value is 0 to 32767, not {value}")
    return values


def _initialise(ident: int, values: Sequence[int], mode: int) -> None:
    """Set a new set's values by one operation; what does not fit into one call is set before it."""
    try:
        together = kernel_limits.limits().semopm
        if 0 < together < len(values):
            _calls.sem_set_values(ident, [0] * together + list(values[together:]))
            values = values[:together]
        operations: list[Operation] = [(i, value) for i, value in enumerate(values) if value]
        Set(ident, 0, f"id {ident}", max(len(values), 1)).operate(operations or [(0, 0)], False, None, False, None)
        if mode & 0o600 != 0o600:
            _calls.sem_set(ident, None, None, mode)
    except BaseException:
        _calls.sem_remove(ident)
        raise


def _wait_for_initialisation(ident: int, name: str, timeout: float | None) -> None:
    """Until sem_otime is set. Nothing tells of that, so it looks now and then, and rarely twice."""
    until = None if timeout is None else time.monotonic() + timeout
    pause = 0.0002
    while True:
        if _status(ident, name).operation_time:
            return
        if until is not None and time.monotonic() >= until:
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"the set has had no operation within {timeout:g} s: its creator has not initialised it, or died; "
                "remove it, or open it with initialised=False",
                name,
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
