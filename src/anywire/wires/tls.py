"""TLS: `tls://host:port`. The TCP wire with a handshake: the peer's certificate is verified unless the user brings a context.

Owns: the contexts made of the options, and the handshake as a generator. Used by the establishment generators, on the
front's thread; the bytes are `_tls.TlsBytes`.

What can go wrong: a certificate that is expired, for another name, or of an unknown authority (`Refused` with OpenSSL's
reason, on both sides), a peer that speaks something else (`BadFrame`, showing it), one that says nothing (`TimedOut`).
"""

from __future__ import annotations

import functools
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, require_host_port
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint
from anywire.contract.errors import BadFrame, PeerLost, Refused, TimedOut, Unsupported
from anywire.contract.options import Option, Side, any_value, path, words
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps, Wait
from anywire.contract.wire import Wire
from anywire.wires import sockets
from anywire.wires._tls import TlsBytes
from anywire.wires.tcp import KEEPALIVE, REUSE_PORT, TRAITS as TCP_TRAITS

CONNECT: frozenset[Side] = frozenset({"connect"})
LISTEN: frozenset[Side] = frozenset({"listen"})

TRAITS: Traits = replace(
    TCP_TRAITS, half_close="yes, one way", clean_end="yes, by the end frame or close_notify", credentials="certificate"
)


def ssl_context(value: Any) -> ssl.SSLContext:
    """A converter: an ssl.SSLContext, which no text can say."""
    if not isinstance(any_value(value), ssl.SSLContext):
        raise ValueError("an ssl.SSLContext, given as the keyword ssl=")
    return value


OPTIONS = (
    Option("ca", path, None, "PEM file or directory of the authorities to trust; default: the system's", CONNECT),
    Option("server_name", str, None, "the name that the certificate must be for; default: the address's host", CONNECT),
    Option("cert", path, None, "PEM file of this side's certificate, with its chain"),
    Option("key", path, None, "PEM file of the certificate's private key; default: in cert="),
    Option("client_ca", path, None, "PEM file or directory of the authorities that clients' certificates need", LISTEN),
    Option("require_client_cert", bool, None, "refuse clients without a certificate; default: if client_ca=", LISTEN),
    Option("alpn", words, None, "application protocols in order of preference (RFC 7301)"),
    Option("ssl", ssl_context, None, "an ssl.SSLContext of your own, used as it is, instead of the options above"),
    KEEPALIVE,
    REUSE_PORT,
)


def _stamp(*files: str | None) -> tuple[int, ...]:
    # A renewed certificate is a new file: the context is made again.
    return tuple(os.stat(file).st_mtime_ns for file in files if file is not None)


