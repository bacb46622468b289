"""How much memory does an idle TCP connection take in the server? 10 000 of them in one process.

The server's handler waits for its first message, as most handlers of most servers do most of the time. Clients are bare
sockets in another process, so that only the server's memory counts: its resident set (`/proc/PID/smaps_rollup`), with
10 000 connections less with 100, by 9 900. What the kernel keeps for a socket is the same for all and not in it.
To be shown: below asyncio streams.
"""

from __future__ import annotations

import asyncio
import importlib
import resource
import socket
import struct
import sys
from pathlib import Path

from anywire.cli.measure import turns
from benchmarks.harness import CLIENT_CORE, Child, Report, module_server, options

BASE = "asyncio streams"
FIRST = 100
NAMES = ("anywire Channel", "anywire Stream", BASE)
PREAMBLE = struct.pack("<8sBBHIQ", b"\x89anyw\r\n\n", 1, 0, 0, 0, 16 << 20)


class Counter:
    """Says ALL each time as many connections are served as were announced."""

    def __init__(self, *marks: int) -> None:
        self.marks, self.served = marks, 0

    def one(self) -> None:
        self.served += 1
        if self.served in self.marks:
            print("ALL", self.served, flush=True)


async def serve_channel(counter: Counter) -> None:
    anywire = importlib.import_module("anywire")

    async def wait(channel: anywire.Channel) -> None:  # type: ignore[name-defined]
        counter.one()
        await channel.recv()

    async with anywire.serve(wait, "tcp://127.0.0.1:0", backlog=4096, close_timeout=0.1) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def serve_stream(counter: Counter) -> None:
    anywire = importlib.import_module("anywire")

    async def wait(stream: anywire.Stream) -> None:  # type: ignore[name-defined]
        counter.one()
        await stream.read()

    async with anywire.serve_stream(wait, "tcp://127.0.0.1:0", backlog=4096, close_timeout=0.1) as server:
        print("READY", server.addresses[0].port, flush=True)
        await server.serve_forever()


async def serve_asyncio(counter: Counter) -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counter.one()
        await reader.read(65536)

    server = await asyncio.start_server(wait, "127.0.0.1", 0, backlog=4096)
    print("READY", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def raise_limit(needed: int) -> int:
    """Raise RLIMIT_NOFILE as far as allowed; how many connections that makes possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(needed, soft) - 200


def hold(port: int, framed: bool, last: int) -> None:
    """The client: told how many connections to have, has them, and keeps them until its input ends."""
    raise_limit(last + 500)
    held: list[socket.socket] = []
    for line in sys.stdin:
        while len(held) < int(line):
            # Another source address for each 5 000: closed connections occupy their port for a minute.
            sock = socket.socket()
            sock.setsockopt(socket.IPPROTO_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
            sock.bind((f"127.0.0.{2 + len(held) // 5000}", 0))
            sock.connect(("127.0.0.1", port))
            if framed:
                sock.sendall(PREAMBLE)
            held.append(sock)
        print("HELD", len(held), flush=True)


def resident(pid: int) -> int:
    """Kilobytes, exact where smaps_rollup exists (Linux 4.14)."""
    for name in ("smaps_rollup", "status"):
        file = Path(f"/proc/{pid}/{name}")
        if file.exists():
            for line in file.read_text().splitlines():
                if line.startswith(("Rss:", "VmRSS:")):
                    return int(line.split()[1])
    raise RuntimeError(f"the resident set of process {pid} can't be read")


def measure(name: str, count: int) -> dict[str, float]:
    with module_server("benchmarks.idle_connections", name, "--connections", str(count)) as server:
        port = server.line().split()[1]
        client_command = (sys.executable, "-m", "benchmarks.idle_connections", "--serve", "client")
        framed = "channel" if name == "anywire Channel" else "bytes"
        arguments = ("--connections", str(count), "--port", port, "--preamble", framed)
        with Child(CLIENT_CORE, *client_command, *arguments) as client:
            seen = {}
            for number in (FIRST, count):
                client.tell(str(number))
                client.line(120)
                server.line(120)
                seen[number] = resident(server.pid)
    return {"kb_each": (seen[count] - seen[FIRST]) / (count - FIRST), "server_mb": seen[count] / 1024}


def main() -> None:
    parser = options(__doc__, rounds=3, seconds=0)
    parser.add_argument("--connections", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--port", type=int, help="of the server, for the client that this starts")
    parser.add_argument("--preamble", choices=("channel", "bytes"), help="the same")
    arguments = parser.parse_args()
    count = min(arguments.connections, raise_limit(arguments.connections + 500))
    if arguments.serve == "client":
        hold(arguments.port, arguments.preamble == "channel", count)
        return
    if arguments.serve:
        serve = {"anywire Channel": serve_channel, "anywire Stream": serve_stream, BASE: serve_asyncio}[arguments.serve]
        asyncio.run(serve(Counter(FIRST, count)))
        return
    report = Report(f"idle_connections: memory of {count} idle TCP connections", ("anywire",))
    report.begin()
    if count < arguments.connections:
        report.note(f"the limit of open files allows {count} connections only (ulimit -Hn)")
    for number in range(arguments.rounds):
        for name in turns(NAMES, number):
            try:
                report.results.add("idle", name, measure(name, count))
            except RuntimeError as error:
                report.results.add("idle", name, str(error))
    report.rates("idle", BASE, "kb_each", ("server_mb",), unit="")
    for name in ("anywire Channel", "anywire Stream"):
        ratio = report.results.ratio("idle", name, BASE, "kb_each")
        report.claim(f"{name}, memory of asyncio streams", ratio, 1.0, at_most=True)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
