"""Build the extension modules and put them beside their sources, so that `PYTHONPATH=src` is enough to work.

For developers: run it again after each change; only what changed is compiled. One build directory per interpreter
version (and one more for `--sanitize`), configured once, under `build/`. Prints one line, or the compiler's output when
it fails. Needs meson, ninja and cython in the environment of the interpreter that runs it, and a C compiler.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def run(command: list[str]) -> None:
    """Run quietly; on failure show everything that was said and stop."""
    # The tools are found beside this interpreter, whether or not its environment is active.
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )
    if done.returncode:
        sys.stdout.write(done.stdout)
        raise SystemExit(f"build_inplace: failed: {' '.join(command)}")


def configure(build: Path, sanitize: bool) -> None:
    """Configure once; again from nothing when another interpreter of the same version owns the directory."""
    owner = build / "interpreter"
    if owner.exists() and owner.read_text() == sys.executable:
        return
    shutil.rmtree(build / "meson", ignore_errors=True)
    options = ["-Doptimization=2", "-Ddebug=true"]
    if sanitize:
        # The interpreter is not built with the sanitizers: their runtime comes by LD_PRELOAD, hence undefined symbols.
        options = ["-Doptimization=1", "-Ddebug=true", "-Db_sanitize=address,undefined", "-Db_lundef=false"]
    run([sys.executable, "-m", "mesonbuild.mesonmain", "setup", str(build / "meson"), *options])
    owner.write_text(sys.executable)


def install(build: Path) -> int:
    """Bring the modules beside their sources; drop those whose source is gone. Returns how many there are."""
    built = {path.relative_to(build / "meson" / "src") for path in (build / "meson" / "src").rglob(f"*{SUFFIX}")}
    modules = {path for path in built if (SOURCE / path).with_name(path.name.removesuffix(SUFFIX) + ".pyx").exists()}
    for stale in {path.relative_to(SOURCE) for path in SOURCE.rglob(f"*{SUFFIX}")} - modules:
        (SOURCE / stale).unlink()
    for module in modules:
        new, old = build / "meson" / "src" / module, SOURCE / module
        if old.exists():
            here, there = old.stat(), new.stat()
            if (here.st_mtime_ns, here.st_size) == (there.st_mtime_ns, there.st_size):
                continue
        # A process may have the old file mapped: replace the name, never write into the file.
        temporary = old.with_name(old.name + ".new")
        shutil.copy2(new, temporary)
        temporary.replace(old)
    return len(modules)


def clean() -> None:
    for build in (ROOT / "build").glob("inplace-*"):
        shutil.rmtree(build)
    for module in SOURCE.rglob("*.so"):
        module.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan (see .ci/run for use)")
    parser.add_argument("--clean", action="store_true", help="remove the build directories and the modules, then stop")
    arguments = parser.parse_args()
    if arguments.clean:
        clean()
        return
    start = time.monotonic()
    name = f"inplace-{sys.version_info.major}.{sys.version_info.minor}" + ("-sanitize" if arguments.sanitize else "")
    build = ROOT / "build" / name
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one checkout take turns
        configure(build, arguments.sanitize)
        run([sys.executable, "-m", "ninja", "-C", str(build / "meson")])
        count = install(build)
    print(f"{count} extension modules in src/ for {name.removeprefix('inplace-')}, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
