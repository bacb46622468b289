"""The system's objects that outlive a process, or have names: found, described, removed.

Owns: where each kind is found (mq_overview(7), sem_overview(7), shm_overview(7), sysvipc(7), unix(7)) and what of it
can be read without opening it. Nothing here changes an object, `remove` excepted. What this user may not read is left
out of the description; what can't be listed at all is a note.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anywire.cli.ipc_users import PROC, Key, Users, locked, look, program
from anywire.ipc import _calls

SHARED_MEMORY = Path("/dev/shm")
KINDS = ("mq", "sem", "shm", "sysv-mq", "sysv-sem", "sysv-shm", "fifo", "abstract")
UNMOUNTED = (
    "POSIX message queues: only those that somebody has open are listed, for their file system is not mounted: "
    "mkdir -p /dev/mqueue && mount -t mqueue none /dev/mqueue (as root)"
)


@dataclass
class Thing:
    """One object."""

    kind: str
    """One of KINDS."""
    name: str
    """What it is removed by: /name, a path, @name, or msg:ID, sem:ID, shm:ID."""
    owner: str = "?"
    """The user."""
    mode: str = ""
    """Permissions, octal; "" where there are none."""
    size: int | None = None
    """Bytes of memory or waiting data that it may hold or holds; of a set, semaphores."""
    depth: int | None = None
    """What waits: messages or bytes in a queue, a semaphore's value, connections of a socket's name."""
    details: str = ""
    """More, in words."""
    used: bool | None = None
    """Whether some process has it open; None: not known."""
    processes: list[dict[str, Any]] = field(default_factory=list)
    """Those that have it: `pid` and `name`."""
    identity: tuple[int, ...] = ()
    """What tells it from a later one of the same name."""

    def as_json(self) -> dict[str, Any]:
        """Without what is only of use here."""
        known = asdict(self)
        del known["identity"]
        return known


def user(uid: int) -> str:
    """A user's name, or the number as text."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Look:
    """One look at everything. `directories` are searched for FIFOs."""

    def __init__(self, kinds: Sequence[str] = KINDS, directories: Sequence[Path] = ()) -> None:
        self.notes: list[str] = []
        self.users: Users = look()
        self.locked = locked()
        self.things: list[Thing] = []
        self._seen: set[Key] = set()
        finders: dict[str, Callable[[], Iterator[Thing]]] = {
            "mq": self._queues, "sem": self._semaphores, "shm": self._memory, "sysv-mq": self._sysv_queues,
            "sysv-sem": self._sysv_semaphores, "sysv-shm": self._sysv_memory,
            "fifo": lambda: self._fifos(directories), "abstract": self._abstract,
        }
        for kind in KINDS:
            if kind in kinds:
                self.things += sorted(finders[kind](), key=lambda thing: thing.name)
        if self.users.unseen:
            self.notes.append(
                f"{self.users.unseen} processes of other users can't be looked at: what they use shows as not known"
            )

    def _described(self, thing: Thing, key: Key) -> Thing:
        pids = sorted(self.users.of.get(key, ()))
        thing.processes = [{"pid": pid, "name": program(pid)} for pid in pids]
        thing.used = True if pids else None if self.users.unseen else False
        if key[1:] in self.locked:
            thing.details = f"{thing.details}, locked".lstrip(", ")
        return thing

    def _file(self, kind: str, name: str, status: os.stat_result, **more: Any) -> Thing:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        identity = (status.st_dev, status.st_ino)
        thing = Thing(kind, name, user(status.st_uid), mode, identity=identity, **more)
        return self._described(thing, ("file", *identity))

    def _queues(self) -> Iterator[Thing]:
        mounts = [Path(mount) for mount in _mounts("mqueue")]
        listed = set()
        for mount in mounts[:1]:
            with os.scandir(mount) as entries:
                for entry in entries:
                    listed.add(f"/{entry.name}")
                    with contextlib.suppress(FileNotFoundError):
                        yield self._queue(f"/{entry.name}", Path(entry.path))
        for name, (pid, number) in self.users.open_queues.items():
            if name not in listed:
                with contextlib.suppress(OSError):
                    yield self._queue(name, PROC / str(pid) / "fd" / str(number))
        if not mounts:
            self.notes.append(UNMOUNTED)

    def _queue(self, name: str, path: Path) -> Thing:
        told: dict[str, str] = {}
        with contextlib.suppress(PermissionError):
            told = dict(word.split(":", 1) for word in path.read_text().split() if ":" in word)
        waiting = told.get("QSIZE")
        details = "bytes waiting" if waiting else "may not be read"
        if told.get("NOTIFY_PID", "0") != "0":
            details += f", notifies process {told['NOTIFY_PID']}"
        return self._file("mq", name, path.stat(), depth=int(waiting) if waiting else None, details=details)

    def _semaphores(self) -> Iterator[Thing]:
        for path, status in _files(SHARED_MEMORY):
            if path.name.startswith("sem."):
                depth, details = None, "may not be read"
                with contextlib.suppress(PermissionError, FileNotFoundError), path.open("rb") as file:
                    # struct new_sem of glibc: the value, and above it how many wait; see sem_getvalue(3).
                    data = int.from_bytes(file.read(8), "little")
                    depth, details = data & 0xFFFFFFFF, f"value, {data >> 32} waiting"
                yield self._file(
                    "sem", f"/{path.name[4:]}", status, size=status.st_size, depth=depth, details=details
                )

    def _memory(self) -> Iterator[Thing]:
        for path, status in _files(SHARED_MEMORY):
            if not path.name.startswith("sem."):
                yield self._file(
                    "shm", f"/{path.name}", status, size=status.st_size,
                    details=f"{status.st_blocks * 512} bytes allocated",
                )

    def _sysv(self, kind: str, table: str) -> Iterator[tuple[dict[str, int], Thing]]:
        lines = (PROC / "sysvipc" / table).read_text().splitlines()
        names = lines[0].split()
        for line in lines[1:]:
            row = dict(zip(names, map(int, line.split()), strict=False))
            number = row["msqid" if table == "msg" else f"{table}id"]
            identity = (number, row["ctime"])
            # The table has the permissions in octal.
            thing = Thing(kind, f"{table}:{number}", user(row["uid"]), f"{row['perms'] % 1000:04}", identity=identity)
            key = row["key"] & 0xFFFFFFFF
            thing.details = f"key {key:#010x}" if key else "private"
            yield row, thing

    def _sysv_queues(self) -> Iterator[Thing]:
        for row, thing in self._sysv("sysv-mq", "msg"):
            thing.size, thing.depth = row["cbytes"], row["qnum"]
            thing.details += f", messages waiting, last sent by {row['lspid']}, received by {row['lrpid']}"
            yield thing

    def _sysv_semaphores(self) -> Iterator[Thing]:
        for row, thing in self._sysv("sysv-sem", "sem"):
            thing.size = row["nsems"]
            thing.details += ", semaphores"
            yield thing

    def _sysv_memory(self) -> Iterator[Thing]:
        for row, thing in self._sysv("sysv-shm", "shm"):
            self._described(thing, ("sysv", 0, row["shmid"]))
            thing.size = row["size"]
            thing.used = row["nattch"] > 0          # the kernel counts, also whom this user may not look at
            thing.details += f", attached {row['nattch']} times, made by {row['cpid']}"
            if row["perms"] >= 1000:                # SHM_DEST: somebody has removed it
                thing.details += ", removed, goes with its last user"
            yield thing

    def _fifos(self, directories: Sequence[Path]) -> Iterator[Thing]:
        for directory in directories:
            for path, status in _files(directory, stat.S_ISFIFO):
                yield self._file("fifo", str(path), status)

    def _abstract(self) -> Iterator[Thing]:
        found: dict[str, list[tuple[int, bool]]] = {}
        for line in (PROC / "net" / "unix").read_text(errors="surrogateescape").splitlines()[1:]:
            words = line.split(None, 7)
            if len(words) == 8 and words[7].startswith("@"):
                listens = bool(int(words[3], 16) & 0x10000)     # __SO_ACCEPTCON
                found.setdefault(words[7], []).append((int(words[6]), listens))
        for name, sockets in found.items():
            pids = {pid for inode, _ in sockets for pid in self.users.of.get(("socket", 0, inode), ())}
            owners = {self.users.owners[inode] for inode, _ in sockets if inode in self.users.owners}
            listens = any(each for _, each in sockets)
            yield Thing(
                "abstract", name, ", ".join(map(user, sorted(owners))) or "?",
                depth=sum(not each for _, each in sockets) if listens else None,
                details="listens, connections" if listens else "bound", used=True,
                processes=[{"pid": pid, "name": program(pid)} for pid in sorted(pids)],
                identity=tuple(sorted(inode for inode, _ in sockets)),
            )


