from collections.abc import Callable

from anywire.contract.address import Address
from anywire.contract.endpoint import BytePump
from anywire.framing.fragments import Fragments
from anywire.wires._descriptor import PipeBytes

WAYS: str

class AtomicPipe(PipeBytes): ...

class FifoWriter(BytePump):
    @property
    def writer(self) -> int: ...
    def __init__(
        self, below: AtomicPipe, writer: int, max_message: int, *, address: Address | None = None
    ) -> None: ...
    def say_hello(self) -> None: ...

class FifoReader(BytePump):
    @property
    def fragments(self) -> Fragments: ...
    def __init__(
        self,
        below: PipeBytes,
        fragments: Fragments,
        on_release: Callable[[], object] | None,
        *,
        address: Address | None = None,
    ) -> None: ...
    def no_more_writers(self) -> None: ...
