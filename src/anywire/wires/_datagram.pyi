import builtins
from collections.abc import Callable, Iterable

from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire
from anywire.wires._descriptor import SocketBytes

class DatagramEndpoint(MessageEndpoint):
    on_release: Callable[[], object] | None
    @property
    def bytes(self) -> SocketBytes: ...
    @property
    def send_limit(self) -> int: ...
    @property
    def idle(self) -> float: ...
    def __init__(
        self,
        fd: int,
        max_message: int = 16777216,
        *,
        idle: float = 0,
        early: Iterable[builtins.bytes] = (),
        accepted: bool = False,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
