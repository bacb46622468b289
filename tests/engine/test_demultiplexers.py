"""One contract, run over every demultiplexer that this platform has, on real descriptors."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anywire.engine.conditions import Condition, Trigger
from anywire.engine.demultiplexers import Demultiplexer, by_name, default, names

READ, WRITE, PRIORITY = Condition.READ, Condition.WRITE, Condition.PRIORITY
HANGUP, READ_HANGUP, ERROR = Condition.HANGUP, Condition.READ_HANGUP, Condition.ERROR


@pytest.fixture(params=names())
def demultiplexer(request: pytest.FixtureRequest) -> Iterator[Demultiplexer]:
    with by_name(request.param) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


def lacks(demultiplexer: Demultiplexer, trigger: Trigger) -> bool:
    """Where a trigger is missing, that it is refused is all there is to test."""
    if not trigger & ~demultiplexer.triggers:
        return False
    with pytest.raises(NotImplementedError, match="epoll has"):
        demultiplexer.add(0, READ, trigger)
    return True


def test_the_platform_has_them() -> None:
    assert names() == ("epoll", "poll", "select") if sys.platform == "linux" else "poll" in names()
    assert default().name == names()[0]
    with pytest.raises(ValueError, match="there are "):
        by_name("kqueue")


def test_conditions_are_the_same_for_cython() -> None:
    text = (Path(__file__).parents[2] / "src/anywire/engine/conditions.pxd").read_text()
    for kind in (Condition, Trigger):
        for member in (*kind, *([Trigger.LEVEL] if kind is Trigger else [])):
            assert f"    {member.name} = {member.value}\n" in text


def test_nothing_is_ready(demultiplexer, pair) -> None:
    assert demultiplexer.wait(0) == []
    demultiplexer.add(pair[0], READ)
    before = time.monotonic()
    assert demultiplexer.wait(0) == []
    assert demultiplexer.wait(0.0105) == []
    assert time.monotonic() - before >= 0.0105, "a wait ended early"


@pytest.mark.parametrize("seconds", [1e-9, 0.000_3, 0.001_000_001])
def test_never_early(demultiplexer, seconds) -> None:
    for _ in range(5):
        before = time.monotonic_ns()
        demultiplexer.wait(seconds)
        assert time.monotonic_ns() - before >= seconds * 1e9


def test_not_a_number(demultiplexer) -> None:
    with pytest.raises(ValueError, match="NaN"):
        demultiplexer.wait(float("nan"))
    assert demultiplexer.wait(-1) == []


def test_read_write_and_tokens(demultiplexer, pair) -> None:
    a, b = pair
    demultiplexer.add(a, READ | WRITE, token=2**64 - 1)
    demultiplexer.add(b, READ, token=7)
    assert demultiplexer.wait() == [(2**64 - 1, WRITE)]
    a.send(b"x")
    b.send(b"y")
    assert sorted(demultiplexer.wait()) == [(7, READ), (2**64 - 1, READ | WRITE)]
    # Level-triggered: as long as it holds.
    assert min(demultiplexer.wait()) == (7, READ)
    demultiplexer.modify(a, READ, token=8)
    a.recv(1)
    assert demultiplexer.wait() == [(7, READ)]
    assert demultiplexer.remove(b)
    assert not demultiplexer.remove(b)
    assert demultiplexer.wait(0) == []


def test_watched_twice(demultiplexer, pair) -> None:
    demultiplexer.add(pair[0], READ)
    with pytest.raises(FileExistsError, match="watched already"):
        demultiplexer.add(pair[0], WRITE)
    assert demultiplexer.wait(0) == []


def test_modify_adds(demultiplexer, pair) -> None:
    demultiplexer.modify(pair[0], WRITE, token=3)
    assert demultiplexer.wait(0) == [(3, WRITE)]


def test_not_open(demultiplexer) -> None:
    a, b = socket.socketpair()
    number = a.fileno()
    a.close()
    b.close()
    for operation in (demultiplexer.add, demultiplexer.modify):
        with pytest.raises(OSError, match=f"{number}") as caught:
            operation(number, READ)
        assert caught.value.errno == 9
    with pytest.raises(OSError, match="-1"):
        demultiplexer.add(-1, READ)
    assert not demultiplexer.remove(number)


def test_unknown_bits(demultiplexer, pair) -> None:
    with pytest.raises(ValueError, match="Condition"):
        demultiplexer.add(pair[0], 64)
    with pytest.raises(ValueError, match="Trigger"):
        demultiplexer.add(pair[0], READ, 64)


def test_closed_without_removing(demultiplexer, pair) -> None:
    a, b = socket.socketpair()
    demultiplexer.add(a, READ | WRITE)
    demultiplexer.add(pair[0], READ, token=1)
    a.close()
    b.close()
    assert demultiplexer.wait(0) == [], "what is closed is no event"
    assert demultiplexer.wait(0.001) == []
    pair[1].send(b"x")
    assert demultiplexer.wait() == [(1, READ)]


def test_watched_for_nothing(demultiplexer) -> None:
    a, b = socket.socketpair()
    with a:
        demultiplexer.add(a, 0)
        b.close()
        assert demultiplexer.wait(0) == [], "a hang-up of what is watched for nothing would make a busy loop"
        demultiplexer.modify(a, READ)
        assert demultiplexer.wait(0)[0][1] & READ
        demultiplexer.modify(a, 0)
        assert demultiplexer.wait(0) == []
        demultiplexer.remove(a)


def test_bytes_come_with_the_hang_up(demultiplexer, pair) -> None:
    a, b = pair
    asked = READ | READ_HANGUP if READ_HANGUP & demultiplexer.conditions else READ
    demultiplexer.add(a, asked)
    b.send(b"last words")
    b.shutdown(socket.SHUT_WR)
    ((_, seen),) = demultiplexer.wait()
    assert seen == asked, "read first, then believe the end"
    assert (a.recv(100), a.recv(100)) == (b"last words", b"")


def test_half_close_that_was_not_asked_about(demultiplexer, pair) -> None:
    demultiplexer.add(pair[0], WRITE)
    pair[1].shutdown(socket.SHUT_WR)
    assert demultiplexer.wait(0) == [(pair[0].fileno(), WRITE)]


def test_what_select_can_not_tell(pair) -> None:
    select = by_name("select")
    with pytest.raises(NotImplementedError, match="READ_HANGUP"):
        select.add(pair[0], READ | READ_HANGUP)
    with pytest.raises(NotImplementedError, match="hang-up"):
        select.add(pair[0], HANGUP)


def test_a_pipe_without_readers(demultiplexer) -> None:
    reading, writing = os.pipe()
    demultiplexer.add(writing, WRITE)
    os.close(reading)
    ((_, seen),) = demultiplexer.wait()
    assert seen & WRITE
    assert bool(seen & ERROR) == bool(demultiplexer.conditions & READ_HANGUP), "select alone can't say so"
    os.close(writing)


def test_a_pipe_without_writers(demultiplexer) -> None:
    reading, writing = os.pipe()
    demultiplexer.add(reading, READ)
    os.write(writing, b"x")
    os.close(writing)
    assert demultiplexer.wait()[0][1] & READ
    os.read(reading, 1)
    ((_, seen),) = demultiplexer.wait()
    assert seen & (READ | HANGUP)
    os.close(reading)


def test_out_of_band(demultiplexer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    with a, b:
        demultiplexer.add(b, PRIORITY)
        a.send(b"!", socket.MSG_OOB)
        ((_, seen),) = demultiplexer.wait()
        assert seen == PRIORITY
        assert b.recv(1, socket.MSG_OOB) == b"!"


def test_a_connect_that_is_refused(demultiplexer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = closed.getsockname()
    with socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(address)
        demultiplexer.add(client, WRITE)
        ((_, seen),) = demultiplexer.wait()
        assert seen & WRITE
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def test_one_shot(demultiplexer, pair) -> None:
    a, b = pair
    if lacks(demultiplexer, Trigger.ONESHOT):
        return
    demultiplexer.add(a, READ | WRITE, Trigger.ONESHOT)
    assert len(demultiplexer.wait()) == 1
    b.send(b"x")
    assert demultiplexer.wait(0) == []
    demultiplexer.modify(a, READ, Trigger.ONESHOT)
    assert len(demultiplexer.wait()) == 1
    assert demultiplexer.wait(0) == []


def test_edge(demultiplexer, pair) -> None:
    a, b = pair
    if lacks(demultiplexer, Trigger.EDGE):
        return
    demultiplexer.add(a, READ | WRITE, Trigger.EDGE)
    # Readable and writable come in one report, and neither may be lost for the other.
    b.send(b"xx")
    assert demultiplexer.wait() == [(a.fileno(), READ | WRITE)]
    a.recv(1)
    assert demultiplexer.wait(0) == [], "a byte is left, and nothing new"
    b.send(b"y")
    assert len(demultiplexer.wait()) == 1
    # Modifying arms it anew: what a budget left over is not lost.
    demultiplexer.modify(a, READ | WRITE, Trigger.EDGE)
    assert len(demultiplexer.wait()) == 1


def test_exclusive(demultiplexer, pair) -> None:
    a, b = pair
    if lacks(demultiplexer, Trigger.EXCLUSIVE):
        return
    with pytest.raises(ValueError, match="ONESHOT"):
        demultiplexer.add(a, READ, Trigger.EXCLUSIVE | Trigger.ONESHOT)
    with pytest.raises(ValueError, match="READ and WRITE only"):
        demultiplexer.add(a, READ | PRIORITY, Trigger.EXCLUSIVE)
    demultiplexer.add(a, READ, Trigger.EXCLUSIVE)
    with pytest.raises(ValueError, match="remove"):
        demultiplexer.modify(a, READ, Trigger.EXCLUSIVE)
    with pytest.raises(ValueError, match="remove"):
        demultiplexer.modify(a, READ)
    b.send(b"x")
    assert len(demultiplexer.wait()) == 1


def test_a_regular_file(demultiplexer) -> None:
    with Path(__file__).open() as file:
        if demultiplexer.name == "epoll":
            with pytest.raises(PermissionError, match="regular files"):
                demultiplexer.add(file, READ)
        else:
            demultiplexer.add(file, READ)
            assert demultiplexer.wait() == [(file.fileno(), READ)]


def test_high_numbers(demultiplexer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1100:
        pytest.skip("this process may not have descriptors above 1024")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    a, b = socket.socketpair()
    os.dup2(a.fileno(), 1090)
    a.close()
    try:
        if demultiplexer.name == "select":
            with pytest.raises(OSError, match="below 1024; use poll or epoll"):
                demultiplexer.add(1090, READ)
        else:
            demultiplexer.add(1090, READ)
            b.send(b"x")
            assert demultiplexer.wait() == [(1090, READ)]
    finally:
        os.close(1090)
        b.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many(demultiplexer) -> None:
    """More than fit one batch of any, all reported within as many waits as it takes, none twice."""
    pairs = [os.pipe() for _ in range(400)]
    for reading, writing in pairs:
        demultiplexer.add(reading, READ)
        os.write(writing, b"x")
    seen: list[int] = []
    while len(seen) < len(pairs):
        for token, conditions in demultiplexer.wait():
            assert conditions == READ
            os.read(token, 1)
            seen.append(token)
    assert sorted(seen) == sorted(reading for reading, _ in pairs)
    for reading, writing in pairs[::2]:
        demultiplexer.remove(reading)
        os.close(reading)
        os.close(writing)
    os.write(pairs[-1][1], b"x")
    assert demultiplexer.wait() == [(pairs[-1][0], READ)]
    demultiplexer.reset()
    assert demultiplexer.wait(0) == []
    for end in [end for pair in pairs[1::2] for end in pair]:
        os.close(end)


def test_a_signal_is_no_end(demultiplexer) -> None:
    """PEP 475: the handler runs, and the wait goes on for the rest of its time."""
    handled: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    try:
        started = time.monotonic()
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert demultiplexer.wait(0.08) == []
        assert time.monotonic() - started >= 0.08
        timer.join()
        assert handled
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_raises_ends_the_wait(demultiplexer, pair) -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stop):
            timer.start()
            demultiplexer.wait()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    demultiplexer.add(pair[0], WRITE)
    assert len(demultiplexer.wait()) == 1, "it can be used again"


def test_one_thread_waits(demultiplexer, pair) -> None:
    a, b = pair
    demultiplexer.add(a, READ)
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(demultiplexer.wait()))
    thread.start()
    refused = False
    while not refused:
        try:
            demultiplexer.wait(0)
        except RuntimeError as error:
            assert "another thread waits" in str(error)
            refused = True
    if demultiplexer.name == "epoll":
        demultiplexer.add(b, WRITE)
        thread.join()
        assert got == [[(b.fileno(), WRITE)]]
    else:
        with pytest.raises(RuntimeError, match="another thread waits"):
            demultiplexer.add(b, WRITE)
        with pytest.raises(RuntimeError, match="another thread waits"):
            demultiplexer.close()
        b.send(b"x")
        thread.join()
        assert got == [[(a.fileno(), READ)]]


def test_closed(demultiplexer, pair) -> None:
    demultiplexer.add(pair[0], READ)
    demultiplexer.close()
    demultiplexer.close()
    assert demultiplexer.closed
    for operation in (lambda: demultiplexer.wait(0), lambda: demultiplexer.add(pair[1], READ), demultiplexer.fileno):
        with pytest.raises(ValueError, match="closed"):
            operation()
    assert not demultiplexer.remove(pair[0])


def test_its_own_descriptor(demultiplexer, pair) -> None:
    if demultiplexer.name != "epoll":
        with pytest.raises(NotImplementedError, match="no descriptor"):
            demultiplexer.fileno()
        return
    with by_name("poll") as outer:
        outer.add(demultiplexer, READ)
        assert outer.wait(0) == []
        demultiplexer.add(pair[0], WRITE)
        assert outer.wait(0) == [(demultiplexer.fileno(), READ)]
    number = demultiplexer.fileno()
    demultiplexer.reset()
    assert demultiplexer.fileno() == number
    assert not os.get_inheritable(number)
    assert demultiplexer.wait(0) == []


def test_importing_brings_nothing_of_the_rest() -> None:
    """The engine is usable on its own."""
    code = (
        "import sys, anywire.engine.demultiplexers as d; d.default().close()\n"
        "print([m for m in sys.modules if m.startswith('anywire.') and not m.startswith('anywire.engine')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
