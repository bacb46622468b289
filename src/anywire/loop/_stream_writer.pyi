from asyncio import StreamWriter
from typing import final

from anywire.engine._awaiting import Awaited

@final
class DrainOperation(Awaited):
    __name__: str
    __qualname__: str

def quick(writer: StreamWriter) -> StreamWriter: ...
