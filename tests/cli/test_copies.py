"""`anywire bench copies` and the ways below it; every process, kernel object and file is real, the files are small."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli_processes import PATIENCE, run, started
from click.testing import CliRunner

from anywire.cli import copies as module
from anywire.cli.bench import bench
from anywire.cli.copies import Source, Transfer, copies, source_of, sources_of
from anywire.cli.measure import cores
from anywire.cli.pair import Failed
from anywire.cli.ways import OPENERS, SLOTS, WAYS, Way, ways

CHUNK = 4096
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24       # prctl(2)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


QUICK = {"pipe", "anywire unix", "anywire shm in place"}
SOME_WAYS = [way if way.name in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in ways()]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that is no measurement: a file goes a few times only."""
    monkeypatch.setattr("anywire.cli.copies.MOST_TIMES", 5)


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
def test_each_way_brings_the_file(way: Way) -> None:
    before = children()
    # One byte; a chunk; more chunks than the shared block has, and a last one that is not full.
    with sources_of((1, CHUNK, (2 * SLOTS + 1) * CHUNK + 77)) as sources, Transfer(way, CHUNK, *cores()) as transfer:
        for source in sources:
            for times in (1, 3):
                figures = transfer.copy(source, times)
                assert figures["mb_s"] > 0
                assert figures["cpu_s_gib"] >= figures["system_s_gib"] >= 0
                assert figures["sleeps_mib"] >= 0
        directory = Path(transfer.directory.name)
    assert children() == before
    assert not directory.exists()


@pytest.mark.parametrize("way", SOME_WAYS, ids=lambda way: way.name)
def test_what_did_not_arrive_is_noticed(way: Way) -> None:
    with sources_of((3 * CHUNK,)) as (source,), Transfer(way, CHUNK, *cores()) as transfer:
        transfer.copy(source, 1)
        # The right bytes are in the client's file from before: they must not count as arrived now.
        Path(source.path).write_bytes(bytes(source.size))
        with pytest.raises(Failed, match="not what the file holds"):
            transfer.copy(source, 1)


@pytest.mark.parametrize("way", SOME_WAYS, ids=lambda way: way.name)
def test_a_file_that_shrinks_fails_at_once_with_the_server_s_reason(way: Way) -> None:
    """Also where the client waits at a semaphore that nobody will post."""
    before = children()
    with sources_of((3 * CHUNK,)) as (source,), Transfer(way, CHUNK, *cores()) as transfer:
        Path(source.path).write_bytes(bytes(CHUNK + 5))
        with pytest.raises(Failed, match=r"^ended: OSError: the file has become shorter than 12288 bytes$"):
            transfer.copy(source, 1)
    assert children() == before


def test_each_way_says_how_often_it_copies() -> None:
    for way in WAYS:
        assert way.opener in OPENERS
        # One arrow for each copy.
        assert way.why.count("→") == way.copies
    copied = {way.name: way.copies for way in WAYS}
    assert copied["pipe"] == 2 * copied["shared memory + semaphores"] == 4


