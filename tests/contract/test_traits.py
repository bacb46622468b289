"""Traits and peers: plain values that say what they mean."""

from __future__ import annotations

import dataclasses
import os
import re

import pytest

from anywire.contract.peer import Peer
from anywire.contract.traits import Traits

PIPE = Traits(
    kind=frozenset({"stream"}),
    connection=True,
    ordered="yes",
    reliable="yes, kept by the kernel",
    clean_end="none",
    sees_death="at once",
    half_close="\u2013",
    crosses_hosts=False,
    credentials="inherited",
    copies="2",
    message_limit="configured",
)


def test_columns_are_those_of_the_table():
    names = "kind connection ordered reliable clean_end sees_death half_close crosses_hosts credentials copies "
    assert " ".join(PIPE.cells()) == names + "message_limit"


@pytest.mark.parametrize(
    ("column", "value", "promised"),
    [
        ("ordered", "yes", True),
        ("ordered", "per writer", True),
        ("ordered", "no", False),
        ("ordered", "no, by type", False),
        ("ordered", "not across threads", True),
        ("half_close", "\u2013", False),
        ("half_close", "yes (tls: one way)", True),
        ("credentials", "none", False),
        ("copies", "0", True),
        ("crosses_hosts", True, True),
        ("connection", False, False),
    ],
)
def test_promises(column, value, promised):
    assert dataclasses.replace(PIPE, **{column: value}).promises(column) is promised


def test_faces():
    assert (PIPE.has_stream, PIPE.is_framed) == (True, True)
    message = dataclasses.replace(PIPE, kind=frozenset({"message"}))
    assert (message.has_stream, message.is_framed) == (False, False)
    both = dataclasses.replace(PIPE, kind=frozenset({"message", "stream"}))
    assert (both.has_stream, both.is_framed) == (True, False)


def test_cells_are_words():
    both = dataclasses.replace(PIPE, kind=frozenset({"stream", "message"}))
    assert both.cells()["kind"] == "message and stream"
    assert both.cells()["connection"] == "yes"
    assert both.cells()["crosses_hosts"] == "no"
    assert both.cells()["reliable"] == "yes, kept by the kernel"


def test_an_empty_promise_is_refused():
    with pytest.raises(ValueError, match="half_close promises nothing"):
        dataclasses.replace(PIPE, half_close="")
    with pytest.raises(ValueError, match=re.escape("frozenset()")):
        dataclasses.replace(PIPE, kind=frozenset())
    with pytest.raises(dataclasses.FrozenInstanceError):
        PIPE.ordered = "no"


def test_same_user():
    assert Peer(uid=os.geteuid()).is_same_user()
    assert Peer(uid=0).is_same_user()
    assert not Peer(uid=os.geteuid() + 1).is_same_user()
    assert not Peer(wire="tcp", address="tcp://127.0.0.1:5").is_same_user()
