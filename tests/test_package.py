"""The package as it is installed: its version, its typing marker, and how little importing it costs."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import subprocess
import sys

import anywire


def test_version_is_that_of_the_installed_distribution() -> None:
    assert anywire.__version__ == importlib.metadata.version("anywire")


def test_package_is_marked_as_typed() -> None:
    assert importlib.resources.files(anywire).joinpath("py.typed").is_file()


def test_import_brings_nothing_optional() -> None:
    program = "import sys, anywire; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    optional = {"click", "rich", "matplotlib", "numpy", "msgspec"}
    assert optional.isdisjoint(done.stdout.split())
