"""The preamble: told apart from everything else at the first wrong byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anywire.contract.errors import BadFrame
from anywire.framing.preamble import FIXED, MAGIC, Preamble, decode, missing, refuse


def test_layout_is_the_documented_one() -> None:
    data = Preamble(0x0102030405060708, 1, extensions={1: b"no"}).encode()
    assert data[:8] == b"\x89anyw\r\n\n"
    assert data[8:10] == b"\x01\x00"
    assert int.from_bytes(data[10:12], "little") == 6
    assert int.from_bytes(data[12:16], "little") == 1
    assert int.from_bytes(data[16:24], "little") == 0x0102030405060708
    assert data[24:] == b"\x01\0\x02\0no"


@given(st.integers(0, (1 << 64) - 1), st.dictionaries(st.integers(2, 65535), st.binary(max_size=50), max_size=5))
def test_every_prefix_asks_for_the_rest_and_the_whole_comes_back(limit: int, extensions: dict[int, bytes]) -> None:
    preamble = Preamble(limit, extensions=extensions)
    data = preamble.encode()
    have = b""
    while need := missing(have):
        assert len(have) + need <= len(data)
        have += data[len(have) : len(have) + need]
    assert have == data
    assert decode(have) == preamble
    for cut in range(len(data)):
        assert missing(data[:cut]) > 0


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"G", "HTTP|G"),
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (b"\x16\x03\x01\x02\x00", "TLS"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (MAGIC + b"\x02", "version 2"),
        (MAGIC[:5] + b"\n", "not a framed"),
        (b"\0", "not a framed"),
    ],
)
def test_a_stranger_is_refused_at_its_first_wrong_byte(data: bytes, shown: str) -> None:
    with pytest.raises(BadFrame, match=shown):
        missing(data)


def test_unknown_extensions_are_skipped_and_broken_ones_refused() -> None:
    assert decode(Preamble(5, extensions={999: b"later"}).encode()).max_message == 5
    good = bytearray(Preamble(5, extensions={999: b"later"}).encode())
    good[FIXED + 2] = 200
    with pytest.raises(BadFrame, match="longer than the preamble"):
        decode(good)
    with pytest.raises(BadFrame, match="cut off"):
        decode(MAGIC + b"\x01\x00\x02\x00" + bytes(12) + b"xx")


def test_a_demand_that_we_do_not_understand_is_refused() -> None:
    assert decode(Preamble(5, 1 << 3).encode()).flags == 8
    with pytest.raises(BadFrame, match="0x00010000"):
        decode(Preamble(5, 1 << 16).encode())


def test_a_refusal_carries_its_reason() -> None:
    assert decode(refuse("no room")).refusal == "no room"
    assert decode(Preamble(1).encode()).refusal is None
    assert decode(Preamble(0, 1).encode()).refusal == "no reason given"
    assert len(refuse("x" * 100_000)) < 2000
