from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire
from anywire.wires._shm_memory import Incoming, Outgoing

WAITING: dict[str, int]

class ShmEnd(MessageEndpoint):
    @property
    def sock(self) -> int: ...
    @property
    def death(self) -> int: ...
    @property
    def peer_limit(self) -> int: ...
    @property
    def doorbells(self) -> int: ...
    @property
    def views(self) -> int: ...
    @property
    def forgotten(self) -> int: ...
    def __init__(self, sock: int, address: Address, peer: Peer | None, wire: Wire, max_message: int) -> None: ...
    def complete(
        self,
        out: Outgoing,
        inc: Incoming,
        death: int,
        peer_limit: int,
        waiting: str,
        spin_us: float,
        alone: bool,
    ) -> None: ...
    def give_socket_away(self) -> None: ...
