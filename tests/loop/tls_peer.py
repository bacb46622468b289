"""A TLS peer whose records the test has in its hands: an SSLObject over memory, and a plain socket."""

from __future__ import annotations

import _ssl
import asyncio
import contextlib
import ctypes
import functools
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import trustme


@functools.cache
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context and a client's that trusts it. Made once; for those who don't change them."""
    return fresh_contexts()


@functools.cache
def authority() -> tuple[trustme.CA, trustme.LeafCert]:
    made = trustme.CA()
    return made, made.issue_cert("localhost", "127.0.0.1")


def fresh_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    issuer, certificate = authority()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    certificate.configure_cert(server)
    issuer.configure_trust(client)
    return server, client


class Peer:
    """A client (or a server, by `server_side`) on a socket, which sends and receives when it is told to."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, **options: Any) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        if not options.get("server_side"):
            options.setdefault("server_hostname", "localhost")
        self.tls = context.wrap_bio(self.incoming, self.outgoing, **options)

    async def more(self) -> bool:
        """Take what comes next. False: the other side's end of the connection."""
        data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 18)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()
        return bool(data)

    async def flush(self) -> None:
        await self.send(self.outgoing.read())

    async def send(self, ciphertext: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, ciphertext)

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush()
                await self.more()
            else:
                return await self.flush()

    def sealed(self, *pieces: bytes) -> bytes:
        """These as records, not sent yet."""
        for data in pieces:
            self.tls.write(data)
        return self.outgoing.read()

    async def write(self, data: bytes) -> None:
        await self.send(self.sealed(data))

    async def read(self, size: int) -> bytes:
        """Exactly so many bytes, or fewer at the end (close_notify, or the connection's)."""
        got = bytearray()
        while len(got) < size:
            try:
                data = self.tls.read(size - len(got))
            except ssl.SSLWantReadError:
                await self.flush()
                await self.more()
                continue
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                break
            if not data:
                break
            got += data
        return bytes(got)

    async def say_goodbye(self) -> None:
        """Send close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self.flush()

    def call(self, name: str, *arguments: int) -> int:
        """A function of libssl, such as SSL_key_update, on this peer's SSL: the second field in CPython."""
        library = ctypes.PyDLL(_ssl.__file__)
        place = id(self.tls._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
        pointer = ctypes.c_void_p.from_address(place)
        return int(getattr(library, name)(pointer, *arguments))


@contextlib.asynccontextmanager
async def peer_of(address: tuple[str, int], context: ssl.SSLContext | None = None, **options: Any) -> Any:
    """A Peer that has done its handshake with the server there."""
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
        peer = Peer(context or contexts()[1], sock, **options)
        await peer.handshake()
        yield peer


def joined(calls: Iterable[tuple[str, Any]]) -> bytes:
    """The data of a recorder's calls."""
    return b"".join(data for name, data in calls if name == "data")
