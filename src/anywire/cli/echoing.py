"""An echo server on one event loop: `python -m anywire.cli.echoing LOOP`, a key of `loops.LOOPS`.

It says READY and its port, serves 127.0.0.1 by a protocol, and ends with who started it. One thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
from typing import Any

from anywire.cli.loops import loop_factory

BACKLOG = 4096
PR_SET_PDEATHSIG = 1                    # prctl(2); the standard library has no name for it


class Echo(asyncio.Protocol):
    """As its users write it."""

    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=BACKLOG)
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await loop.create_future()          # until it is ended; rloop's servers have no serve_forever


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with asyncio.Runner(loop_factory=loop_factory(sys.argv[1])) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
