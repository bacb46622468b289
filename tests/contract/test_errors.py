"""Errors: their text, their builtin parents, and that they survive a trip to another process."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import multiprocessing
import pickle

import pytest

from anywire.contract import errors
from anywire.contract.errors import (
    AddressError,
    AnywireError,
    BadFrame,
    Busy,
    ChannelClosed,
    EndOfChannel,
    Forked,
    MessagesLost,
    PeerLost,
    Refused,
    TimedOut,
    TooLarge,
    TooSlow,
    UnknownWire,
    Unsupported,
    describe_bytes,
)

WHERE = {"address": "tcp://h:1", "operation": "recv"}

# error, the builtin people catch, its errno, attributes, text
TABLE = [
    (
        AddressError("tcp://h:x", 8, 9, "a port is a number"),
        ValueError,
        None,
        {"text": "tcp://h:x", "start": 8, "end": 9, "reason": "a port is a number", "address": "tcp://h:x"},
        "a port is a number\n    tcp://h:x\n            ^",
    ),
    (
        UnknownWire("tpc", ["unix", "tcp"], address="tpc://h:1", operation="connect"),
        ValueError,
        None,
        {"scheme": "tpc", "known": ("tcp", "unix"), "operation": "connect"},
        "connect tpc://h:1: there is no wire 'tpc'; known wires: tcp, unix",
    ),
    (
        Unsupported("a datagram wire has no byte stream", advice="use tcp:// or unix://", **WHERE),
        NotImplementedError,
        None,
        WHERE,
        "recv tcp://h:1: a datagram wire has no byte stream; use tcp:// or unix://",
    ),
    (
        EndOfChannel(unconfirmed=1, **WHERE),
        EOFError,
        None,
        {"unconfirmed": 1},
        "recv tcp://h:1: the peer ended the channel cleanly, 1 sent message may not have reached its application",
    ),
    (
        PeerLost("connection reset", unconfirmed=3, **WHERE),
        ConnectionResetError,
        errno.ECONNRESET,
        {"reason": "connection reset", "unconfirmed": 3, **WHERE},
        (
            "recv tcp://h:1: the peer was lost (connection reset), 3 sent messages may not have reached its "
            "application; connect again and send again what must arrive"
        ),
    ),
    (ChannelClosed(**WHERE), BrokenPipeError, errno.EPIPE, WHERE, "recv tcp://h:1: it is closed"),
    (
        Refused(**WHERE),
        ConnectionRefusedError,
        errno.ECONNREFUSED,
        {"reason": "nobody listens there"},
        (
            "recv tcp://h:1: refused: nobody listens there; start the listener first, or wait for it with "
            "connect(wait=seconds)"
        ),
    ),
    (
        Refused("uid 7 is not 0", **WHERE),
        ConnectionRefusedError,
        errno.ECONNREFUSED,
        {"reason": "uid 7 is not 0"},
        "recv tcp://h:1: refused: uid 7 is not 0",
    ),
    (
        TimedOut(0.25, **WHERE),
        TimeoutError,
        errno.ETIMEDOUT,
        {"seconds": 0.25},
        "recv tcp://h:1: took longer than 0.25 s; try again, or pass a larger timeout",
    ),
    (
        TooLarge(20_000_000, 16_777_216, **WHERE),
        ValueError,
        None,
        {"size": 20_000_000, "limit": 16_777_216, "option": "max_message"},
        (
            "recv tcp://h:1: a message of 20,000,000 bytes is over the limit of 16,777,216; "
            "raise max_message= on the receiving side, or send it in parts"
        ),
    ),
    (
        BadFrame(received=b"GET / HTTP/1.1\r\n", **WHERE),
        ConnectionError,
        errno.EPROTO,
        {"received": b"GET / HTTP/1.1\r\n"},
        (
            "recv tcp://h:1: the peer does not speak anywire's framing: an HTTP request, b'GET / HTTP/1.1\\r\\n'; "
            "check that both ends use anywire on this address, in the same version"
        ),
    ),
    (
        MessagesLost(3, **WHERE),
        BufferError,
        None,
        {"lost": 3, **WHERE},
        "recv tcp://h:1: 3 messages were left out, because this subscriber was behind; go on receiving; losses='count' "
        "only counts",
    ),
    (
        TooSlow(5.0, **WHERE),
        ConnectionAbortedError,
        errno.ECONNABORTED,
        {"seconds": 5.0, **WHERE},
        "recv tcp://h:1: the publisher dropped this subscriber, which took no message for 5 s; subscribe again; the "
        "publisher sets stall_timeout=",
    ),
    (
        Busy(**WHERE),
        RuntimeError,
        None,
        WHERE,
        (
            "recv tcp://h:1: another task or thread is receiving already; receive in one place and hand the messages "
            "out, or open one channel for each receiver"
        ),
    ),
    (
        Forked(**WHERE),
        RuntimeError,
        None,
        WHERE,
        (
            "recv tcp://h:1: it was opened before this process was forked; connect again in the child, or hand it over "
            "with detach() and attach()"
        ),
    ),
]


@pytest.mark.parametrize(("error", "builtin", "number", "attributes", "text"), TABLE)
def test_each_error(error, builtin, number, attributes, text):
    assert isinstance(error, AnywireError)
    assert isinstance(error, builtin)
    for name, value in attributes.items():
        assert getattr(error, name) == value
    assert str(error) == error.message == text
    assert error.args == (error.what,)
    assert type(error).__name__ in repr(error)
    if isinstance(error, OSError):
        assert error.errno == number
        assert error.strerror == error.what
    with pytest.raises(builtin):
        raise error


@pytest.mark.parametrize("error", [row[0] for row in TABLE])
@pytest.mark.parametrize("trip", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_copies_keep_everything(error, trip):
    there = trip(error)
    assert type(there) is type(error)
    assert there.__dict__ == error.__dict__
    assert there.args == error.args
    assert str(there) == str(error)
    if isinstance(error, OSError):
        assert (there.errno, there.strerror) == (error.errno, error.strerror)


def test_the_table_has_every_class():
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AnywireError)}
    assert classes - {AnywireError} == {type(row[0]) for row in TABLE}


def _lose():
    error = PeerLost("killed", unconfirmed=2, address="unix:@x", operation="send")
    error.add_note("in the child")
    raise error


def test_crosses_a_process_border():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(PeerLost) as caught:
        pool.submit(_lose).result()
    assert caught.value.unconfirmed == 2
    assert caught.value.errno == errno.ECONNRESET
    assert caught.value.__notes__ == ["in the child"]
    assert str(caught.value).startswith("send unix:@x: the peer was lost (killed)")


def test_a_layer_above_fills_in_where_it_happened():
    error = ChannelClosed()
    assert str(error) == "it is closed"
    error.operation = "send"
    assert str(error) == "send: it is closed"
    error.address = "tcp://h:1"
    assert str(error) == "send tcp://h:1: it is closed"


PREAMBLE = b"\x89anyw\r\n\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no bytes"),
        (b"GET / HTTP/1.1", "an HTTP request"),
        (b"PRI * HTTP/2.0\r\n", "an HTTP/2 client"),
        (b"HTTP/1.1 400 Bad", "an HTTP response"),
        (b"SSH-2.0-OpenSSH_9.6", "an SSH banner"),
        (b"\x16\x03\x01\x02\x00\x01\x00", "a TLS ClientHello"),
        (b"\x16\x03\x03\x00\x7a\x02", "a TLS ServerHello"),
        (b"\x16\x03", "a TLS handshake"),
        (b"\x15\x03\x01\x00\x02\x02", "a TLS alert"),
        (PREAMBLE + b"\x02\x07", "an anywire preamble of version 2.7"),
        (PREAMBLE, "the start of an anywire preamble"),
        (b"\x89anyw\n\n\x01", "line ends were translated"),
    ],
)
def test_recognises_who_knocked(data, says):
    assert says in describe_bytes(data)
    assert describe_bytes(data).isprintable()
    if data:
        assert says in str(BadFrame(received=memoryview(data)))


def test_the_excerpt_is_short_and_printable():
    shown = describe_bytes(bytes(range(256)) * 1000)
    assert shown.isprintable()
    assert shown.startswith("b'\\x00\\x01")
    assert shown.endswith("...")
    assert len(shown) < 250
