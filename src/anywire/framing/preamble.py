"""The preamble: the first bytes of a framed connection, from each side. Sans-I/O.

Used by the establishment generators of the wires, once per connection. A mismatch is told as early as the bytes allow:
`missing` looks at every prefix, so a browser or an old version fails at its first wrong byte, not after a time-out.
Layout: docs/design/wire-format.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from anywire.contract.errors import BadFrame

MAGIC = b"\x89anyw\r\n\n"
MAJOR, MINOR = 1, 0
FIXED = 24
REFUSED = 1
UNDERSTOOD = 0
"""Flags of the upper half (must be understood) that this version knows."""
REASON = 1
"""Extension: why a connection was refused, UTF-8."""
_LAYOUT = struct.Struct("<8sBBHIQ")
_EXTENSION = struct.Struct("<HH")


@dataclass(frozen=True, slots=True)
class Preamble:
    """What one side says of itself: version, flags, the largest message it receives (bytes), extensions by type."""

    max_message: int
    flags: int = 0
    major: int = MAJOR
    minor: int = MINOR
    extensions: dict[int, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The bytes to send.

        >>> Preamble(16 << 20).encode().hex(" ", 4)
        '89616e79 770d0a0a 01000000 00000000 00000001 00000000'
        """
        parts = [_EXTENSION.pack(kind, len(data)) + data for kind, data in self.extensions.items()]
        tail = b"".join(parts)
        head = _LAYOUT.pack(MAGIC, self.major, self.minor, len(tail), self.flags, self.max_message)
        return head + tail

    @property
    def refusal(self) -> str | None:
        """Why the other side refused us, or None when it did not."""
        if not self.flags & REFUSED:
            return None
        return self.extensions.get(REASON, b"no reason given").decode("utf-8", "replace")


def refuse(reason: str) -> bytes:
    """The preamble that refuses a connection."""
    return Preamble(0, REFUSED, extensions={REASON: reason.encode()[:1000]}).encode()


def missing(data: bytes | bytearray) -> int:
    """How many more bytes the preamble needs (0: it is whole).

    Raises:
        BadFrame: these can't be the first bytes of a framed connection of a version we speak.
    """
    have = bytes(data[: len(MAGIC)])
    if have != MAGIC[: len(have)]:
        raise BadFrame("this is not a framed anywire connection", received=bytes(data))
    if len(data) > len(MAGIC) and data[8] != MAJOR:
        raise BadFrame(f"the peer speaks version {data[8]} of the wire format, we speak {MAJOR}", received=bytes(data))
    if len(data) < FIXED:
        return FIXED - len(data)
    total = FIXED + int.from_bytes(data[10:12], "little")
    return max(0, total - len(data))


def decode(data: bytes | bytearray) -> Preamble:
    """Read a whole preamble.

    Raises:
        BadFrame: it is malformed, or demands what this version does not understand.
    """
    _, major, minor, length, flags, max_message = _LAYOUT.unpack_from(data)
    unknown = (flags >> 16) & ~UNDERSTOOD
    if unknown:
        raise BadFrame(f"the peer demands features {unknown << 16:#010x} that this version lacks", received=bytes(data))
    extensions: dict[int, bytes] = {}
    at, end = FIXED, FIXED + length
    while at < end:
        if at + _EXTENSION.size > end:
            raise BadFrame("an extension of the preamble is cut off", received=bytes(data))
        kind, size = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if at + size > end:
            raise BadFrame("an extension of the preamble is longer than the preamble", received=bytes(data))
        extensions[kind] = bytes(data[at : at + size])
        at += size
    return Preamble(max_message, flags, major, minor, extensions)
