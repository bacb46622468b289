"""UDP: `udp://host:port`. A message wire: each message is one datagram, its bytes unchanged.

Owns: how a listener tells its peers apart. There are no connections in UDP, so the first datagram of an address that is
not known yet is taken for one: the peer gets a socket of its own, bound to the same port and connected to it, and from
then on the kernel sorts (udp(7)). So each peer has its own bounded queue in the kernel, and the library waits for it as
for any other descriptor. Called by the establishment generators and, for `release`, from any thread.

Between bind(2) and connect(2) of such a socket the kernel may give it datagrams of other peers, and the listener still
holds earlier ones of this peer: both are sorted by hand before the connection is handed out, so nothing is lost or
misplaced. Listening sockets allow others on their port (SO_REUSEADDR) only for that moment.

What can go wrong: strangers. Anybody can send, with any address, so a flood of them costs at most `max_peers` sockets
and a queue of 4 MiB; what is over that is dropped and counted (`drops`). Who is silent for `idle_timeout` is forgotten.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import socket
import struct
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from anywire.contract.address import Address
from anywire.contract.errors import Refused
from anywire.contract.options import Option, Side, integer, size
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor, Wire
from anywire.wires import sockets
from anywire.wires._datagram import DatagramEndpoint

LISTEN: frozenset[Side] = frozenset({"listen"})

TRAITS = Traits(
    kind=frozenset({"message"}),
    connection=False,
    ordered="no",
    reliable="no",
    clean_end="–",
    sees_death="no",
    half_close="–",
    crosses_hosts=True,
    credentials="–",
    copies="2+",
    message_limit="datagram",
)

AREA = 65536
"""Bytes: no datagram is larger."""
MOST_HELD = 4 << 20
"""Bytes of datagrams that wait here because they were met while another peer's were looked for."""
OVERHEAD = 256
"""Bytes that the objects around a datagram take, roughly: empty ones are not free."""
MOST_DROPPED = 256
"""Datagrams of strangers thrown away in one call, before others get a turn."""
MOST_SORTED = 16384
"""Datagrams read while one peer is admitted: more than receive buffers hold, and not for ever under a flood."""
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
IP_PKTINFO = 8  # ip(7); the socket module names it only since Python 3.14
_NAMES_OF_WILDCARDS = ("0.0.0.0", "::")


class Datagram(NamedTuple):
    """What came, from whom (as recvfrom(2) names it), and to which address of this host."""

    data: bytes
    sender: Any
    local: Any


