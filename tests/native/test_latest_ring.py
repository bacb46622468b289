"""The ring of mode latest, in C alone: a writer that waits for nobody and a reader that it laps, under the sanitizers.

latest_stress.c says what it does. It must pass as latest.h is; without the look at `floor`, without the pins, and with
a memory order of theirs taken away, it must fail.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_ring import BUILDS, SCALE, compiler, fixed_addresses, run

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"
LATEST = SOURCE / "anywire" / "ipc" / "latest.h"


def build(folder: Path, kind: str, text: str = "") -> list[str]:
    """The command that runs latest_stress, built in this way and with this text as latest.h."""
    include = SOURCE
    if text:
        include = folder
        (folder / "anywire" / "ipc").mkdir(parents=True)
        for header in ("ring.h", "broadcast.h"):
            (folder / "anywire" / "ipc" / header).write_text((LATEST.parent / header).read_text())
        (folder / "anywire" / "ipc" / "latest.h").write_text(text)
    program = folder / "latest_stress"
    compiler(kind, [f"-I{include}", *BUILDS[kind], str(HERE / "latest_stress.c"), "-o", str(program)])
    return [*fixed_addresses(), str(program)]


@pytest.mark.parametrize(("kind", "mode"), [("plain", "two"), ("thread", "one"), ("address", "two")])
def test_what_is_got_and_what_is_lost_is_all(tmp_path: Path, kind: str, mode: str) -> None:
    command = build(tmp_path, kind)
    for seed in range(SCALE):
        done = run(command, mode, 100_000, seed)
        assert done.returncode == 0, done.stderr
        got, lost, *_ = map(int, re.findall(r"\d+", done.stdout))
        assert got + lost == 100_000 and got and lost


def without(old: str, new: str) -> str:
    text = LATEST.read_text()
    assert text.count(old) == 1, f"latest.h has no {old} any more: say here what took its place"
    return text.replace(old, new)


def relaxed(text: str, *places: str) -> str:
    """latest.h with the order at each of these places relaxed."""
    for place in places:
        text, count = re.subn(rf"({re.escape(place)}, memory_order_)(acquire|release)", r"\1relaxed", text)
        assert count == 1, f"latest.h has no {place} any more: say here what took its place"
    return text


FLOOR = "&c->control->floor, memory_order_relaxed) <= at"
PIN = "return atomic_load_explicit(&p->control->pins"
NEEDED = {
    "the look at floor": ("plain", "two", without(FLOOR, f"{FLOOR} + c->size * 9")),
    "the pins": ("thread", "one", without(PIN, PIN.replace("return", "return 0 &"))),
    "the release of a pin": ("thread", "one", relaxed(LATEST.read_text(), "pins[pin], 0")),
    "the acquire of a pin": ("thread", "one", relaxed(LATEST.read_text(), "pins[pin]")),
    "the acquire of head": ("thread", "one", relaxed(LATEST.read_text(), "->head", "->oldest", "c->control->floor")),
}


@pytest.mark.parametrize(("kind", "mode", "text"), NEEDED.values(), ids=NEEDED)
def test_each_part_is_needed(tmp_path: Path, kind: str, mode: str, text: str) -> None:
    done = run(build(tmp_path, kind, text), mode, 2_000_000)
    assert done.returncode != 0
    wrong = r"data race|bytes are wrong|makes? no sense|go backwards|length is wrong"
    assert done.returncode < 0 or re.search(wrong, done.stderr), done.stderr
