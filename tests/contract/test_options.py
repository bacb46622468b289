"""Wire options: from the address, from keywords, and clear refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from anywire.contract import options
from anywire.contract.address import Address
from anywire.contract.errors import AddressError
from anywire.contract.options import Option, resolve_options
from anywire.contract.wire import Wire


class Sample(Wire):
    schemes = ("sample",)
    options: ClassVar[Mapping[str, Option]] = {
        option.name: option
        for option in (
            Option("mode", options.octal_mode, 0o600, "of the file", frozenset({"listen"})),
            Option("keepalive", float, 30.0, "seconds"),
            Option("type", options.one_of("stream", "seqpacket"), "stream", "of socket"),
            Option("reply", bool, False),
            Option("server_name", str, None, sides=frozenset({"connect"})),
        )
    }

    def traits(self, address):
        raise AssertionError("options are resolved without I/O")

    check = dial = bind = traits


def resolve(text, side="connect", **keywords):
    return resolve_options(Sample(), Address.parse(text), keywords, side=side)


def test_defaults_of_the_side():
    assert resolve("sample:") == {"keepalive": 30.0, "type": "stream", "reply": False, "server_name": None}
    assert resolve("sample:", "listen") == {"mode": 0o600, "keepalive": 30.0, "type": "stream", "reply": False}


def test_address_and_keywords_are_merged():
    found = resolve("sample:?mode=0640&keepalive=250ms", "listen", type="seqpacket", reply=True)
    assert found == {"mode": 0o640, "keepalive": 0.25, "type": "seqpacket", "reply": True}
    assert resolve("sample:?reply=yes", reply="true")["reply"] is True
    assert resolve("sample:?reply=yes", reply=None)["reply"] is True  # None: not given


def test_an_address_is_shared_by_both_sides():
    assert "mode" not in resolve("sample:?mode=0640", "connect")
    with pytest.raises(AddressError, match="octal"):  # but it is still checked
        resolve("sample:?mode=rw", "connect")
    with pytest.raises(TypeError, match="'mode' of sample is for the other side"):
        resolve("sample:", "connect", mode=0o600)


def test_refusals_name_the_nearest_option():
    with pytest.raises(AddressError) as caught:
        resolve("sample:?reply=1&keep_alive=3")
    assert str(caught.value) == (
        "sample has no option 'keep_alive'; did you mean 'keepalive'? "
        "known: keepalive, mode, reply, server_name, type\n"
        "    sample:?reply=1&keep_alive=3\n"
        "                    ^^^^^^^^^^^^"
    )
    with pytest.raises(TypeError, match="sample:: sample has no option 'keepalife'; did you mean 'keepalive'"):
        resolve("sample:", keepalife=3)
    with pytest.raises(TypeError, match="known: keepalive, reply, server_name, type"):
        resolve("sample:", zzz=3)


def test_bad_values_point_at_themselves():
    with pytest.raises(AddressError) as caught:
        resolve("sample:?type=dgram&reply=1")
    assert str(caught.value).split("\n") == [
        "type: one of stream, seqpacket",
        "    sample:?type=dgram&reply=1",
        "            ^^^^^^^^^^",
    ]
    with pytest.raises(ValueError, match="keepalive=-1: a time is"):
        resolve("sample:", keepalive=-1)


def test_contradictions_are_refused():
    with pytest.raises(AddressError, match="given twice"):
        resolve("sample:?type=stream", type="seqpacket")


@pytest.mark.parametrize(
    ("convert", "given", "value"),
    [
        (options.boolean, "TRUE", True),
        (options.boolean, "off", False),
        (options.boolean, "0", False),
        (options.boolean, True, True),
        (options.octal_mode, "600", 0o600),
        (options.octal_mode, "0o777", 0o777),
        (options.octal_mode, 0o660, 0o660),
        (options.seconds, "1.5", 1.5),
        (options.seconds, "250ms", 0.25),
        (options.seconds, ".5s", 0.5),
        (options.seconds, "2 m", 120.0),
        (options.seconds, 3, 3.0),
        (options.size, "512", 512),
        (options.size, "64KiB", 65536),
        (options.size, "16 MiB", 16 << 20),
        (options.size, "1GB", 10**9),
        (options.size, "2k", 2000),
        (options.size, 7, 7),
        (options.integer(-1, 5), "-1", -1),
        (options.count, "12", 12),
        (options.text, "a", "a"),
        (options.path, Path("/a/b"), "/a/b"),
        (options.path, "/a\udcff", "/a\udcff"),
        (options.words, "h2,http/1.1", ("h2", "http/1.1")),
        (options.words, ["h2"], ("h2",)),
        (options.any_value, None, None),
    ],
)
def test_converters_take(convert, given, value):
    found = convert(given)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("convert", "given"),
    [
        (options.boolean, "maybe"),
        (options.boolean, 1),
        (options.boolean, ""),
        (options.octal_mode, "0888"),
        (options.octal_mode, "rw-"),
        (options.octal_mode, "7777"),
        (options.octal_mode, -1),
        (options.octal_mode, True),
        (options.octal_mode, 6.0),
        (options.seconds, "soon"),
        (options.seconds, "-1"),
        (options.seconds, "nan"),
        (options.seconds, float("nan")),
        (options.seconds, float("inf")),
        (options.seconds, "\u0661"),
        (options.seconds, True),
        (options.seconds, None),
        (options.size, "16 stones"),
        (options.size, "1.5MiB"),
        (options.size, "-1"),
        (options.size, "9" * 5000),
        (options.size, 1.0),
        (options.size, -1),
        (options.integer(0, 5), "6"),
        (options.integer(0, 5), "\u0661"),
        (options.integer(0, 5), "9" * 5000),
        (options.integer(0, 5), True),
        (options.one_of("a"), "b"),
        (options.one_of("a"), ["a"]),
        (options.text, ""),
        (options.text, 1),
        (options.path, ""),
        (options.path, "a\0b"),
        (options.path, 3),
        (options.words, ""),
        (options.words, "a,,b"),
        (options.words, 5),
        (options.words, [1]),
    ],
)
def test_converters_refuse_with_a_reason(convert, given):
    with pytest.raises(ValueError, match=r"\w") as caught:
        convert(given)
    assert "invalid literal" not in str(caught.value)
