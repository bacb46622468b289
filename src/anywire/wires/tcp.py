"""TCP: `tcp://host:port`. A stream wire for IPv4, IPv6 and names.

Owns: how a TCP connection comes about. No-delay always (a small message never waits for an acknowledgement), keep-alive
within a bound that the user sets, happy eyeballs. Used by the establishment generators, on the front's thread.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, ClassVar

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint
from anywire.contract.options import Option
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps
from anywire.contract.wire import Wire
from anywire.wires import sockets
from anywire.wires._descriptor import SocketBytes

KEEPALIVE = Option("keepalive", float, 30.0, "seconds within which a vanished host is noticed; 0 switches it off")
REUSE_PORT = Option(
    "reuse_port",
    bool,
    False,
    "let several listeners share the port; the kernel balances (socket(7))",
    frozenset({"listen"}),
)

TRAITS = Traits(
    kind=frozenset({"stream"}),
    connection=True,
    ordered="yes",
    reliable="yes",
    clean_end="yes, by the end frame",
    sees_death="across hosts by keep-alive within a set bound; on one host at once",
    half_close="yes",
    crosses_hosts=True,
    credentials="none",
    copies="2+",
    message_limit="configured",
)


class TcpWire(Wire):
    """The TCP wire."""

    schemes: ClassVar[tuple[str, ...]] = ("tcp",)
    options: ClassVar[Mapping[str, Option]] = {option.name: option for option in (KEEPALIVE, REUSE_PORT)}

    def traits(self, address: Address) -> Traits:
        """What TCP promises."""
        return TRAITS

    def check(self, address: Address) -> None:
        """An address needs a port, and no path."""
        sockets.check(address)

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint]:
        """Connect."""
        sock = yield from sockets.connect_steps(address)
        sock.setblocking(True)  # the blocking front waits inside recv(2); the async one uses MSG_DONTWAIT
        return self.endpoint(sock, None, address, options)

    def endpoint(self, sock: socket.socket, name: Any, address: Address, options: Mapping[str, Any]) -> SocketBytes:
        """The byte endpoint of a connected socket, which it takes over. `name`: the peer's, None if not known yet."""
        try:
            sockets.tune_tcp(sock, options)
            peer = sockets.tcp_peer("tcp", "tcp", name or sock.getpeername())
        except BaseException:
            sock.close()
            raise
        return SocketBytes(sock.detach(), address=address, peer=peer, wire=self)

    def bind(self, address: Address, options: Mapping[str, Any]) -> sockets.SocketAcceptor:
        """Listen."""
        sock = sockets.listen_tcp(address, options["backlog"], reuse_port=options["reuse_port"])
        return self.acceptor(sock, sockets.text_address("tcp", sock.getsockname()), options)

    def acceptor(self, sock: socket.socket, address: Address, options: Mapping[str, Any]) -> sockets.SocketAcceptor:
        """The acceptor of a listening socket."""
        return sockets.SocketAcceptor(
            self, address, sock, lambda accepted, name: self.endpoint(accepted, name, address, options)
        )

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> sockets.SocketAcceptor:
        """Go on accepting on a socket from another process."""
        return self.acceptor(socket.socket(fileno=fds[0]), address, options)