class UdpAcceptor(Acceptor):
    """Makes a connected socket for each new peer of a bound one. Used by one thread at a time."""

    def __init__(self, wire: Wire, address: Address, sock: socket.socket, options: Mapping[str, Any]) -> None:
        self.wire = wire
        self.address = address
        self.sock = sock
        self.options = options
        self.peers: weakref.WeakValueDictionary[Any, DatagramEndpoint] = weakref.WeakValueDictionary()
        self.held: dict[Any, list[Datagram]] = {}
        self.held_bytes = 0
        self.overflowed = 0
        self.here = sock.getsockname()
        self.everywhere = self.here[0] in _NAMES_OF_WILDCARDS

    def fileno(self) -> int:
        """The bound descriptor, -1 when closed."""
        return self.sock.fileno()

    def accept(self) -> DatagramEndpoint | None:
        """The next new peer, None when nobody new wrote. Descriptors exhausted: OSError, and nothing is lost."""
        reads = 0
        while True:
            if not self.held:
                datagram = self.read() if reads < MOST_DROPPED else None
                if datagram is None:
                    return None
                reads += 1
                self.hold(datagram)
                continue
            if len(self.peers) >= self.options["max_peers"]:
                self.drop_held()
                continue
            sender = next(iter(self.held))
            try:
                return self.admit(sender)
            except OSError as error:
                if error.errno in EXHAUSTED:
                    raise
                self.drop(len(self.take(sender)))  # an address that can't be answered, such as port 0

    def hold(self, datagram: Datagram) -> None:
        """Keep a datagram until its sender is admitted."""
        n = len(datagram.data) + OVERHEAD
        # A datagram of a known peer was on its way to this socket while the peer got its own: too late.
        if datagram.sender in self.peers or self.held_bytes + n > MOST_HELD:
            self.drop(1)
            return
        self.held.setdefault(datagram.sender, []).append(datagram)
        self.held_bytes += n

    def take(self, sender: Any) -> list[Datagram]:
        """All that is held of a sender."""
        datagrams = self.held.pop(sender)
        self.held_bytes -= sum(len(datagram.data) + OVERHEAD for datagram in datagrams)
        return datagrams

    def read(self) -> Datagram | None:
        """One datagram of the bound socket, None when nothing is here."""
        while True:
            try:
                data, ancillary, _, sender = self.sock.recvmsg(AREA, 128)
            except BlockingIOError:
                return None
            except ConnectionError:
                continue  # ICMP's answer to something; bound sockets seldom hear it, and it concerns no new peer
            local = self.here
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, sockets.SO_RXQ_OVFL):
                    (total,) = struct.unpack("I", value)
                    self.drop((total - self.overflowed) & 0xFFFFFFFF)
                    self.overflowed = total
                elif (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                    local = (socket.inet_ntop(socket.AF_INET, value[4:8]), self.here[1])
                elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                    (index,) = struct.unpack("I", value[16:20])
                    host = socket.inet_ntop(socket.AF_INET6, value[:16])
                    local = (host, self.here[1], 0, index if ipaddress.IPv6Address(host).is_link_local else 0)
            return Datagram(data, sender, local)

    def admit(self, peer: Any) -> DatagramEndpoint:
        """A connected socket for a sender, with all that it wrote so far."""
        local = self.held[peer][0].local
        sock = socket.socket(self.sock.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            set_buffer(sock, self.options)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sock.family == socket.AF_INET6:
                only = self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(local)
                sock.connect(peer)
            finally:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            self.sort(sock, local)
            endpoint = DatagramEndpoint(
                sock.fileno(),
                self.options["max_message"],
                idle=self.options["idle_timeout"],
                early=[datagram.data for datagram in self.held[peer]],
                accepted=True,
                address=self.address,
                peer=sockets.tcp_peer("udp", "udp", peer),
                wire=self.wire,
            )
        except BaseException:
            sock.close()
            raise
        sock.detach()
        self.take(peer)
        self.peers[peer] = endpoint
        # No reference to this acceptor: a listener that was closed may go while its peers stay.
        endpoint.on_release = functools.partial(self.peers.pop, peer, None)
        return endpoint

    def sort(self, sock: socket.socket, local: Any) -> None:
        """Hold what this socket has, and what the peer's new one, bound to `local`, got before it was connected."""
        for _ in range(MOST_SORTED):
            datagram = self.read()
            if datagram is None:
                break
            self.hold(datagram)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            for _ in range(MOST_SORTED):
                self.hold(Datagram(*sock.recvfrom(AREA, socket.MSG_DONTWAIT), local))

    def drop(self, number: int) -> None:
        """Count what was dropped."""
        if number and self.on_drop is not None:
            self.on_drop(number)

    def drop_held(self) -> None:
        """Nobody of those who wait can be admitted."""
        self.drop(sum(map(len, self.held.values())))
        self.held.clear()
        self.held_bytes = 0

    def close(self) -> None:
        """Stop listening; peers that have their channel keep it."""
        self.drop_held()
        self.sock.close()


def set_buffer(sock: socket.socket, options: Mapping[str, Any]) -> None:
    """The receive buffer, and the report of what did not fit into it."""
    if options["rcvbuf"] is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["rcvbuf"])
    sock.setsockopt(socket.SOL_SOCKET, sockets.SO_RXQ_OVFL, 1)


def bind(address: Address, options: Mapping[str, Any]) -> socket.socket:
    """A bound socket. An empty host is every address of this host (IPv6 with IPv4 mapped, where the host has IPv6)."""
    kind = socket.SOCK_DGRAM
    infos = sockets.look_up(address, kind)
    if not address.host:
        infos.sort(key=lambda info: info[0] != socket.AF_INET6)
    failure: OSError | None = None
    for family, _, protocol, _, target in infos if not address.host else infos[:1]:
        sock = None
        try:
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address.host else 1)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            set_buffer(sock, options)
            try:
                sock.bind(target)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not target[1]:
                    raise
                # Peers of an earlier listener may still have their sockets, which allow this; a listener does not.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(target)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            return sock
        except OSError as error:
            failure = type(error)(error.errno, f"listen {address}: {error.strerror}")
            if sock is not None:
                sock.close()
    assert failure is not None
    raise failure


class UdpWire(Wire):
    """The UDP wire."""

    schemes: ClassVar[tuple[str, ...]] = ("udp",)
    options: ClassVar[Mapping[str, Option]] = {
        option.name: option
        for option in (
            Option("idle_timeout", float, 60.0, "seconds of silence after which a peer is forgotten; 0: never", LISTEN),
            Option("max_peers", integer(1, 1 << 20), 512, "most peers at once; others are dropped and counted", LISTEN),
            Option("rcvbuf", size, None, "bytes of each socket's receive buffer (SO_RCVBUF), which bounds what waits"),
        )
    }

    def traits(self, address: Address) -> Traits:
        """What UDP promises: little."""
        return TRAITS

    def check(self, address: Address) -> None:
        """An address needs a port, and no path."""
        sockets.check(address)

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[DatagramEndpoint]:
        """A socket connected to the first address that this host has a way to. Nothing is sent: nobody may be there."""
        failure: OSError = Refused("the name has no internet address", address=str(address), operation="connect")
        for family, kind, protocol, _, target in (yield from sockets.resolve_steps(address, socket.SOCK_DGRAM)):
            try:
                sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
            except OSError as error:  # a family that this host lacks
                failure = error
                continue
            try:
                set_buffer(sock, options)
                sock.connect(target)
                peer = sockets.tcp_peer("udp", "udp", sock.getpeername())
                endpoint = DatagramEndpoint(
                    sock.fileno(), options["max_message"], address=address, peer=peer, wire=self
                )
            except OSError as error:
                failure = error
                sock.close()
                continue
            sock.detach()
            return endpoint
        raise failure

    def bind(self, address: Address, options: Mapping[str, Any]) -> UdpAcceptor:
        """Listen."""
        sock = bind(address, options)
        return UdpAcceptor(self, sockets.text_address("udp", sock.getsockname()), sock, options)
