"""Keys of System V objects: how a file stands for one, how one is made up, how an object is named in errors, and where
keys and ids mean what they mean here.

Plain functions, any thread. What can go wrong: the file of `ftok` is missing; two files give one key (it is made of a
part of their inode numbers only).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import TypeVar

from ._calls import project_key

T = TypeVar("T")

PRIVATE = 0
"""The key of no key (IPC_PRIVATE): a new object each time, found by its id alone."""

CREATE = 0o1000
"""The flag IPC_CREAT: make the object if the key has none."""

EXCLUSIVE = 0o2000
"""The flag IPC_EXCL, with CREATE: FileExistsError if the key has one."""


def ftok(path: str | os.PathLike[str], project: int = 1) -> int:
    """The key that C programs compute by ftok(3) for an existing file and a number of 1 to 255.

    It is made of the low 16 bits of the inode number, the low 8 of the device's and the project: other files may have
    the same, and a file that was deleted and made again has another. OSError: the file can't be looked up.
    ValueError."""
    if not 1 <= project <= 255:
        raise ValueError(f"the project of ftok is a number of 1 to 255, not {project}")
    return project_key(os.fsencode(path), project)


def key_of(key: object) -> int:
    """A key as key_t has it, -2³¹ to 2³¹-1; up to 2³²-1 is taken as well (0xffffffff is -1). ValueError, TypeError."""
    if not isinstance(key, int):
        raise TypeError(f"a System V key is an int, not {key!r}; ftok(path) makes one of a file")
    if not -(1 << 31) <= key < 1 << 32:
        raise ValueError(f"a System V key has 32 bits; {key} is too large")
    return key - (1 << 32) if key >= 1 << 31 else int(key)


def made_up(create: Callable[[int], T]) -> tuple[int, T]:
    """(key, what `create(key)` returned) for a random key that nobody had. OSErrors of `create`."""
    while True:
        key = secrets.randbelow((1 << 31) - 1) + 1
        try:
            return key, create(key)
        except FileExistsError:
            continue


def name_of(key: int, ident: int) -> str:
    """How errors and reprs name an object: by its key, as ipcs(1) writes it; a private one by its id."""
    return f"id {ident}" if key == PRIVATE else f"key 0x{key & 0xFFFFFFFF:08x}"


def space() -> int:
    """A number for the IPC namespace of this process: in another one the same keys and ids are other objects'
    (namespaces(7))."""
    return os.stat("/proc/self/ns/ipc").st_ino
