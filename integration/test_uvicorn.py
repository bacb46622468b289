"""uvicorn, started as its users start it, with `--loop` naming ours; under wrk, a Python client, and web sockets."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from programs import LOOP, PATIENCE, program

pytest.importorskip("uvicorn")
HERE = Path(__file__).parent


class Uvicorn:
    def __init__(self, *more: str) -> None:
        command = [sys.executable, "-m", "uvicorn", "--app-dir", HERE, "asgi_app:app", "--loop", LOOP, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *more], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                return
        pytest.fail("".join(self.said))

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it as its users do; what it said."""
        self.process.send_signal(number)
        try:
            rest = self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            rest = self.process.communicate()[1]
            pytest.fail(f"did not stop:\n{''.join(self.said)}{rest}")
        return "".join(self.said) + rest


@pytest.fixture(params=["httptools", "h11"])
def server(request: pytest.FixtureRequest) -> Iterator[Uvicorn]:
    pytest.importorskip(request.param)
    uvicorn = Uvicorn("--http", request.param, "--no-access-log")
    yield uvicorn
    said = uvicorn.stop()
    assert "Application shutdown complete" in said
    assert "Traceback" not in said and "ERROR" not in said, said


def test_under_wrk(server: Uvicorn) -> None:
    wrk = program("wrk")
    done = subprocess.run(
        [wrk, "-t1", "-c50", "-d2s", f"http://127.0.0.1:{server.port}/"],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )
    assert "Socket errors" not in done.stdout and "Non-2xx" not in done.stdout, done.stdout
    found = re.search(r"(\d+) requests in", done.stdout)
    assert found is not None and int(found[1]) > 200, done.stdout


def test_bodies(server: Uvicorn) -> None:
    large = os.urandom(3 << 20)

    def one(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        for _ in range(3):                  # one connection, kept
            connection.request("POST", "/digest", body=large)
            assert connection.getresponse().read().decode() == hashlib.sha256(large).hexdigest()
            connection.request("GET", "/stream")
            answer = connection.getresponse().read()
            assert answer == b"".join(bytes([number % 256]) * 10_000 for number in range(200))
        connection.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


def test_a_client_that_leaves(server: Uvicorn) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", "/wait")      # answered when this client has gone, which another one asks about
    connection.close()
    other = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    other.request("GET", "/gone")
    assert other.getresponse().read() == b"gone"
    other.close()


def test_web_sockets(server: Uvicorn) -> None:
    client = pytest.importorskip("websockets.sync.client")
    with client.connect(f"ws://127.0.0.1:{server.port}/") as socket:
        socket.send("shout")
        assert socket.recv() == "SHOUT"
        socket.send(bytes(500_000))
        assert socket.recv() == bytes(500_000)


def test_an_interrupt_ends_it_politely() -> None:
    uvicorn = Uvicorn()
    said = uvicorn.stop(signal.SIGINT)
    assert "Application shutdown complete" in said
    assert "Traceback" not in said.replace("KeyboardInterrupt", ""), said
