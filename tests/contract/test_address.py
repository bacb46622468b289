"""Addresses: what parses, what it means, what is refused and where the caret points."""

from __future__ import annotations

import copy
import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anywire.contract.address import Address, forbid, require_host_port, require_name, require_path
from anywire.contract.errors import AddressError

FIELDS = ("scheme", "host", "port", "zone", "path", "abstract", "params")

GOOD = {
    # text: (canonical text, fields that are not empty)
    "tcp://127.0.0.1:9000": ("tcp://127.0.0.1:9000", {"host": "127.0.0.1", "port": 9000}),
    "TCP://Example.ORG:0080": ("tcp://example.org:80", {"host": "example.org", "port": 80}),
    "tcp://[::1]:0": ("tcp://[::1]:0", {"host": "::1", "port": 0}),
    "tcp://[0:0:0:0:0:0:0:1]:1": ("tcp://[::1]:1", {"host": "::1", "port": 1}),
    "tcp://[::FFFF:10.0.0.1]:1": ("tcp://[::ffff:10.0.0.1]:1", {"host": "::ffff:10.0.0.1", "port": 1}),
    "tcp://[fe80::1%25eth0]:1": ("tcp://[fe80::1%25eth0]:1", {"host": "fe80::1", "zone": "eth0", "port": 1}),
    "tcp://[fe80::1%eth0]:1": ("tcp://[fe80::1%25eth0]:1", {"host": "fe80::1", "zone": "eth0", "port": 1}),
    "tcp://[fe80::1%2]:1": ("tcp://[fe80::1%252]:1", {"host": "fe80::1", "zone": "2", "port": 1}),
    "tcp://[fe80::1%25]:1": ("tcp://[fe80::1%2525]:1", {"host": "fe80::1", "zone": "25", "port": 1}),
    "tcp://[fe80::1%25a%2Fb]:1": ("tcp://[fe80::1%25a%2Fb]:1", {"host": "fe80::1", "zone": "a/b", "port": 1}),
    "tcp://:80": ("tcp://:80", {"port": 80}),
    "tls://h:1?server_name=a&ca=/etc/ca.pem": (
        "tls://h:1?ca=/etc/ca.pem&server_name=a",
        {"host": "h", "port": 1, "params": {"ca": "/etc/ca.pem", "server_name": "a"}},
    ),
    "unix:///run/app.sock": ("unix:///run/app.sock", {"path": "/run/app.sock"}),
    "unix:/run/app.sock": ("unix:///run/app.sock", {"path": "/run/app.sock"}),
    "unix:////double": ("unix:////double", {"path": "//double"}),
    "unix:///a%20b%3Fc%23d%25": ("unix:///a%20b%3Fc%23d%25", {"path": "/a b?c#d%"}),
    "unix:///%ff": ("unix:///%FF", {"path": "/\udcff"}),
    "unix:///\udcff": ("unix:///%FF", {"path": "/\udcff"}),
    "unix:///caf\u00e9": ("unix:///caf%C3%A9", {"path": "/caf\u00e9"}),
    "unix:@name": ("unix:@name", {"path": "name", "abstract": True}),
    "unix:@/tmp/x": ("unix:@/tmp/x", {"path": "/tmp/x", "abstract": True}),
    "unix:@a%00b": ("unix:@a%00b", {"path": "a\0b", "abstract": True}),
    "unix:@n?type=seqpacket": (
        "unix:@n?type=seqpacket",
        {"path": "n", "abstract": True, "params": {"type": "seqpacket"}},
    ),
    "pipe:?write=4&read=3": ("pipe:?read=3&write=4", {"params": {"read": "3", "write": "4"}}),
    "pipe:": ("pipe:", {}),
    "pipe://": ("pipe:", {}),
    "inproc://Name": ("inproc://Name", {"host": "Name"}),
    "inproc://a%3Ab%40": ("inproc://a%3Ab%40", {"host": "a:b@"}),
    "nats://h:4222/sub.ject": ("nats://h:4222/sub.ject", {"host": "h", "port": 4222, "path": "/sub.ject"}),
    "x:?k=": ("x:?k=", {"params": {"k": ""}}),
    "x:?k=a=b+c%26": ("x:?k=a%3Db%2Bc%26", {"params": {"k": "a=b+c&"}}),
}

