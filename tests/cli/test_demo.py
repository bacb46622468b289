"""`anywire demo`: a short run of everything, what it prints, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_processes import ANYWIRE, PATIENCE, run

from anywire.cli.demo import program
from anywire.cli.demo.addresses import names
from anywire.contract.wire import known_schemes

FIGURES = {"messages", "mb_s", "messages_s", "p50_us", "p99_us", "cpu_us", "wire_s", "digest_s"}
PEERS = {"multiprocessing.Pipe", "asyncio streams"}
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "demo.md"
SHORT = ["--seconds", "3"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files small enough for every wire, an empty one among them, and one that can't be read as text."""
    for number in range(20):
        folder = tmp_path / f"folder{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{number}").write_bytes(os.urandom(number * 37) if number % 2 else b"text\n" * number)
    return tmp_path


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory for the demo's own: its path is short, because socket names are."""
    with tempfile.TemporaryDirectory(prefix="aw-") as directory:
        yield Path(directory)


def demo(*arguments: str, temporary: Path) -> subprocess.CompletedProcess[bytes]:
    return run("demo", *SHORT, *arguments, env={**os.environ, "TMPDIR": str(temporary)})


def processes_of(temporary: Path) -> list[int]:
    """Processes that have the demo's directory on their command line: its servers."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(temporary) + b"/" in words:
                found.append(int(name))
    return found


def nothing_is_left(temporary: Path) -> bool:
    return not list(temporary.iterdir()) and not processes_of(temporary)


def test_a_short_run_keeps_every_promise_and_says_so_in_json(tree: Path, temporary: Path) -> None:
    done = demo("--json", str(tree), temporary=temporary)
    outcome = json.loads(done.stdout)
    assert outcome["loop"]["turns"] > 100 and 0 < outcome["loop"]["utilisation"] < 1
    assert done.returncode == 0, (outcome["problems"], done.stderr)
    assert outcome["passed"] is True
    assert outcome["problems"] == []
    assert outcome["material"]["root"] == str(tree)
    assert outcome["material"]["files"] == outcome["material"]["found"] == 20
    assert outcome["material"]["bytes"] == sum(file.stat().st_size for file in tree.rglob("file*"))
    assert outcome["machine"]["cores"] >= 1
    wires = {wire["name"]: wire for wire in outcome["wires"]}
    assert {"tcp", "unix", "shm", "inproc", *PEERS} <= {name for name, wire in wires.items() if wire["took_part"]}
    assert set(known_schemes()) <= set(wires)
    for name, wire in wires.items():
        assert wire["error"] == ""
        assert wire["ours"] is (name not in PEERS)
        if wire["took_part"]:
            assert wire["messages"] >= 20
            assert all(wire[figure] >= 0 for figure in FIGURES)
            assert wire["p50_us"] <= wire["p99_us"]
        else:
            assert wire["reason"]
    promises = {one["promise"]: one for one in outcome["promises"]}
    assert set(promises) == {"kill -9 in mid-flow", "a reader pauses", "cancelled receives"}
    assert all(one["held"] for one in outcome["promises"])
    killed = promises["kill -9 in mid-flow"]
    assert killed["accepted"] <= killed["delivered"] + killed["unconfirmed"]
    assert killed["knew_ms"] > 0
    assert promises["a reader pauses"]["arrived"] == promises["a reader pauses"]["sent"] > 0
    assert promises["cancelled receives"]["cancelled"] == 10_000
    assert promises["cancelled receives"]["lost"] == 0
    assert outcome["left"] == {"processes": [], "descriptors": [], "files": [], "names": []}
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))
    documented = set(re.findall("`([a-z0-9_]+)`", REFERENCE.read_text(encoding="utf-8")))
    assert keys_of(outcome) - documented == set()


def keys_of(outcome: dict[str, Any]) -> set[str]:
    """All keys of the JSON object but those of `machine`, which `anywire bench` has too."""
    found = set(outcome)
    for part in (outcome["material"], outcome["left"], *outcome["wires"], *outcome["promises"]):
        found |= set(part)
    return found


def test_promises_are_shown_with_messages_that_the_wire_takes(tree: Path, temporary: Path) -> None:
    """A queue of the system has messages of 8 KiB at most: of these, and of the files that are sent."""
    (tree / "large").write_bytes(bytes(9000))
    done = demo("--json", "--wires", "mq", str(tree), temporary=temporary)
    outcome = json.loads(done.stdout)
    assert done.returncode == 0, outcome["problems"]
    assert (outcome["material"]["files"], outcome["material"]["left_out"]) == (20, 1)
    (pause,) = [one for one in outcome["promises"] if one["promise"] == "a reader pauses"]
    assert pause["wire"] == "mq" and pause["held"] and pause["arrived"] == pause["sent"] > 0


def test_it_prints_its_twelve_lines_and_one_table(tree: Path, temporary: Path) -> None:
    lines = [line for line in program.text().splitlines() if line.strip()]
    assert len(lines) == 12
    done = demo("--wires", "tcp,inproc", str(tree), temporary=temporary)
    assert done.returncode == 0, done.stderr
    printed = [line.rstrip() for line in done.stdout.decode().splitlines()]
    assert [line for line in printed if line in lines] == lines
    assert max(map(len, printed)) <= 80
    for row in ("tcp", "inproc", *PEERS):
        assert any(line.strip().startswith(row) for line in printed)
    assert any(line.startswith("3. Left behind: 0 processes, 0 descriptors, 0 files, 0 names") for line in printed)


def test_a_wrong_digest_is_told_and_is_status_1(tree: Path, temporary: Path) -> None:
    """One file's expected digest is changed after it was made: what comes back can't match."""
    faulty = """
