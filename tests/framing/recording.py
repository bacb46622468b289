"""Fixed sessions of real channels, and the bytes that each side puts on the wire in them.

Called by test_captures.py: to record a release's captures, and to check that the same sessions give the same bytes.
Each session leaves no choice: who sends next is fixed, and so is which header carries a confirmation.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import tempfile
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywire.sync
from anywire.framing.fragments import fragments_of
from anywire.framing.preamble import Preamble

Session = Callable[[anywire.sync.Channel], None]
LARGE = 0xFFFFFFF0
"""Bytes of the smallest message that goes as a large frame."""
SHOWN = 1000
"""Bytes of that frame that are recorded."""


def sessions() -> dict[str, bytes]:
    """All captures of this version: {name: bytes of one side}."""
    out: dict[str, bytes] = {}
    for name, (client, listener, address) in TALKS.items():
        out[name], out[f"{name}-listener"] = recorded(client, listener, address)
    refused = recorded(nothing, nothing, TCP, authorize=lambda peer: "not you")
    out["v1.0-refused"], out["v1.0-refused-listener"] = refused
    out["v1.0-large"] = large()
    out["v1.0-fragments"] = fragments()
    return out


# ---- what is said ---------------------------------------------------------------------------------------------------


def talk(channel: anywire.sync.Channel) -> None:
    for message in (b"", b"a", b"hello, wire", bytes(range(256)) * 40):
        channel.send(message)
        assert channel.recv() == message
    channel.send_many([b"one", b"two", b"three"])
    assert [channel.recv() for _ in range(3)] == [b"one", b"two", b"three"]


def half_close(channel: anywire.sync.Channel) -> None:
    channel.send(b"last words")
    channel.send_eof()
    assert list(channel) == [b"last words"]


def echo(channel: anywire.sync.Channel) -> None:
    for message in channel:
        channel.send(message)


def receive_in_silence(channel: anywire.sync.Channel) -> None:
    """256 messages without an answer: the 257th receive confirms them in a frame of its own."""
    assert [channel.recv() for _ in range(256)] == [b"%d" % number for number in range(256)]
    assert not channel.stats().messages_sent
    try:
        channel.recv(timeout=0)
    except anywire.TimedOut:
        channel.send(b"all here")


def send_and_listen(channel: anywire.sync.Channel) -> None:
    channel.send_many([b"%d" % number for number in range(256)])
    assert list(channel) == [b"all here"]
    assert channel.unconfirmed == 0


def give(channel: anywire.sync.Channel) -> None:
    """Descriptors, with a message and without bytes, between messages that carry none."""
    channel.send(b"two come")
    with open(os.devnull, "rb") as first, open(os.devnull, "rb") as second:
        channel.send_fds([first.fileno(), second.fileno()], b"with two")
        channel.send_fds([first.fileno()])
    assert channel.recv() == b"thanks"


def take(channel: anywire.sync.Channel) -> None:
    assert channel.recv() == b"two come"
    for expected, count in ((b"with two", 2), (b"", 1)):
        message, fds = channel.recv_fds()
        assert (message, len(fds)) == (expected, count)
        for fd in fds:
            os.close(fd)
    channel.send(b"thanks")
    assert list(channel) == []


def nothing(channel: anywire.sync.Channel) -> None:
    raise AssertionError("there should be no connection")


TCP, UNIX = "tcp://127.0.0.1:0", "unix"
TALKS: dict[str, tuple[Session, Session, str]] = {
    "v1.0-echo": (talk, echo, TCP),
    "v1.0-half-close": (half_close, echo, TCP),
    "v1.0-confirmations": (receive_in_silence, send_and_listen, TCP),
    "v1.0-descriptors": (give, take, UNIX),
}


# ---- how it is recorded ---------------------------------------------------------------------------------------------


def recorded(client: Session, listener: Session, address: str, **options: Any) -> tuple[bytes, bytes]:
    """Run a session through a recording relay: what the client sent, and what the listener sent."""
    sent, answered = bytearray(), bytearray()
    with tempfile.TemporaryDirectory() as directory:
        if address == UNIX:
            address = f"unix://{directory}/server"
            relay = socket.socket(socket.AF_UNIX)
            relay.bind(f"{directory}/relay")
            relay.listen()
            dial = f"unix://{directory}/relay"
        else:
            relay = socket.create_server(("127.0.0.1", 0))
            dial = f"tcp://127.0.0.1:{relay.getsockname()[1]}"
        failures: list[BaseException] = []

        def handler(channel: anywire.sync.Channel) -> None:
            try:
                listener(channel)
            except BaseException as error:
                failures.append(error)
                raise

        with relay, anywire.sync.serve(handler, address, **options) as server:

            def carry() -> None:
                near, _ = relay.accept()
                far = socket.socket(near.family)
                to = server.addresses[0]
                far.connect(f"{directory}/server" if near.family == socket.AF_UNIX else (to.host, to.port))
                with near, far:
                    back = threading.Thread(target=pump, args=(far, near, answered), daemon=True)
                    back.start()
                    pump(near, far, sent)
                    back.join()

            thread = threading.Thread(target=carry, daemon=True)
            thread.start()
            try:
                with anywire.sync.connect(dial) as channel:
                    client(channel)
            except anywire.Refused as refused:
                assert "authorize" in options, refused
            thread.join()
        assert not failures, failures
    return bytes(sent), bytes(answered)


def pump(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    """Carry bytes and descriptors to the end."""
    unix = source.family == socket.AF_UNIX
    while True:
        data, fds = socket.recv_fds(source, 65536, 253)[:2] if unix else (source.recv(65536), [])
        if not data:
            break
        record += data
        if fds:
            done = socket.send_fds(target, [data], fds)
            data = data[done:]
            for fd in fds:
                os.close(fd)
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def large() -> bytes:
    """The beginning of a message of 4 GiB - 16 bytes, as a client sends it to a listener that takes even larger ones.

    The message is untouched memory: the kernel reads one page of zeros for all of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sent = b""

        def receive() -> None:
            nonlocal sent
            raw, _ = listener.accept()
            with raw:
                raw.sendall(Preamble(1 << 40).encode())
                while len(sent) < SHOWN:
                    sent += raw.recv(SHOWN - len(sent))

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with (
            mmap.mmap(-1, LARGE, flags=private, prot=mmap.PROT_READ) as message,
            memoryview(message) as view,
            anywire.sync.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}") as channel,
        ):
            try:
                channel.send(view)
            except anywire.PeerLost:
                channel.abort()
        thread.join()
    return sent


