"""Large chunks cost neither page faults nor more reads than they need."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from anywire import sync

SIZE = 100 << 10
SERVER = """
import asyncio, anywire

async def echo(stream):
    async for chunk in stream:
        await stream.write(chunk)

async def main():
    async with anywire.serve_stream(echo, "tcp://127.0.0.1:0") as server:
        print(server.addresses[0].port, flush=True)
        await server.serve_forever()

asyncio.run(main())
"""


def faults(pid: int) -> int:
    """Minor page faults of a process so far (proc_pid_stat(5), field 10)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def echoes(client: socket.socket, count: int) -> None:
    view = memoryview(bytearray(SIZE))
    for _ in range(count):
        client.sendall(view)
        got = 0
        while got < SIZE:
            some = client.recv_into(view[got:])
            assert some, "the server ended"
            got += some


def all_echo(clients: list[socket.socket], count: int) -> None:
    threads = [threading.Thread(target=echoes, args=(client, count)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.no_sanitize
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has a heap of its own")
def test_the_heap_is_not_given_back_between_chunks() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(10)]
            all_echo(clients, 20)
            before = faults(server.pid)
            all_echo(clients, 100)
            assert faults(server.pid) - before < 300, "about one a chunk without keep_heap()"
            for client in clients:
                client.close()
        finally:
            server.kill()


def test_a_message_in_two_parts_does_not_make_the_next_read_small() -> None:
    with sync.listen_stream(f"unix:@anywire-heap-{os.getpid()}") as listener:
        client = sync.connect_stream(listener.addresses[0])
        served = listener.accept(timeout=20)

        def read_of(size: int) -> int:
            client.write(bytes(size))               # a Unix socket's sender puts it all into the reader's queue
            return len(served.read(timeout=20))

        for _ in range(3):
            left = SIZE - read_of(SIZE)
            while left:
                left -= len(served.read(timeout=20))
        assert read_of(60 << 10) == 60 << 10
        assert read_of(40 << 10) == 40 << 10
        assert read_of(SIZE) == SIZE
        client.abort()
        served.abort()
