from collections.abc import Iterable
from typing import Any

from typing_extensions import Buffer

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint, BytePump
from anywire.contract.waits import Steps
from anywire.framing.codec import Decoder

class FramedEndpoint(BytePump):
    @property
    def decoder(self) -> Decoder: ...
    @property
    def peer_limit(self) -> int: ...
    @property
    def confirms(self) -> bool: ...
    @property
    def end_sent(self) -> bool: ...
    @property
    def carries_fds(self) -> bool: ...
    def __init__(
        self,
        below: ByteEndpoint,
        max_message: int = 16777216,
        peer_limit: int = 16777216,
        *,
        confirms: bool = True,
        descriptors: bool = False,
        address: Address | str | None = None,
    ) -> None: ...
    def put_fds(self, fds: Iterable[Any], message: Buffer, block: bool) -> int: ...
    def taken_steps(self, timeout: float) -> Steps[None]: ...
    def take_fds_message(self, block: bool) -> tuple[bytes, list[int]] | None: ...
    def restore_state(self, state: dict[str, Any]) -> None: ...
