"""The reference page names all that is public, and the modules for Cython are what it says."""

from __future__ import annotations

import re
from pathlib import Path

import anywire.engine
from anywire.engine import demultiplexers, sockets

PAGE = (Path(__file__).resolve().parents[2] / "docs/reference/engine.md").read_text(encoding="utf-8")
# These are shown from their docstrings.
SHOWN = {"BufferedConnection", "RateLimit", "SharedQueue", "Condition", "Trigger"}


def test_each_public_name_is_in_the_reference() -> None:
    missing = []
    for name in anywire.engine.__all__:
        if name in SHOWN:
            continue
        members = [member for member in vars(getattr(anywire.engine, name)) if not member.startswith("_")]
        missing += [f"{name}.{member}" for member in members if not re.search(rf"\b{member}\b", PAGE)]
    for module in (demultiplexers, sockets):
        assert f"anywire.engine.{module.__name__.rpartition('.')[2]}" in PAGE
    # Used by the reactor alone.
    assert set(missing) == {"Reactor.level_of", "Reactor.watch_wakeup"}


def test_the_lazy_names_exist() -> None:
    for name in anywire.engine.__all__:
        assert getattr(anywire.engine, name).__name__ == name
    assert set(anywire.engine.__all__) == set(anywire.engine._WHERE)
