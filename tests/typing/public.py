"""What users' type checkers see of the public names: checked by mypy and by pyright, never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_type

from anywire.contract.address import Address
from anywire.contract.errors import AnywireError, EndOfChannel, PeerLost, TimedOut


def addresses(text: str) -> None:
    address = Address.parse(text)
    assert_type(address, Address)
    assert_type(address.scheme, str)
    assert_type(address.port, int | None)
    assert_type(address.params, Mapping[str, str])


def errors(error: Exception) -> None:
    if isinstance(error, PeerLost):
        assert_type(error.unconfirmed, int)
        caught: ConnectionResetError = error
        print(caught)
    elif isinstance(error, EndOfChannel):
        ended: EOFError = error
        print(ended)
    elif isinstance(error, TimedOut):
        late: TimeoutError = error
        print(late)
    elif isinstance(error, AnywireError):
        print(error)
