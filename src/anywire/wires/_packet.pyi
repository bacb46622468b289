import builtins
from collections.abc import Iterable
from typing import Any

from typing_extensions import Buffer

from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire
from anywire.wires._descriptor import SocketBytes

class PacketEndpoint(MessageEndpoint):
    carries_fds: bool
    @property
    def bytes(self) -> SocketBytes: ...
    @property
    def send_limit(self) -> int: ...
    @property
    def end_sent(self) -> bool: ...
    def __init__(
        self,
        fd: int,
        max_message: int = 16777216,
        *,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
    def put_fds(self, fds: Iterable[Any], message: Buffer, block: bool) -> int: ...
    def take_fds_message(self, block: bool) -> tuple[builtins.bytes, list[int]] | None: ...
    def restore_state(self, state: dict[str, Any]) -> None: ...
    def waiting_dropped(self) -> None: ...
