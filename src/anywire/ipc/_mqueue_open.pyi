from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from anywire.ipc.mqueue_limits import Limits
from anywire.ipc.unlinking import Unlink

def remove(name: str) -> None: ...

class OpenQueue:
    unlink: ClassVar[Unlink]
    @property
    def name(self) -> str | None: ...
    @property
    def max_messages(self) -> int: ...
    @property
    def message_size(self) -> int: ...
    @property
    def owner(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    @property
    def depth(self) -> int: ...
    @property
    def blocking(self) -> bool: ...
    @blocking.setter
    def blocking(self, value: bool) -> None: ...
    @property
    def access(self) -> Literal["r", "w", "rw"]: ...
    def __init__(
        self,
        name: str | None,
        flags: int = ...,
        mode: int = 0o600,
        max_messages: int | None = None,
        message_size: int | None = None,
        *,
        owner: bool = False,
    ) -> None: ...
    @classmethod
    def create(
        cls,
        name: str | None = None,
        max_messages: int | None = None,
        message_size: int | None = None,
        *,
        mode: int = 0o600,
        access: Literal["r", "w", "rw"] = "rw",
        owner: bool = False,
    ) -> Self: ...
    @classmethod
    def open(cls, name: str, *, access: Literal["r", "w", "rw"] = "rw", owner: bool = False) -> Self: ...
    @classmethod
    def create_or_open(
        cls,
        name: str,
        max_messages: int | None = None,
        message_size: int | None = None,
        *,
        mode: int = 0o600,
        access: Literal["r", "w", "rw"] = "rw",
        owner: bool = False,
    ) -> Self: ...
    @classmethod
    def from_fd(cls, fd: int) -> Self: ...
    @staticmethod
    def limits() -> Limits: ...
    def close(self) -> None: ...
    def fileno(self) -> int: ...
    def __del__(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
