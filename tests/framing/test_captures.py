"""E11: bytes recorded from each release's wire format are replayed against this one.

`captures/vMAJOR.MINOR-NAME.hex` holds what one side of a real connection sent, as hex; `captures/index.json` says what
a decoder must make of it. NAME ends in `-listener` for the listening side's bytes. Between them they hold every frame
of docs/design/wire-format.md, both kinds of preamble, and the fragments of a FIFO with many writers.
`python tests/framing/test_captures.py record` adds what is not recorded yet; recorded files never change afterwards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import recording

from anywire.framing.codec import Decoder, WithDescriptors
from anywire.framing.fragments import Fragments
from anywire.framing.preamble import decode, missing

HERE = Path(__file__).parent / "captures"
_INDEX = HERE / "index.json"
INDEX: dict[str, dict[str, Any]] = json.loads(_INDEX.read_text()) if _INDEX.exists() else {}
LIMIT = 1 << 40
"""Bytes of the largest message. The large frame announces four gigabytes, of which the first bytes are recorded."""


def captured(name: str) -> bytes:
    return bytes.fromhex((HERE / f"{name}.hex").read_text())


def replay(data: bytes, cuts: Iterable[int]) -> dict[str, Any]:
    """What a decoder makes of a capture that comes in pieces, cut at these places."""
    if data.startswith(b"awF"):
        return replay_fragments(data, cuts)
    at = 0
    while need := missing(data[:at]):
        at += need
    preamble = decode(data[:at])
    decoder = Decoder(LIMIT, descriptors=True)
    got = [m for piece in pieces(data, at, cuts) for m in decoder.feed(piece)]
    told = {
        "max_message": preamble.max_message,
        "refusal": preamble.refusal,
        **digest([m.message if isinstance(m, WithDescriptors) else m for m in got]),
        "confirmed": decoder.confirmed,
        "ended": decoder.ended,
        "closed": decoder.closed,
        "inside": decoder.inside,
    }
    if decoder.fds_due:
        told["descriptors"] = [m.count if isinstance(m, WithDescriptors) else 0 for m in got]
    return told


def replay_fragments(data: bytes, cuts: Iterable[int]) -> dict[str, Any]:
    together = Fragments(1 << 24)
    for piece in pieces(data, 0, cuts):
        together.feed(piece)
    return {
        **digest(list(together.ready)),
        "problems": len(together.problems),
        "unfinished": together.unfinished,
    }


def pieces(data: bytes, start: int, cuts: Iterable[int]) -> list[bytes]:
    places = [start, *(cut for cut in cuts if start < cut < len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def digest(messages: list[bytes]) -> dict[str, Any]:
    return {
        "sizes": [len(message) for message in messages],
        "first_bytes": [message[:8].hex() for message in messages],
    }


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", sorted(INDEX))
def test_recorded_bytes_still_mean_the_same(name: str, step: int) -> None:
    data = captured(name)
    assert replay(data, range(step, len(data), step)) == INDEX[name]


@pytest.mark.parametrize("name", sorted(INDEX))
def test_wherever_the_bytes_are_split(name: str) -> None:
    data = captured(name)
    for cut in range(len(data)):
        assert replay(data, [cut]) == INDEX[name], cut


@pytest.mark.parametrize("name", sorted(name for name in INDEX if "max_message" in INDEX[name]))
def test_a_preamble_is_whole_with_its_last_byte(name: str) -> None:
    data = captured(name)
    length = next(at for at in range(len(data) + 1) if not missing(data[:at]))
    assert length == 24 + int.from_bytes(data[10:12], "little")


def test_every_frame_is_among_the_captures_of_the_current_version() -> None:
    names = [name for name in INDEX if name.startswith("v1.0-")]
    told = [INDEX[name] for name in names]
    assert {name.endswith("-listener") for name in names} == {True, False}
    assert any(one.get("refusal") for one in told)
    assert any(one.get("descriptors") for one in told)
    assert any(one.get("inside") == f"inside a message: 960 of {recording.LARGE} bytes came" for one in told)
    kinds = {kind for name in names for kind in headers(captured(name))}
    assert kinds == {"message", "confirm", "end", "close", "large", "descriptors", "fragment", "hello"}


def headers(data: bytes) -> Iterable[str]:
    """What kinds of frames or fragments a capture holds, read by the drawings of docs/design/wire-format.md."""
    number = lambda at, size: int.from_bytes(data[at : at + size], "little")  # noqa: E731
    if data.startswith(b"awF"):
        at = 0
        while at < len(data):
            yield "fragment" if number(at + 6, 2) else "hello"
            at += 24 + number(at + 4, 2)
        return
    at = 24 + number(10, 2)
    kinds = ["end", "close", "large", "confirm", "descriptors"]  # FFFFFFFF downwards
    while at < len(data):
        kind = dict(enumerate(kinds)).get(0xFFFFFFFF - number(at, 4), "message")
        yield kind
        follows = {"message": number(at, 4), "large": 8 + number(at + 8, 8), "descriptors": 8 + number(at + 8, 4)}
        at += 8 + follows.get(kind, 0)


@cache
def sent_today() -> dict[str, bytes]:
    return recording.sessions()


@pytest.mark.parametrize("name", sorted(name for name in INDEX if name.startswith("v1.0-")))
def test_what_we_send_today_is_what_was_recorded(name: str) -> None:
    """The encoder's side: the same session gives the same bytes."""
    assert sent_today()[name].hex() == captured(name).hex()


def record() -> None:
    """Write the captures that are not recorded yet; never touches recorded ones."""
    index = dict(INDEX)
    HERE.mkdir(exist_ok=True)
    for name, data in recording.sessions().items():
        if name not in index:
            (HERE / f"{name}.hex").write_text(data.hex() + "\n")
            index[name] = replay(data, [])
    (HERE / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__" and sys.argv[1:] == ["record"]:
    record()
