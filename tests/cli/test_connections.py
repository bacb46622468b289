"""`anywire bench connections` at a small scale: each server and the load generator are real, the times are short."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from cli_processes import PATIENCE, started
from click.testing import CliRunner

from anywire.cli import connections as module
from anywire.cli.bench import bench
from anywire.cli.connections import lines
from anywire.cli.echoes import BASE, LIBRARIES, SERVERS, NoCompiler, cell_name, compiled, run, server
from anywire.cli.loops import LOOPS, is_here
from anywire.cli.measure import Results, cores
from anywire.contract.counters import snapshot

SHORT = ["--rounds", "1", "--seconds", "0.02"]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None and "CC" not in os.environ, reason="needs a C compiler")


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_each_server_answers_any_number_of_connections(capfd: pytest.CaptureFixture[str]) -> None:
    before, missing = children(), []
    results = run((1, 30), rounds=1, seconds=0.02, note=missing.append)
    assert not results.errors
    here = set(SERVERS) - {line.partition(":")[0] for line in missing}
    assert {BASE, "asyncio", "anywire"} <= here == set(results.cells[cell_name(30)])
    assert {name for name in LOOPS if is_here(name)} == here & set(LOOPS)
    assert all("install" in line for line in missing)
    for count in (1, 30):
        assert all(results.median(cell_name(count), name, "rate") for name in here)
        assert results.ratio(cell_name(count), BASE, BASE, "rate") == 1
    assert children() == before
    drawn = lines(results, (1, 30))
    assert all(f"\n{name} " in drawn for name in here)


def test_the_loop_is_the_one_that_is_named() -> None:
    for name, ours in (("anywire", 1), ("asyncio", 0)):
        with server(cores()[0], sys.executable, "-m", "anywire.cli.echoing", name) as (pid, _):
            if ours:
                assert len(snapshot(pid).loops) == 1
            else:
                with pytest.raises(LookupError):                # it has no page at all
                    snapshot(pid)


def test_the_command_prints_a_table_and_draws_a_line_for_each_server(tmp_path: Path) -> None:
    file = tmp_path / "connections.svg"
    arguments = ["connections", *SHORT, "--servers", f"{BASE},anywire,asyncio", "--counts", "1,20"]
    plotted = importlib.util.find_spec("matplotlib") is not None
    done = CliRunner().invoke(bench, [*arguments, *(["--plot", str(file)] if plotted else [])], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert {BASE, "anywire", "asyncio"} <= set(rows)
    if plotted:
        drawn = file.read_text()
        # A line has its name in the legend, and a marker for each number of connections.
        assert all(f"<!-- {name} -->" in drawn for name in (BASE, "anywire", "asyncio"))
        assert "connections, each with a message under way" in drawn


def test_json_has_every_round() -> None:
    done = CliRunner().invoke(bench, ["connections", *SHORT, "--servers", BASE, "--counts", "3", "--json"])
    outcome = json.loads(done.stdout)
    assert outcome["counts"] == [3]
    assert outcome["cells"][cell_name(3)][BASE]["rounds"][0]["rate"] > 0


def test_a_server_that_fails_gets_a_line_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anywire.cli.echoes._command", lambda name, directory, note: [
        compiled(directory, "echo_server"), "127.0.0.1", "0"] if name == BASE else [
        sys.executable, "-c", "raise SystemExit('no loop today')"])
    done = CliRunner().invoke(bench, ["connections", *SHORT, "--servers", f"{BASE},asyncio", "--counts", "2"])
    assert done.exit_code == 1
    assert "asyncio, 2 × 1 KiB: no loop today" in done.stderr
    assert f"\n{BASE} " in done.stdout


def test_a_server_that_accepts_no_more_gets_a_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    mute = """
import socket, time
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(0)
print("READY", listener.getsockname()[1], flush=True)
time.sleep(600)
"""
    monkeypatch.setattr("anywire.cli.echoes._command", lambda *_: [sys.executable, "-c", mute])
    monkeypatch.setattr("anywire.cli.echoes.LATE", 0.3)
    results = run((9,), ["asyncio"], rounds=1, seconds=0.02)
    assert "accepts or answers no more" in results.errors[cell_name(9), "asyncio"]


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(NoCompiler, match=r"echo_client\.c"):
        compiled(tmp_path, "echo_client")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(bench, ["connections", *SHORT])
    assert done.exit_code == 1
    assert "needs a C compiler" in done.stderr


@pytest.mark.parametrize("text", ["", "0", "x", "1,,2", "-1", "100001"])
def test_a_bad_number_is_refused_with_an_example(text: str) -> None:
    done = CliRunner().invoke(bench, ["connections", "--counts", text])
    assert done.exit_code == 2
    assert "1,100" in done.stderr


def test_one_with_the_most_connections_that_failed_comes_last() -> None:
    results = Results()
    results.add(cell_name(1), "libuv", {"rate": 10.0})
    results.add(cell_name(1), BASE, {"rate": 5.0})
    results.add(cell_name(9), BASE, {"rate": 5.0})
    results.add(cell_name(9), "libuv", "stalled")
    assert module.by_rate(results, (1, 9)) == [BASE, "libuv"]
    assert "libuv" in LIBRARIES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_its_children_end(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with started("bench", "connections", "--seconds", "60", "--servers", f"{BASE},anywire", env=environment) as process:
        children_of = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PATIENCE
        while len(mine := children_of.read_text().split()) < 3:         # two servers and the load generator
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number
    while any(Path("/proc", pid).exists() for pid in mine):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGINT:
        assert not list(tmp_path.iterdir())