def _mounts(kind: str) -> Iterator[str]:
    """Where file systems of this kind are mounted (proc(5), mountinfo)."""
    for line in (PROC / "self" / "mountinfo").read_text().splitlines():
        first, _, second = line.partition(" - ")
        if second.split()[0] == kind:
            yield first.split()[4].replace("\\040", " ")


def _files(
    directory: Path, wanted: Callable[[int], bool] = stat.S_ISREG
) -> Iterator[tuple[Path, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if wanted(status.st_mode):
                    yield Path(entry.path), status


def remove(thing: Thing) -> None:
    """Remove it. OSError: gone already, or not allowed; ValueError: what can't be removed."""
    if thing.kind == "mq":
        _calls.mq_unlink(os.fsencode(thing.name))
    elif thing.kind == "sem":
        os.unlink(SHARED_MEMORY / f"sem.{thing.name[1:]}")
    elif thing.kind == "shm":
        os.unlink(SHARED_MEMORY / thing.name[1:])
    elif thing.kind == "fifo":
        os.unlink(thing.name)
    elif thing.kind.startswith("sysv-"):
        kind, _, number = thing.name.partition(":")
        _calls.remove_sysv(kind, int(number))
    else:
        raise ValueError(f"{thing.name}: an abstract socket's name goes with its socket; end the process that has it")
