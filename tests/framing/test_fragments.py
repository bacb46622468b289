"""Fragments: messages of many writers, mixed in any way the kernel may mix them."""

import random

import pytest

from anywire.framing.fragments import Fragments, fragments_of

ATOM = 4096


def atoms(writer, message):
    data = fragments_of(writer, message)
    return [data[i : i + ATOM] for i in range(0, len(data), ATOM)]


def test_the_bytes_of_a_fragment():
    assert fragments_of(0x0102030405060708, b"hi") == (
        b"awF\x01" + b"\x02\x00" + b"\x03\x00" + bytes.fromhex("0807060504030201") + (2).to_bytes(8, "little") + b"hi"
    )
    first, last = atoms(1, b"x" * 5000)
    assert (first[4:8], last[4:8]) == (b"\xe8\x0f\x01\x00", (928).to_bytes(2, "little") + b"\x02\x00")
    assert int.from_bytes(first[16:24], "little") == 5000
    assert int.from_bytes(last[16:24], "little") == 4072


@pytest.mark.parametrize("size", [0, 1, 4071, 4072, 4073, 8144, 8145, 100_000])
@pytest.mark.parametrize("step", [1, 23, 4096, 1 << 20])
def test_any_size_in_any_pieces(size, step):
    if step == 1 and size > 10_000:
        step = 7
    message = random.Random(size).randbytes(size)
    fragments = Fragments(1 << 20)
    data = fragments_of(9, message) + fragments_of(9, b"next")
    for i in range(0, len(data), step):
        fragments.feed(data[i : i + step])
    assert list(fragments.ready) == [message, b"next"]
    assert not fragments.problems and not fragments.unfinished


@pytest.mark.parametrize("seed", range(20))
def test_writers_mixed_at_random(seed):
    chance = random.Random(seed)
    sent = {
        writer: [chance.randbytes(chance.choice([0, 5, 4072, 9000, 50_000])) for _ in range(20)] for writer in range(6)
    }
    queues = {writer: [atom for message in sent[writer] for atom in atoms(writer, message)] for writer in sent}
    stream = b""
    while queues:
        writer = chance.choice(list(queues))
        stream += queues[writer].pop(0)
        if not queues[writer]:
            del queues[writer]
    fragments = Fragments(1 << 20)
    while stream:
        cut = chance.randrange(1, 100_000)
        fragments.feed(stream[:cut])
        stream = stream[cut:]
    got = list(fragments.ready)
    assert not fragments.problems and not fragments.unfinished
    for writer, messages in sent.items():
        rest = iter(got)
        assert all(any(message == other for other in rest) for message in messages), writer
    assert len(got) == 120


def test_foreign_bytes_are_passed_over_and_noted():
    fragments = Fragments(1000)
    fragments.feed(
        fragments_of(1, b"before")
        + b"hello from echo\n" * 5
        + fragments_of(2, b"after")
        + b"awF"
        + fragments_of(3, b"end")
    )
    assert list(fragments.ready) == [b"before", b"after", b"end"]
    assert fragments.problems[0][1].startswith(b"hello from echo")


def test_a_message_over_the_limit_costs_only_itself():
    fragments = Fragments(5000)
    large = atoms(1, b"x" * 20_000)
    fragments.feed(large[0] + fragments_of(2, b"other") + b"".join(large[1:]) + fragments_of(1, b"mine again"))
    assert list(fragments.ready) == [b"other", b"mine again"]
    ((reason, _sample),) = fragments.problems
    assert "20000 bytes" in reason and "max_message" in reason


def test_a_length_allocates_nothing():
    fragments = Fragments(1 << 40)
    fragments.feed(b"awF\x01\x00\x00\x01\x00" + bytes(8) + (1 << 39).to_bytes(8, "little"))
    assert fragments.unfinished == 1


def test_a_writer_that_died_in_mid_message():
    fragments = Fragments(1 << 20)
    fragments.feed(atoms(1, b"x" * 10_000)[0])
    fragments.feed(atoms(2, b"y" * 10_000)[0])
    fragments.idle()
    fragments.feed(b"".join(atoms(2, b"y" * 10_000)[1:]))
    assert fragments.idle() == [1]
    fragments.forget(1)
    fragments.forget(1)
    assert list(fragments.ready) == [b"y" * 10_000]
    assert "4072 of 10000" in fragments.problems[0][0]


def test_a_writer_that_came_says_so_with_nothing():
    fragments = Fragments(10)
    fragments.feed(b"awF\x01" + bytes(4) + (7).to_bytes(8, "little") + bytes(8))
    assert not fragments.ready and not fragments.problems and not fragments.unfinished


@pytest.mark.parametrize("seed", range(50))
def test_garbage_never_breaks_it(seed):
    chance = random.Random(seed)
    fragments = Fragments(10_000)
    for _ in range(200):
        data = bytearray(b"".join(atoms(chance.randrange(3), chance.randbytes(chance.randrange(9000)))))
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        fragments.feed(bytes(data[chance.randrange(20) : chance.randrange(20, len(data) + 20)]))
    assert all(len(message) <= 10_000 for message in fragments.ready)