@pytest.mark.usefixtures("short")
def test_the_command_prints_json() -> None:
    arguments = ["copies", "--sizes", "64k,100", "--chunk", "4k", "--rounds", "2", "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["machine"]["cores"] >= 1
    assert outcome["chunk"] == 4096
    assert set(outcome["ways"]) == {way.name for way in ways()}
    for cell in ("65536", "100"):
        for name in outcome["ways"]:
            rounds = outcome["cells"][cell][name]["rounds"]
            assert len(rounds) == 2
            assert all(figures["mb_s"] > 0 for figures in rounds)


@pytest.mark.usefixtures("short")
def test_the_command_prints_a_table_of_the_ways_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(100_000))
    arguments = [str(file), "--rounds", "1", "--ways", "pipe,shared memory + semaphores"]
    done = CliRunner().invoke(copies, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["100000", "B,", "64", "KiB", "at", "a", "time"] in rows
    pipe = next(row for row in rows if row[:2] == ["pipe", "4"])
    assert "1.00" in pipe
    assert any(row[:5] == ["shared", "memory", "+", "semaphores", "2"] for row in rows)
    assert "FIFO" not in done.stdout
    assert "file → shared block → file" in done.stdout


def test_system_calls_are_counted_or_strace_is_named() -> None:
    arguments = ["--sizes", "256k", "--chunk", "64k", "--rounds", "1", "--ways", "pipe", "--calls", "--json"]
    done = CliRunner().invoke(copies, arguments)
    if shutil.which("strace") is None:
        assert done.exit_code == 1
        assert "strace" in done.stderr
    else:
        assert done.exit_code == 0, done.stderr
        calls = json.loads(done.stdout)["cells"]["262144"]["pipe"]["median"]["calls_mib"]
        # 16 chunks a MiB: each is read, written, read and written. Beside that only what is done once a transfer.
        assert 64 <= calls < 100


@pytest.mark.usefixtures("short")
def test_a_plot_is_drawn_or_names_the_extra(tmp_path: Path) -> None:
    file = tmp_path / "copies.svg"
    arguments = ["--sizes", "4k,64k", "--rounds", "1", "--ways", "pipe", "--plot", str(file)]
    done = CliRunner().invoke(copies, arguments)
    if importlib.util.find_spec("matplotlib") is None:
        assert done.exit_code == 1
        assert "anywire[plot]" in done.stderr
        assert not file.exists()
    else:
        assert done.exit_code == 0, done.stderr
        assert "<svg" in file.read_text()


@pytest.mark.usefixtures("short")
def test_a_way_that_fails_gets_a_line_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Way("FIFO", "fifo", 4, "", "{directory}/missing/fifo")
    monkeypatch.setattr(module, "ways", lambda: [broken, *(way for way in WAYS if way.name == "pipe")])
    done = CliRunner().invoke(copies, ["--sizes", "4k", "--rounds", "1"])
    assert done.exit_code == 1
    assert "FIFO: ended: FileNotFoundError" in done.stderr
    assert any(line.startswith("pipe ") for line in done.stdout.splitlines())


def test_files_that_cannot_be_copied_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, status, text in (
        ("empty", 1, "is empty"),
        ("missing", 2, "does not exist"),
        ("dangling", 2, "does not exist"),
        ("", 2, "is a directory"),
        ("fifo", 1, "no regular file"),
    ):
        done = CliRunner().invoke(bench, ["copies", str(tmp_path / name)], catch_exceptions=False)
        assert done.exit_code == status, name
        assert text in done.stderr, name
        assert done.stdout == ""
    done = run("bench", "copies", str(tmp_path / "empty"))
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (1, 1, b"")


def obey_modes() -> None:
    """Root reads any file by two capabilities: capabilities(7). Without them modes hold for root too."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)       # fails unless we are root


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"x")
    file.chmod(0)
    done = run("bench", "copies", str(file), preexec_fn=obey_modes)
    assert done.returncode == 2
    assert b"not readable" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--sizes", "0"], "1m,64m"),
        (["--sizes", "5g"], "1 to 4g"),
        (["--chunk", "4k,8k"], "more than one size"),
        (["--chunk", "17m"], "1 to 16m"),
        (["--ways", "pigeon"], "pigeon"),
        ([__file__, "--sizes", "1m"], "leave it out"),
    ],
)
def test_mistakes_are_usage_errors(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(copies, arguments)
    assert done.exit_code == 2
    assert text in done.stderr


def test_options_before_the_command_are_not_passed_over() -> None:
    done = CliRunner().invoke(bench, ["--rounds", "1", "copies"])
    assert done.exit_code == 2
    assert "anywire bench copies ..." in done.stderr


def test_help_explains_and_has_examples() -> None:
    done = run("bench", "copies", "--help")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert text.startswith("Usage: anywire bench copies")
    assert text.partition("Examples:\n")[2].count("anywire bench copies") >= 2
    assert max(map(len, text.splitlines())) <= 100
    assert "copies" in run("bench", "--help").stdout.decode().partition("Commands:\n")[2]


def test_a_source_goes_often_enough_to_be_measured_and_not_for_ever() -> None:
    assert Source("", 1, "").times == module.MOST_TIMES
    assert Source("", 1 << 20, "").times == 64
    assert Source("", 1 << 30, "").times == 1


def test_a_source_is_the_same_file_wherever_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    source = source_of(Path("file"))
    assert source.path == str(tmp_path / "file")
    assert source.size == 3


@pytest.mark.parametrize("way", ["pipe", "shared memory + semaphores"])
def test_ctrl_c_leaves_nothing_behind(way: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    arguments = ["bench", "copies", "--rounds", "1000", "--sizes", "16m", "--chunk", "1k", "--ways", way]
    with started(*arguments, env=environment) as process:
        children_of = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PATIENCE
        while len(mine := children_of.read_text().split()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGINT, errors
        assert b"Traceback" not in errors, errors.decode()
    assert list(tmp_path.iterdir()) == []
    while any(Path(f"/proc/{child}").exists() for child in mine):
        assert time.monotonic() < deadline


def test_a_killed_command_takes_its_processes_with_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    arguments = ["bench", "copies", "--rounds", "1000", "--sizes", "1m", "--ways", "shared memory + semaphores"]
    with started(*arguments, env=environment) as process:
        children_of = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PATIENCE
        while len(mine := children_of.read_text().split()) < 2:
            assert time.monotonic() < deadline
        process.kill()
    while any(Path(f"/proc/{child}").exists() for child in mine):
        assert time.monotonic() < deadline
