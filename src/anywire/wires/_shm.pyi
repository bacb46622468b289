from typing import Any

from anywire.contract.waits import Steps
from anywire.wires._shm_sending import ShmSender

class ShmEndpoint(ShmSender):
    half: Any
    def close_now(self) -> None: ...
    def sign_steps(self, end: float, reading: bool) -> Steps[bool]: ...