@functools.lru_cache(maxsize=16)
def _context(
    side: Side,
    authorities: str | None,
    cert: str | None,
    key: str | None,
    alpn: tuple[str, ...] | None,
    require: bool,
    stamp: tuple[int, ...],
) -> ssl.SSLContext:
    """Reading the system's authorities takes tens of milliseconds, hence the cache. A context is safe in many threads."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "connect" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if authorities is not None:
        folder = os.path.isdir(authorities)
        context.load_verify_locations(cafile=None if folder else authorities, capath=authorities if folder else None)
    elif side == "connect":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if side == "listen" and authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED if require else ssl.CERT_OPTIONAL
    if cert is not None:
        context.load_cert_chain(cert, key)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def context_for(side: Side, options: Mapping[str, Any], address: Address) -> ssl.SSLContext:
    """The context that the options describe. Raises ValueError for a bad combination, OSError for unreadable files."""
    given = {name for name in ("ca", "cert", "key", "client_ca", "require_client_cert", "alpn") if options.get(name)}
    if options["ssl"] is not None:
        if given:
            raise ValueError(f"{address}: ssl= brings everything itself; leave out {', '.join(sorted(given))}")
        return options["ssl"]  # type: ignore[no-any-return]
    cert, key = options["cert"], options["key"]
    if key is not None and cert is None:
        raise ValueError(f"{address}: key= needs cert=, the certificate that it belongs to")
    if side == "listen":
        if cert is None:
            raise ValueError(f"{address}: a listener needs a certificate: cert= and key=, or ssl=")
        authorities, require = options["client_ca"], options["require_client_cert"]
        if require and authorities is None:
            raise ValueError(f"{address}: require_client_cert= needs client_ca=, the authority to trust")
        require = require is not False
    else:
        authorities, require = options["ca"], True
    try:
        return _context(side, authorities, cert, key, options["alpn"], require, _stamp(authorities, cert, key))
    except ssl.SSLError as error:
        named = ", ".join(file for file in (authorities, cert, key) if file)
        raise ValueError(f"{address}: OpenSSL can't use {named}: {error.reason or error}") from error


def handshake_steps(below: TlsBytes, timeout: float, operation: str) -> Steps[TlsBytes]:
    """The handshake, within `timeout` seconds. Closes `below` when it fails."""
    deadline = time.monotonic() + timeout
    try:
        try:
            while not below.handshake_some():
                ready = yield Wait([(below.read_fd, below.want)], max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    raise TimedOut(
                        timeout,
                        f"the TLS handshake took longer than {timeout:g} s; {len(below.first)} bytes came",
                        address=below.address,
                        operation=operation,
                        advice="is the other end tls://, and alive? handshake_timeout= sets the limit",
                    )
        except ssl.SSLError as error:
            raise explain(error, below, operation) from error
        except ConnectionError as error:
            if below.first and not is_tls(below.first):
                raise no_tls(below, operation) from error
            raise PeerLost(
                error.strerror or str(error),
                address=below.address,
                operation=operation,
                advice="the other end may not be tls://, or refuse this side; its log says more",
            ) from error
    except BaseException:
        below.release()
        raise
    certificate = below.tls.getpeercert()
    below.peer = replace(below.peer, certificate=certificate or None, alpn=below.tls.selected_alpn_protocol())
    return below


def is_tls(first: bytes) -> bool:
    """Whether bytes start as a TLS record does: handshake or alert, version major 3 (RFC 8446 5.1)."""
    return first[:1] in (b"\x16", b"\x15") and first[1:2] in (b"", b"\x03")


def no_tls(below: TlsBytes, operation: str) -> BadFrame:
    """The error for a peer that speaks something else."""
    return BadFrame(
        "the peer does not speak TLS",
        received=below.first,
        address=below.address,
        operation=operation,
        advice="check that both ends use tls:// on this port",
    )


def explain(error: ssl.SSLError, below: TlsBytes, operation: str) -> OSError:
    """What a failed handshake means, in the words of the certificate check, the alert, or the bytes that came."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message or error.reason or str(error)
        advice = {
            62: "server_name= says which name the certificate is for",
            64: "server_name= says which name the certificate is for",
        }.get(error.verify_code, "ca= (for a listener client_ca=) names the authorities to trust")
        return Refused(
            f"the peer's certificate was not accepted: {reason}", address=below.address, operation=operation, advice=advice
        )
    if below.first and not is_tls(below.first):
        return no_tls(below, operation)
    explained = below.explained(error)
    if isinstance(explained, Refused):
        explained.operation = operation
        return explained
    if isinstance(error, ssl.SSLEOFError):
        return PeerLost("the peer closed the connection during the TLS handshake", address=below.address, operation=operation)
    return Refused(
        f"the TLS handshake failed: {(error.reason or str(error)).replace('_', ' ').lower()}",
        address=below.address,
        operation=operation,
    )


class TlsAcceptor(sockets.SocketAcceptor):
    """A listening socket whose connections begin with a handshake."""

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Refused: the private key does not travel."""
        raise Unsupported(
            "a TLS listener can't move to another process",
            address=self.address,
            operation="detach",
            advice="listen in the other process with reuse_port=True and the same cert= and key=",
        )


class TlsWire(Wire):
    """The TLS wire."""

    schemes: ClassVar[tuple[str, ...]] = ("tls",)
    options: ClassVar[Mapping[str, Option]] = {option.name: option for option in OPTIONS}

    def traits(self, address: Address) -> Traits:
        """What TLS over TCP promises."""
        return TRAITS

    def check(self, address: Address) -> None:
        """An address needs a port, and no path."""
        require_host_port(address)

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint]:
        """Connect, shake hands, verify."""
        context = context_for("connect", options, address)
        sock = yield from sockets.connect_steps(address)
        name = options["server_name"] or address.host
        below = self.endpoint(sock, sock.getpeername(), address, options, context, name)
        return (yield from handshake_steps(below, options["handshake_timeout"], "connect"))

    def endpoint(
        self,
        sock: socket.socket,
        name: Any,
        address: Address,
        options: Mapping[str, Any],
        context: ssl.SSLContext,
        server_name: str | None,
    ) -> TlsBytes:
        """The byte endpoint of a connected socket, which it takes over, before its handshake."""
        try:
            sockets.tune_tcp(sock, options)
            peer = sockets.tcp_peer("tls", "tls", name)
            below = TlsBytes(
                sock.fileno(),
                context,
                server_side=server_name is None,
                server_name=server_name,
                address=address,
                peer=peer,
                wire=self,
            )
        except BaseException:
            sock.close()
            raise
        sock.detach()
        return below

    def bind(self, address: Address, options: Mapping[str, Any]) -> TlsAcceptor:
        """Listen."""
        context = context_for("listen", options, address)
        sock = sockets.listen_tcp(address, options["backlog"], reuse_port=options["reuse_port"])
        real = sockets.text_address("tls", sock.getsockname())

        def make(accepted: socket.socket, name: Any) -> TlsBytes:
            return self.endpoint(accepted, name, real, options, context, None)

        def greet(below: ByteEndpoint | MessageEndpoint) -> Steps[TlsBytes]:
            assert isinstance(below, TlsBytes)
            return (yield from handshake_steps(below, options["handshake_timeout"], "accept"))

        return TlsAcceptor(self, real, sock, make, greet)
