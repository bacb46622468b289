"""A wire that lives in another package: installed with pip, found by its entry point, the same on both fronts."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire import sync
from anywire.contract.wire import known_schemes, unregister, wire_for

PACKAGE = Path(__file__).parents[2] / "examples" / "third_party_wire"
SO_PROTOCOL, IPPROTO_MPTCP = 38, 262
MESSAGES = [b"", b"hello", bytes(range(256)) * 4, os.urandom(3_000_000)]


def kernel_has_mptcp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that pip installed the package to, which is then importable."""
    # A copy: the build leaves its traces beside the sources.
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    options = ["--disable-pip-version-check", "--target", str(target), str(source)]
    # The build looks for meson on the path, where an environment that was not activated is not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    subprocess.run([*command, *options], check=True, timeout=120, env={**os.environ, "PATH": path})
    assert "mptcp" not in known_schemes()
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    try:
        yield target
    finally:
        unregister(type(wire_for("mptcp://127.0.0.1:1")))
        sys.path.remove(str(target))
        sys.modules.pop("anywire_mptcp", None)
        importlib.invalidate_caches()


def echo(channel: Any) -> None:
    for message in channel:
        channel.send(message)


async def echo_async(channel: Any) -> None:
    async for message in channel:
        await channel.send(message)


async def use_async(address: object) -> list[bytes]:
    got = []
    async with anywire.connect(str(address)) as channel:
        assert channel.traits.crosses_hosts
        for message in MESSAGES:
            await channel.send(message)
            got.append(await channel.recv(timeout=20))
    return got


def use_blocking(address: object) -> list[bytes]:
    got = []
    with sync.connect(str(address)) as channel:
        for message in MESSAGES:
            channel.send(message)
            got.append(channel.recv(timeout=20))
    return got


def test_a_channel_on_both_fronts(installed: Path) -> None:
    async def on_loop() -> None:
        async with anywire.serve(echo_async, "mptcp://127.0.0.1:0", "mptcp://[::1]:0") as server:
            for address in server.addresses:
                assert address.port != 0
                assert await use_async(address) == MESSAGES
                assert await asyncio.to_thread(use_blocking, address) == MESSAGES

    asyncio.run(on_loop())
    with sync.serve(echo, "mptcp://127.0.0.1:0") as server:
        assert use_blocking(server.addresses[0]) == MESSAGES
        assert asyncio.run(use_async(server.addresses[0])) == MESSAGES


def test_a_stream(installed: Path) -> None:
    def answer(stream: Any) -> None:
        stream.write(b"".join(stream)[::-1])

    with sync.serve_stream(answer, "mptcp://127.0.0.1:0") as server, sync.connect_stream(server.addresses[0]) as stream:
        stream.write(b"abc" * 100_000)
        stream.write_eof()
        assert b"".join(stream) == b"cba" * 100_000


def test_what_goes_wrong_has_the_same_errors(installed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(anywire.Refused, match=f"connect mptcp://127.0.0.1:{port}"):
        sync.connect(f"mptcp://127.0.0.1:{port}")
    with pytest.raises(anywire.AddressError, match="the port is missing"):
        sync.connect("mptcp://127.0.0.1")
    with pytest.raises(TypeError, match="mptcp has no option 'requires'; did you mean 'require'"):
        sync.connect("mptcp://127.0.0.1:1", requires=True)
    with sync.serve(echo, "mptcp://127.0.0.1:0") as server, sync.connect(server.addresses[0]) as channel:
        with pytest.raises(anywire.TimedOut):
            channel.recv(timeout=0.01)
        with pytest.raises(anywire.Unsupported):
            channel.detach()
        with pytest.raises(OSError, match="Address already in use"):
            sync.listen(server.addresses[0])
        channel.send(b"goes on")
        assert channel.recv(timeout=20) == b"goes on"


def test_it_is_what_it_says(installed: Path) -> None:
    address = "mptcp://127.0.0.1:0?require=true"
    if not kernel_has_mptcp():
        with pytest.raises(anywire.Unsupported, match="no MPTCP"):
            sync.listen(address)
        return
    with (
        sync.serve(echo, address) as server,
        sync.connect(server.addresses[0], require=True) as channel,
        socket.socket(fileno=os.dup(channel.endpoint.byte_endpoint().read_fd)) as sock,
    ):
        assert sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL) == IPPROTO_MPTCP


def test_a_fresh_process_needs_no_import(installed: Path) -> None:
    program = (
        "import sys, anywire.sync\n"
        "def handle(channel): channel.send(channel.recv().upper())\n"
        "with anywire.sync.serve(handle, 'mptcp://127.0.0.1:0') as server:\n"
        "    with anywire.sync.connect(server.addresses[0]) as channel:\n"
        "        channel.send(b'hello'); print(channel.recv().decode(), 'anywire_mptcp' in sys.modules)\n"
    )
    path = os.pathsep.join([str(installed), str(Path(anywire.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("HELLO True\n", "")


def test_without_the_package_the_scheme_is_unknown() -> None:
    path = str(Path(anywire.__file__).parents[1])
    program = "import anywire.sync; anywire.sync.connect('mptcp://127.0.0.1:1')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "UnknownWire" in done.stderr and "there is no wire 'mptcp'" in done.stderr
