"""wakeup.h in C alone, where threads really run at the same time: no wake is lost. With the order of its drain turned
round it must lose one, or this test would show nothing; not by luck, for there wakes come amid each drain."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HEADER = HERE.parents[1] / "src/anywire/engine/wakeup.h"
BUILDS = {
    "plain": ["-O2", "-Wall", "-Wextra", "-Werror"],
    "thread": ["-O1", "-fsanitize=thread"],
    "amid": ["-O2", "-Wall", "-Wextra", "-Werror", "-DAMID"],
}
KINDS = ["eventfd", "pipe"]
# Not the sanitizers that the whole test run may be under.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not re.search("LD_PRELOAD|SAN_OPTIONS", key)}


def run(folder: Path, build: str, text: str, kind: str, count: int, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "wakeup.h").write_text(text)
    program = folder / "wakeup_stress"
    command = shlex.split(os.environ.get("CC", "cc"))
    command += ["-std=gnu11", "-g", "-pthread", f"-I{folder}", *BUILDS[build], *more, str(HERE / "wakeup_stress.c")]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    if build == "thread" and re.search(r"cannot find .*tsan|unsupported option", done.stderr):
        pytest.skip("this compiler has no thread sanitizer here")
    assert done.returncode == 0, done.stderr
    # ThreadSanitizer's shadow memory leaves no room for some random layouts.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode:
        fixed = []
    command = [*fixed, str(program), kind, str(count)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=50, check=False)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", KINDS)
def test_none_is_lost(tmp_path: Path, build: str, kind: str) -> None:
    done = run(tmp_path, build, HEADER.read_text(), kind, 8_000 if build == "thread" else 40_000)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drain_that_clears_first_loses_one(tmp_path: Path, kind: str) -> None:
    text = HEADER.read_text()
    clear = "    __atomic_store_n(&w->flag, 0, __ATOMIC_SEQ_CST);\n"
    head, middle, tail = text.partition("static inline void aw_drain")
    body = tail.replace(clear, "").replace("    do\n", clear + "    do\n", 1)
    broken = head + middle + body
    assert broken != text and broken.count(clear) == text.count(clear)
    # It is lost before anybody waits, so a short wait shows it.
    done = run(tmp_path, "amid", broken, kind, 1_000, "-DPATIENCE=100")
    assert done.returncode == 1 and "a wake was lost: 0 items seen" in done.stdout, done.stdout + done.stderr
