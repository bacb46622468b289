"""`connect(wait=)` and `connect_forever`: what is tried again, and what is not.

What holds on every wire is in the conformance suite; here the other side is a bare socket that misbehaves as told, once
for each connection. A script that is used up closes the socket it listens on, so what is tried too often is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire import sync
from anywire.contract.counters import NoCounters, snapshot
from anywire.contract.errors import AnywireError
from anywire.framing.preamble import Preamble
from anywire.wires.establish import curable

FRONTS = ("async", "blocking")
Script = Callable[[socket.socket], object]


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tcp", "unix"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    if request.param == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    else:
        path = str(tmp_path / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        address = f"unix://{path}"
    with listener:
        yield listener, address


@contextlib.contextmanager
def playing(listener: socket.socket, *scripts: Script) -> Iterator[list[str]]:
    """Plays a script for each connection that comes; gives the names of those that were begun."""
    begun: list[str] = []
    accepted: list[socket.socket] = []

    def play() -> None:
        for script in scripts:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            begun.append(script.__name__)
            accepted.append(peer)
            script(peer)
        listener.close()

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield begun
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for peer in accepted:
            peer.close()
    assert not thread.is_alive()


def vanish(peer: socket.socket) -> None:
    peer.close()


def stay_silent(peer: socket.socket) -> None:
    pass


def answer(peer: socket.socket) -> None:
    peer.recv(1000)
    peer.sendall(Preamble(1000).encode())


def speak_http(peer: socket.socket) -> None:
    peer.recv(1000)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def connect(front: str, address: str, **options: Any) -> None:
    """Connect on a front, and drop it."""
    if front == "blocking":
        sync.connect(address, **options).abort()
        return

    async def main() -> None:
        (await anywire.connect(address, **options)).abort()

    asyncio.run(main())


def first_of_forever(front: str, address: str, **options: Any) -> None:
    if front == "blocking":
        with contextlib.closing(sync.connect_forever(address, **options)) as channels:
            next(channels).abort()
        return

    async def main() -> None:
        async with contextlib.aclosing(anywire.connect_forever(address, **options)) as channels:
            (await anext(channels)).abort()

    asyncio.run(main())


TRYING = pytest.mark.parametrize(
    ("trying", "options"), [(connect, {"wait": 60}), (first_of_forever, {"backoff": (0.001, 0.01)})],
    ids=["wait", "connect_forever"],
)  # fmt: skip


@TRYING
def test_losses_and_time_outs_are_tried_again(front: str, listening: Any, trying: Any, options: Any) -> None:
    listener, address = listening
    before = snapshot().connect_retries
    with playing(listener, vanish, stay_silent, vanish, answer) as begun:
        trying(front, address, handshake_timeout=0.2, **options)
    assert begun == ["vanish", "stay_silent", "vanish", "answer"]
    assert snapshot().connect_retries == before + 3


def test_the_log_says_once_where_nobody_answered(
    front: str, listening: Any, caplog: pytest.LogCaptureFixture
) -> None:
    listener, address = listening
    caplog.set_level(logging.INFO, logger="anywire")
    with playing(listener, vanish, answer):
        first_of_forever(front, address, backoff=(0.001, 0.01))
    [record] = caplog.records
    said = record.getMessage()
    assert said.startswith(f"connect {address}: the peer was lost"), said
    assert said.count(address) == 1


@TRYING
def test_what_speaks_something_else_is_not_tried_again(front: str, listening: Any, trying: Any, options: Any) -> None:
    listener, address = listening
    with playing(listener, speak_http, answer) as begun, pytest.raises(anywire.BadFrame, match="an HTTP response"):
        trying(front, address, **options)
    assert begun == ["speak_http"]


def test_without_wait_the_first_loss_is_the_answer(front: str, listening: Any) -> None:
    listener, address = listening
    with playing(listener, vanish, answer) as begun, pytest.raises(anywire.PeerLost):
        connect(front, address)
    assert begun == ["vanish"]


def test_other_errors_of_connecting_are_not_waited_for(front: str, tmp_path: Path) -> None:
    """A path that leads through a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="connect unix:"):
        connect(front, f"unix://{tmp_path}/file/socket", wait=60)


