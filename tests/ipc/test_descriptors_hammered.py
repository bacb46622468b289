"""Pipes, counters and appended files used by 8 processes and 8 threads at a time: nothing is lost or mixed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from ipc_children import run

pytestmark = pytest.mark.processes

# Forked before there are threads; a process that fails ends the program with its status.
ALL_AT_ONCE = """
import os, sys, threading
def all_at_once(work):
    pids = []
    for number in range(8):
        pids.append(os.fork())
        if not pids[-1]:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
    threads = [threading.Thread(target=work, args=(8 + number,)) for number in range(8)]
    for thread in threads: thread.start()
    def end():
        for thread in threads: thread.join()
        for pid in pids: assert os.waitpid(pid, 0)[1] == 0
    return end
"""
EACH = Counter(f"{number:02} {turn:02}" for number in range(16) for turn in range(40))


def test_records_in_a_pipe_are_whole() -> None:
    told = run(ALL_AT_ONCE + """
from anywire.ipc import pipe
reader, writer = pipe(size=4096)
def write(number):
    for turn in range(40):
        writer.write_atomic(b"%02d %02d " % (number, turn) + b"x" * 994)
end = all_at_once(write)
for _ in range(16 * 40):
    record = b""
    while len(record) < 1000:
        record += reader.read(1000 - len(record), timeout=20)
    assert record[6:] == b"x" * 994
    print(record[:5].decode())
end()
assert reader.pending == 0
reader.close()
writer.close()
""")
    assert Counter(told.splitlines()) == EACH


def test_what_is_added_to_a_counter_is_taken_once() -> None:
    assert run(ALL_AT_ONCE + """
from anywire.ipc import EventFd
units, total = EventFd(semaphore=True), EventFd()
def work(number):
    for _ in range(100):
        if number % 2:
            units.add()
        else:
            total.add(units.take(timeout=20))
all_at_once(work)()
print(total.take())
try:
    units.try_take()
except BlockingIOError:
    print("none left")
units.close()
total.close()
""") == "800\nnone left\n"


def test_records_in_a_file_are_whole(tmp_path: Path) -> None:
    run(ALL_AT_ONCE + """
from anywire.ipc import Appender
def write(number):
    with Appender(sys.argv[1]) as file:
        for turn in range(40):
            file.append(b"%02d %02d" % (number, turn), b"x" * 9000, b"\\n")
all_at_once(write)()
""", str(tmp_path / "log"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(line[5:] == "x" * 9000 for line in lines)
    assert Counter(line[:5] for line in lines) == EACH
