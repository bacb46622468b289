"""Prove a wheel where there is nothing: an empty environment, no compiler on PATH, no checkout in sight.

Called by `make wheel` with the wheel as argument. First without the `cli` extra: the import works, and the command
prints one line that names the extra. Then with it: the demo runs. click and rich come from PyPI. `--no-demo` leaves
the demo out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang", "c99", "c++", "g++")


def run(folder: Path, *command: str | Path, status: int | None = 0, timeout: float = 120) -> str:
    """Run a program of the new environment, in an empty directory, with that environment alone on PATH."""
    name, *arguments = map(str, command)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["PATH"] = str(folder / "environment" / "bin")
    (folder / "empty").mkdir(exist_ok=True)
    done = subprocess.run(
        [str(folder / "environment" / "bin" / name), *arguments],
        cwd=folder / "empty", env=environment, timeout=timeout,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    if (done.returncode != 0) if status is None else (done.returncode == status):
        return done.stdout
    sys.stdout.write(done.stdout)
    raise SystemExit(f"check_wheel: exit status {done.returncode}: {name} {' '.join(arguments)}")


def check(wheel: Path, demo: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="anywire-wheel-") as temporary:
        folder = Path(temporary)
        venv.create(folder / "environment", with_pip=True)
        here = "import shutil, sys; sys.exit(any(map(shutil.which, sys.argv[1:])))"
        run(folder, "python", "-c", here, *COMPILERS)

        run(folder, "python", "-m", "pip", "install", "-qq", "--no-deps", wheel)
        print(run(folder, "python", "-c", "import anywire; print('imported', anywire.__version__)"), end="")
        modules = run(folder, "python", "-c", EXTENSIONS).split()
        print(f"loaded {len(modules)} extension modules")
        refusal = run(folder, "anywire", "demo", status=None)
        if refusal.count("\n") != 1 or "anywire[cli]" not in refusal:
            raise SystemExit(f"check_wheel: without its extra the command prints one line naming it, not:\n{refusal}")

        run(folder, "python", "-m", "pip", "install", "-qq", f"anywire[cli] @ {wheel.as_uri()}")
        print(run(folder, "anywire", "--help").strip().splitlines()[0].strip())
        if demo:
            print(run(folder, "anywire", "demo", "--seconds", "5"), end="")


# Import every extension module of the installed package: each must find its symbols.
EXTENSIONS = """
import importlib, importlib.machinery, pathlib, anywire
root = pathlib.Path(anywire.__file__).parent
for path in sorted(root.rglob("*" + importlib.machinery.EXTENSION_SUFFIXES[0])):
    name = ".".join(path.relative_to(root.parent).parts).removesuffix(importlib.machinery.EXTENSION_SUFFIXES[0])
    importlib.import_module(name)
    print(name)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--no-demo", action="store_true", help="stop after the imports and the command's help")
    arguments = parser.parse_args()
    check(arguments.wheel.resolve(), not arguments.no_demo)
    print(f"{arguments.wheel.name}: works in an empty environment without a compiler")


if __name__ == "__main__":
    main()
