"""The demo's server process: does one act at a time, as it is told over a socket pair.

An act is a wire of part 1, a peer beside it, or a handler of a promise. The orders come as JSON lines, some with
descriptors: `{"act": name, "address": ...}` is answered with `{"address": ...}` (or `{"error": ...}`) once it can be
reached, `{"stop": true}` with what it cost. A thread reads them: when the demo is gone, however it died, it removes the
demo's directory and ends this process, whatever the main thread does. What a terminal sends (Ctrl-C) is the demo's
business, and ignored here.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anywire
from anywire.cli.demo import program
from anywire.cli.demo.addresses import PIPE
from anywire.cli.demo.left import open_descriptors
from anywire.contract import counters

STREAMS_LIMIT = 1 << 20             # bytes a StreamReader keeps: with its default of 64 KiB large files go slower

Ready = Callable[[Any], Coroutine[Any, Any, None]]
Handler = Callable[[anywire.Channel], Awaitable[None]]


# ---- part 1: the wires, and what one would otherwise write


async def wire(address: str, fds: list[int], ready: Ready) -> None:
    """The printed program."""
    if address == PIPE:
        await serve(program.answer, address, fds, ready)
    else:
        await program.server(address, ready)


async def serve(handle: Handler, address: str, fds: list[int], ready: Ready) -> None:
    """Serve at an address, or on the end of an anonymous pipe: nobody listens there, both sides connect."""
    if address != PIPE:
        async with anywire.serve(handle, address) as running:
            await ready(running.addresses[0])
        return

    async def work() -> None:
        try:
            async with anywire.connect(f"pipe:?read={fds[0]}&write={fds[1]}") as channel:
                await handle(channel)
        except anywire.AnywireError:
            pass                        # the client knows more about it

    working = asyncio.create_task(work())
    try:
        await ready(PIPE)
    finally:
        await working


async def streams(address: str, fds: list[int], ready: Ready) -> None:
    """asyncio streams, framed by hand, on asyncio's own loop: in a thread: what one has without anywire."""
    here = asyncio.get_running_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack("!I", await reader.readexactly(4))
                made = program.digest(await reader.readexactly(size))
                writer.write(struct.pack("!I", len(made)) + made)
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass                        # the client has finished
        finally:
            writer.close()
            await writer.wait_closed()

    async def serve() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0, limit=STREAMS_LIMIT) as running:
            port = running.sockets[0].getsockname()[1]
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ready(port), here))

    await asyncio.to_thread(asyncio.run, serve())


async def mp_pipe(address: str, fds: list[int], ready: Ready) -> None:
    """multiprocessing.Pipe, as its users have it: blocking, so in a thread."""
    connection = importlib.import_module("multiprocessing.connection").Connection(fds[0])

    def answer() -> None:
        try:
            while True:
                connection.send_bytes(program.digest(connection.recv_bytes()))
        except (EOFError, OSError):
            connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    await ready("")
    thread.join()


# ---- part 2: handlers for the promises


async def count(address: str, fds: list[int], ready: Ready) -> None:
    """Count what was received where others can see it, after this process is dead too."""
    with mmap.mmap(fds[0], 8) as page:
        os.close(fds.pop(0))

        async def handle(channel: anywire.Channel) -> None:
            seen = 0
            async for _ in channel:
                seen += 1
                struct.pack_into("=Q", page, 0, seen)

        await serve(handle, address, fds, ready)


async def pause(address: str, fds: list[int], ready: Ready) -> None:
    """Stop reading for as long as the first message says: the whole process sleeps, nothing is read behind its back.
    Then count up to an empty message."""

    async def handle(channel: anywire.Channel) -> None:
        seconds = float(await channel.recv())
        await channel.send(b"pausing")
        time.sleep(seconds)  # noqa: ASYNC251 - this is the point
        seen, in_order = 0, True
        while message := await channel.recv():
            in_order = in_order and int.from_bytes(message[:8], "big") == seen
            seen += 1
        await channel.send(json.dumps({"seen": seen, "in_order": in_order}).encode())

    await serve(handle, address, fds, ready)


async def flow(address: str, fds: list[int], ready: Ready) -> None:
    """Number messages, in uneven bursts, until told to stop; then end."""

    async def handle(channel: anywire.Channel) -> None:
        await channel.recv()
        stop = asyncio.ensure_future(channel.recv())
        number = 0
        while not stop.done():
            await channel.send(number.to_bytes(8, "big"))
            number += 1
            await asyncio.sleep(0.001 if number % 7 == 0 else 0)
        await channel.send(b"total %d" % number)

    await serve(handle, address, fds, ready)


async def descriptors(address: str, fds: list[int], ready: Ready) -> None:
    """What this process has open, as text instead of an address."""
    counters.page_fd()                  # made at its first use, and kept as long as the process
    await ready(json.dumps(open_descriptors()))


ACTS = {act.__name__: act for act in (wire, streams, mp_pipe, count, pause, flow, descriptors)}


class Control:
    """This end of the socket pair."""

    def __init__(self, sock: socket.socket, directory: str) -> None:
        self.sock = sock
        self.directory = directory
        self.orders: asyncio.Queue[tuple[dict[str, Any], list[int]]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="demo orders", daemon=True).start()

    def _read(self) -> None:
        rest = b""
        fds: list[int] = []
        while True:
            try:
                data, new, _, _ = socket.recv_fds(self.sock, 65536, 8)
            except OSError:             # reset: it died with something unread
                data, new = b"", []
            fds += new
            if not data:
                self._remove_directory()
                os._exit(0)
            rest += data
            while b"\n" in rest:
                line, _, rest = rest.partition(b"\n")
                self.loop.call_soon_threadsafe(self.orders.put_nowait, (json.loads(line), fds))
                fds = []

    def _remove_directory(self) -> None:
        # The main thread may be binding a socket in it just now: then the directory isn't empty at its end.
        for _ in range(100):
            shutil.rmtree(self.directory, ignore_errors=True)
            if not os.path.exists(self.directory):
                return

    def say(self, **what: Any) -> None:
        try:
            self.sock.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            # The demo is gone, and the reading thread is about to clean up: dying of this would stop it half-way.
            threading.Event().wait()


async def perform(control: Control) -> None:
    """Act after act, for ever: the process ends when its orders end."""
    while True:
        order, fds = await control.orders.get()
        if "act" not in order:
            continue                    # the stop of an act that had failed by itself
        began = time.process_time_ns()
        del program.digest_times[:]

        async def ready(address: Any) -> None:
            control.say(address=str(address))
            await control.orders.get()      # stop

        try:
            await ACTS[order["act"]](order.get("address", ""), fds, ready)
        except Exception as error:
            control.say(error=f"{type(error).__name__}: {error}")
            continue
        control.say(cpu_ns=time.process_time_ns() - began, digest_ns=list(program.digest_times))


def main() -> None:
    """`python -m anywire.cli.demo.server FD DIRECTORY`."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):      # a terminal sends them to both of us
        signal.signal(number, signal.SIG_IGN)

    async def run() -> None:
        await perform(Control(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]))

    anywire.run(run())


if __name__ == "__main__":
    main()
