from collections.abc import Callable, Mapping
from typing import Any

from anywire.contract.address import Address
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.peer import Peer
from anywire.contract.wire import Wire
from anywire.ipc.mqueue import MessageQueue

WAYS: str

class QueueEndpoint(MessageEndpoint):
    @property
    def receiver(self) -> MessageQueue | None: ...
    @property
    def sender(self) -> MessageQueue | None: ...
    @property
    def priority(self) -> int: ...
    def __init__(
        self,
        receiver: MessageQueue | None,
        sender: MessageQueue | None,
        max_message: int = 16777216,
        *,
        priority: int = 0,
        ends: bool = False,
        on_release: Callable[[], object] | None = None,
        address: Address | None = None,
        peer: Peer | None = None,
        wire: Wire | None = None,
    ) -> None: ...
    def no_more(self) -> None: ...
    def restore_state(self, state: Mapping[str, Any]) -> None: ...
