from typing import Any

from anywire.contract.waits import Steps
from anywire.wires._shm_sending import ShmSender

class ShmEndpoint(ShmSender):
    half: Any
    @property
    def takes_nothing(self) -> bool: ...
    def close_now(self) -> None: ...
    def sign_steps(self, end: float, reading: bool) -> Steps[bool]: ...