BAD = [
    # the text, and below it the exact carets
    ("", "^"),
    ("localhost", "^^^^^^^^^"),
    ("/tmp/x", "^^^^^^"),
    ("/tmp/x:1", "^^^^^^^^"),
    ("localhost:9000", "          ^^^^"),
    ("127.0.0.1:80", "^"),
    ("://host:1", "^"),
    ("t_p://h:1", " ^"),
    (" tcp://h:1", "^"),
    ("tcp://h:1 ", "         ^"),
    ("tcp://a b:1", "       ^"),
    ("unix:///a#b", "         ^"),
    ("tcp://h:", "       ^"),
    ("tcp://h:http", "        ^^^^"),
    ("tcp://h:-1", "        ^^"),
    ("tcp://h:65536", "        ^^^^^"),
    ("tcp://h:\u0663", "        ^"),
    ("tcp://::1:80", "      ^^^^^^"),
    ("tcp://[::1:80", "      ^^^^^^^"),
    ("tcp://[::g]:80", "       ^^^"),
    ("tcp://[127.0.0.1]:80", "       ^^^^^^^^^"),
    ("tcp://[]:80", "       ^"),
    ("tcp://[::1]80", "           ^^"),
    ("tcp://[::1%]:80", "          ^"),
    ("tcp://h]:80", "       ^"),
    ("tcp://me@h:80", "      ^^^"),
    ("unix://@name", "       ^^^^^"),
    ("unix:@", "     ^"),
    ("unix:relative", "     ^^^^^^^^"),
    ("unix:///a%2", "         ^^"),
    ("unix:///a%zz/b", "         ^^^"),
    ("unix:///a%00b", "         ^^^"),
    ("tcp://h%00:1", "       ^^^"),
    ("pipe:?", "     ^"),
    ("pipe:?read", "      ^^^^"),
    ("pipe:?read=3&", "             ^"),
    ("pipe:?read=3&&write=4", "             ^"),
    ("pipe:?read=3&read=4", "             ^^^^^^"),
    ("pipe:?=3", "      ^"),
    ("pipe:?re%61d=3", "      ^^^^^^"),
    ("pipe:?read=%", "           ^"),
]


@pytest.mark.parametrize("text", GOOD)
def test_parses(text):
    canonical, expected = GOOD[text]
    address = Address.parse(text)
    assert str(address) == canonical
    empty = {"host": "", "port": None, "zone": "", "path": "", "abstract": False, "params": {}}
    assert {name: getattr(address, name) for name in FIELDS} == {
        "scheme": canonical.partition(":")[0],
        **empty,
        **expected,
    }
    assert Address.parse(canonical) == address
    assert hash(Address.parse(canonical)) == hash(address)
    assert Address(**{name: getattr(address, name) for name in FIELDS}) == address
    assert pickle.loads(pickle.dumps(address)) == copy.deepcopy(address) == address


@pytest.mark.parametrize(("text", "carets"), BAD)
def test_points_at_the_bad_part(text, carets):
    with pytest.raises(AddressError) as caught:
        Address.parse(text)
    error = caught.value
    reason, shown, below = str(error).split("\n")
    assert reason == error.reason
    assert shown == "    " + text
    assert below == "    " + carets
    assert isinstance(error, ValueError)
    assert error.text == text == error.address


def test_fields_that_make_no_address_are_refused():
    for fields in (
        {"scheme": "tcp", "host": "h", "path": "no-slash"},
        {"scheme": "tcp", "host": "h", "port": 70000},
        {"scheme": "tcp", "host": "h", "port": -1},
        {"scheme": "", "host": "h"},
        {"scheme": "tcp", "host": "h", "zone": "eth0"},
        {"scheme": "unix", "host": "h", "path": "x", "abstract": True},
        {"scheme": "unix", "path": "/a\0"},
        {"scheme": "unix", "path": "/\ud800"},
        {"scheme": "x", "params": {"no-identifier": "1"}},
    ):
        with pytest.raises(AddressError):
            Address(**fields)


