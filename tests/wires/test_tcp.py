"""tcp://: how a connection comes about, and the socket options it then has. What every wire does is in the conformance
suite.

An address that never answers is a listening socket whose backlog is full: Linux drops further SYNs (tcp(7)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire import sync
from anywire.contract.address import Address
from anywire.contract.driver import driver_for, run_blocking
from anywire.contract.handle import Handle
from anywire.contract.waits import Resolve
from anywire.framing.preamble import Preamble
from anywire.wires import sockets

FRONTS = ("async", "blocking")
V4, V6 = ("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def echo(channel: Any) -> None:
    for message in channel:
        channel.send(message)


def dial(front: str, address: object, use: Callable[[Any], Any] = lambda channel: channel.peer, **options: Any) -> Any:
    """Connect, send and receive one message, then `use(channel)`."""

    async def run() -> Any:
        async with anywire.connect(str(address), **options) as channel:
            await channel.send(b"hello")
            assert await channel.recv() == b"hello"
            return use(channel)

    if front == "async":
        return asyncio.run(run())
    with sync.connect(str(address), **options) as channel:
        channel.send(b"hello")
        assert channel.recv() == b"hello"
        return use(channel)


@contextlib.contextmanager
def silent(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port where connecting takes for ever."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        while True:
            filler = stack.enter_context(socket.socket(family))
            filler.settimeout(0.2)
            try:
                filler.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


def sockets_open() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(target for target in found if target.startswith("socket:"))


# -- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_the_real_port_is_told(front: str, host: str) -> None:
    with sync.serve(echo, f"tcp://{host}:0") as server:
        address = server.addresses[0]
        assert address.port != 0
        assert dial(front, address).address == str(address)


def test_an_empty_host_is_every_address(front: str) -> None:
    peers = []

    def handle(channel: Any) -> None:
        peers.append(channel.peer.address)
        echo(channel)

    with sync.serve(handle, "tcp://:0") as server:
        port = server.addresses[0].port
        assert dial(front, f"tcp://127.0.0.1:{port}").address == f"tcp://127.0.0.1:{port}"
        assert dial(front, f"tcp://[::1]:{port}").address == f"tcp://[::1]:{port}"
    # The first came as an IPv4-mapped address (RFC 4291 2.5.5.2), which nobody wants to see.
    assert [peer.rpartition(":")[0] for peer in peers] == ["tcp://127.0.0.1", "tcp://[::1]"]


def link_local() -> tuple[str, str] | None:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, interface = line.split()
        if scope == "20":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), interface
    return None


@pytest.mark.skipif(link_local() is None, reason="no interface here has a link-local IPv6 address")
def test_a_link_local_address_needs_its_zone(front: str) -> None:
    found = link_local()
    assert found is not None
    host, interface = found
    with sync.serve(echo, f"tcp://[{host}%25{interface}]:0") as server:
        address = server.addresses[0]
        assert (address.host, address.zone) == (host, interface)
        assert dial(front, address).address == str(address)
    for listen_or_connect in (anywire.connect, sync.connect, anywire.listen, sync.listen):
        with pytest.raises(anywire.AddressError, match="link-local.*name one"):
            listen_or_connect(f"tcp://[{host}]:1")


def test_a_zone_that_does_not_exist(front: str) -> None:
    with pytest.raises(anywire.Refused, match=r"connect tcp://\[fe80::1%25nowhere\]:1: .*the name was not found"):
        dial(front, "tcp://[fe80::1%25nowhere]:1")


def test_names_that_do_not_exist(front: str) -> None:
    with pytest.raises(anywire.Refused, match=r"connect tcp://nobody\.invalid:1: .*the name was not found"):
        dial(front, "tcp://nobody.invalid:1")
    for address in ("tcp://nobody.invalid:0", "udp://nobody.invalid:0"):
        with pytest.raises(socket.gaierror, match=f"listen {address}"):
            (anywire.listen if front == "async" else sync.listen)(address)


# -- connecting ------------------------------------------------------------------------------------------------------


def test_refused(front: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    before = sockets_open()
    with pytest.raises(anywire.Refused, match=rf"connect tcp://127\.0\.0\.1:{port}: .*nobody listens.*wait=SECONDS"):
        dial(front, f"tcp://127.0.0.1:{port}")
    assert sockets_open() == before


def test_timed_out(front: str) -> None:
    with silent() as port:
        before = sockets_open()
        with pytest.raises(anywire.TimedOut, match=rf"connect tcp://127.0.0.1:{port}: took longer") as caught:
            dial(front, f"tcp://127.0.0.1:{port}", timeout=0.2)
        assert caught.value.seconds == 0.2
        assert sockets_open() == before


def test_an_error_of_the_kernel_names_address_and_operation(front: str) -> None:
    with pytest.raises(PermissionError, match=r"connect udp://255\.255\.255\.255:1: Permission denied"):
        dial(front, "udp://255.255.255.255:1")
    with sync.serve(echo, "tcp://127.0.0.1:0") as server:
        address = server.addresses[0]
        with pytest.raises(OSError, match=f"listen {address}: Address already in use"):
            (anywire.listen if front == "async" else sync.listen)(address)


def test_connect_waits_for_a_listener(front: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    refused = threading.Event()
    served = threading.Event()
    done = threading.Event()

    def serve_later() -> None:
        refused.wait(20)
        with sync.serve(echo, address):
            served.set()
            done.wait(20)

    thread = threading.Thread(target=serve_later)
    thread.start()
    try:
        with pytest.raises(anywire.Refused):
            dial(front, address, wait=0.05)
        refused.set()
        assert dial(front, address, wait=20).address == address
    finally:
        refused.set()
        done.set()
        thread.join(20)
    assert served.is_set()


# -- happy eyeballs --------------------------------------------------------------------------------------------------


def connect_to(front: str, hosts: list[tuple[str, socket.AddressFamily]], port: int) -> tuple[str, float]:
    """Connect to a name with these addresses: which one won, and after how many seconds."""

    def resolved() -> Generator[Any, Any, socket.socket]:
        steps = sockets.connect_steps(Address.parse(f"tcp://name.example:{port}"))
        request = next(steps)
        assert isinstance(request, Resolve)
        assert (request.host, request.port) == ("name.example", port)
        infos = [(family, socket.SOCK_STREAM, 6, "", (host, port)) for host, family in hosts]
        try:
            request = steps.send(infos)
            while True:
                request = steps.send((yield request))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def on_loop() -> socket.socket:
        return await driver_for().run(resolved())

    begun = time.monotonic()
    before = sockets_open()
    sock = asyncio.run(on_loop()) if front == "async" else run_blocking(resolved(), begun + 20)
    took = time.monotonic() - begun
    with sock:
        assert len(sockets_open()) == len(before) + 1, "the attempts that lost are closed"
        return sock.getpeername()[0], took


def test_the_first_address_wins_when_it_answers(front: str) -> None:
    with sync.listen("tcp://:0") as listener:
        port = listener.addresses[0].port
        assert connect_to(front, [V6, V4], port)[0] == "::1"
        assert connect_to(front, [V4, V6], port)[0] == "127.0.0.1"


def test_a_refusing_address_passes_to_the_next_at_once(front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "ATTEMPT_DELAY", 15)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        host, took = connect_to(front, [V6, V4], port)
    assert host == "127.0.0.1"
    assert took < 10, "a refusal needs no waiting"


def test_a_silent_address_is_overtaken(front: str) -> None:
    """RFC 8305 section 5: after 250 ms the next address is tried beside it, and the first to answer wins."""
    with socket.create_server(("127.0.0.1", 0)) as listener, silent("::1", listener.getsockname()[1]) as port:
        host, took = connect_to(front, [V6, V4], port)
    assert host == "127.0.0.1"
    assert took >= sockets.ATTEMPT_DELAY * 0.9


def test_a_failure_beside_a_silent_address_starts_the_next_at_once(
    front: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent, refusing, good: the second starts after the delay, the third when the second failed."""
    monkeypatch.setattr(sockets, "ATTEMPT_DELAY", 1.5)
    with socket.create_server(("127.0.0.2", 0)) as listener, silent("::1", listener.getsockname()[1]) as port:
        hosts = [V6, V4, ("127.0.0.2", socket.AF_INET)]
        host, took = connect_to(front, hosts, port)
    assert host == "127.0.0.2"
    assert 1.4 < took < 3, "one delay, not two"


