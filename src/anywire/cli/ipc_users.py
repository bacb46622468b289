"""Who has an object of the system open: one look at /proc, for all objects at a time.

Descriptors are compared by device and inode, mappings by the same (proc(5), /proc/PID/maps). Whom this user may not
look at is counted: of what they might have open one can only say that it is not known. Processes of other PID
namespaces (containers) are not in /proc at all.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
Key = tuple[str, int, int]
"""("file", device, inode), ("socket", 0, inode) or ("sysv", 0, id) of a System V segment."""

_MAPPED = re.compile(r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +(.*)$")
_QUEUE_SIZE = 80
"""What stat(2) says of the size of every POSIX message queue: the room of its file's text (FILENT_SIZE)."""


@dataclass
class Users:
    """What was found."""

    of: dict[Key, set[int]] = field(default_factory=dict)
    """The processes that have it open or mapped."""
    unseen: int = 0
    """Processes that this user may not look at."""
    owners: dict[int, int] = field(default_factory=dict)
    """Of sockets, by inode: the user of a process that has it."""
    open_queues: dict[str, tuple[int, int]] = field(default_factory=dict)
    """POSIX message queues that somebody has open: name -> (process, descriptor there)."""

    def add(self, key: Key, pid: int) -> None:
        self.of.setdefault(key, set()).add(pid)


def look() -> Users:
    """Look at every process."""
    users = Users()
    for pid in _processes():
        try:
            numbers = os.listdir(PROC / str(pid) / "fd")
        except PermissionError:
            users.unseen += 1
            continue
        except OSError:                 # it has ended
            continue
        for number in numbers:
            with contextlib.suppress(OSError):
                _descriptor(users, pid, int(number))
        with contextlib.suppress(OSError):
            for key in _mapped(pid):
                users.add(key, pid)
    return users


def _processes() -> list[int]:
    return sorted(int(entry) for entry in os.listdir(PROC) if entry.isdigit())


def _descriptor(users: Users, pid: int, number: int) -> None:
    path = PROC / str(pid) / "fd" / str(number)
    target = os.readlink(path)
    if target.startswith("socket:["):
        inode = int(target[8:-1])
        users.add(("socket", 0, inode), pid)
        users.owners.setdefault(inode, os.stat(PROC / str(pid)).st_uid)
        return
    if not target.startswith("/"):      # pipe:[5], anon_inode:[eventpoll]
        return
    status = path.stat()
    users.add(("file", status.st_dev, status.st_ino), pid)
    # A queue's link is its name, which is no path: the file system it is in need not be mounted anywhere.
    no_path = target.count("/") == 1 and not os.path.exists(target) and not target.endswith(" (deleted)")
    if no_path and status.st_size == _QUEUE_SIZE and _namespace(pid) == _namespace():
        users.open_queues.setdefault(target, (pid, number))


def _namespace(pid: int | str = "self") -> str:
    """The IPC namespace: queues and System V objects of others have the same names and numbers (ipc_namespaces(7))."""
    return os.readlink(PROC / str(pid) / "ns" / "ipc")


def _mapped(pid: int) -> Iterator[Key]:
    for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
        # Most are private ones of programs and libraries: address, then "r-xp".
        if not (line.find("s ", 0, 40) > 0 or "/dev/shm/" in line):
            continue
        match = _MAPPED.match(line)
        if match and match[4].startswith("/SYSV"):
            if _namespace(pid) == _namespace():
                yield "sysv", 0, int(match[3])
        elif match and match[3] != "0":
            yield "file", os.makedev(int(match[1], 16), int(match[2], 16)), int(match[3])


def program(pid: int) -> str:
    """A process's name; "" once it has ended."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "comm").read_text().strip()
    return ""


def locked() -> set[tuple[int, int]]:
    """(device, inode) of all files on which somebody has a lock (/proc/locks)."""
    found = set()
    with contextlib.suppress(OSError):
        for line in (PROC / "locks").read_text().splitlines():
            # 1: OFDLCK ADVISORY  WRITE -1 00:19:1234 0 EOF; one that waits has "->" behind the number
            for word in line.split():
                parts = word.split(":")
                if len(parts) == 3 and all(parts):
                    found.add((os.makedev(int(parts[0], 16), int(parts[1], 16)), int(parts[2])))
    return found
