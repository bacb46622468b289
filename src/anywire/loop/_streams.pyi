from typing import final

from anywire.engine._awaiting import Awaited

@final
class ReadOperation(Awaited):
    __name__: str
    __qualname__: str
