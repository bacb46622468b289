"""The page that maps posix_ipc and sysv_ipc to ours leaves out nothing of theirs, and names only what ours have."""

from __future__ import annotations

import builtins
import importlib
import mmap
import os
import re
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import anywire

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/ipc-from-posix-ipc.md"
ROW = re.compile(r"^\| `([\w.]+)` \| `([\w.]+)` \|", re.MULTILINE)
ELSEWHERE = {"os": os, "mmap": mmap, "signal": signal, "anywire": anywire}


def rows(name: str) -> list[tuple[str, str]]:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    found: list[tuple[str, str]] = ROW.findall(section)
    assert len(found) == section.count("\n| ") - 1          # each row but the header has this form
    return found


def public(module: ModuleType) -> set[str]:
    found = set()
    for name in dir(module):
        if name.startswith("_"):
            continue
        value = getattr(module, name)
        found.add(name)
        if isinstance(value, type) and not issubclass(value, BaseException):
            found |= {f"{name}.{member}" for member in dir(value) if not member.startswith("_")}
    return found


@pytest.mark.parametrize("name", ["posix_ipc", "sysv_ipc"])
def test_the_page_has_all_of_theirs_once(name: str) -> None:
    theirs = [row[0] for row in rows(name)]
    assert len(theirs) == len(set(theirs))
    assert public(importlib.import_module(name)) - set(theirs) == set()


@pytest.mark.parametrize(("name", "home"), [("posix_ipc", "anywire.ipc"), ("sysv_ipc", "anywire.ipc.sysv")])
def test_ours_exist(name: str, home: str) -> None:
    for _, ours in rows(name):
        first, *rest = ours.split(".")
        if first in ELSEWHERE:
            thing: Any = ELSEWHERE[first]
        else:
            module = importlib.import_module(home)
            thing = getattr(module, first) if hasattr(module, first) else getattr(builtins, first)
        for part in rest:
            # A status is a NamedTuple; of other classes a few attributes are the objects' own.
            known = hasattr(thing, part) or part in _own_attributes(thing)
            assert known, f"{ours}: there is no {part}"
            thing = getattr(thing, part, None)


def _own_attributes(thing: Any) -> set[str]:
    return {name for cls in getattr(thing, "__mro__", ()) for name in getattr(cls, "__annotations__", ())}
