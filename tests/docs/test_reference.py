"""The generated parts of the reference are what the library says today."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_reference_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_wire_has_its_part_of_the_reference_and_its_page() -> None:
    reference = (ROOT / "docs/reference/wires.md").read_text(encoding="utf-8")
    index = (ROOT / "docs/how-to/index.md").read_text(encoding="utf-8")
    with (ROOT / "pyproject.toml").open("rb") as file:
        wires = tomllib.load(file)["project"]["entry-points"]["anywire.wires"]
    here = [scheme for scheme, where in wires.items() if find_spec(where.partition(":")[0])]
    assert here
    for scheme in {scheme.partition("+")[0] for scheme in here}:      # shm+unix is told under shm
        assert f"\n## {scheme}\n" in reference, scheme
        assert f"<!-- generated: options {scheme} -->" in reference, scheme
        assert f"(wire-{scheme}.md)" in index, scheme
