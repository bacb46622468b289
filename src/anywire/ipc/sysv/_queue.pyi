from typing_extensions import Buffer

from anywire.ipc._interrupt import Interrupt

class Queue:
    id: int
    key: int
    closed: bool
    name: str
    def __init__(self, ident: int, key: int, name: str) -> None: ...
    def shut(self) -> None: ...
    def send_message(
        self, data: Buffer, type: int, timeout: float | None, block: bool, interrupt: Interrupt | None
    ) -> None: ...
    def recv_message(
        self, type: int, excluding: int | None, truncate: int | None, timeout: float | None, block: bool,
        interrupt: Interrupt | None,
    ) -> tuple[bytes, int]: ...
    def send(self, message: Buffer, type: int = 1, *, timeout: float | None = None, block: bool = True) -> None: ...
    def recv(
        self, type: int = 0, *, excluding: int | None = None, truncate: int | None = None,
        timeout: float | None = None, block: bool = True,
    ) -> tuple[bytes, int]: ...
    def recv_into(
        self, buffer: Buffer, type: int = 0, *, excluding: int | None = None, truncate: bool = False,
        timeout: float | None = None, block: bool = True,
    ) -> tuple[int, int]: ...
    def copy_message(self, index: int) -> tuple[bytes, int]: ...
