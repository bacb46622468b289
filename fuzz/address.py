"""Fuzz addresses with atheris: any text parses to an address that survives its own text, or raises AddressError.

    python fuzz/address.py -max_total_time=60          (`make fuzz` runs every target)

Checked for each input: no other exception; the caret span lies inside the text and the error prints; the canonical form
is ASCII, parses to an equal address and is its own canonical form; wires' checks raise nothing but AddressError.
It begins with one address of each kind (`seeds/address`); a crash leaves its input in the current directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["anywire.contract.address"]):
    from anywire.contract.address import Address, require_host_port, require_name, require_path
    from anywire.contract.errors import AddressError

SEEDS = Path(__file__).parent / "seeds" / "address"


def check(text: str) -> None:
    """One input."""
    try:
        address = Address.parse(text)
    except AddressError as error:
        assert 0 <= error.start <= error.end <= len(text), (text, error.start, error.end)
        assert "^" in str(error)
        return
    canonical = str(address)
    again = Address.parse(canonical)
    assert canonical.isascii() and canonical.isprintable(), (text, canonical)
    assert again == address and str(again) == canonical, (text, canonical)
    for require in (require_host_port, require_name, require_path):
        try:
            require(address)
        except AddressError as error:
            assert 0 <= error.start <= error.end <= len(text), (text, error.start, error.end)


def one_input(data: bytes) -> None:
    """The bytes as an address: once as they are, once after a scheme, so that the deeper parts are reached early."""
    text = data.decode("utf-8", "surrogateescape")
    check(text)
    check("x:" + text)
    check("x://" + text)


def main() -> None:
    """Run libFuzzer with this process's arguments, beginning with the seeds. It ends the process itself."""
    seeds = ",".join(str(path) for path in sorted(SEEDS.iterdir()))
    atheris.Setup([*sys.argv, f"-seed_inputs={seeds}"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
