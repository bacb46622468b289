"""Peer: who is at the other end, as far as the wire can tell.

Owns: the value that `channel.peer` and `authorize(peer)` see. Filled by the wire once, when the connection is made, on
the thread of the front; frozen after. What can go wrong: a field that the wire can't know is None, never a guess.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    `wire`: the scheme. `address`: where it is, if it has an address ("" if not, as a Unix client has none).
    `pid`, `uid`, `gid`: as the kernel recorded them at connect time (unix(7), SO_PEERCRED); another process may have
    that pid by now. `certificate`: as `ssl.SSLSocket.getpeercert()`, if it showed one that was verified.
    `alpn`: the application protocol that both sides agreed on (RFC 7301).
    """

    wire: str = ""
    address: str = ""
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    certificate: Mapping[str, Any] | None = None
    alpn: str | None = None

    def is_same_user(self) -> bool:
        """Whether the kernel says that it is this process's user, or root: the default rule on one host.

        False if the kernel says nothing.
        """
        return self.uid is not None and self.uid in (0, os.geteuid())
