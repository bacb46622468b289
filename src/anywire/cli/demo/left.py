"""Part 3 of the demo: what is left behind. Looked at in the kernel's own lists, not in what we believe.

Owns: a snapshot of this process before the demo (`Before`) and the comparison after it. Linux's /proc (proc(5)):
children, descriptors, Unix names, listening ports. On the main thread. What can go wrong: nothing; what can't be read
counts as none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

LISTENING = "0A"                # include/net/tcp_states.h: TCP_LISTEN


def open_descriptors() -> dict[str, str]:
    """This process's descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue            # the one that listdir itself had open
    return found


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        found.update(word for line in _lines(f"/proc/self/task/{task}/children") for word in line.split())
    return found


def _alive(pid: int) -> bool:
    # A zombie counts: somebody forgot to wait for it.
    return os.path.exists(f"/proc/{pid}")


class Before:
    """How things were before the demo."""

    def __init__(self) -> None:
        self.children = _children()
        self.threads = set(threading.enumerate())
        self.descriptors = open_descriptors()

    def left(
        self, directory: Path, own_files: Iterable[str], pids: Iterable[int], addresses: Iterable[str],
        in_server: Iterable[str],
    ) -> dict[str, list[str]]:
        """What there is now and was not before; four empty lists when nothing was left.

        directory: the demo's, before it is removed. own_files: what the demo itself put there. pids: of processes it
        had. addresses: where its servers listened. in_server: descriptors that its server had and shouldn't.
        """
        processes = [f"process {pid}" for pid in sorted({*pids, *map(int, _children() - self.children)}) if _alive(pid)]
        processes += [f"thread {thread.name}" for thread in set(threading.enumerate()) - self.threads]
        # The directory's own listing closes its descriptor first.
        files = sorted({str(path.relative_to(directory)) for path in directory.rglob("*")} - set(own_files))
        now = open_descriptors()
        descriptors = [f"{fd}: {what}" for fd, what in now.items() if self.descriptors.get(fd) != what]
        return {
            "processes": processes,
            "descriptors": descriptors + [f"server: {what}" for what in in_server],
            "files": files,
            "names": [*_unix_names(str(directory)), *_unix_names(f"/shm/{directory.name}"), *_ports(addresses)],
        }


def _unix_names(directory: str) -> list[str]:
    return [line.split()[-1] for line in _lines("/proc/net/unix") if directory in line]


def _ports(addresses: Iterable[str]) -> list[str]:
    """Of these addresses, those where somebody still listens."""
    numbers = {address: address.partition("?")[0].rpartition(":")[2] for address in addresses}
    listening = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in _lines(path)[1:]:
            words = line.split()
            if words[3] == LISTENING:
                listening.add(str(int(words[1].rpartition(":")[2], 16)))
    for path in ("/proc/net/udp", "/proc/net/udp6"):
        for line in _lines(path)[1:]:
            listening.add("udp " + str(int(line.split()[1].rpartition(":")[2], 16)))
    return [
        address for address, number in numbers.items()
        if number.isdigit() and ("udp " if address.startswith("udp:") else "") + number in listening
    ]
