"""Traits: what a wire promises, as data.

Owns: the columns of the table "wire x guarantee". A wire returns one `Traits` for an address; the facade refuses early
what the wire can't do, the conformance suite holds the wire to each promise, and README's first table is made from
them. Plain frozen values, for any thread. What can go wrong: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Kind = Literal["stream", "message"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What one wire promises at one address, in the words of the table.

    `kind`: "stream" (carries bytes: shows both faces, the Channel framed), "message" (carries the user's bytes
    unchanged: Channel only), or both. Of `ordered` to `half_close`, the value is "yes", "no", "–" (there is
    nothing to promise), or a yes with its conditions ("per writer", "at once"): ask `promises()`, a string is always
    true. `sees_death`: how this side learns that the peer was killed. `clean_end`: whether a polite end and a loss are
    told apart. `credentials`: what `channel.peer` knows. `copies`: of a message, from sender to receiver.
    `message_limit`: what bounds a message; "configured" is the `max_message` argument.
    """

    kind: frozenset[Kind]
    connection: bool
    ordered: str
    reliable: str
    clean_end: str
    sees_death: str
    half_close: str
    crosses_hosts: bool
    credentials: str
    copies: str
    message_limit: str

    def __post_init__(self) -> None:
        if not self.kind or not self.kind <= {"stream", "message"}:
            raise ValueError(f'kind is a set of "stream" and "message", not {self.kind!r}')
        for column in fields(self)[2:]:
            if getattr(self, column.name) == "":
                raise ValueError(f"{column.name} promises nothing; say yes, no, or on which condition")

    @property
    def has_stream(self) -> bool:
        """Whether `connect_stream` and `serve_stream` work: the bytes can be shown bare."""
        return "stream" in self.kind

    @property
    def is_framed(self) -> bool:
        """Whether its Channel needs framing: the wire has no messages of its own."""
        return "message" not in self.kind

    def promises(self, column: str) -> bool:
        """Whether a column holds a promise, with or without a condition.

        >>> udp = Traits(
        ...     frozenset({"message"}), False, "no", "no", "–", "no", "–", True, "–", "2+", "datagram"
        ... )
        >>> udp.promises("ordered"), udp.promises("crosses_hosts")
        (False, True)
        """
        value = getattr(self, column)
        if isinstance(value, str):
            return value.partition(" ")[0].rstrip(",;:") not in ("no", "none", "–", "-")
        return bool(value)

    def cells(self) -> dict[str, str]:
        """Each column as the words of a table cell, in the table's order."""
        cells = {column.name: getattr(self, column.name) for column in fields(self)}
        cells["kind"] = " and ".join(sorted(self.kind))
        return {name: {True: "yes", False: "no"}.get(value, value) for name, value in cells.items()}
