"""scripts/check_layers.py sees what Cython files import, in every spelling, and applies pyproject.toml's contracts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(folder: Path, package: str, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "check_layers.py", folder / "scripts")
    shutil.copy(ROOT / "pyproject.toml", folder)
    source = folder / "src" / "anywire" / package
    source.mkdir(parents=True)
    (source / "module.pyx").write_text(text)
    return subprocess.run(
        [sys.executable, "scripts/check_layers.py"], cwd=folder, capture_output=True, text=True, check=False,
    )


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("contract", "from anywire.framing.codec cimport Decoder"),
        ("contract", "from anywire.framing.codec import Decoder"),
        ("contract", "from anywire cimport framing"),
        ("contract", "from ..wires cimport _framed"),
        ("contract", "cimport anywire.wires._framed as framed"),
        ("framing", "cdef f():\n    import os, socket"),
        ("framing", "from asyncio import get_running_loop"),
        ("wires", "from anywire.sync import Channel"),
        ("ipc", "from anywire.contract.errors import PeerLost"),
        ("wires", "import rich.console"),
    ],
)
def test_an_import_from_above_is_named(tmp_path: Path, package: str, line: str) -> None:
    done = check(tmp_path, package, f"# a module\n{line}\n")
    assert done.returncode == 1
    assert f"src/anywire/{package}/module.pyx: imports " in done.stdout


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("wires", "from anywire.contract.endpoint cimport ByteEndpoint"),
        ("wires", "from ._descriptor cimport Descriptor"),
        ("wires", "import socket"),
        ("framing", "from libc.string cimport memcpy"),
        ("framing", "from anywire.contract.errors import BadFrame"),
        ("contract", "from anywire.contractors cimport x"),
        ("contract", "# from anywire.wires import tcp"),
    ],
)
def test_an_import_from_below_is_fine(tmp_path: Path, package: str, line: str) -> None:
    done = check(tmp_path, package, f"{line}\n")
    assert (done.returncode, done.stdout) == (0, "")
