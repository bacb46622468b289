"""All benchmarks with short settings, then what they claim, in one list. Takes about eight minutes.

Each runs as it would alone, so its output is the same. `--long` gives each its own settings (about half an hour);
`--check` makes a claim that doesn't hold the exit status. On a machine that does other work meanwhile a claim can fail
that holds on an idle one: run it alone then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from anywire.cli.measure import machine
from benchmarks.harness import ROOT

SHORT = {
    "import_time": ["--rounds", "15"],
    "stream_echo": ["--rounds", "3", "--seconds", "0.4"],
    "channel_echo": ["--rounds", "3", "--seconds", "0.4"],
    "loop_echo": ["--rounds", "3", "--seconds", "0.3"],
    "loop_micro": ["--rounds", "3", "--seconds", "0.03"],
    "tls_echo": ["--rounds", "3", "--seconds", "0.3"],
    "busy_poll": ["--rounds", "3", "--seconds", "0.2"],
    "http_hello": ["--rounds", "3", "--seconds", "1"],
    "connections": ["--rounds", "1", "--seconds", "0.3"],
    "blocking_unix": ["--rounds", "3", "--seconds", "0.08"],
    "aio_ipc": ["--rounds", "3", "--seconds", "0.3"],
    "shm_blocking": ["--rounds", "3", "--seconds", "0.08"],
    "broadcast": ["--rounds", "3", "--seconds", "0.3"],
    "multiprocessing_queues": ["--rounds", "3", "--seconds", "0.1"],
    "ipc": ["--rounds", "3", "--seconds", "0.1"],
    "idle_connections": ["--rounds", "1", "--seconds", "0.4"],
    "engine": ["--rounds", "2", "--seconds", "0.3"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT)} (all)")
    parser.add_argument("--long", action="store_true", help="each benchmark's own settings")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a claim does not hold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and claims there")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in SHORT:
            parser.error(f"no benchmark is called {name!r}; there are {', '.join(SHORT)}")
    outcomes = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.names or SHORT:
            file = Path(directory) / f"{name}.json"
            settings = [] if arguments.long else SHORT[name]
            command = [sys.executable, "-m", f"benchmarks.{name}", *settings, "--json", str(file)]
            status = subprocess.run(command, cwd=ROOT, check=False).returncode
            if file.exists():
                outcomes[name] = json.loads(file.read_text())
            else:
                outcomes[name] = {"claims": [], "failed": f"ended with status {status}"}
            print(flush=True)
    print("# Summary")
    bad = 0
    for name, outcome in outcomes.items():
        print(f"{name}{': ' + outcome['failed'] if 'failed' in outcome else ''}")
        bad += "failed" in outcome
        for claim in outcome["claims"]:
            bad += not claim["holds"]
            value = "no figure" if claim["value"] is None else f"{claim['value']:.2f} {claim['unit']}"
            target = f"{'≤' if claim['at_most'] else '≥'} {claim['limit']:g} {claim['unit']}"
            print(f"  {'PASS' if claim['holds'] else 'FAIL'}  {claim['text']}: {value} (target {target})")
    if arguments.json is not None:
        document = {"machine": machine(("anywire",)), "benchmarks": outcomes}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if bad and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
