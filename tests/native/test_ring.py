"""The ring of the shared-memory wire, in C alone: two threads under the sanitizers, and a peer that writes nonsense.

ring_stress.c says what it does. It must pass as ring.h is; with one memory order, fence, second look or check of ring.h
taken away, one of its modes must fail. `make races` runs the same for longer (ANYWIRE_RING_SCALE), and what needs two
CPUs at the same moment.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RING = HERE.parents[1] / "src" / "anywire" / "ipc" / "ring.h"
SCALE = int(os.environ.get("ANYWIRE_RING_SCALE", "1"))
BUILDS = {
    "plain": ["-O2", "-Wall", "-Wextra", "-Werror"],
    # GCC warns that ThreadSanitizer takes no order from fences: no order of ring.h's data hangs on one.
    "thread": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
# Not the sanitizers that the whole test run may be under.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not re.search("LD_PRELOAD|SAN_OPTIONS", key)}
ENVIRONMENT["TSAN_OPTIONS"] = "halt_on_error=1"

Compile = Callable[..., list[str]]


@functools.cache
def fixed_addresses() -> list[str]:
    """ThreadSanitizer's shadow memory leaves no room for some random layouts."""
    command = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
        return command
    return []


def compiler(kind: str, arguments: list[str]) -> None:
    """Compile. Skips where the compiler lacks the sanitizer."""
    command = [*shlex.split(os.environ.get("CC", "cc")), "-std=c11", "-g", "-pthread", f"-DPAGE={mmap.PAGESIZE}u"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if kind != "plain" and re.search(r"cannot find .*(tsan|asan|ubsan)|unsupported option", done.stderr):
        pytest.skip(f"this compiler has no {kind} sanitizer here")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compile]:
    """The command that runs ring_stress, built in this way and with this text as ring.h."""
    known: dict[tuple[str, str], list[str]] = {}

    def build(kind: str, text: str = "") -> list[str]:
        text = text or RING.read_text()
        if (kind, text) not in known:
            folder = tmp_path_factory.mktemp(kind)
            (folder / "ring.h").write_text(text)
            program = folder / "ring_stress"
            compiler(kind, [f"-I{folder}", *BUILDS[kind], str(HERE / "ring_stress.c"), "-o", str(program)])
            known[kind, text] = [*fixed_addresses(), str(program)]
        return known[kind, text]

    yield build
    for command in known.values():
        Path(command[-1]).unlink()


def run(command: list[str], mode: str, count: int, seed: int = 1) -> subprocess.CompletedProcess[str]:
    arguments = [*command, mode, str(count), str(seed)]
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False)


RUNS = [
    ("plain", "two", 50_000),
    ("plain", "meet", 1),
    ("plain", "producer", 2_000),
    ("plain", "consumer", 2_000),
    ("thread", "one", 40_000),
    ("thread", "two", 40_000),
    ("thread", "meet", 1),
    ("address", "two", 40_000),
    ("address", "producer", 2_000),
    ("address", "consumer", 2_000),
]


@pytest.mark.parametrize(("kind", "mode", "count"), RUNS, ids=[f"{mode}-{kind}" for kind, mode, _ in RUNS])
def test_ring(compiled: Compile, kind: str, mode: str, count: int) -> None:
    for seed in range(SCALE):  # "meet" takes seconds, all else a number of messages
        done = run(compiled(kind), mode, count, seed)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def broken(pattern: str, new: str) -> dict[str, str]:
    """ring.h with each match of the pattern replaced in turn, by the function that it is in and what was there."""
    text = RING.read_text()
    found = {}
    for match in re.finditer(pattern, text):
        function = re.findall(r"^static inline .*?(\w+)\(", text[: match.start()], re.MULTILINE)[-1]
        found[f"{function}: {match[0]}"] = text[: match.start()] + new + text[match.end() :]
    assert found, f"ring.h has no {pattern} any more: say here what took its place"
    return found


ORDERS = broken(r"memory_order_(acquire|release)(?=\))", "memory_order_relaxed")


@pytest.mark.parametrize("text", ORDERS.values(), ids=ORDERS)
def test_each_order_is_needed(compiled: Compile, text: str) -> None:
    done = run(compiled("thread", text), "one", 1_000_000)
    assert "ThreadSanitizer: data race" in done.stderr