WAITS = """
import asyncio, sys
import anywire.sync
front, how, address = sys.argv[1:]
async def main():
    if how == "wait":
        await anywire.connect(address, wait=3600)
    async for channel in anywire.connect_forever(address, backoff=(0.001, 0.01)):
        pass
if front == "async":
    asyncio.run(main())
elif how == "wait":
    anywire.sync.connect(address, wait=3600)
else:
    next(anywire.sync.connect_forever(address, backoff=(0.001, 0.01)))
"""


@pytest.mark.parametrize("how", ["wait", "connect_forever"])
@pytest.mark.parametrize("wire", ["tcp", "tls", "unix", "seqpacket", "fifo", "inproc"])
def test_retries_are_counted_where_others_can_see_them(front: str, how: str, wire: str, tmp_path: Path) -> None:
    """Also of a process that has no connection yet."""
    with socket.socket() as bound:  # the port is taken, and nobody listens
        bound.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{bound.getsockname()[1]}"
        address = {
            "tcp": f"tcp://{place}",
            "tls": f"tls://{place}",
            "unix": f"unix://{tmp_path}/socket",
            "seqpacket": f"unix://{tmp_path}/socket?type=seqpacket",
            "fifo": f"fifo://{tmp_path}/fifo",
            "inproc": "inproc://nobody",
        }[wire]
        with subprocess.Popen([sys.executable, "-c", WAITS, front, how, address]) as process:
            try:
                while retries_of(process.pid) < 3:
                    assert process.poll() is None
                    time.sleep(0.005)
                seen = retries_of(process.pid)
                while retries_of(process.pid) <= seen:
                    assert process.poll() is None
                    time.sleep(0.005)
            finally:
                process.kill()


def retries_of(pid: int) -> int:
    """As its page tells; 0 before it has one."""
    try:
        return snapshot(pid).connect_retries
    except NoCounters:
        return 0


SHORT_OF_DESCRIPTORS = """
import os, sys, threading
from anywire import sync
from anywire.contract.counters import snapshot
sync.connect(sys.argv[1]).close()  # whatever is opened once: modules, the counters page
spare = []
try:
    while True:
        spare.append(os.dup(0))
except OSError as error:
    print(error.strerror)
def relieve():
    while not snapshot().connect_retries:
        pass
    for fd in spare:
        os.close(fd)
thread = threading.Thread(target=relieve, daemon=True)
thread.start()
with sync.connect(sys.argv[1], wait=60) as channel:
    thread.join()
    print(channel.recv())
"""


def test_a_lack_of_descriptors_is_waited_for() -> None:
    """In a process that has none left, until its first retry."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with sync.serve(lambda channel: channel.send(b"welcome"), "tcp://127.0.0.1:0") as server:
        command = [sys.executable, "-c", SHORT_OF_DESCRIPTORS, str(server.addresses[0])]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60, check=False)
    assert done.stdout.splitlines() == ["Too many open files", "b'welcome'"], done.stderr


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (anywire.Refused(), True),
        (anywire.Refused(answered=True), False),
        (anywire.TimedOut(1), True),
        (anywire.PeerLost(), True),
        (anywire.BadFrame(), False),
        (anywire.TooLarge(2, 1), False),
        (anywire.Unsupported(), False),
        (AnywireError(), False),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), True),
        (OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)), True),
        (OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), True),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/missing.pem"), False),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (ValueError(), False),
    ],
)
def test_what_is_curable(error: Exception, cure: bool) -> None:
    assert curable(error) is cure


def test_the_last_attempt_is_at_the_end_of_the_wait(front: str, tmp_path: Path) -> None:
    """The pauses between attempts grow to half a second; a listener that comes in the last of them is still met."""
    address = f"unix://{tmp_path}/late"
    started = time.monotonic()

    def try_it() -> None:
        if front == "async":
            asyncio.run(asyncio.wait_for(_connect_async(address, wait=0.6), 20))
        else:
            sync.connect(address, wait=0.6)

    with pytest.raises(anywire.Refused, match=r"tried for 0.6 s; start the listener, or wait longer") as caught:
        try_it()
    assert 0.6 <= time.monotonic() - started < 5
    assert "wait=" not in str(caught.value)


async def _connect_async(address: str, **options: Any) -> None:
    await anywire.connect(address, **options)
