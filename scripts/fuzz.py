"""Run each atheris target of fuzz/ for a while. A finding stops it, is printed, and leaves its input in build/fuzz/.

A target is a Python file in fuzz/ whose name doesn't start with an underscore; it takes libFuzzer's arguments and
brings its own seeds (fuzz/seeds/NAME). What it learns stays in build/fuzz/NAME for the next run. Called by `make fuzz`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A decoder that allocates on a length alone would pass this long before the machine notices.
MEMORY_MB = 1024


def fuzz(target: Path, seconds: int) -> bool:
    grown = ROOT / "build" / "fuzz" / target.stem
    grown.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(target), f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY_MB}", "-timeout=10",
        f"-artifact_prefix={grown.parent}/{target.stem}-", "-print_final_stats=1", str(grown),
    ]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )
    output = done.stdout.decode(errors="backslashreplace").splitlines()
    if done.returncode:
        print("\n".join(output[-60:]))
    runs = next((line.split()[-1] for line in output if line.startswith("stat::number_of_executed_units")), "?")
    outcome = "no finding" if done.returncode == 0 else f"FAILED, exit status {done.returncode}"
    print(f"{target.stem}: {runs} inputs in {time.monotonic() - start:.0f} s, {outcome}", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="targets to run (all)")
    arguments = parser.parse_args()
    targets = {path.stem: path for path in sorted((ROOT / "fuzz").glob("[!_]*.py"))}
    unknown = set(arguments.names) - targets.keys()
    if unknown or not targets:
        missing = ", ".join(sorted(unknown)) or "at all"
        parser.error(f"no target {missing} in fuzz/; there are: {', '.join(targets) or 'none'}")
    passed = [fuzz(targets[name], arguments.seconds) for name in arguments.names or targets]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