def test_the_last_failure_is_told_when_none_answers(front: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    before = sockets_open()
    with pytest.raises(ConnectionRefusedError):
        connect_to(front, [V6, V4], port)
    assert sockets_open() == before


def test_families_take_turns() -> None:
    """RFC 8305 section 4, from the resolver's first choice on."""
    infos = [(family, name) for name, family in zip("abcde", [10, 10, 10, 2, 2], strict=True)]
    assert [name for _, name in sockets.interleave(infos)] == ["a", "d", "b", "e", "c"]
    assert sockets.interleave([]) == []


# -- socket options --------------------------------------------------------------------------------------------------


def options_of(channel: Any) -> dict[str, int]:
    with socket.socket(fileno=os.dup(channel.endpoint.byte_endpoint().read_fd)) as sock:
        names = ("TCP_NODELAY", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        found = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names}
        found["SO_KEEPALIVE"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return found


@pytest.mark.parametrize("bound", [30, 7, 1, 0])
def test_small_messages_go_at_once_and_a_vanished_host_is_noticed(front: str, bound: int) -> None:
    theirs: list[dict[str, int]] = []

    def handle(channel: Any) -> None:
        theirs.append(options_of(channel))
        echo(channel)

    with sync.serve(handle, "tcp://127.0.0.1:0", keepalive=bound) as server:
        ours = dial(front, f"{server.addresses[0]}?keepalive={bound}", options_of)
    for options in (ours, *theirs):
        assert options["TCP_NODELAY"] == 1
        assert options["SO_KEEPALIVE"] == (bound > 0)
        if bound:
            assert options["TCP_USER_TIMEOUT"] == bound * 1000
            probes = options["TCP_KEEPINTVL"] * options["TCP_KEEPCNT"]
            assert options["TCP_KEEPIDLE"] + probes <= max(bound, 4), "seconds; no part of it can be below one"


def test_a_listener_that_moves_takes_its_options_along(front: str) -> None:
    """Those of the address, which the real address no longer shows, and those given as keywords."""
    listen = anywire.listen if front == "async" else sync.listen
    detached = listen("tcp://127.0.0.1:0?keepalive=7", max_message=1000, handshake_timeout=3.0, backlog=5).detach()
    handle = Handle.unpack(detached.pack(), detached.take())

    async def main() -> None:
        moved = await anywire.attach(handle) if front == "async" else await asyncio.to_thread(sync.attach, handle)
        (plan,) = moved._plans.values()
        assert plan.options["handshake_timeout"] == 3.0
        assert plan.options["backlog"] == 5
        with sync.connect_stream(moved.addresses[0]) as client:
            client.write(Preamble(100).encode())
            accepting = moved.accept()
            channel = await accepting if front == "async" else accepting
            options = options_of(channel)
            assert (options["SO_KEEPALIVE"], options["TCP_USER_TIMEOUT"]) == (1, 7000)
            assert channel.max_message == 1000
            channel.abort()
        moved.close()

    asyncio.run(main())


def test_the_blocking_front_waits_inside_one_system_call() -> None:
    """Both ends' descriptors are in blocking mode: no poll(2) around each call."""
    modes = []

    def handle(channel: Any) -> None:
        modes.append(os.get_blocking(channel.endpoint.byte_endpoint().read_fd))
        echo(channel)

    with sync.serve(handle, "tcp://127.0.0.1:0") as server:
        modes.append(dial("blocking", server.addresses[0], lambda channel: os.get_blocking(channel.endpoint.read_fd)))
    assert modes == [True, True]


def test_listeners_may_share_a_port(front: str) -> None:
    listen = anywire.listen if front == "async" else sync.listen
    first = listen("tcp://127.0.0.1:0", reuse_port=True)
    second = listen(first.addresses[0], reuse_port=True)
    assert first.addresses == second.addresses
    with pytest.raises(OSError, match="already in use"):
        listen(first.addresses[0])
    first.close()
    second.close()


def test_a_silent_client_does_not_outlast_the_time_out_of_accept() -> None:
    """The handshake has a longer limit of its own; a caller who gave accept() less gets it back in time."""
    with sync.listen("tcp://127.0.0.1:0") as listener:
        where = listener.addresses[0]
        with socket.create_connection((where.host, where.port)):
            begun = time.monotonic()
            with pytest.raises(anywire.TimedOut):
                listener.accept(timeout=0.2)
            assert time.monotonic() - begun < 5


def test_silence_ends_after_five_seconds_by_default() -> None:
    """docs/design/wire-format.md. On both sides and both fronts at once, so that the five seconds pass once."""

    def hang_up(server: Any) -> float:
        """Seconds until the listener gives up a client that says nothing."""
        address = server.addresses[0]
        with socket.create_connection((address.host, address.port), 20) as client:
            started = time.monotonic()
            assert client.recv(100) == b""
            return time.monotonic() - started

    def give_up(port: int) -> float:
        started = time.monotonic()
        with pytest.raises(anywire.TimedOut) as caught:
            sync.connect(f"tcp://127.0.0.1:{port}", timeout=20)
        assert caught.value.seconds == 5.0, "not the time-out of connect, which is longer"
        return time.monotonic() - started

    async def give_up_async(port: int) -> float:
        started = time.monotonic()
        with pytest.raises(anywire.TimedOut) as caught:
            await anywire.connect(f"tcp://127.0.0.1:{port}", timeout=20)
        assert caught.value.seconds == 5.0
        return time.monotonic() - started

    async def main() -> dict[str, float]:
        with socket.create_server(("127.0.0.1", 0)) as listener, sync.serve(echo, "tcp://127.0.0.1:0") as blocking:
            port = listener.getsockname()[1]  # connecting succeeds, in the backlog; nobody answers
            async with anywire.serve(echo, "tcp://127.0.0.1:0") as server:
                taken = await asyncio.gather(
                    asyncio.to_thread(hang_up, server),
                    asyncio.to_thread(hang_up, blocking),
                    give_up_async(port),
                    asyncio.to_thread(give_up, port),
                )
        return dict(zip(("server", "sync server", "connect", "sync connect"), taken, strict=True))

    taken = asyncio.run(main())
    assert all(4.9 < seconds < 10 for seconds in taken.values()), taken