FENCES = broken(r"atomic_thread_fence\(memory_order_seq_cst\)", "(void)0")


LOOKS = {
    **broken(r"(?<=return )aw_has_data\(c\)(?=;\n})", "0"),
    **broken(r"(?<=return )aw_has_room\(p, length\)(?=;\n})", "0 * (int)length"),
}


@pytest.mark.parametrize("text", LOOKS.values(), ids=LOOKS)
def test_each_second_look_is_needed(compiled: Compile, text: str) -> None:
    assert "sleeps and the" in run(compiled("plain", text), "meet", 40).stderr


CHECKS = {
    "consumer": {
        **broken(r"head - c->tail > c->size \|\| head % AW_RECORD", "0"),
        **broken(r"aw_space\(record->length\) <= c->head_seen - c->tail \? 1 : -1", "1"),
    },
    "producer": broken(r"tail - p->tail_seen > p->published - p->tail_seen \|\| tail % AW_RECORD", "0"),
}


@pytest.mark.parametrize(
    ("mode", "text"),
    [pytest.param(mode, text, id=name) for mode, texts in CHECKS.items() for name, text in texts.items()],
)
def test_each_check_of_what_the_peer_writes_is_needed(compiled: Compile, mode: str, text: str) -> None:
    done = run(compiled("address", text), mode, 1_000_000)
    assert done.returncode != 0
    assert re.search(r"AddressSanitizer: (SEGV|BUS)|outside the ring|can't be", done.stderr), done.stderr


class TestAtTheSameMoment:
    """What shows only where two threads run at the same moment: for `make races`, on two CPUs, nothing beside it."""

    __test__ = SCALE > 1 and len(os.sched_getaffinity(0)) > 1

    @pytest.mark.parametrize("text", FENCES.values(), ids=FENCES)
    def test_each_fence_is_needed(self, compiled: Compile, text: str) -> None:
        assert "sleeps and the" in run(compiled("plain", text), "meet", 200).stderr

    def test_a_length_is_loaded_once(self, compiled: Compile) -> None:
        checked = "aw_space(record->length) <= c->head_seen - c->tail ? 1 : -1;"
        again = f"here = {checked} record->length = *(const volatile uint32_t *)at; return here;"
        [text] = broken(re.escape(f"return {checked}"), again).values()
        done = run(compiled("address", text), "consumer", 1_000_000)
        assert re.search(r"AddressSanitizer: (SEGV|BUS)|outside the ring", done.stderr), done.stderr


# What tests/model explores is written there again. These are the places of ring.h that it speaks of, in their order:
# whoever changes one changes the model's programs (tests/model/doorbells.py) in the same commit.
MODELLED = {
    "aw_publish": ["store head release"],
    "aw_must_ring": ["fence seq_cst", "load data_wanted relaxed", "exchange data_wanted acq_rel"],
    "aw_sleep_for_data": ["store data_wanted relaxed", "fence seq_cst", "call aw_has_data"],
    "aw_has_data": ["load head acquire"],
    "aw_release_records": ["store tail release"],
    "aw_room_was_wanted": ["fence seq_cst", "load room_wanted relaxed", "exchange room_wanted acq_rel"],
    "aw_sleep_for_room": ["store room_wanted relaxed", "fence seq_cst", "call aw_has_room"],
    "aw_has_room": ["call aw_see_tail"],
    "aw_see_tail": ["load tail acquire"],
    "aw_return": ["store returned release"],
    "aw_next_return": ["load returned acquire"],
}


@pytest.mark.parametrize("function", MODELLED)
def test_the_model_speaks_of_this_ring(function: str) -> None:
    text = re.sub(r"/\*.*?\*/", "", RING.read_text(), flags=re.DOTALL)
    [body] = re.findall(rf"^static inline \w+ {function}\(.*?^}}", text, re.MULTILINE | re.DOTALL)
    told = []
    for step in re.finditer(
        r"atomic_(load|store|exchange)_explicit\(&\w->control->(\w+),[^;]*?memory_order_(\w+)\)"
        r"|atomic_thread_(fence)\(memory_order_(\w+)\)|(?:return|if \() ?(aw_(?:has|see)\w+)",
        body,
    ):
        told.append(f"call {step[6]}" if step[6] else " ".join(part for part in step.groups() if part))
    assert told == MODELLED[function]
