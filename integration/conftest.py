"""Other people's programs on anywire's event loop: what their tests share.

Run by `make integration` and by a stage of `.ci/run`. The programs are unmodified, the servers (PostgreSQL, Redis)
real, started here in a temporary directory as an unprivileged user, and ended. A server that is not installed skips
its tests, with the reason.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import pwd
import socket
import subprocess
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import PATIENCE, Run, Server, descriptors, new_event_loop, private, program, unprivileged


@pytest.fixture
def run() -> Iterator[Run]:
    """Run a coroutine on a new loop of ours; nothing may be left afterwards: descriptors, tasks, errors."""
    complaints: list[dict[str, Any]] = []
    new_event_loop().close()        # the first one opens the page of counters, which stays with the process
    before = descriptors()

    def run_one(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.get_loop().set_exception_handler(lambda loop, context: complaints.append(context))
            return runner.run(asyncio.wait_for(main, PATIENCE))

    yield run_one
    gc.collect()
    left = {fd: what for fd, what in descriptors().items() if before.get(fd) != what}
    assert not left
    assert not complaints


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A directory that the servers' user may write to, and nobody else."""
    with tempfile.TemporaryDirectory(prefix="anywire-integration-") as directory:
        if (user := unprivileged()) is not None:
            os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
        yield Path(directory)


@pytest.fixture(scope="session")
def authority() -> Any:
    return importlib.import_module("trustme").CA()


@pytest.fixture(scope="session")
def postgres(place: Path, authority: Any) -> Iterator[dict[str, Any]]:
    """A PostgreSQL server with TLS: the arguments of `asyncpg.connect` for its Unix socket."""
    versions = "/usr/lib/postgresql/*/bin"
    initdb, postgres = program("initdb", versions), program("postgres", versions)
    data, user = place / "data", unprivileged()
    subprocess.run(
        [initdb, "-D", data, "-U", "anywire", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"],
        user=user, cwd=place, check=True, stdin=subprocess.DEVNULL, capture_output=True,
    )
    certificate = authority.issue_cert("127.0.0.1")
    private(data / "key.pem", certificate.private_key_pem.bytes(), user)
    private(data / "certificate.pem", b"".join(blob.bytes() for blob in certificate.cert_chain_pems), user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": place, "fsync": "off",
        "ssl": "on", "ssl_cert_file": "certificate.pem", "ssl_key_file": "key.pem", "shared_buffers": "16MB",
        "autovacuum": "off",
    }
    server = Server(
        [postgres, "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())], place, user,
    )
    try:
        server.wait_for(lambda: "ready to accept connections" in server.log.read_text(errors="replace"))
        yield {"host": str(place), "port": port, "user": "anywire", "database": "postgres"}
    finally:
        server.close()


@pytest.fixture(scope="session")
def redis_server(place: Path) -> Iterator[tuple[str, int]]:
    """A Redis server: the path of its Unix socket, and its port on 127.0.0.1."""
    command = program("redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory = place / "redis"
    directory.mkdir()
    if (user := unprivileged()) is not None:
        os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
    path = directory / "socket"
    server = Server(
        [command, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path), "--save", "", "--dir", "."],
        directory, user,
    )
    try:
        server.wait_for(path.exists)
        yield str(path), port
    finally:
        server.close()
