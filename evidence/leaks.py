"""What is left of twelve thousand connections, on each wire and front.

    python evidence/leaks.py [--cycles 12000] [--wires inproc,unix,fifo-many,tcp]

Runs `tests/native/leak_cycles.py`, which uses and ends connections in a dozen ways: politely, by abort, cancellation,
time-out, refusal. The table shows what one process, which holds both sides, held more at the end than after its
warm-up, summed over the ways. Fails where `tests/native/test_leaks.py` would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parents[1] / "tests" / "native" / "leak_cycles.py"
ADDRESSES = {
    "inproc": "inproc://leaks",
    "unix": f"unix:@anywire-leaks-{os.getpid()}",
    "seqpacket": f"unix:@anywire-leaks-{os.getpid()}?type=seqpacket",
    "shm": f"shm://anywire-leaks-{os.getpid()}?pool=1MiB",
    "fifo": "fifo://{directory}/leaks?reply=true",
    "fifo-one-way": "fifo://{directory}/leaks",
    "fifo-many": "fifo://{directory}/leaks?writers=many",
    "mq": f"mq:///anywire-leaks-{os.getpid()}?reply=true&depth=4&message_size=1000",
    "sysv": f"sysv://{0x41000000 | os.getpid():#x}?reply=true&max_bytes=1000",
    "tcp": "tcp://127.0.0.1:0",
    "tls": "tls://127.0.0.1:0",
    "udp": "udp",
    "pipe": "pipe",
}
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}


def main() -> None:
    options = argparse.ArgumentParser(description="What is left of thousands of connections.")
    options.add_argument("--cycles", type=int, default=12_000)
    options.add_argument("--wires", default=",".join(ADDRESSES))
    chosen = options.parse_args()
    print(f"{chosen.cycles} connections each: objects of Python, bytes of malloc, resident bytes, descriptors\n")
    print(f"{'wire':14}{'front':10}{'objects':>9}{'malloc':>10}{'resident':>12}{'fds':>6}{'threads':>9}")
    failed = False
    for wire in chosen.wires.split(","):
        for front in ("async", "blocking"):
            with tempfile.TemporaryDirectory() as directory:
                address = ADDRESSES[wire].format(directory=directory)
                done = subprocess.run(
                    [sys.executable, str(PROGRAM), address, front, str(chosen.cycles)],
                    env={**os.environ, **STEADY},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            ways: dict[str, list[dict[str, Any]]] = {}
            for line in done.stdout.splitlines():
                way, _, held = json.loads(line)
                ways.setdefault(way, []).append(held)
            sums = {
                key: sum(after[key] - before[key] for before, *_, after in ways.values())
                for key in ("objects", "malloced", "resident", "threads")
            }
            fds = sum(len(after["descriptors"]) - len(before["descriptors"]) for before, *_, after in ways.values())
            failed |= fds != 0 or sums["threads"] > 0 or sums["objects"] > chosen.cycles // 10
            failed |= sums["malloced"] > 2 << 20 or sums["resident"] > 16 << 20
            numbers = f"{sums['objects']:9}{sums['malloced']:10}{sums['resident']:12}{fds:6}{sums['threads']:9}"
            print(f"{wire:14}{front:10}{numbers}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