def test_is_frozen():
    address = Address.parse("tcp://h:1?a=b")
    with pytest.raises(AttributeError):
        address.port = 2
    with pytest.raises(AttributeError):
        del address.port
    with pytest.raises(TypeError):
        address.params["a"] = "c"
    assert str(address) == "tcp://h:1?a=b"


def test_comparison_and_replacement():
    address = Address.parse("tcp://h:0?a=b")
    assert address.with_port(5) == Address.parse("tcp://h:5?a=b")
    assert address.with_params({}) == Address.parse("tcp://h:0")
    assert address.with_params({"z": "1", "c": "/x"}) == Address.parse("tcp://h:0?c=/x&z=1")
    assert address != "tcp://h:0?a=b"
    assert Address.parse(address) is address
    assert Address.parse("inproc://A") != Address.parse("inproc://a")
    with pytest.raises(TypeError, match="bytes"):
        Address.parse(b"tcp://h:1")


def test_abstract_and_file_names_are_bytes_in_the_end():
    assert Address.parse("unix:@%00%ff%C3%A9").path_bytes == b"\0\xff\xc3\xa9"
    assert Address.parse("unix:///caf\u00e9").path_bytes == "/caf\u00e9".encode()


@pytest.mark.parametrize(
    ("text", "carets"),
    [
        ("tcp://h", "       ^"),
        ("tcp://:1", "      ^"),
        ("tcp:", "    ^"),
        ("tcp://h:1/path", "         ^^^^^"),
        ("tcp:@name", "    ^^^^^"),
        ("tcp://h:0", "        ^"),
        ("tcp://a..b:1", "      ^^^^"),
        ("tcp://a%20b:1", "      ^^^^^"),
        ("tcp://" + "a" * 64 + ":1", "      " + "^" * 64),
    ],
)
def test_require_host_port(text, carets):
    with pytest.raises(AddressError) as caught:
        require_host_port(Address.parse(text), port_zero=False)
    assert str(caught.value).split("\n")[1:] == ["    " + text, "    " + carets]


def test_requirements_met():
    assert require_host_port(Address.parse("tcp://b\u00fccher.example:0")) == ("b\u00fccher.example", 0)
    assert require_host_port(Address.parse("tcp://[::1]:7"), port_zero=False) == ("::1", 7)
    assert require_host_port(Address.parse("tcp://:0")) == ("", 0)
    assert require_path(Address.parse("unix:///a/b")) == "/a/b"
    assert require_name(Address.parse("inproc://n")) == "n"
    forbid(Address.parse("inproc://n"), "port", "path", "abstract", "params")


@pytest.mark.parametrize(
    ("check", "text", "carets"),
    [
        (require_path, "unix:", "     ^"),
        (require_path, "unix:///", "       ^"),
        (require_path, "unix:///dir/", "       ^^^^^"),
        (require_path, "unix://tmp/x", "       ^^^"),
        (require_path, "unix://:1/x", "        ^"),
        (require_path, "unix:@x", "     ^^"),
        (require_name, "inproc:", "       ^"),
        (require_name, "inproc:///a", "         ^^"),
        (require_name, "inproc://a:1", "           ^"),
        (lambda a: forbid(a, "params"), "x:?a=1", "  ^^^^"),
    ],
)
def test_requirements_point_at_the_bad_part(check, text, carets):
    with pytest.raises(AddressError) as caught:
        check(Address.parse(text))
    assert str(caught.value).split("\n")[1:] == ["    " + text, "    " + carets]