def fragments() -> bytes:
    """What two writers put into a FIFO, in turn and then mixed. Their numbers, drawn at random, become 7 and 8."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "fifo")
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with anywire.sync.connect(f"fifo://{path}?writers=many") as first:
                first.send(b"hi")
                first.send(b"")
                with anywire.sync.connect(f"fifo://{path}?writers=many") as second:
                    second.send_many([b"one", b"two", b"three"])
                    first.send(bytes(range(256)) * 40)
                    second.send(bytes(4072))
                    data = read_all(reader)
        finally:
            os.close(reader)
    out, numbers = bytearray(), {}
    at = 0
    while at < len(data):
        end = at + 24 + int.from_bytes(data[at + 4 : at + 6], "little")
        writer = numbers.setdefault(data[at + 8 : at + 16], 7 + len(numbers))
        out += data[at : at + 8] + writer.to_bytes(8, "little") + data[at + 16 : end]
        at = end
    queues = [cut(fragments_of(7, b"seven" * 1700)), cut(fragments_of(8, b"eight" * 1000))]
    for atom in (queues[0][0], queues[1][0], queues[0][1], queues[1][1], queues[0][2]):
        out += atom
    return bytes(out)


def cut(data: bytes) -> list[bytes]:
    return [data[at : at + 4096] for at in range(0, len(data), 4096)]


def read_all(fd: int) -> bytes:
    """What is in a pipe now."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    data = b""
    while len(data) < count[0]:
        data += os.read(fd, count[0] - len(data))
    return data
