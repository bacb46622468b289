"""The smallest example over every wire that takes part: in one process, and a server with three client processes."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from anywire.cli.demo.addresses import Place, names, places

PROGRAM = Path(__file__).parents[2] / "examples" / "char_plus_one" / "char_plus_one.py"
PATIENCE = 30.0
ANSWERS = {"HAL": "IBM", "Zmxvhqd": "[nywire", "ä\ud7ff\U0010ffff": "å\ue000\0"}


def able() -> list[str]:
    """The wires that answer several clients at a time; their addresses are made anew in each test."""
    with tempfile.TemporaryDirectory() as directory:
        able = [place.name for place in places(Path(directory)) if not place.reason]
        return [name for name in able if name not in ("mq", "sysv")]


ABLE = able()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="aw-") as made:
        yield Path(made)


def place_of(name: str, directory: Path) -> Place:
    (place,) = (place for place in places(directory, [name]) if place.name == name)
    return place


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL,
    )


@contextmanager
def server(address: str) -> Iterator[str]:
    """A server process, and its real address; ended by Ctrl-C."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "--serve", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert select.select([process.stdout], [], [], PATIENCE)[0]
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield line.strip()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize("name", [name for name in ABLE if name != "tls"])
def test_server_and_three_clients_in_one_process(name: str, directory: Path) -> None:
    done = run(place_of(name, directory).listen)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "HAL -> IBM\nZmxvhqd -> [nywire\n0123456789 -> 123456789:\n"
    assert [path.name for path in directory.iterdir()] == []


@pytest.mark.parametrize("name", [name for name in ABLE if name not in ("inproc", "pipe")])
def test_a_server_process_and_three_client_processes_at_once(name: str, directory: Path) -> None:
    place = place_of(name, directory)
    with server(place.listen) as real:
        clients = {
            text: subprocess.Popen(
                [sys.executable, str(PROGRAM), "--ask", place.reach(real), text],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for text in ANSWERS
        }
        for text, client in clients.items():
            output, errors = client.communicate(timeout=PATIENCE)
            assert (client.returncode, errors) == (0, b"")
            assert output.decode() == ANSWERS[text] + "\n"


def test_nobody_there_is_one_line() -> None:
    done = run("tcq://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("char_plus_one: ") and "Traceback" not in done.stderr


def test_every_wire_is_covered() -> None:
    """Those that can't answer yet are named by the demo's table; none is forgotten."""
    assert {"tcp", "unix", "inproc"} <= set(ABLE) <= set(names())
