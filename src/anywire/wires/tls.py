"""TLS: `tls://host:port`. The TCP wire with a handshake that verifies the peer's certificate.

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

from anywire.contract.address import Address
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint
from anywire.contract.errors import BadFrame, PeerLost, Refused, TimedOut, Unsupported
from anywire.contract.options import Option, Side, path, text, words
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps, Wait
from anywire.contract.wire import Wire
from anywire.wires import sockets
from anywire.wires._tls import TlsBytes
from anywire.wires.tcp import KEEPALIVE, REUSE_PORT
from anywire.wires.tcp import TRAITS as TCP_TRAITS

CONNECT: frozenset[Side] = frozenset({"connect"})

TRAITS: Traits = replace(
    TCP_TRAITS, half_close="yes, one way", clean_end="yes, by the end frame or close_notify", credentials="certificate"
)


def ssl_context(value: Any) -> ssl.SSLContext:
    """A converter: an ssl.SSLContext, which no text can say."""
    if not isinstance(value, ssl.SSLContext):
        raise ValueError("an ssl.SSLContext, given as the keyword ssl_context=")
    return value


OPTIONS = (
    Option(
        "ca",
        path,
        None,
        "PEM file or directory of the authorities that the peer's certificate must come from; connecting, the default "
        "is the system's; listening, clients must show a certificate only if this is given",
    ),
    Option("cert", path, None, "PEM file of this side's certificate, with its chain"),
    Option("key", path, None, "PEM file of the certificate's private key, without a password; default: in cert="),
    Option("server_name", text, None, "the name the server's certificate must be for; default: the host", CONNECT),
    Option("alpn", words, None, "application protocols in order of preference (RFC 7301); see peer.alpn"),
    Option("ssl_context", ssl_context, None, "an ssl.SSLContext of your own, used as it is, for all but server_name="),
    KEEPALIVE,
    REUSE_PORT,
)


def _stamp(*files: str | None) -> tuple[int, ...]:
    # A renewed certificate is a new file: the context is made again.
    return tuple(os.stat(file).st_mtime_ns for file in files if file is not None)


def _about_file(error: OSError, options: Mapping[str, Any], address: Address, side: Side) -> OSError:
    """The same error with the address, the option and the file. OpenSSL doesn't say which: then all are named."""
    given = {name: options[name] for name in ("ca", "cert", "key") if options[name] is not None}
    guilty = {name: file for name, file in given.items() if file == error.filename} or given
    what = f"{side} {address}: {', '.join(f'{name}=' for name in guilty)} {error.strerror}"
    return type(error)(error.errno, what, ", ".join(guilty.values()))


@functools.lru_cache(maxsize=16)
def _context(
    side: Side,
    authorities: str | None,
    cert: str | None,
    key: str | None,
    alpn: tuple[str, ...] | None,
    stamp: tuple[int, ...],
) -> ssl.SSLContext:
    """Cached: reading a system's authorities takes tens of milliseconds, and a context may be used by many threads."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "connect" else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if authorities is not None:
        folder = os.path.isdir(authorities)
        context.load_verify_locations(cafile=None if folder else authorities, capath=authorities if folder else None)
        context.verify_mode = ssl.CERT_REQUIRED
    elif side == "connect":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if cert is not None:
        # Without a password function OpenSSL would ask on the terminal, and wait.
        context.load_cert_chain(cert, key, password=_no_password)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def _no_password() -> str:
    raise ValueError("the private key is encrypted; decrypt it, or pass ssl_context=")


def context_for(side: Side, options: Mapping[str, Any], address: Address) -> ssl.SSLContext:
    """The context that the options describe. Raises ValueError for a bad combination, OSError for unreadable files."""
    context: ssl.SSLContext | None = options["ssl_context"]
    if context is not None:
        given = [name for name in ("ca", "cert", "key", "alpn") if options[name]]
        if given:
            raise ValueError(f"{address}: ssl_context= brings everything itself; leave out {', '.join(given)}")
        unfit = ssl.PROTOCOL_TLS_SERVER if side == "connect" else ssl.PROTOCOL_TLS_CLIENT
        if context.protocol == unfit:
            raise ValueError(f"{address}: this ssl_context= is for the other side; {side} needs one of its own")
        return context
    authorities, cert, key = options["ca"], options["cert"], options["key"]
    if key is not None and cert is None:
        raise ValueError(f"{address}: key= needs cert=, the certificate that it belongs to")
    if side == "listen" and cert is None:
        raise ValueError(f"{address}: a listener needs a certificate: cert= and key=, or ssl_context=")
    try:
        return _context(side, authorities, cert, key, options["alpn"], _stamp(authorities, cert, key))
    except ssl.SSLError as error:
        named = ", ".join(file for file in (authorities, cert, key) if file)
        raise ValueError(f"{address}: OpenSSL can't use {named}: {error.reason or error}") from error
    except OSError as error:
        raise _about_file(error, options, address, side) from None


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
        return Refused(
            f"the peer's certificate was not accepted: {error.verify_message or error.reason or error}",
            address=below.address,
            operation=operation,
            answered=True,
            advice=ADVICE.get(error.verify_code, TRUST),
        )
    if below.first and not is_tls(below.first):
        if operation == "accept":
            below.alert_stranger()  # OpenSSL sends none; an anywire client shows it as a TLS alert
        return no_tls(below, operation)
    explained = below.explained(error)
    if isinstance(explained, Refused):
        explained.operation = operation
        return explained
    return Refused(
        f"the TLS handshake failed: {(error.reason or str(error)).replace('_', ' ').lower()}",
        address=below.address,
        operation=operation,
        answered=True,
    )


TRUST = "ca= names the authorities to trust; compare it with the peer's cert="
_NAME = "connect to a name that it is for, or say that name with server_name="
ADVICE = {
    9: "it is not valid yet; check this host's clock",
    10: "it has expired; the peer needs a new one (or this host's clock is wrong)",
    62: _NAME,
    64: _NAME,
}
"""What to do, by OpenSSL's verification code (X509_STORE_CTX_get_error(3))."""


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
        sockets.check(address)

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint]:
        """Connect, shake hands, verify."""
        context = context_for("connect", options, address)
        sock = yield from sockets.connect_steps(address)
        below = self.endpoint(sock, None, address, options, context, options["server_name"] or address.host)
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
        """The byte endpoint of a connected socket, which it takes over, before its handshake. `name`: the peer's."""
        try:
            sockets.tune_tcp(sock, options)
            peer = sockets.tcp_peer("tls", "tls", name or sock.getpeername())
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
