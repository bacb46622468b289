"""Which processes have a file mapped: who still uses a shared memory object, a semaphore or a lock (proc(5)).

Any thread. Processes of other users that we may not look at are not seen, nor those of other PID namespaces.
"""

from __future__ import annotations

import os


def processes_with(path: str) -> list[int]:
    """The numbers of the processes that have this file mapped, sorted. FileNotFoundError: there is no such file.

    /proc/PID/maps shows a mapping's device and inode, so a file that was removed and made anew is told from the old."""
    status = os.stat(path)
    return processes_of(status.st_dev, status.st_ino)


def processes_of(device: int, inode: int) -> list[int]:
    """The same for a file that is known by its device and inode (of os.fstat)."""
    wanted = [f"{os.major(device):02x}:{os.minor(device):02x}".encode(), str(inode).encode()]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/maps", "rb") as maps:
                    if any(line.split(None, 5)[3:5] == wanted for line in maps):
                        found.append(int(entry))
            except OSError:  # it has ended, or is not ours to look at
                continue
    return sorted(found)
