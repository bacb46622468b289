"""What others see of a loop and its connections: on the process's page of counters, also while the loop is held up."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire.contract.counters import open_page, snapshot
from anywire.contract.counters_page import LoopCounters, Page, TransportCounters
from anywire.engine import _figures

DOCUMENT = Path(__file__).parents[2] / "docs" / "design" / "counters.md"

# A protocol and a stream server; b"hold" makes either wait for a line of standard input in the middle of its turn.
SERVER = """
import asyncio, sys
import anywire

def held(data):
    if data == b"hold":
        print("held", flush=True)
        sys.stdin.readline()

class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        held(data)
        self.transport.write(data)

async def handle(reader, writer):
    while data := await reader.read(100):
        held(data)
        writer.write(data)
    writer.close()

async def main():
    asyncio.current_task().set_name("main")
    loop = asyncio.get_running_loop()
    echo = await loop.create_server(Echo, "127.0.0.1", 0)
    streams = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(echo.sockets[0].getsockname()[1], streams.sockets[0].getsockname()[1], flush=True)
    await loop.create_future()

anywire.run(main(), slow_callbacks=0.05, count_transports=True)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def until(look: Callable[[], Page], good: Callable[[Page], Any]) -> Page:
    """Read until the page is as it should be; the test's own time limit ends it."""
    while not good(page := look()):
        pass
    return page


def documented(heading: str) -> dict[str, tuple[int, int]]:
    section = DOCUMENT.read_text(encoding="utf-8").split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)`", section, re.MULTILINE)
    return {name: (int(offset), int(size)) for offset, size, name in rows}


@pytest.mark.parametrize(("heading", "part"), [("Loop slot", "loop"), ("Transport slot", "transport")])
def test_the_layout_is_the_documented_one(heading: str, part: str) -> None:
    rows = documented(heading)
    assert {name: offset for name, (offset, _) in rows.items()} == _figures.layout()[part]
    ends = [offset + size for offset, size in rows.values()]
    assert [offset for offset, _ in rows.values()] == [0, *ends[:-1]] and ends[-1] == 256


def test_a_loop_and_its_connections_from_outside(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None and server.stdin is not None
    echo, streams = map(int, server.stdout.readline().split())
    with open_page(server.pid) as page, socket.create_connection(("127.0.0.1", echo)) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
        host, port = sock.getsockname()
        # The answer is here a little before the server has counted it.
        seen = until(page.read, lambda page: page.loops[0].asleep_ns and page.transports[0].bytes_sent)
        (loop,), (transport,) = seen.loops, seen.transports
        assert loop.name == f"MainThread {server.pid}" and loop.stuck == 0
        assert loop.turns and loop.callbacks and loop.sleeps and loop.watched == 5
        assert 0 < loop.utilisation < 1 and loop.began_ns <= loop.asleep_ns <= loop.read_ns
        assert (transport.address, transport.local) == (f"{host}:{port}", f"127.0.0.1:{echo}")
        assert (transport.bytes_received, transport.bytes_sent) == (5, 5)
        for where, culprit in ((echo, "Echo.data_received"), (streams, "handle")):
            before = page.read().loops[0].slow          # starting may have been slow
            with socket.create_connection(("127.0.0.1", where)) as other:
                other.sendall(b"hold")
                assert server.stdout.readline() == "held\n"
                held = until(page.read, lambda page: page.loops[0].stuck > 0.06).loops[0]
                assert not held.asleep_ns and held.slow == before
                server.stdin.write("\n")
                server.stdin.flush()
                assert other.recv(100) == b"hold"
                after = until(page.read, lambda page: page.loops[0].asleep_ns).loops[0]
                assert after.slow == before + 1 and after.slow_ns >= 50_000_000 and culprit in after.culprit
        until(page.read, lambda page: len(page.transports) == 1)       # those that were closed are gone


def one_loop(page: Page, name: str) -> LoopCounters:
    return next(each for each in page.loops if each.name.startswith(name))


def one_transport(local: Any) -> TransportCounters:
    return next(each for each in snapshot().transports if each.local == f"{local[0]}:{local[1]}")


def test_loops_are_named_after_their_thread_and_leave_with_it() -> None:
    loops: list[anywire.loop.Loop] = []
    began, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())  # type: ignore[arg-type]
        for _ in range(7):
            loops[0].call_soon(lambda: None)
        loops[0].call_later(1000, print)
        began.set()
        go_on.wait()

    thread = threading.Thread(target=anywire.run, args=(main(),), name="worker-7")
    thread.start()
    began.wait()
    seen = one_loop(snapshot(), "worker-7")
    assert seen.name == f"worker-7 {thread.native_id}" and seen.began_ns and not seen.asleep_ns
    assert loops[0].stats().ready == 7 and loops[0].stats().timers == 1
    go_on.set()
    thread.join()
    assert not [each for each in snapshot().loops if each.name.startswith("worker-7")]


def test_a_loop_that_was_there_before_the_page() -> None:
    program = """
import asyncio, sys
from anywire.loop import new_event_loop
loop = new_event_loop()
async def main():
    assert "anywire.contract.counters" not in sys.modules
    from anywire.contract.counters import snapshot
    await asyncio.sleep(0.05)
    (seen,) = snapshot().loops
    assert seen.name.startswith("MainThread ") and seen.sleeps == loop.stats().sleeps > 0, seen
loop.run_until_complete(main())
from anywire.contract.counters import snapshot
(seen,) = snapshot().loops
assert seen.began_ns == 0 and seen.ran_ns > 0 and seen.seconds == seen.ran_ns / 1e9
loop.close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_queued_bytes_and_pauses() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
            peer, _ = listener.accept()
            local = transport.get_extra_info("sockname")
            transport.pause_reading()
            transport.write(bytes(8 << 20))
            seen = one_transport(local)
            assert seen.queued == transport.get_write_buffer_size() > 65536 and seen.queued_most >= seen.queued
            assert (seen.reading_paused, seen.reading_pauses) == (seen.writing_paused, seen.writing_pauses) == (True, 1)
            assert seen.bytes_sent + seen.queued == 8 << 20
            transport.resume_reading()
            peer.setblocking(False)
            got = 0
            while got < 8 << 20:
                got += len(await loop.sock_recv(peer, 1 << 20))
            seen = one_transport(local)
            assert (seen.queued, seen.bytes_sent) == (0, 8 << 20)
            assert not seen.reading_paused and not seen.writing_paused
            transport.close()
            peer.close()
            await asyncio.sleep(0)
        assert not [each for each in snapshot().transports if each.local == f"{local[0]}:{local[1]}"]

    before = len(snapshot().transports)
    anywire.run(main(), count_transports=True)
    assert len(snapshot().transports) == before


def test_connections_are_shown_only_if_asked_for() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = snapshot()
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        assert len(snapshot().transports) == len(before.transports) and snapshot().claims == before.claims
        transport.close()
        theirs.close()

    anywire.run(main())
