from typing import Any

from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire

class InprocEndpoint(MessageEndpoint):
    def __init__(self, *args: Any, **keywords: Any) -> None: ...

def pair(
    address: Address, wire: Wire, connecting_limit: int, listening_limit: int, peer: Peer
) -> tuple[InprocEndpoint, InprocEndpoint]: ...
