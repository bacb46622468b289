"""The table of how-to/ipc-lifetimes.md, each cell: real objects, users that are killed, a namespace, removed names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ipc_children import PATIENCE, line, started

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/ipc-lifetimes.md"
HEAD = """
import glob, json, os, random, signal, socket, sys
from anywire.ipc import (
    Condition, EventFd, Fifo, FileLock, MessageQueue, Mutex, OwnerDied, RWLock, Semaphore, SharedMemory, SignalQueue,
    TimerFd, Watch, pipe, sysv,
)
tag, directory = sys.argv[1:3]
name = "/" + tag
key = int(tag.rpartition("-")[2]) * 4 + 0x20000000
kept = []
def keep(thing):
    kept.append(thing)
    return thing
def link(text):                                     # whether any process has a descriptor or a mapping of this kind
    for place in glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/[0-9]*/map_files/*"):
        try:
            if text in os.readlink(place):
                return True
        except OSError:
            pass
    return False
def descriptor(text):                               # whether any process has one of which /proc says this
    for place in glob.glob("/proc/[0-9]*/fdinfo/*"):
        try:
            with open(place) as file:
                if text in file.read():
                    return True
        except OSError:
            pass
    return False
def connects():
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect("\\0" + tag)
        except ConnectionRefusedError:
            return False
        return True
def locked():
    lock = FileLock(directory + "/lock")
    try:
        lock.try_acquire()
    except BlockingIOError:
        return True
    lock.release()
    return False
def mutex_held():
    mutex = Mutex.open(name + "-mutex")
    try:
        free = mutex.try_lock()
    except OwnerDied:
        mutex.mark_consistent()
        free = True
    if free:
        mutex.unlock()
    return not free
def written():
    return not RWLock.open(name + "-written").try_read_lock()
def bytes_in(fifo):
    with fifo.open_reader() as reader:
        return reader.pending == 4
"""


class Row(NamedTuple):
    """A primitive: programs' lines that make it with a mark, look for that, and use it after its name was removed."""

    make: str
    look: str
    remove: str = ""


# `told` is what the maker printed for this row.
ROWS = {
    "POSIX message queue, with its messages": Row(
        "keep(MessageQueue.create(name)).send(b'mark')",
        "MessageQueue.open(name).depth == 1",
        "q = keep(MessageQueue.open(name)); MessageQueue.unlink(name); q.send(b'x')",
    ),
    "POSIX semaphore, its value": Row(
        "keep(Semaphore.create(name, 3))",
        "Semaphore.open(name).value == 3",
        "s = keep(Semaphore.open(name)); Semaphore.unlink(name); s.acquire(timeout=0)",
    ),
    "POSIX shared memory": Row(
        "keep(SharedMemory.create(name, 10))[0] = 7",
        "SharedMemory.open(name)[0] == 7",
        "m = keep(SharedMemory.open(name)); SharedMemory.unlink(name); m[1] = m[0]",
    ),
    "memory-mapped file": Row(
        "keep(SharedMemory.file(directory + '/memory', 10, create=True))[0] = 7",
        "SharedMemory.file(directory + '/memory')[0] == 7",
        "m = keep(SharedMemory.file(directory + '/memory')); os.unlink(directory + '/memory'); m[1] = m[0]",
    ),
    "anonymous shared memory": Row("keep(SharedMemory.anonymous(10, label=tag))", "link('memfd:' + tag)"),
    "System V message queue, with its messages": Row(
        "keep(sysv.MessageQueue.create(key)).send(b'mark')",
        "sysv.MessageQueue.open(key).depth == 1",
        "q = keep(sysv.MessageQueue.open(key)); sysv.MessageQueue.unlink(key); q.send(b'x')",
    ),
    "System V semaphore set, its values": Row(
        "keep(sysv.SemaphoreSet.create(key, values=[3]))",
        "sysv.SemaphoreSet.open(key).value(0) == 3",
        "s = keep(sysv.SemaphoreSet.open(key)); sysv.SemaphoreSet.unlink(key); s.release()",
    ),
    "what was taken of one with `undo=True`": Row(
        "kept[-1].acquire(undo=True)", "sysv.SemaphoreSet.open(key).value(0) == 2",
    ),
    "System V shared memory": Row(
        "keep(sysv.SharedMemory.create(key, 10)).buf[0] = 7",
        "sysv.SharedMemory.open(key).buf[0] == 7",
        "m = keep(sysv.SharedMemory.open(key)); sysv.SharedMemory.unlink(key); m.buf[0] = 8",
    ),
    "pipe, with its bytes": Row(
        "p = keep(pipe()); p.writer.write(b'mark'); told = os.readlink(f'/proc/self/fd/{p.reader.fileno()}')",
        "link(told)",
    ),
    "FIFO, its name": Row(
        "f = keep(Fifo.create(directory + '/fifo'))",
        "Fifo.open(directory + '/fifo') is not None",
        "f = Fifo.open(directory + '/fifo'); r = keep(f.open_reader()); w = keep(f.open_writer()); f.unlink(); "
        "w.write(b'x'); r.read(timeout=0)",
    ),
    "FIFO, its bytes": Row(
        "f = Fifo.create(directory + '/bytes'); keep(f.open_reader()); keep(f.open_writer()).write(b'mark')",
        "bytes_in(Fifo.open(directory + '/bytes'))",
        "f = Fifo.open(directory + '/bytes'); r = keep(f.open_reader()); w = keep(f.open_writer()); w.write(b'x'); "
        "f.unlink(); assert r.read(timeout=0) == b'x'",
    ),
    "EventFd, its count": Row(
        "count = int.from_bytes(os.urandom(7)); told = f'eventfd-count: {count:16x}'; keep(EventFd(count))",
        "descriptor(told)",                                 # their numbers are used again at once
    ),
    "TimerFd, what it is set to": Row(
        "every = random.randrange(10**9, 10**15); keep(TimerFd()).set(3600, every=every / 1e9); "
        "told = f'it_interval: ({every // 10**9}, '",
        "descriptor(told)",
    ),
    "SignalQueue, signals that wait in it": Row(
        "numbers = random.sample(range(signal.SIGRTMIN, signal.SIGRTMAX), 6); keep(SignalQueue(*numbers)); "
        "told = f'sigmask:\\t{sum(1 << number - 1 for number in numbers):016x}'",
        "descriptor(told)",
    ),
    "Watch, changes that wait in it": Row(
        "keep(Watch(directory)); told = f' ino:{os.stat(directory).st_ino:x} '", "descriptor(told)",
    ),
    "abstract Unix socket": Row(
        "s = keep(socket.socket(socket.AF_UNIX)); s.bind('\\0' + tag); s.listen()", "connects()",
    ),
    "FileLock": Row("keep(FileLock(directory + '/lock')).acquire()", "locked()"),
    "Mutex, Condition and RWLock, with a name": Row(
        "m = keep(Mutex.create(name + '-mutex')); keep(Condition.create(name + '-condition', m)); "
        "keep(RWLock.create(name + '-rwlock'))",
        "[Condition.open(name + '-condition', Mutex.open(name + '-mutex')), RWLock.open(name + '-rwlock')]",
        "m = keep(Mutex.open(name + '-mutex')); c = keep(Condition.open(name + '-condition', m)); "
        "l = keep(RWLock.open(name + '-rwlock')); "
        "[each.unlink() for each in (m, c, l)]; "
        "m.lock(0); c.notify(); m.unlock(); l.write_lock(0); l.unlock()",
    ),
    "that a Mutex is held": Row("kept[-3].lock()", "mutex_held()"),
    "that an RWLock is held": Row(
        "keep(RWLock.create(name + '-written')).write_lock()",
        "written()",
        "l = keep(RWLock.open(name + '-written')); RWLock.unlink(name + '-written'); "
        "assert l.abandoned",
    ),
}


def page() -> dict[str, tuple[str, str, str]]:
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {row[0]: row[1:] for row in found[1:]}


MAKE = HEAD + "all_told = {}\n" + "".join(
    f"told = ''\n{row.make}\nall_told[{primitive!r}] = told\n" for primitive, row in ROWS.items()
) + "print(json.dumps(all_told), flush=True)\nsys.stdin.read()\n"

LOOK = HEAD + "all_told = json.loads(sys.argv[3])\nfound = {}\n" + "".join(
    f"told = all_told[{primitive!r}]\ntry:\n    found[{primitive!r}] = bool({row.look})\n"
    f"except FileNotFoundError:\n    found[{primitive!r}] = False\n"
    for primitive, row in ROWS.items()
) + "print(json.dumps(found))\n"

REMOVE = HEAD + "found = {}\n" + "".join(
    f"try:\n    {row.remove}\n    found[{primitive!r}] = 'goes on'\n"
    f"except OSError:\n    found[{primitive!r}] = 'gone for all'\n"
    for primitive, row in ROWS.items() if row.remove
) + "print(json.dumps(found))\n"


class Left:
    """What a maker leaves, and looks at it."""

    def __init__(self, directory: Path) -> None:
        self.arguments = [f"awlife-{os.getpid()}", str(directory)]
        self.told = ""

    def run(self, program: str, *prefix: str) -> dict[str, bool | str]:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", program, *self.arguments, self.told],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, bool | str] = json.loads(done.stdout)
        return found


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Left]:
    it = Left(tmp_path)
    yield it
    it.run(REMOVE)                                          # of what is gone already, errors are answers


def test_the_page_and_the_tests_have_the_same_rows() -> None:
    assert list(page()) == list(ROWS)


@pytest.mark.processes
def test_each_cell(left: Left) -> None:
    with started(MAKE, *left.arguments) as maker:
        left.told = line(maker)
        while_in_use = left.run(LOOK)
        assert set(while_in_use) == set(ROWS)
        # Looking finds them, but for the set's value, of which a unit is taken; otherwise "gone" would say nothing.
        assert [row for row in ROWS if not while_in_use[row]] == ["System V semaphore set, its values"]
        maker.kill()
        maker.wait()
    after = left.run(LOOK)
    user = [] if os.getuid() == 0 else ["--map-root-user"]
    inside = ["unshare", "--ipc", "--mount", *user]
    mounted = subprocess.run([*inside, "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True, check=False)
    elsewhere = None
    if mounted.returncode == 0:
        script = 'mount -t tmpfs none /dev/shm && exec "$@"'
        elsewhere = left.run(LOOK, *inside, "sh", "-c", script, "sh")
    removed = left.run(REMOVE)
    for primitive, (place, killed, gone) in page().items():
        assert killed == ("stays" if after[primitive] else "gone"), primitive
        assert gone == removed.get(primitive, "no name"), primitive
        if not after[primitive]:
            assert place == "processes", primitive
        elif elsewhere is not None:
            # The kernel's own are another namespace's own there; files are the same.
            assert place == ("a file system" if elsewhere[primitive] else "the kernel"), primitive