import dataclasses
from anywire.cli.demo import command
read = command.read
def wrong(*arguments):
    made = read(*arguments)
    items = list(made.items)
    items[3] = (items[3][0], bytes(32))
    return dataclasses.replace(made, items=items)
command.read = wrong
from anywire.cli.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", faulty, "demo", *SHORT, "--wires", "tcp", "--json", str(tree)],
        capture_output=True, timeout=PATIENCE, check=False, env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 1, done.stderr
    outcome = json.loads(done.stdout)
    tcp = next(wire for wire in outcome["wires"] if wire["name"] == "tcp")
    assert "expected " + "00" * 32 in tcp["error"]
    assert not tcp["took_part"]
    assert outcome["passed"] is False
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))


def test_a_wire_that_can_not_take_part_says_why(tree: Path, temporary: Path) -> None:
    (tree / "large").write_bytes(bytes(1 << 20))
    done = demo("--wires", "fifo,udp,tcp", "--json", str(tree), temporary=temporary)
    outcome = json.loads(done.stdout)
    assert done.returncode == 0, (outcome["problems"], done.stderr)
    wires = {wire["name"]: wire for wire in outcome["wires"]}
    assert "no answer can come back" in wires["fifo one-way"]["reason"]
    assert "1 of 21 files are larger than its messages" in wires["udp"]["reason"]
    assert wires["tcp"]["took_part"]
    assert not wires["udp"]["took_part"]


def test_without_openssl_tls_says_so(tree: Path, temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary), "PATH": str(tree)}
    done = run("demo", *SHORT, "--wires", "tls,inproc", "--json", str(tree), env=environment)
    outcome = json.loads(done.stdout)
    assert done.returncode == 0, (outcome["problems"], done.stderr)
    assert "no openssl command" in next(wire["reason"] for wire in outcome["wires"] if wire["name"] == "tls")
    assert nothing_is_left(temporary)


def test_a_wire_that_promises_nothing_is_told_apart(tree: Path, temporary: Path) -> None:
    done = demo("--wires", "udp", str(tree), temporary=temporary)
    assert done.returncode == 0, done.stdout
    assert b"no promise was to be shown" in done.stdout
    assert nothing_is_left(temporary)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--wires", "carrier-pigeon"], 2, "carrier-pigeon"),
        (["--seconds", "0"], 2, "--seconds"),
        (["/nowhere/at/all"], 2, "does not exist"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], status: int, text: str) -> None:
    done = run("demo", *arguments)
    assert done.returncode == status
    assert text in done.stderr.decode()


