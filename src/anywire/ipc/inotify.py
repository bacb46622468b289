"""`Watch`: what happens to files and directories (inotify(7)).

    >>> import tempfile
    >>> from anywire.ipc import Watch
    >>> with tempfile.TemporaryDirectory() as directory, Watch(directory) as watch:
    ...     open(directory + "/new", "w").close()
    ...     event = watch.recv(timeout=5)
    ...     event.kind, event.path == directory + "/new"
    ('created', True)

A rename inside what is watched is one event with both names. What comes too fast for a reader is not lost silently: an
"overflow" says that events are missing. Only what happens through this machine's kernel is told: nothing of other
NFS clients, and nothing of /proc and /sys.

Any thread; each event goes to one who waits. A forked child shares the descriptor: an event that one reads the other
does not get. It does not pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator
from typing import NamedTuple

from anywire.ipc import _calls, waiting
from anywire.ipc.owned import Owned, deadline_of, forget, late, left, wait

_HEAD = struct.Struct("iIII")               # struct inotify_event: watch, mask, cookie, length of the name
ACCESS, MODIFY, ATTRIB, CLOSE_WRITE, OPEN = 0x1, 0x2, 0x4, 0x8, 0x20
MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
UNMOUNT, OVERFLOW, IGNORED, ONLYDIR, DONT_FOLLOW, ISDIR = 0x2000, 0x4000, 0x8000, 0x1000000, 0x2000000, 0x40000000

KINDS = {
    "created": CREATE,
    "deleted": DELETE | DELETE_SELF,
    "modified": MODIFY,
    "closed": CLOSE_WRITE,
    "moved": MOVED_FROM | MOVED_TO | MOVE_SELF,
    "attributes": ATTRIB,
    "opened": OPEN,
    "read": ACCESS,
}
"""What may be asked for. "closed": after it was open for writing. "attributes": mode, owner, times, links."""
USUAL = ("created", "deleted", "modified", "closed", "moved")
TREE = CREATE | MOVED_FROM | MOVED_TO | DELETE | DELETE_SELF
"""What a recursive watch needs to know of directories in any case."""
PAIRING = 0.005
"""Seconds that the first half of a rename waits for the second, which the kernel mostly puts right behind it."""


class FileEvent(NamedTuple):
    """Something that happened."""

    kind: str
    """One of KINDS; or "moved_in" and "moved_out" for renames of which one side is not watched, "overflow" (events are
    missing: look for yourself), "unmounted"."""
    path: str
    """The file; after a rename its new name."""
    source: str | None = None
    """Of "moved": the former name."""
    directory: bool = False
    """Whether it is a directory."""


class Watch(Owned):
    """A watch on a file, on a directory and the files in it, or with `recursive` on a whole tree.

    Parameters: `kinds`, of KINDS, what to tell. `recursive`: directories that are made or moved there are watched too;
    files that were made in a new one before the watch was there are told as "created", some perhaps twice. Symbolic
    links are not followed. `unwatched` lists directories of the tree that may not be read.
    Raises FileNotFoundError, PermissionError, ValueError for an unknown kind; OSError (ENOSPC) when the user has as
    many watches as it may have, (EMFILE) as many instances: the text names the limit.
    """

    def __init__(
        self, path: str | os.PathLike[str], kinds: Collection[str] = USUAL, *, recursive: bool = False
    ) -> None:
        unknown = set(kinds) - set(KINDS)
        if unknown or isinstance(kinds, str):
            raise ValueError(f"the kinds are {', '.join(KINDS)}; not {', '.join(sorted(unknown)) or repr(kinds)}")
        self.path = os.fspath(path)
        self.kinds = frozenset(kinds)
        self.recursive = recursive
        self.unwatched: list[str] = []
        """Directories that could not be watched."""
        self._mask = 0
        for kind in kinds:
            self._mask |= KINDS[kind]
        if recursive:
            self._mask |= TREE
        self._paths: dict[int, str] = {}
        self._events: deque[FileEvent] = deque()
        self._moving: tuple[int, str, bool] | None = None      # cookie, name, whether a directory
        self._rung = False
        self._guard = threading.Lock()
        super().__init__(_calls.inotify_init(), self.path)
        # Waits are for an epoll of two: what the kernel has, and what was taken from it and waits here for others.
        self._left = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._any = select.epoll()
        self._any.register(self._fd, select.EPOLLIN)
        self._any.register(self._left, select.EPOLLIN)
        try:
            self._add(self.path)
            if recursive:
                self._add_below(self.path, tell=False)
        except BaseException:
            self.close()
            raise

    def _add(self, path: str, flags: int = 0) -> None:
        self._paths[_calls.inotify_add_watch(self.fileno(), os.fsencode(path), self._mask | flags)] = path

    def _add_below(self, top: str, *, tell: bool) -> None:
        """Watch the directories below one; tell what is in them."""
        try:
            entries = list(os.scandir(top))
        except NotADirectoryError:
            return
        except FileNotFoundError:                           # gone again
            return
        except PermissionError:
            self.unwatched.append(top)
            return
        for entry in entries:
            directory = entry.is_dir(follow_symlinks=False)
            if directory:
                self._add_directory(entry.path)
            if tell:
                self._tell("created", entry.path, directory=directory)
            if directory:
                self._add_below(entry.path, tell=tell)

    def _add_directory(self, path: str) -> None:
        try:
            self._add(path, ONLYDIR | DONT_FOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError:
            self.unwatched.append(path)

    def _tell(self, kind: str, path: str, source: str | None = None, *, directory: bool = False) -> None:
        asked = "moved" if kind.startswith("moved") else kind
        if asked in self.kinds or asked not in KINDS:
            self._events.append(FileEvent(kind, path, source, directory))

    def _read(self) -> None:
        """Take what the kernel has. BlockingIOError: nothing."""
        data = os.read(self.fileno(), 1 << 16)
        place = 0
        while place < len(data):
            number, mask, cookie, length = _HEAD.unpack_from(data, place)
            place += _HEAD.size
            name = os.fsdecode(data[place : place + length].rstrip(b"\0"))
            place += length
            self._one(number, mask, cookie, name)

    def _one(self, number: int, mask: int, cookie: int, name: str) -> None:
        directory = bool(mask & ISDIR)
        if mask & OVERFLOW:
            self._settle()
            self._events.append(FileEvent("overflow", self.path, None, True))
            if self.recursive:
                self._add_below(self.path, tell=False)      # directories may have been missed
            return
        place = self._paths.get(number)
        if place is None:                                   # of a watch that was taken back
            return
        if mask & IGNORED:
            del self._paths[number]
            return
        path = os.path.join(place, name) if name else place
        if mask & MOVED_TO and self._moving is not None and self._moving[0] == cookie:
            source = self._moving[1]
            self._moving = None
            self._tell("moved", path, source, directory=directory)
            if directory and self.recursive:
                self._renamed(source, path)
            return
        self._settle()
        if mask & MOVED_FROM:
            self._moving = (cookie, path, directory)
        elif mask & (CREATE | MOVED_TO):
            self._tell("created" if mask & CREATE else "moved_in", path, directory=directory)
            if directory and self.recursive:
                self._add_directory(path)
                self._add_below(path, tell=bool(mask & CREATE))
        elif mask & (DELETE_SELF | MOVE_SELF):
            if place == self.path:                          # of others the directory above tells
                self._tell("deleted" if mask & DELETE_SELF else "moved_out", path, directory=directory)
        elif mask & UNMOUNT:
            self._tell("unmounted", path, directory=directory)
        else:
            for kind in ("deleted", "modified", "closed", "attributes", "opened", "read"):
                if mask & KINDS[kind]:
                    self._tell(kind, path, directory=directory)

    def _settle(self) -> None:
        """The second half of a rename did not come: it went where nobody watches."""
        if self._moving is not None:
            _, path, directory = self._moving
            self._moving = None
            self._tell("moved_out", path, directory=directory)
            if directory and self.recursive:
                for number, place in list(self._paths.items()):
                    if _within(place, path):
                        del self._paths[number]
                        with contextlib.suppress(OSError):
                            _calls.inotify_rm_watch(self.fileno(), number)

    def _renamed(self, source: str, path: str) -> None:
        for number, place in self._paths.items():
            if _within(place, source):
                self._paths[number] = path + place[len(source) :]
        if path not in self._paths.values():                # its watch was not there yet
            self._add_directory(path)
            self._add_below(path, tell=False)

    def _next(self) -> FileEvent | None:
        """The next event that is whole. None: there is none now."""
        with self._guard:
            while not self._events:
                try:
                    self._read()
                except BlockingIOError:
                    return None
            return self._first()

    def _first(self) -> FileEvent:
        event = self._events.popleft()
        if self._events and not self._rung:
            os.eventfd_write(self._left, 1)
        elif self._rung and not self._events:
            os.eventfd_read(self._left)
        self._rung = bool(self._events)
        return event

    def _ready(self) -> int:
        self.fileno()                                       # OSError (EBADF) when it is closed
        return self._any.fileno()

    def close(self) -> None:
        """End all watches; waits for them end with OSError (EBADF)."""
        if not self.closed:
            super().close()
            forget(self._any.fileno())
            self._any.close()
            os.close(self._left)

    def _half(self) -> FileEvent | None:
        with self._guard:
            self._settle()
            return self._first() if self._events else None

    def try_recv(self) -> FileEvent:
        """An event that has come. BlockingIOError: none has, or only the first half of a rename."""
        event = self._next()
        if event is None:
            raise BlockingIOError(errno.EAGAIN, "nothing happened", self.name)
        return event

    def recv(self, *, timeout: float | None = None) -> FileEvent:
        """The next event. TimeoutError: nothing happened within `timeout` seconds."""
        deadline = deadline_of(timeout)
        while (event := self._next()) is None:
            if self._moving is not None:
                if not wait(self._ready(), deadline_of(PAIRING)) and (event := self._half()) is not None:
                    return event
            elif not wait(self._ready(), deadline):
                raise late(self.name, "nothing happened", timeout)
        return event

    async def recv_async(self, *, timeout: float | None = None) -> FileEvent:
        """`recv` for an event loop. Cancelled, it has taken nothing."""
        deadline = deadline_of(timeout)
        while (event := self._next()) is None:
            moving = self._moving is not None
            try:
                async with asyncio.timeout(PAIRING if moving else left(deadline)):
                    await waiting.readable(self._ready())
            except TimeoutError:
                if not moving:
                    raise late(self.name, "nothing happened", timeout) from None
                if (event := self._half()) is not None:
                    return event
        return event

    def __iter__(self) -> Iterator[FileEvent]:
        while True:
            yield self.recv()

    async def __aiter__(self) -> AsyncIterator[FileEvent]:
        while True:
            yield await self.recv_async()

    def __reduce__(self) -> tuple[type[Watch], tuple[str]]:
        raise TypeError(f"a Watch does not pickle: make one of {self.path} in the other process")


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + os.sep)
