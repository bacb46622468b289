from collections.abc import Callable, Mapping
from socket import socket
from typing import Any

from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire

WAYS: str

class SysvEndpoint(MessageEndpoint):
    type: int
    @property
    def recv_id(self) -> int: ...
    @property
    def send_id(self) -> int: ...
    @property
    def wanted(self) -> int: ...
    def __init__(
        self,
        recv_id: int,
        send_id: int,
        max_message: int = 16777216,
        *,
        type: int = 1,
        wanted: int = 0,
        early: int = 0,
        client: bool = False,
        lock: socket | None = None,
        on_end: Callable[[bool], object] | None = None,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
    def no_more(self) -> None: ...
    def restore_state(self, state: Mapping[str, Any]) -> None: ...
