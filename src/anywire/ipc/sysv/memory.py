"""System V shared memory: a segment of bytes that processes attach.

    with SharedMemory.create(PRIVATE, 4096, owner=True) as memory:
        memory.buf[:5] = b"hello"

The memory itself is in _memory.pyx. Any thread; who writes what when is the programs' business (a SemaphoreSet helps).
What can go wrong: the limits of shmmax, shmall and shmmni, named by the error with how to raise them. A removed segment
lives on until the last process has detached it. A child made by fork has what its parent had attached; the kernel
counts it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple, Self

from . import _calls, kernel_limits, keys
from ._memory import Memory
from .objects import Object, create_or_open

HUGE = 0o4000
"""The flag SHM_HUGETLB of a new segment: huge pages, which somebody must have reserved (vm.nr_hugepages)."""

_REMOVED = 0o1000


class MemoryStatus(NamedTuple):
    """What the kernel says of a segment (struct shmid_ds). Times are seconds of the epoch, 0 for never."""

    key: int
    uid: int
    gid: int
    creator_uid: int
    creator_gid: int
    mode: int
    size: int
    """Bytes, as they were asked for."""
    attach_time: int
    detach_time: int
    change_time: int
    creator_pid: int
    last_pid: int
    attached: int
    """How often it is attached, in all processes."""
    removed: bool
    """Whether it is gone when the last process detaches it."""


def _get(key: int, size: int, flags: int) -> int:
    try:
        return _calls.shmget(key, size, flags)
    except OSError as error:
        wrong = f"{size} bytes: at least 1, and {kernel_limits.explain('shmmax')}; or this key's is smaller"
        kernel_limits.refuse_get(
            error.errno or 0, keys.name_of(key, 0), "shared memory", flags, ("shmmni", "shmall"), wrong
        )


class SharedMemory(Memory, Object):
    """A reference to a segment, attached unless `attach=False`. Constructing opens it: `SharedMemory(key)`, with
    `flags` CREATE, EXCLUSIVE and HUGE as shmget(2) has them; `create`, `open`, `create_or_open` and `from_id` say what
    they mean. It is a buffer: `memoryview(memory)`, `memory.buf`, `numpy.frombuffer(memory)`.

    `size`: bytes of a new segment; an existing one must not be smaller. `mode`: the rights of a new segment.
    `readonly`: attach it for reading only. `owner`: the end of this reference removes the segment. OSErrors:
    FileNotFoundError, FileExistsError, PermissionError, EINVAL (names shmmax), ENOSPC (names shmmni and shmall)."""

    _what = "shared memory"
    _remove = staticmethod(_calls.shm_remove)
    _change = staticmethod(_calls.shm_set)

    def __init__(
        self, key: int, flags: int = 0, mode: int = 0o600, *, size: int = 0, readonly: bool = False,
        attach: bool = True, owner: bool = False,
    ) -> None:
        key = keys.key_of(key)
        if size < 0:
            raise ValueError(f"shared memory has a size of 1 byte or more, not {size}")
        if key == keys.PRIVATE or flags & keys.CREATE:
            flags |= mode & 0o777
        ident = create_or_open(key, flags, lambda key, flags: _get(key, size, flags))
        self._begin(ident, key, readonly, attach, owner)

    def _begin(self, ident: int, key: int | None, readonly: bool, attach: bool, owner: bool) -> None:
        try:
            status = _calls.shm_status(ident)
        except OSError as error:
            kernel_limits.refuse_id(error, ident, self._what)
        # A removed segment has lost its key.
        key = status[0] if key is None else key
        Memory.__init__(self, ident, key, keys.name_of(key, ident), status[6])
        if attach:
            self.attach(readonly=readonly)
        self.owner = owner

    @classmethod
    def create(
        cls, key: int | None, size: int, mode: int = 0o600, *, flags: int = 0, attach: bool = True, owner: bool = False
    ) -> Self:
        """A new segment of zeros. `key`: PRIVATE for one without a key; None for a random key that nobody had. `flags`:
        HUGE. FileExistsError: the key has a segment."""
        if key is None:
            return keys.made_up(lambda key: cls.create(key, size, mode, flags=flags, attach=attach, owner=owner))[1]
        flags |= keys.CREATE | keys.EXCLUSIVE
        return cls(key, flags, mode, size=size, attach=attach, owner=owner)

    @classmethod
    def open(cls, key: int, *, readonly: bool = False, attach: bool = True, owner: bool = False) -> Self:
        """The segment of this key. FileNotFoundError: there is none."""
        key = keys.key_of(key)
        if key == keys.PRIVATE:
            raise ValueError("private memory has no key to open it by; from_id(id) opens it, or a pickled reference")
        return cls(key, readonly=readonly, attach=attach, owner=owner)

    @classmethod
    def create_or_open(
        cls, key: int, size: int, mode: int = 0o600, *, attach: bool = True, owner: bool = False
    ) -> Self:
        """The segment of this key, which may be larger; a new one of this size if there is none."""
        return cls(key, keys.CREATE, mode, size=size, attach=attach, owner=owner)

    @classmethod
    def from_id(cls, ident: int, *, readonly: bool = False, attach: bool = True) -> Self:
        """A reference by id, as ipcs(1) shows them: the only way to a private segment of another process."""
        memory = cls.__new__(cls)
        memory._begin(ident, None, readonly, attach, owner=False)
        return memory

    @staticmethod
    def unlink(key: int) -> None:
        """Remove the segment of this key. FileNotFoundError: there is none."""
        SharedMemory.open(key, attach=False).remove()

    @property
    def buf(self) -> memoryview:
        """A memoryview of all of it. BufferError: it is not attached."""
        return memoryview(self)

    def stat(self) -> MemoryStatus:
        """The segment's status. OSError: EIDRM, gone; PermissionError, the mode lets this user not read."""
        try:
            found = _calls.shm_status(self.id)
        except OSError as error:
            self._refuse(error)
        return MemoryStatus._make((*found[:5], found[5] & 0o777, *found[6:], bool(found[5] & _REMOVED)))

    @property
    def attach_count(self) -> int:
        """How often the segment is attached now, in all processes."""
        return self.stat().attached

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.id, self.readonly, self.attached)

    def __del__(self, os: Any = os, warnings: Any = warnings) -> None:
        if self.attached and not self._owner:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
        super().__del__()


def _again(kind: type[SharedMemory], ident: int, readonly: bool, attach: bool) -> SharedMemory:
    return kind.from_id(ident, readonly=readonly, attach=attach)
