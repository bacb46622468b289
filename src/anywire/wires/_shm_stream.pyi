from anywire.contract.endpoint import ByteEndpoint, RawEndpoint
from anywire.wires._shm import ShmEndpoint

class ShmBytes(ByteEndpoint):
    def __init__(self, end: ShmEndpoint) -> None: ...

class ShmStream(RawEndpoint):
    def __init__(self, shm: ShmEndpoint) -> None: ...
