"""The bytes drawn on docs/design/wire-format.md are the ones that go over the wire."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anywire.framing.codec import Decoder, encode, encode_kind
from anywire.framing.fragments import fragments_of
from anywire.framing.preamble import Preamble, refuse

PAGE = Path(__file__).resolve().parents[2] / "docs/design/wire-format.md"
DRAWN = dict(re.findall(r"^```hex (\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
SENT = {
    "preamble": Preamble(16 << 20).encode(),
    "refusal": refuse("not you"),
    "message": encode(b"hi", 3),
    "end": encode_kind("end"),
    "close": encode_kind("close"),
    "confirm": encode_kind("confirm", 256),
    "fragment": fragments_of(7, b"hi"),
}


@pytest.mark.parametrize("name", sorted(SENT.keys() | DRAWN.keys()))
def test_the_page_shows_what_is_sent(name: str) -> None:
    assert bytes.fromhex(DRAWN[name]) == SENT[name]


def test_reserved_kinds_are_refused() -> None:
    for kind in range(0xFFFFFFF0, 0xFFFFFFFB):
        with pytest.raises(ConnectionError):
            Decoder().feed(kind.to_bytes(4, "little") + bytes(4))
