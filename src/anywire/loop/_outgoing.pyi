from typing import final

@final
class Outgoing:
    @property
    def total(self) -> int: ...
