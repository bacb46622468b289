"""What do 10 000 TCP connections cost in the server: memory while they are idle, and rate while few are at work?

Memory: the handler waits for its first message, as most handlers of most servers do most of the time. Clients are bare
sockets in another process, so that only the server's memory counts: its resident set (`/proc/PID/smaps_rollup`), with
10 000 connections less with 100, by 9 900. What the kernel keeps for a socket is the same for all and not in it.
Rotation: 100 of the 10 000 have a message of 1 KiB under way, and each answer lets the next connection in turn send, so
that each is used again only after all others; on each event loop, beside the C server.

To be shown: `Channel` and `Stream` below asyncio streams in memory; anywire's loop below asyncio's and uvloop's, with
protocols and with streams; in rotation 0.9 × the C server.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
import struct
import sys
from pathlib import Path

from anywire.cli.echoes import raise_limit
from anywire.cli.measure import turns
from benchmarks import loops
from benchmarks.harness import CLIENT_CORE, SERVER_CORE, Child, Report, load, module_server, native_programs, options

BASE = "streams, asyncio"
FIRST = 100
ACTIVE = 100
OURS = ("Channel, asyncio", "Stream, asyncio")
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


async def serve_protocol(counter: Counter) -> None:
    class Waiting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            counter.one()

    server = await asyncio.get_running_loop().create_server(Waiting, "127.0.0.1", 0, backlog=4096)
    await loops.announce(server)


async def serve_streams(counter: Counter) -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counter.one()
        await reader.read(65536)

    server = await asyncio.start_server(wait, "127.0.0.1", 0, backlog=4096)
    await loops.announce(server)


SERVERS = {"Channel": serve_channel, "Stream": serve_stream, "streams": serve_streams, "protocol": serve_protocol}


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
        framed = "channel" if name.startswith("Channel") else "bytes"
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
    parser = options(__doc__, rounds=3, seconds=0.8)
    parser.add_argument("--connections", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--port", type=int, help="of the server, for the client that this starts")
    parser.add_argument("--preamble", choices=("channel", "bytes"), help="the same")
    arguments = parser.parse_args()
    count = min(arguments.connections, raise_limit(arguments.connections + 500))
    if arguments.serve == "client":
        hold(arguments.port, arguments.preamble == "channel", count)
        return
    if arguments.serve:
        kind, _, loop = arguments.serve.partition(", ")
        loops.run(loop, SERVERS[kind](Counter(FIRST, count)))
        return
    report = Report(f"idle_connections: {count} TCP connections, idle and in rotation", loops.PACKAGES)
    report.begin()
    if count < arguments.connections:
        report.note(f"the limit of open files allows {count} connections only (ulimit -Hn)")
    here = loops.installed(report)
    names = [*OURS, *(f"{kind}, {loop}" for kind in ("streams", "protocol") for loop in here)]
    if "anywire" in here:
        names += ["Channel, anywire", "Stream, anywire"]
    for number in range(arguments.rounds):
        for name in turns(names, number):
            try:
                report.results.add("idle", name, measure(name, count))
            except RuntimeError as error:
                report.results.add("idle", name, str(error))
    report.rates("idle", BASE, "kb_each", ("server_mb",), unit="")
    ratio = report.results.ratio
    for name in OURS:
        report.claim(f"{name}, memory of {BASE}", ratio("idle", name, BASE, "kb_each"), 1.0, at_most=True)
    for kind in ("streams", "protocol") if "anywire" in here else ():
        for other in ("asyncio", "uvloop"):
            ours, theirs = f"{kind}, anywire", f"{kind}, {other}"
            report.claim(f"{ours}, memory of {theirs}", ratio("idle", ours, theirs, "kb_each"), 1.0, at_most=True)
    rotation(report, here, count, arguments.rounds, arguments.seconds)
    report.finish(arguments.json)


def rotation(report: Report, here: list[str], count: int, rounds: int, seconds: float) -> None:
    """The rates of echo servers with `count` connections, of which ACTIVE have a message under way."""
    cell, native = f"{count} in rotation", "C epoll"
    with native_programs() as programs, contextlib.ExitStack() as stack:
        servers = {native: stack.enter_context(Child(SERVER_CORE, programs / "echo_server", "127.0.0.1", "0"))}
        for loop in here:
            servers[f"protocol, {loop}"] = stack.enter_context(loops.server("protocol", loop))
        ports = {name: loops.port_of(server) for name, server in servers.items()}
        for number in range(rounds):
            for name in turns(list(servers), number):
                one = (programs, ports[name], count, 1 << 10, 1, seconds, "raw", servers[name].pid, "rotate", ACTIVE)
                try:
                    report.results.add(cell, name, load(*one))
                except RuntimeError as error:
                    report.results.add(cell, name, str(error))
    report.rates(cell, native, "rate", ("server_cpu_us", "p50_us", "p99_us", "busy"))
    if "anywire" in here:
        ratio = report.results.ratio(cell, "protocol, anywire", native, "rate")
        report.claim(f"protocol, anywire, {cell}, of {native}", ratio, 0.9)


if __name__ == "__main__":
    main()
