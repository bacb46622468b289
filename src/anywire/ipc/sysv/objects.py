"""What queues, semaphore sets and shared memory have in common: ownership, the end, pickling, how they are named.

System V objects live until they are removed or the machine stops; an object of Python is only a reference to one by its
id. With `owner=True` the end of the reference (close, the end of `with`, garbage collection) in the process that made
it removes the object. After fork, both processes have a reference and only the parent's owns. Pickled, it is a
reference by id, which does not own. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

from . import keys
from .kernel_limits import refuse, refuse_removed, refuse_use


def create_or_open(key: int, flags: int, get: Callable[[int, int], int]) -> int:
    """`get` with the flags; opening what exists does not ask for the rights of a new one's mode."""
    try:
        return get(key, flags)
    except PermissionError:
        if flags & keys.EXCLUSIVE or not flags & keys.CREATE:
            raise
        return get(key, flags & ~(keys.CREATE | 0o777))


class Object:
    """A reference to a System V object."""

    _what: ClassVar[str]
    _owner: int = 0                         # the process that removes it at the end
    _removed = False
    # Of the classes that are compiled, or of SemaphoreSet:
    id: int
    key: int
    name: str
    closed: bool

    @staticmethod
    def _remove(ident: int) -> None:
        raise NotImplementedError

    def shut(self) -> None:
        """Refuse everything from now on."""
        raise NotImplementedError

    @classmethod
    def from_id(cls, ident: int) -> Self:
        """A reference by id, as ipcs(1) shows them: the only way to a private object of another process."""
        raise NotImplementedError

    @staticmethod
    def _change(ident: int, uid: int | None, gid: int | None, mode: int | None) -> None:
        raise NotImplementedError

    def set(self, *, uid: int | None = None, gid: int | None = None, mode: int | None = None) -> None:
        """Change its owner, group or mode. PermissionError: only its creator, its owner and root may."""
        try:
            self._change(self.id, uid, gid, mode)
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> NoReturn:
        refuse_use(error, self.name, self._what)

    @property
    def owner(self) -> bool:
        """Whether the end of this reference removes the object; settable. True in the process alone that set it."""
        return self._owner == os.getpid()

    @owner.setter
    def owner(self, value: bool) -> None:
        self._owner = os.getpid() if value else 0

    def remove(self) -> None:
        """Remove the object, for everybody. Queues and semaphore sets are gone at once, and whoever waits gets an
        OSError (EIDRM); shared memory is gone when the last process has detached it. OSError: EPERM if it is another
        user's, EIDRM if it is gone already."""
        try:
            self._remove(self.id)
        except OSError as error:
            if isinstance(error, PermissionError):
                why = f"only its creator, its owner and root may remove this {self._what}"
                refuse(error.errno or 0, self.name, why)
            refuse_removed(self.name, self._what, waiting=False)
        self._removed = True
        self._owner = 0

    def close(self) -> None:
        """End this reference; an owner's removes the object. Calls that wait in other threads go on waiting."""
        if not self.closed:
            self.shut()
        if self.owner:
            self._owner = 0
            with contextlib.suppress(OSError):
                self._remove(self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, os: Any = os, warnings: Any = warnings) -> None:
        if self._owner == os.getpid() and not self.closed:
            warnings.warn(f"{self!r}, an owner, was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_id, (self.id,)

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<{type(self).__name__} key=0x{self.key & 0xFFFFFFFF:08x} id={self.id}{state}>"
