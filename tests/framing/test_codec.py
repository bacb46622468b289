"""Frames: every fragmentation gives the same messages, memory follows what came, and bad bytes are told."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anywire.contract.errors import BadFrame, TooLarge
from anywire.framing.codec import Decoder, encode, encode_kind

messages = st.lists(st.binary(max_size=300), max_size=30)


def test_layout_of_a_frame_is_the_documented_one() -> None:
    assert encode(b"hi", 3) == b"\x02\0\0\0\x03\0\0\0hi"
    assert encode_kind("end", 1) == b"\xff\xff\xff\xff\x01\0\0\0"
    assert encode_kind("close") == b"\xfe\xff\xff\xff\0\0\0\0"
    assert encode_kind("confirm", 7) == b"\xfc\xff\xff\xff\x07\0\0\0"


@given(messages, st.data())
def test_any_fragmentation_gives_the_messages_in_order(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(encode(message, index) for index, message in enumerate(sent)) + encode_kind("end", 5)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = Decoder()
    got: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[start:end])
    assert got == sent
    assert decoder.ended and not decoder.closed
    assert decoder.confirmed == sum(range(len(sent))) + 5
    assert decoder.received == len(sent)
    assert decoder.inside == ""


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 65535, 65536, 65537, 300_000])
def test_byte_by_byte_and_whole_are_the_same(size: int) -> None:
    message = bytes(i * 31 & 255 for i in range(size))
    stream = encode(message) + encode(b"next")
    assert Decoder().feed(stream) == [message, b"next"]
    decoder = Decoder()
    step = 1 if size < 1000 else 997
    got = [m for at in range(0, len(stream), step) for m in decoder.feed(stream[at : at + step])]
    assert got == [message, b"next"]


def test_where_the_bytes_end_is_told() -> None:
    decoder = Decoder()
    decoder.feed(b"\x05\0\0")
    assert decoder.inside == "inside a frame header: 3 of 8 bytes came"
    decoder.feed(b"\0\0\0\0\0ab")
    assert decoder.inside == "inside a message: 2 of 5 bytes came"
    assert decoder.feed(b"cde") == [b"abcde"]
    assert decoder.inside == ""


def test_the_limit_is_inclusive_and_a_length_above_it_is_refused() -> None:
    assert Decoder(10).feed(encode(bytes(10))) == [bytes(10)]
    with pytest.raises(TooLarge) as caught:
        Decoder(10).feed(encode(bytes(11)))
    assert (caught.value.size, caught.value.limit) == (11, 10)
    large = struct.pack("<IIQ", 0xFFFFFFFD, 0, 1 << 62)
    with pytest.raises(TooLarge):
        Decoder().feed(large)


def test_nothing_is_allocated_on_a_length_alone() -> None:
    decoder = Decoder(1 << 40)
    tracemalloc.start()
    try:
        decoder.feed(struct.pack("<IIQ", 0xFFFFFFFD, 0, 1 << 39))
        decoder.feed(b"x" * 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoder.allocated <= 65536
    assert peak < 1 << 20
    for _ in range(100):
        decoder.feed(bytes(10_000))
        assert decoder.allocated <= max(65536, 4 * 1_001_000)


def test_a_large_frame_header_may_come_in_pieces() -> None:
    decoder = Decoder(1 << 40)
    for byte in struct.pack("<IIQ", 0xFFFFFFFD, 9, 1 << 33):
        assert decoder.feed(bytes([byte])) == []
    assert decoder.inside == f"inside a message: 0 of {1 << 33} bytes came"
    assert decoder.confirmed == 9


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (struct.pack("<II", 0xFFFFFFF0, 0), "unknown frame kind 0xfffffff0"),
        (struct.pack("<II", 0xFFFFFFFA, 0), "unknown frame kind 0xfffffffa"),
        (struct.pack("<IIQ", 0xFFFFFFFD, 0, 5), "a large frame of only 5 bytes"),
        (struct.pack("<IIII", 0xFFFFFFFB, 0, 1, 1), "carries none"),
        (encode_kind("end") + encode(b"x"), "after the end"),
        (encode_kind("end") + encode_kind("end"), "after the end"),
        (encode_kind("close") + encode_kind("confirm"), "after the end"),
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes, text: str) -> None:
    with pytest.raises(BadFrame, match=text):
        Decoder().feed(stream)


def test_after_the_end_confirmations_and_the_close_still_come() -> None:
    decoder = Decoder()
    decoder.feed(encode_kind("end", 1) + encode_kind("confirm", 2) + encode_kind("close", 4))
    assert (decoder.ended, decoder.closed, decoder.confirmed) == (True, True, 7)


def test_descriptors_are_announced_with_their_count() -> None:
    decoder = Decoder(descriptors=True)
    (announced,) = decoder.feed(struct.pack("<IIII", 0xFFFFFFFB, 0, 3, 2) + b"fds")
    assert (announced.message, announced.count) == (b"fds", 2)
    with pytest.raises(BadFrame, match="254 descriptors"):
        Decoder(descriptors=True).feed(struct.pack("<IIII", 0xFFFFFFFB, 0, 0, 254))


@given(st.binary(max_size=400), st.integers(0, 400))
@settings(max_examples=300)
def test_garbage_raises_our_errors_only(data: bytes, cut: int) -> None:
    decoder = Decoder(1000)
    try:
        got = decoder.feed(data[:cut]) + decoder.feed(data[cut:])
    except (BadFrame, TooLarge):
        return
    assert all(len(message) <= 1000 for message in got)


@given(messages, st.integers(0, 5000))
def test_the_state_moves_to_another_decoder_at_any_point(sent: list[bytes], at: int) -> None:
    stream = b"".join(encode(message, 1) for message in sent)
    at = min(at, len(stream))
    first, second = Decoder(), Decoder()
    got = first.feed(stream[:at])
    second.restore_state(*first.detach_state())
    got += second.feed(stream[at:])
    assert got == sent
    assert second.confirmed == len(sent)