def test_nothing_to_send_is_one_line(tmp_path: Path) -> None:
    done = run("demo", str(tmp_path))
    assert done.returncode == 1
    assert b"no files that can be read" in done.stderr and b"Traceback" not in done.stderr


def test_names_may_be_asked_for() -> None:
    assert set(known_schemes()) <= set(names())
    assert "seqpacket" in names()


def test_a_plot_is_drawn_or_names_the_extra(tree: Path, temporary: Path) -> None:
    file = temporary / "demo.svg"
    done = demo("--wires", "inproc", "--plot", str(file), str(tree), temporary=temporary)
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode == 1
        assert b"anywire[plot]" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "<svg" in file.read_text()


# ---- however it ends


class Terminal:
    """The demo on a terminal of its own, as a person has it: progress is shown, Ctrl-C reaches the whole group."""

    def __init__(self, temporary: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.shown = b""
        environment = {**os.environ, "TMPDIR": str(temporary), "TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
        self.process = subprocess.Popen(
            [*ANYWIRE, "demo", *SHORT, *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)

    def wait_for(self, text: bytes) -> None:
        """Until it is on the screen."""
        self._read(lambda: text in self.shown)

    def end(self) -> int:
        """Its exit status."""
        self._read(lambda: False)
        return self.process.wait(PATIENCE)

    def _read(self, enough: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not enough():
            assert select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0], self.shown
            try:
                data = os.read(self.master, 65536)
            except OSError:             # EIO: nobody has the terminal open any more
                data = b""
            if not data:
                return
            self.shown += data

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(temporary: Path, *arguments: str) -> Iterator[Terminal]:
    made = Terminal(temporary, *arguments)
    try:
        yield made
    finally:
        made.close()


MOMENTS = [
    b"Only the address",
    pytest.param(b"files over tcp", marks=pytest.mark.slow),
    pytest.param(b"files over inproc", marks=pytest.mark.slow),
    b"files over multiprocessing.Pipe",
    pytest.param(b"files over asyncio streams", marks=pytest.mark.slow),
    pytest.param(b"kill -9 of a server", marks=pytest.mark.slow),
    pytest.param(b"the reader pauses: ", marks=pytest.mark.slow),
    b"cancelled 500 receives",
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.decode())
def test_ctrl_c_leaves_nothing_behind(moment: bytes, tree: Path, temporary: Path) -> None:
    with terminal(temporary, str(tree)) as shown:
        shown.wait_for(moment)
        os.write(shown.master, b"\x03")
        assert shown.end() == -signal.SIGINT, shown.shown
        assert b"Traceback" not in shown.shown, shown.shown.decode()
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_as_cleanly(number: signal.Signals, tree: Path, temporary: Path) -> None:
    with terminal(temporary, str(tree)) as shown:
        shown.wait_for(b"files over unix")
        shown.process.send_signal(number)
        assert shown.end() == -number, shown.shown
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))


def test_even_kill_9_of_the_demo_leaves_nothing_behind(tree: Path, temporary: Path) -> None:
    with terminal(temporary, str(tree)) as shown:
        shown.wait_for(b"files over unix")
        (server,) = processes_of(temporary)
        pidfd = os.pidfd_open(server)
        try:
            shown.process.kill()
            assert select.select([pidfd], [], [], PATIENCE)[0], "the server process stays"
        finally:
            os.close(pidfd)
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))


def test_a_run_on_a_terminal_ends_with_the_table(tree: Path, temporary: Path) -> None:
    with terminal(temporary, "--wires", "tcp,unix", str(tree)) as shown:
        assert shown.end() == 0, shown.shown
        printed = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown.shown)
        assert b"Every digest matched over 2 wires, every promise held" in printed
    assert nothing_is_left(temporary), (list(temporary.rglob("*")), processes_of(temporary))
