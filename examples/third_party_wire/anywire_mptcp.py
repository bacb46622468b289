"""`mptcp://host:port`: multipath TCP (RFC 8684, Linux 5.6) as a wire of anywire.

Where a kernel has no MPTCP the connection is plain TCP; `require=true` refuses that on this side. Everything here runs
on the front's thread and never waits: it says that a descriptor is not ready, and the front does the waiting.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import Any

import anywire
from anywire.contract.address import require_host_port
from anywire.contract.waits import WRITE, Resolve, Steps, Wait

IPPROTO_MPTCP = 262
ABSENT = {errno.EPROTONOSUPPORT, errno.EINVAL, errno.ENOPROTOOPT}  # no such protocol in this kernel, or switched off


class MptcpBytes(anywire.ByteEndpoint):
    """Bytes of a connected socket, which it takes over."""

    def __init__(self, sock: socket.socket, wire: anywire.Wire, address: anywire.Address) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.read_fd = self.write_fd = sock.fileno()
        self.address = address
        self.peer = anywire.Peer(wire="mptcp", address=str(address_of(sock.getpeername())))
        self.wire = wire

    def do_read_into(self, buffer: memoryview) -> int | None:
        """How many bytes came, 0 at the end, None: nothing is here, wait until readable."""
        try:
            return self.sock.recv_into(buffer)
        except BlockingIOError:
            return None

    def do_write(self, data: memoryview) -> int | None:
        """How many bytes were taken, None: no room, wait until writable."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return None

    def shutdown_write(self) -> None:
        """Half-close."""
        self.sock.shutdown(socket.SHUT_WR)

    def close_now(self) -> None:
        """Give the descriptor back."""
        self.sock.close()
        super().close_now()


class MptcpAcceptor(anywire.Acceptor):
    """A listening socket."""

    def __init__(self, wire: anywire.Wire, sock: socket.socket) -> None:
        self.wire = wire
        self.sock = sock
        self.address = address_of(sock.getsockname())

    def fileno(self) -> int:
        """Readable when a connection waits."""
        return self.sock.fileno()

    def accept(self) -> MptcpBytes | None:
        """The next connection, None when nobody waits."""
        try:
            sock, _ = self.sock.accept()
        except BlockingIOError:
            return None
        try:
            sock.setblocking(False)
            return MptcpBytes(sock, self.wire, self.address)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Stop listening."""
        self.sock.close()


class MptcpWire(anywire.Wire):
    """The wire: what anywire asks for an address of this scheme."""

    schemes = ("mptcp",)
    options = {  # noqa: RUF012 - as in the base class, a mapping that nobody changes
        "require": anywire.Option("require", bool, False, "refuse to use plain TCP where the kernel has no MPTCP"),
    }

    def traits(self, address: anywire.Address) -> anywire.Traits:
        """What it promises."""
        return anywire.Traits(
            kind=frozenset({"stream"}),
            connection=True,
            ordered="yes",
            reliable="yes",
            clean_end="yes, by the end frame",
            sees_death="across hosts by the kernel's time-outs; on one host at once",
            half_close="yes",
            crosses_hosts=True,
            credentials="none",
            copies="2+",
            message_limit="configured",
        )

    def check(self, address: anywire.Address) -> None:
        """An address needs a port, and no path."""
        require_host_port(address)

    def dial(self, address: anywire.Address, options: Mapping[str, Any]) -> Steps[MptcpBytes]:
        """Connect. A generator: it yields what it waits for, and both fronts know how to wait."""
        failure: OSError = anywire.Refused("the name has no address", address=address, operation="connect")
        for family, _, _, _, target in (yield Resolve(address.host, address.port or 0)):
            sock = None
            try:
                sock = make_socket(family, address, options["require"])
                code = sock.connect_ex(target)
                if code == errno.EINPROGRESS:
                    yield Wait([(sock.fileno(), WRITE)])
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                return MptcpBytes(sock, self, address)
            except OSError as error:
                failure = error
                if sock is not None:
                    sock.close()
                if isinstance(error, anywire.AnywireError):  # a time-out of the caller's, or Unsupported
                    break
            except BaseException:  # cancelled in mid-way
                if sock is not None:
                    sock.close()
                raise
        raise failure

    def bind(self, address: anywire.Address, options: Mapping[str, Any]) -> MptcpAcceptor:
        """Listen."""
        infos = socket.getaddrinfo(address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sock = make_socket(infos[0][0], address, options["require"])
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(infos[0][4])
            sock.listen(options["backlog"])
        except OSError as error:
            sock.close()
            raise type(error)(error.errno, f"listen {address}: {error.strerror}") from None
        return MptcpAcceptor(self, sock)


def make_socket(family: int, address: anywire.Address, require: bool) -> socket.socket:
    """A non-blocking MPTCP socket, or a TCP socket if that may do. Raises Unsupported if it may not."""
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        if require:
            raise anywire.Unsupported(
                "this kernel has no MPTCP",
                address=address,
                operation="socket",
                advice="switch it on with sysctl net.mptcp.enabled=1, or leave out require=true",
            ) from error
        sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def address_of(name: Any) -> anywire.Address:
    """The address of a socket name as getsockname(2) gives it."""
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return anywire.Address.parse(f"mptcp://{host}:{name[1]}")
