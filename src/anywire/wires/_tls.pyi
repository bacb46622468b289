import ssl

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire

class TlsBytes(ByteEndpoint):
    def __init__(
        self,
        fd: int,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: str | None = None,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
    @property
    def tls(self) -> ssl.SSLObject: ...
    @property
    def first(self) -> bytes: ...
    def handshake_some(self) -> bool: ...
    def alert_stranger(self) -> None: ...
    def explained(self, error: ssl.SSLError) -> OSError: ...
