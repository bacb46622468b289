"""The kernel's limits on System V objects, and errors that name the one that was met and say how to raise it.

Plain functions, any thread. The limits belong to the IPC namespace, thus to the container.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple, NoReturn

_DIRECTORY = "/proc/sys/kernel"


class Limits(NamedTuple):
    """What the kernel allows, from /proc/sys/kernel; -1 where it can't be read. See proc_sys_kernel(5)."""

    msgmax: int
    """Bytes of one message."""
    msgmnb: int
    """Bytes of all messages in a new queue."""
    msgmni: int
    """Message queues."""
    semmsl: int
    """Semaphores in a set."""
    semmns: int
    """Semaphores in all sets."""
    semopm: int
    """Operations in one call."""
    semmni: int
    """Semaphore sets."""
    shmmax: int
    """Bytes of one shared memory segment."""
    shmall: int
    """Pages of memory in all segments."""
    shmmni: int
    """Shared memory segments."""


def _numbers(name: str, count: int) -> list[int]:
    try:
        with open(os.path.join(_DIRECTORY, name)) as file:
            return [int(word) for word in file.read().split()][:count]
    except OSError:
        return [-1] * count


def limits() -> Limits:
    """The limits as they are now."""
    one = [_numbers(name, 1)[0] for name in ("msgmax", "msgmnb", "msgmni")]
    two = [_numbers(name, 1)[0] for name in ("shmmax", "shmall", "shmmni")]
    return Limits(*one, *_numbers("sem", 4), *two)


def largest_message() -> int:
    """Bytes of one message that a queue takes (kernel.msgmax); -1: it can't be read."""
    return _numbers("msgmax", 1)[0]


def explain(*names: str) -> str:
    """The limits of these names with their values, and how to raise them."""
    now = limits()
    said = [f"kernel.{name} is {getattr(now, name)}" for name in names if not name.startswith("sem")]
    how = [f"sysctl -w kernel.{name}=" for name in names if not name.startswith("sem")]
    if sem := [name for name in names if name.startswith("sem")]:
        said += [f"{name} is {getattr(now, name)}" for name in sem]
        how.append('sysctl -w kernel.sem="semmsl semmns semopm semmni"')
    return f"{', '.join(said)}; raise it: {', '.join(how)}"


def refuse(number: int, name: str | None, more: str) -> NoReturn:
    """Raise the OSError of this number for the object of this name."""
    text = f"{os.strerror(number)}: {more}"
    raise OSError(number, text, name) if name is not None else OSError(number, text)


def refuse_removed(name: str, what: str, waiting: bool) -> NoReturn:
    """Raise the error (EIDRM) of an object that is gone."""
    how = "was removed while this call waited" if waiting else "has been removed"
    refuse(errno.EIDRM, name, f"the {what} {how}; open its key again for what is there now")


def refuse_use(error: OSError, name: str, what: str) -> NoReturn:
    """Raise why an object that was opened can't be looked at or changed: this user may not, or it is gone."""
    if isinstance(error, PermissionError):
        refuse(error.errno or 0, name, f"the {what}'s mode or owner does not let this user do that")
    refuse_removed(name, what, waiting=False)


def refuse_id(error: OSError, ident: int, what: str) -> NoReturn:
    """Raise why there is no reference by this id."""
    if isinstance(error, PermissionError):
        refuse(error.errno or 0, f"id {ident}", f"the {what}'s mode does not let this user read it")
    refuse(errno.ENOENT, f"id {ident}", f"no {what} has this id ({error.strerror}); look with ipcs(1)")


def refuse_get(number: int, name: str, what: str, flags: int, full: tuple[str, ...], wrong: str) -> NoReturn:
    """Raise why msgget, semget or shmget failed. `full`: the limits behind ENOSPC; `wrong`: what EINVAL means."""
    if number == errno.ENOENT:
        refuse(number, name, f"no {what} has this key; create it, or look with ipcs(1)")
    if number == errno.EEXIST:
        refuse(number, name, f"there is a {what} with this key already; open it, or choose another")
    if number == errno.EACCES:
        refuse(number, name, f"the {what}'s mode does not allow mode {flags & 0o777:04o} to this user")
    if number == errno.ENOSPC:
        refuse(number, name, f"no more of them: {explain(*full)}; or remove what nobody uses (ipcs, ipcrm)")
    if number == errno.EINVAL:
        refuse(number, name, wrong)
    if number == errno.EPERM:
        refuse(number, name, "huge pages need CAP_IPC_LOCK or membership in the group of vm.hugetlb_shm_group")
    if number == errno.ENOMEM:
        refuse(number, name, f"no memory for a {what} (huge pages: vm.nr_hugepages)")
    refuse(number, name, f"the {what} can't be opened")
