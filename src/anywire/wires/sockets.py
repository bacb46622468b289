"""What the socket wires share: connecting with happy eyeballs, listening, socket options.

Generators run on the caller's thread and yield what they wait for; every socket opened here is closed here when a step
fails.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from anywire.contract.address import Address, require_host_port
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint
from anywire.contract.errors import Refused
from anywire.contract.peer import Peer
from anywire.contract.waits import WRITE, Resolve, Steps, Wait
from anywire.contract.wire import Acceptor, Wire

ATTEMPT_DELAY = 0.25
"""Seconds before the next address is tried beside the one under way: RFC 8305 section 5."""
SO_RXQ_OVFL = 40
"""socket(7): count what found the receive buffer full; the socket module has no name for it."""


def check(address: Address) -> None:
    """What tcp, tls and udp addresses have in common: a host with a port, no path, and a zone where there are many."""
    host, _ = require_host_port(address)
    if not address.zone and ":" in host and ipaddress.IPv6Address(host).is_link_local:
        raise address.error("host", "a link-local address is on every interface: name one, as in [fe80::1%25eth0]")


def look_up(address: Address, kind: socket.SocketKind) -> list[Any]:
    """The socket addresses to listen on; all of this host's for an empty host. Waits for the resolver."""
    host = f"{address.host}%{address.zone}" if address.zone else address.host or None
    try:
        return socket.getaddrinfo(host, address.port or 0, type=kind, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"listen {address}: {error.strerror}") from None


def keep_alive(sock: socket.socket, bound: float) -> None:
    """Notice a vanished host within about `bound` seconds (0: never): tcp(7) keep-alive and TCP_USER_TIMEOUT.

    Half of the bound passes in silence, then three probes; unacknowledged data counts against the same bound."""
    if bound <= 0:
        return
    idle = max(1, int(bound / 2))
    interval = max(1, int((bound - idle) / 3))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(bound * 1000))


def tune_tcp(sock: socket.socket, options: Mapping[str, Any]) -> None:
    """No delay for small messages, and keep-alive."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(sock, options["keepalive"])


def interleave(infos: list[Any]) -> list[Any]:
    """Alternate the address families, the resolver's first choice first: RFC 8305 section 4."""
    first = [info for info in infos if info[0] == infos[0][0]]
    others = [info for info in infos if info[0] != infos[0][0]]
    out = []
    for pair in range(max(len(first), len(others))):
        out += first[pair : pair + 1] + others[pair : pair + 1]
    return out


def resolve_steps(address: Address, kind: int) -> Steps[list[Any]]:
    """The socket addresses of `address`; a zone goes to the resolver with the host."""
    host = f"{address.host}%{address.zone}" if address.zone else address.host
    infos = yield Resolve(host, address.port or 0, socket.AF_UNSPEC, kind)
    return interleave([info for info in infos if info[0] in (socket.AF_INET, socket.AF_INET6)])


def connect_steps(address: Address) -> Steps[socket.socket]:
    """A connected TCP socket: happy eyeballs over all addresses of the name (RFC 8305), with poll instead of tasks.

    Raises the last OSError when none answers."""
    infos = yield from resolve_steps(address, socket.SOCK_STREAM)
    if not infos:
        raise Refused("the name has no internet address", address=str(address), operation="connect")
    pending: dict[int, socket.socket] = {}
    failure: OSError | None = None
    next_start = 0.0
    try:
        while infos or pending:
            if infos and (not pending or time.monotonic() >= next_start):
                family, kind, protocol, _, target = infos.pop(0)
                try:
                    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
                except OSError as error:      # a family that this host lacks
                    failure = error
                    continue
                pending[sock.fileno()] = sock
                code = sock.connect_ex(target)
                if code == 0:
                    return pending.pop(sock.fileno())
                if code != errno.EINPROGRESS:
                    failure = OSError(code, os.strerror(code))
                    pending.pop(sock.fileno()).close()
                    continue
                next_start = time.monotonic() + ATTEMPT_DELAY
            timeout = max(0.0, next_start - time.monotonic()) if infos else None
            ready = yield Wait([(fd, WRITE) for fd in pending], timeout)
            for fd, _ in ready:
                sock = pending.pop(fd)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return sock
                failure = OSError(code, os.strerror(code))
                sock.close()
                next_start = 0.0              # RFC 8305 section 5: a failure starts the next attempt at once
        assert failure is not None
        raise failure
    finally:
        for sock in pending.values():
            sock.close()


def text_address(scheme: str, name: Any) -> Address:
    """The address of a socket name as getsockname(2) gives it."""
    host, port = name[0], name[1]
    host = host.removeprefix("::ffff:") if "." in host else host  # an IPv4 peer of a socket for both
    if ":" in host:
        zone = ""
        if name[3]:
            with contextlib.suppress(OSError):  # the interface has gone meanwhile
                zone = "%25" + socket.if_indextoname(name[3])
        return Address.parse(f"{scheme}://[{host}{zone}]:{port}")
    return Address.parse(f"{scheme}://{host}:{port}")


def listen_tcp(address: Address, backlog: int, *, reuse_port: bool = False) -> socket.socket:
    """A listening socket. An empty host listens on every address (IPv6 with IPv4 mapped, where the host has IPv6)."""
    if not address.host:
        try:
            sock = socket.create_server(
                ("", address.port or 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True,
                reuse_port=reuse_port,
            )  # fmt: skip
        except (OSError, ValueError):
            sock = socket.create_server(("", address.port or 0), backlog=backlog, reuse_port=reuse_port)
        sock.setblocking(False)
        return sock
    family, kind, protocol, _, target = look_up(address, socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
        sock.listen(backlog)
        return sock
    except OSError as error:
        sock.close()
        raise type(error)(error.errno, f"listen {address}: {error.strerror}") from None


class SocketAcceptor(Acceptor):
    """Accepts on a listening socket. `make(sock, name)` turns an accepted socket into an endpoint (and owns it).

    Not thread-safe; owned by one server or listener."""

    def __init__(
        self,
        wire: Wire,
        address: Address,
        sock: socket.socket,
        make: Callable[[socket.socket, Any], ByteEndpoint | MessageEndpoint],
        greet: Callable[[Any], Steps[Any]] | None = None,
    ) -> None:
        self.wire = wire
        self.address = address
        self.sock = sock
        self.make = make
        self._greet = greet

    def fileno(self) -> int:
        """The listening descriptor, -1 when closed."""
        return self.sock.fileno()

    def accept(self) -> ByteEndpoint | MessageEndpoint | None:
        """The next connection, None when nobody waits. OSError as accept(2), descriptors exhausted included."""
        try:
            sock, name = self.sock.accept()
        except BlockingIOError:
            return None
        try:
            return self.make(sock, name)
        except BaseException:
            sock.close()
            raise

    def greet(self, endpoint: Any) -> Steps[Any]:
        """The wire's own handshake (TLS)."""
        if self._greet is not None:
            endpoint = yield from self._greet(endpoint)
        return endpoint

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the listening socket away."""
        return [self.sock.detach()], {}

    def close(self) -> None:
        """Stop listening; connections that wait in the backlog are refused by the kernel."""
        self.sock.close()


def tcp_peer(wire: str, scheme: str, name: Any) -> Peer:
    """Who is at the other end of a TCP connection."""
    return Peer(address=str(text_address(scheme, name)), wire=wire)
