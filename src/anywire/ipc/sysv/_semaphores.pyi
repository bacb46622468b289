from collections.abc import Iterable

from anywire.ipc._interrupt import Interrupt

class Set:
    id: int
    key: int
    closed: bool
    count: int
    name: str
    def __init__(self, ident: int, key: int, name: str, count: int) -> None: ...
    def shut(self) -> None: ...
    def acquire(
        self, index: int = 0, n: int = 1, *, undo: bool = False, timeout: float | None = None, block: bool = True
    ) -> None: ...
    def release(self, index: int = 0, n: int = 1, *, undo: bool = False) -> None: ...
    def wait_zero(self, index: int = 0, *, timeout: float | None = None, block: bool = True) -> None: ...
    def operate(
        self, operations: Iterable[tuple[int, int] | tuple[int, int, int]], undo: bool, timeout: float | None,
        block: bool, interrupt: Interrupt | None,
    ) -> None: ...