def test_an_error_points_into_what_the_user_wrote():
    address = Address.parse("TCP://[0:0::1]:0080?zeta=1&alpha=2")
    assert str(address.error("?alpha", "no")).split("\n")[1:] == [
        "    TCP://[0:0::1]:0080?zeta=1&alpha=2",
        "    " + " " * 27 + "^^^^^^^",
    ]
    assert address.error("host", "no").start == 7


def test_a_caret_in_a_long_or_wide_address_still_stands_below():
    long = "unix:///" + "a" * 5000 + "%zz" + "b" * 5000
    with pytest.raises(AddressError) as caught:
        Address.parse(long)
    _, shown, below = str(caught.value).split("\n")
    assert len(shown) < 300
    assert shown[below.index("^") : len(below)] == "%zz"
    with pytest.raises(AddressError) as caught:
        Address.parse("unix:///\u6f22\u5b57%zz")  # two wide characters: four cells
    assert str(caught.value).split("\n")[2] == "    " + " " * 12 + "^^^"
    with pytest.raises(AddressError) as caught:
        Address.parse("tcp://h\t:1")
    assert str(caught.value).split("\n")[1:] == ["    tcp://h\\t:1", "           ^^"]


# Text that is nearly an address finds more than text at random.
_pieces = st.sampled_from(
    ["tcp", "unix", ":", "//", "/", "[", "]", "::1", "@", "%", "%25", "%00", "%ff", "?", "=", "&", "a", "Z", "7", "#"]
    + ["\udcff", "\ud800", "\u00e9", "\u0130", "\u6f22", " ", "\0", "+", "'"]
)


@given(st.one_of(st.text(), st.lists(_pieces).map("".join), st.lists(_pieces).map(lambda p: "x://" + "".join(p))))
@example("x://%C4%B0:1")
def test_any_text_parses_or_raises_address_error(text):
    try:
        address = Address.parse(text)
    except AddressError as error:
        assert 0 <= error.start <= error.end <= len(text)
        assert "^" in str(error)
    else:
        canonical = str(address)
        again = Address.parse(canonical)
        assert canonical.isascii() and canonical.isprintable()
        assert again == address
        assert str(again) == canonical


# Any bytes make a path or name. A NUL only in an abstract name; hosts with a port fold their case.
_bytes = st.binary(min_size=1, max_size=30)
_text = _bytes.map(lambda raw: raw.decode("utf-8", "surrogateescape"))
_no_nul = _text.filter(lambda text: "\0" not in text)
_scheme = st.from_regex(r"[a-z][a-z0-9+.-]*", fullmatch=True)
_key = st.text(string.ascii_letters + "_", min_size=1)
_params = st.dictionaries(_key, st.one_of(st.just(""), _no_nul), max_size=3)
_v6 = st.ip_addresses(v=6).map(str)
_places = st.one_of(
    st.fixed_dictionaries({"abstract": st.just(True), "path": _text}),
    st.fixed_dictionaries({"path": _no_nul.map(lambda path: "/" + path)}),
    st.fixed_dictionaries({"host": _no_nul}),
    st.fixed_dictionaries(
        {"host": _no_nul, "port": st.integers(0, 65535), "path": _no_nul.map(lambda path: "/" + path)}
    ),
    st.fixed_dictionaries({"host": _v6, "port": st.integers(0, 65535), "zone": st.one_of(st.just(""), _no_nul)}),
)


@given(_scheme, _places, _params)
def test_fields_survive_the_text(scheme, place, params):
    address = Address(scheme, **place, params=params)
    again = Address.parse(str(address))
    assert again == address
    assert str(again) == str(address)
    assert again.params == params
    for name in place.keys() - {"host"}:
        assert getattr(again, name) == place[name]
    assert again.host.lower() == address.host.lower()


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("localhost:9000", "for host and port write tcp://localhost:9000"),
        ("unix:./socket", "a path is absolute: unix:///"),
        ("unix:folder/socket", "a path is absolute: unix:///"),
    ],
)
def test_likely_mistakes_are_told_what_was_meant(text, advice):
    with pytest.raises(AddressError, match=advice):
        Address.parse(text)
