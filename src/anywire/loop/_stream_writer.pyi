from asyncio import StreamWriter
from typing import final

from anywire.loop._streams import Operation

@final
class DrainOperation(Operation):
    __name__: str
    __qualname__: str

def quick(writer: StreamWriter) -> StreamWriter: ...
