"""E11: bytes recorded from each release's wire format are replayed against this one.

`captures/vMAJOR.MINOR-NAME.hex` holds what one side of a real connection sent, as hex; `captures/index.json` says what
a decoder must make of it. `python tests/framing/test_captures.py record` records a new set; recorded files never change
afterwards.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import anywire.sync
from anywire.framing.codec import Decoder
from anywire.framing.preamble import decode, missing

HERE = Path(__file__).parent / "captures"
_INDEX = HERE / "index.json"
INDEX: dict[str, dict[str, Any]] = json.loads(_INDEX.read_text()) if _INDEX.exists() else {}


def replay(data: bytes, step: int) -> dict[str, Any]:
    at = 0
    while need := missing(data[:at]):
        at += need
    preamble = decode(data[:at])
    decoder = Decoder(preamble.max_message or 1 << 24)
    got = [m for cut in range(at, len(data), step) for m in decoder.feed(data[cut : cut + step])]
    return {
        "max_message": preamble.max_message,
        "refusal": preamble.refusal,
        "sizes": [len(message) for message in got],
        "first_bytes": [message[:8].hex() for message in got],
        "confirmed": decoder.confirmed,
        "ended": decoder.ended,
        "closed": decoder.closed,
        "inside": decoder.inside,
    }


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", sorted(INDEX))
def test_recorded_bytes_still_mean_the_same(name: str, step: int) -> None:
    data = bytes.fromhex((HERE / f"{name}.hex").read_text())
    assert replay(data, step) == INDEX[name]


def test_there_are_captures_of_the_current_version() -> None:
    assert any(name.startswith("v1.0-") for name in INDEX)


def test_what_we_send_today_is_what_was_recorded() -> None:
    """The encoder's side: the same session gives the same bytes."""
    for name, data in sessions().items():
        assert data.hex() == (HERE / f"{name}.hex").read_text().strip(), name


def sessions() -> dict[str, bytes]:
    """What a client sends in a few fixed sessions, recorded from real channels over a TCP connection."""

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

    return {"v1.0-echo": recorded(talk), "v1.0-half-close": recorded(half_close)}


def recorded(session: Any) -> bytes:
    """Run a client session against an echo server through a recording relay; what the client sent."""
    sent = bytearray()

    def echo(channel: anywire.sync.Channel) -> None:
        for message in channel:
            channel.send(message)

    with anywire.sync.serve(echo, "tcp://127.0.0.1:0") as server, socket.create_server(("127.0.0.1", 0)) as relay:

        def carry() -> None:
            client, _ = relay.accept()
            upstream = socket.create_connection(("127.0.0.1", server.addresses[0].port))
            back = threading.Thread(target=pump, args=(upstream, client, None))
            back.start()
            pump(client, upstream, sent)
            back.join()
            client.close()
            upstream.close()

        thread = threading.Thread(target=carry)
        thread.start()
        with anywire.sync.connect(f"tcp://127.0.0.1:{relay.getsockname()[1]}") as channel:
            session(channel)
        thread.join()
    return bytes(sent)


def pump(source: socket.socket, target: socket.socket, record: bytearray | None) -> None:
    while data := source.recv(65536):
        if record is not None:
            record += data
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def record() -> None:
    """Write the captures of this version; refuses to touch recorded ones."""
    index = dict(INDEX)
    HERE.mkdir(exist_ok=True)
    for name, data in sessions().items():
        if name in index:
            raise SystemExit(f"{name} is recorded already")
        (HERE / f"{name}.hex").write_text(data.hex() + "\n")
        index[name] = replay(data, 1 << 20)
    (HERE / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__" and sys.argv[1:] == ["record"]:
    record()
