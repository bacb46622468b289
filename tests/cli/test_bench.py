"""`anywire bench` and the pairs of processes below it; every contender is real, the sizes and times are small."""

import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli_processes import PATIENCE, started
from click.testing import CliRunner

from anywire.cli.bench import Sizes, bench, pick, run
from anywire.cli.contenders import Contender, contenders, key
from anywire.cli.measure import cores
from anywire.cli.pair import Failed, Pair
from anywire.contract.counters import snapshot
from anywire.contract.wire import wire_for


def here(contender: Contender) -> bool:
    """Whether this version has the wire, and this machine what it needs."""
    if contender.trust and shutil.which("openssl") is None:
        return False
    scheme = "pipe" if contender.inherits else contender.address.partition(":")[0]
    try:
        wire_for({"pipe": "pipe:?read=0", "shm": "shm://x"}.get(scheme, f"{scheme}:///x"))
    except ImportError:
        return False
    return True


PEERS = [contender for contender in contenders() if not contender.name.startswith("anywire") and not contender.missing]
PEERS = [contender for contender in PEERS if not contender.trust or here(contender)]
OURS = [contender for contender in contenders() if contender.name.startswith("anywire") and here(contender)]


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("contender", PEERS + OURS, ids=key)
def test_each_contender_does_its_phases(contender: Contender) -> None:
    before = children()
    with Pair(contender, *cores()) as pair:
        for size in (1, 64, 5000):
            for phase in contender.phases:
                done = pair.phase(phase, size, 100)
                assert done["seconds"] > 0
                assert done["client"] > 0
                assert done["server"] > 0
        measured = pair.measure(contender.phases[0], 64, 0.01)
        assert measured["rate"] > 0
        directory = Path(pair.directory.name)
    assert children() == before
    assert not directory.exists()


def test_a_server_that_fails_says_why_in_a_line() -> None:
    before = children()
    with pytest.raises(Failed, match="No such file or directory"):
        Pair(Contender("asyncio streams unix", "asyncio", "streams", "{directory}/missing/socket"), *cores())
    assert children() == before


def test_a_child_that_dies_in_mid_phase_fails_the_pair() -> None:
    pipe = next(contender for contender in PEERS if contender.name == "multiprocessing.Pipe")
    with Pair(pipe, *cores()) as pair:
        pair.server.process.kill()
        with pytest.raises(Failed):
            pair.phase("echo", 64, 10)


@pytest.mark.parametrize("first", ["server", "client"])
def test_of_two_that_fail_the_one_is_named_that_failed_first(first: str) -> None:
    pipe = next(contender for contender in PEERS if contender.name == "multiprocessing.Pipe")
    with Pair(pipe, *cores()) as pair:
        one, other = (pair.server, pair.client) if first == "server" else (pair.client, pair.server)
        one.tell({"phase": "echo", "size": "nothing that is a number", "count": 1})
        one.process.wait(PATIENCE)              # so both have said it before anybody looks
        other.tell({"phase": "echo", "size": 64, "count": 1})
        other.process.wait(PATIENCE)
        with pytest.raises(Failed, match="^ended: TypeError"):
            pair.answers(PATIENCE)


def test_a_failed_contender_does_not_stop_the_others() -> None:
    broken = Contender("asyncio streams unix", "asyncio", "streams", "{directory}/missing/socket")
    pipe = next(contender for contender in PEERS if contender.name == "multiprocessing.Pipe")
    results = run([broken, pipe], sizes=(64,), rounds=1, seconds=0.01)
    assert results.median("echo 64", key(pipe), "rate")
    assert results.median("echo 64", key(broken), "rate") is None
    assert "No such file" in results.errors["echo 64", key(broken)]


def test_the_choice_of_wires_and_fronts() -> None:
    names = [key(contender) for contender in pick(("tcp",), ("blocking",))]
    assert "anywire tcp (blocking)" in names
    assert "multiprocessing.Pipe (blocking)" in names
    assert not any("anywire unix" in name or "asyncio" in name for name in names)


def test_tls_is_compared_with_tls() -> None:
    assert not any(contender.trust for contender in pick(("unix", "tcp")))
    assert {contender.name for contender in pick(("tls",)) if contender.trust} >= {"anywire tls", "asyncio streams tls"}


def test_the_command_prints_json() -> None:
    arguments = ["--wires", "unix", "--sizes", "64", "--rounds", "1", "--seconds", "0.01", "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["machine"]["cores"] >= 1
    assert outcome["cells"]["echo 64"]["anywire unix (blocking)"]["median"]["rate"] > 0
    assert outcome["cells"]["flow 64"]["multiprocessing.Pipe (blocking)"]["median"]["rate"] > 0


def test_the_loop_of_anywire_s_channels_is_chosen() -> None:
    """The server's page of counters has a loop if it is ours."""
    contender = next(one for one in OURS if key(one) == "anywire unix (asyncio)")
    for loop, ours in (("anywire", 1), ("asyncio", 0)):
        with Pair(contender, *cores(), more=(loop,)) as pair:
            assert pair.measure("echo", 64, 0.01)["rate"] > 0
            assert len(snapshot(pair.server.process.pid).loops) == ours
    refused = CliRunner().invoke(bench, ["--loop", "trio"])
    assert refused.exit_code == 2 and "'trio'" in refused.output


def test_the_command_prints_tables_and_names_what_is_missing() -> None:
    arguments = ["--wires", "unix", "--fronts", "blocking", "--sizes", "64,1k", "--rounds", "1", "--seconds", "0.01"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "anywire unix" in done.stdout
    assert "multiprocessing.Pipe" in done.stdout
    assert "1 KiB messages" in done.stdout
    for contender in contenders():
        if contender.missing and contender.front == "blocking":
            assert contender.needs in done.stderr


@pytest.mark.parametrize("text", ["", "0", "x", "65m", "1,,2", "-1"])
def test_a_bad_size_is_refused_with_an_example(text: str) -> None:
    done = CliRunner().invoke(bench, ["--sizes", text])
    assert done.exit_code == 2
    assert "64,1k,64k,1m" in done.stderr


def test_sizes_are_read() -> None:
    assert Sizes().convert("64, 1k,2M,64", None, None) == (64, 1024, 2 << 20)


def test_a_plot_is_drawn_or_names_the_extra(tmp_path: Path) -> None:
    file = tmp_path / "bench.svg"
    arguments = ["--wires", "unix", "--fronts", "blocking", "--sizes", "64,1k", "--rounds", "1", "--seconds", "0.01"]
    done = CliRunner().invoke(bench, [*arguments, "--plot", str(file)])
    if importlib.util.find_spec("matplotlib") is None:
        assert done.exit_code == 1
        assert "anywire[plot]" in done.stderr
        assert not file.exists()
    else:
        assert done.exit_code == 0, done.stderr
        assert "<svg" in file.read_text()


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with started("bench", "--seconds", "10", "--sizes", "64", env=environment) as process:
        children_of = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + PATIENCE
        while len(mine := children_of.read_text().split()) < 2 or not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGINT, errors
        assert b"Traceback" not in errors, errors.decode()
    assert list(tmp_path.iterdir()) == []
    while any(Path(f"/proc/{child}").exists() for child in mine):    # one that had just begun sees that we have gone
        assert time.monotonic() < deadline
