from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire

LOST_FDS: str

class SocketBytes(ByteEndpoint):
    def __init__(
        self, fd: int, *, address: Address | None = None, peer: Peer | None = None, wire: Wire | None = None
    ) -> None: ...

class UnixBytes(SocketBytes):
    carries_fds: bool
    keep_fds: bool
    def drop_fds(self) -> None: ...

class PipeBytes(ByteEndpoint):
    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
