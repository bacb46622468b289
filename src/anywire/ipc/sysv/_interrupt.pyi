from typing import final

@final
class Interrupt:
    cancelled: bool
    def __new__(cls) -> Interrupt: ...
    def cancel(self) -> None: ...
