"""What the two ends of a pattern tell each other between the messages: control messages of 32 bytes.

Owns: their layout, and telling them from messages. No I/O; both fronts, any thread. Drawn in docs/design/patterns.md.

Messages travel as they are, with no header of ours: so nothing is copied for it on either side, and a message of any
size is received in place. A control message is told by its length and its first 16 bytes. A user's message that happens
to look like one is announced by LITERAL, so any bytes can be sent.

What can go wrong: the other end is no end of this pattern (a plain channel, another pattern): `greeting_of` says so.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from anywire.contract.errors import BadFrame, Refused

MAGIC: Final = b"\x89anywire many\r\n\n"
LAYOUT: Final = struct.Struct("<16sBBHIQ")
SIZE: Final = LAYOUT.size
VERSION: Final = 1

# The first message of each end says which end it is; the connecting one begins.
SUBSCRIBE, PUBLISH, PULL, PUSH = 1, 2, 3, 4
# Then, of the publisher: so many messages were left out here; the next message only looks like a control message; all
# was sent; you took nothing for too long; this message is over your limit. Of those who receive: so many were taken.
SKIPPED, LITERAL, END, STALLED, TOO_LARGE, TAKEN, LEAVING, REFUSED = 16, 17, 18, 19, 20, 21, 22, 23

ENDS: Final = {SUBSCRIBE: "subscriber", PUBLISH: "publisher", PULL: "pull end", PUSH: "push end"}
LATEST: Final = 1
"""A publisher's flag: subscribers that are behind lose the oldest messages."""


class Control(NamedTuple):
    """One control message. What `number` and `value` mean depends on the kind."""

    kind: int
    version: int
    flags: int
    number: int
    value: int


def control(kind: int, value: int = 0, *, number: int = 0, flags: int = 0) -> bytes:
    """The bytes of a control message."""
    return LAYOUT.pack(MAGIC, kind, VERSION, flags, min(number, 0xFFFFFFFF), value)


def looks_like_control(message: bytes) -> bool:
    """Whether these bytes are a control message, if LITERAL did not come before them."""
    return len(message) == SIZE and message[:16] == MAGIC


def read(message: bytes) -> Control:
    """Understand a control message."""
    return Control(*LAYOUT.unpack(message)[1:])


def greeting_of(message: bytes, wanted: int, address: object, operation: str) -> Control:
    """The other end's first message, which must say that it is what was wanted. Raises Refused, BadFrame."""
    told = read(message) if looks_like_control(message) else None
    if told is not None and told.version == VERSION and told.kind == wanted:
        return told
    if told is None or told.kind not in (*ENDS, REFUSED):
        raise BadFrame(
            f"the other end is no {ENDS[wanted]}",
            received=message[:48],
            address=address,
            operation=operation,
            advice=f"check that a {ENDS[wanted]} uses this address",
        )
    found = ENDS.get(told.value if told.kind == REFUSED else told.kind, "end of another kind")
    if told.version != VERSION:
        found += f" of version {told.version}"
    raise Refused(
        f"the other end is a {found}, not a {ENDS[wanted]}", address=address, operation=operation, answered=True
    )
