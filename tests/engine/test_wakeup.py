"""Wakeups: none is lost, many cost one write, and a loopback pair is connected to itself alone."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import deque

import pytest

from anywire.engine._wakeup import Wakeup
from anywire.engine.demultiplexers import default
from anywire.engine.loopback import joined, listening, loopback_pair

KINDS = ["eventfd", "socketpair", "pipe", "loopback"]


def readable(wakeup: Wakeup, seconds: float = 0) -> bool:
    return bool(select.select([wakeup], [], [], seconds)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_wake_and_drain(kind) -> None:
    with Wakeup(kind) as wakeup:
        assert wakeup.kind == kind
        assert not readable(wakeup) and not wakeup.drain()
        for _ in range(1000):
            wakeup.wake()
        assert readable(wakeup, 5)
        assert wakeup.writes == 1, "a flood costs one write"
        assert wakeup.drain() and not readable(wakeup) and not wakeup.drain()
        wakeup.wake()
        assert readable(wakeup, 5)
        for fd in {wakeup.fileno(), wakeup.write_fd}:
            assert not os.get_inheritable(fd) and not os.get_blocking(fd)
    for operation in (wakeup.wake, wakeup.drain, wakeup.fileno):
        with pytest.raises(ValueError, match="closed"):
            operation()
    wakeup.close()


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_lost_under_eight_hammering_threads(kind) -> None:
    """Each thread puts items down and wakes; the one that waits must see all, and never sleeps while some are here."""
    count, threads = 4000, 8
    items: deque[int] = deque()
    with Wakeup(kind) as wakeup, default() as demultiplexer:
        demultiplexer.add(wakeup, 1)

        def hammer() -> None:
            for number in range(count):
                items.append(number)
                wakeup.wake()

        hammering = [threading.Thread(target=hammer) for _ in range(threads)]
        for thread in hammering:
            thread.start()
        taken = 0
        while taken < count * threads:
            assert demultiplexer.wait(20), f"a wake was lost: {taken} taken, {len(items)} are here"
            wakeup.drain()
            while items:
                items.popleft()
                taken += 1
        for thread in hammering:
            thread.join()
        assert wakeup.writes <= count * threads


@pytest.mark.parametrize("kind", ["socketpair", "pipe"])
def test_what_others_write_is_drained(kind) -> None:
    """As signal.set_wakeup_fd does, and until it is full."""
    with Wakeup(kind) as wakeup:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(wakeup.write_fd, bytes(4096))
        wakeup.wake()  # full, so there is something to read: that's enough
        wakeup.drain()
        assert not readable(wakeup)
        wakeup.wake()
        assert readable(wakeup, 5)


def test_from_a_signal_handler() -> None:
    with Wakeup() as wakeup, default() as demultiplexer:
        before = signal.signal(signal.SIGUSR1, lambda number, frame: wakeup.wake())
        try:
            demultiplexer.add(wakeup, 1)
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            assert demultiplexer.wait(20)
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_no_such_kind() -> None:
    with pytest.raises(ValueError, match="there are eventfd, socketpair, pipe, loopback"):
        Wakeup("carrier pigeon")


def test_a_stranger_on_the_loopback_pair() -> None:
    with listening() as listener:
        stranger = socket.create_connection(listener.getsockname())
        ours, theirs, strangers = joined(listener)
    with ours, theirs, stranger:
        assert strangers == 1
        stranger.settimeout(10)
        assert stranger.recv(1) == b"", "the stranger is sent away"
        ours.send(b"x")
        assert theirs.recv(1) == b"x"


def test_strangers_that_keep_us_out() -> None:
    """Its queue is full of them, and nobody accepts: that takes no longer than the patience, and says who it was."""
    listener = listening()
    with listener:
        listener.listen(0)
        strangers = []
        for _ in range(4):
            stranger = socket.socket()
            stranger.setblocking(False)
            stranger.connect_ex(listener.getsockname())
            strangers.append(stranger)
        with pytest.raises(OSError, match=r"strangers|timed out|did not"):
            joined(listener, 0.3)
        for stranger in strangers:
            stranger.close()


def test_the_pair_knows_itself() -> None:
    a, b = loopback_pair()
    with a, b:
        assert a.getpeername() == b.getsockname() and b.getpeername() == a.getsockname()


def test_loopback_is_down() -> None:
    """In a network namespace of its own, where nobody has set the interface up."""
    code = (
        "import sys\nfrom anywire.engine._wakeup import Wakeup\n"
        "Wakeup('socketpair').close()\n"
        "try:\n    Wakeup('loopback')\nexcept OSError as error:\n    print(error.errno, error)\n"
    )
    command = ["unshare", "--net", "--map-root-user", sys.executable, "-c", code]
    try:
        allowed = subprocess.run([*command[:3], "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("unshare --net is not permitted here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    number, _, text = done.stdout.partition(" ")
    assert int(number) in (errno.ENETUNREACH, errno.EADDRNOTAVAIL)
    assert "loopback interface is down" in text and "ip link set lo up" in text
