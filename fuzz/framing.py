"""Fuzz the preamble and the decoder with atheris: any bytes in any fragments give messages or one of our errors.

    python fuzz/framing.py -max_total_time=60          (`make fuzz` runs every target)

Checked for each input: no other exception, no message over the limit, memory in proportion to what came, and the same
outcome whether the bytes come at once, byte by byte, or in the fragments that the input itself chooses.
The decoder is compiled, so coverage guides through the preamble and the outcome only; the sanitizers catch the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["anywire.framing.preamble"]):
    from anywire.contract.errors import BadFrame, TooLarge
    from anywire.framing.codec import Decoder
    from anywire.framing.preamble import decode, missing

SEEDS = Path(__file__).parent / "seeds" / "framing"
LIMIT = 4096


def outcome(data: bytes, cuts: list[int]) -> tuple[object, ...]:
    """What a decoder makes of the fragments: messages, counts, and the kind of error."""
    decoder = Decoder(LIMIT, descriptors=True)
    got: list[object] = []
    error = ""
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        try:
            got += decoder.feed(data[start:end])
        except (BadFrame, TooLarge) as caught:
            error = type(caught).__name__
            break
        assert decoder.allocated <= max(65536, 4 * len(data))
    sizes = [len(getattr(message, "message", message)) for message in got]  # type: ignore[arg-type]
    assert all(size <= LIMIT for size in sizes)
    # Messages decoded in the call that raised stay inside the decoder: compare what is certain in every fragmentation.
    if error:
        return (error,)
    return (tuple(sizes), decoder.confirmed, decoder.ended, decoder.closed, decoder.inside, error)


def test_one_input(data: bytes) -> None:
    """What atheris calls."""
    try:
        have = 0
        while (need := missing(data[:have])) and have + need <= len(data):
            have += need
        if not missing(data[:have]):
            decode(data[:have])
    except BadFrame:
        pass
    whole = outcome(data, [])
    cuts = sorted({byte % (len(data) + 1) for byte in data[:8]})
    assert outcome(data, cuts) == whole, (data, cuts)
    assert outcome(data, list(range(1, len(data)))) == whole, data


if __name__ == "__main__":
    # Not as a corpus directory: libFuzzer would write what it finds into the repository.
    seeds = ",".join(str(path) for path in sorted(SEEDS.iterdir()))
    atheris.Setup([*sys.argv, f"-seed_inputs={seeds}"], test_one_input)
    atheris.Fuzz()
