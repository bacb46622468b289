from anywire.wires._shm_end import ShmEnd

class ShmSender(ShmEnd):
    @property
    def private_loans(self) -> int: ...
