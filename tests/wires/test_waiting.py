"""`connect(wait=)` and `connect_forever`: what is tried again, and what is not.

What holds on every wire is in the conformance suite; here the other side is a bare socket that misbehaves as told, once
for each connection. A script that is used up closes the socket it listens on, so what is tried too often is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire import sync
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
    with playing(listener, vanish, stay_silent, vanish, answer) as begun:
        trying(front, address, handshake_timeout=0.2, **options)
    assert begun == ["vanish", "stay_silent", "vanish", "answer"]


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
