"""What the loop does for sockets in place of the standard loop: its own transports, and accepting without a Task each.

A mix-in of `anywire.loop.Loop`, in front of the standard loop: the methods are those that `BaseEventLoop` calls from
`create_connection`, `create_server`, `connect_accepted_socket`, the Unix variants and `Server`. On the loop's thread.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING, Any

from anywire.loop._acceptor import Acceptor
from anywire.loop._connection import owner_of
from anywire.loop._tls import tls_protocol
from anywire.loop._transport import StreamTransport

if TYPE_CHECKING:
    _Base = Any                 # what it is put in front of has its hooks in no stub
else:
    _Base = object


class SocketHooks(_Base):  # type: ignore[misc]
    """The standard loop's hooks for stream sockets; `self` is the loop and its own `Core`."""

    def __init__(self, *arguments: Any) -> None:
        self._acceptors: dict[int, Acceptor] = {}      # by descriptor
        super().__init__(*arguments)

    def _make_socket_transport(
        self, sock: socket.socket, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[Any] | None = None, *,
        extra: dict[str, Any] | None = None, server: Any = None,
    ) -> Any:
        if not issubclass(type(sock), socket.socket):
            # Something that only says it is a socket, as tests have it.
            return super()._make_socket_transport(sock, protocol, waiter, extra=extra, server=server)
        self._ensure_fd_no_transport(sock)
        return StreamTransport(self, self, sock, protocol, waiter, extra, server)

    def _make_ssl_transport(
        self, rawsock: socket.socket, protocol: asyncio.BaseProtocol, sslcontext: Any,
        waiter: asyncio.Future[Any] | None = None, *, server_side: bool = False, server_hostname: str | None = None,
        extra: dict[str, Any] | None = None, server: Any = None, **timeouts: float | None,
    ) -> Any:
        self._ensure_fd_no_transport(rawsock)
        tls: Any = tls_protocol(self, protocol, sslcontext, waiter, server_side, server_hostname, **timeouts)
        StreamTransport(self, self, rawsock, tls, None, extra, server)
        return tls._app_transport

    async def start_tls(
        self, transport: Any, protocol: asyncio.BaseProtocol, sslcontext: ssl.SSLContext, *, server_side: bool = False,
        server_hostname: str | None = None, **timeouts: float | None,
    ) -> Any:
        """Upgrade the transport to TLS; returns the transport that the protocol uses from then on."""
        if not isinstance(sslcontext, ssl.SSLContext):
            raise TypeError(f"sslcontext is expected to be an instance of ssl.SSLContext, got {sslcontext!r}")
        if not getattr(transport, "_start_tls_compatible", False):
            raise TypeError(f"transport {transport!r} is not supported by start_tls()")
        waiter = self.create_future()
        tls: Any = tls_protocol(
            self, protocol, sslcontext, waiter, server_side, server_hostname, call_connection_made=False, **timeouts)
        transport.pause_reading()                      # nothing may come before its connection_made
        transport.set_protocol(tls)
        begin, resume = self.call_soon(tls.connection_made, transport), self.call_soon(transport.resume_reading)
        try:
            await waiter
        except BaseException:
            transport.close()
            begin.cancel()
            resume.cancel()
            raise
        return tls._app_transport

    def _start_serving(
        self, protocol_factory: Any, sock: socket.socket, sslcontext: Any = None, server: Any = None,
        backlog: int = 100, ssl_handshake_timeout: float | None = None, ssl_shutdown_timeout: float | None = None,
    ) -> None:
        self._check_closed()
        if not issubclass(type(sock), socket.socket):
            timeouts = (ssl_handshake_timeout, ssl_shutdown_timeout)
            super()._start_serving(protocol_factory, sock, sslcontext, server, backlog, *timeouts)
            return
        acceptor = Acceptor(self, self, protocol_factory, sock, server, backlog, sslcontext, ssl_handshake_timeout,
                            ssl_shutdown_timeout)
        acceptor.start()
        self._acceptors[sock.fileno()] = acceptor

    def _stop_serving(self, sock: socket.socket) -> None:
        acceptor = self._acceptors.pop(sock.fileno(), None)
        if acceptor is not None:
            acceptor.stop()
        super()._stop_serving(sock)                    # closes it; from 3.13 on a Unix socket's name goes, too

    def _ensure_fd_no_transport(self, fd: Any) -> None:
        super()._ensure_fd_no_transport(fd)
        number = fd if isinstance(fd, int) else int(fd.fileno())
        transport: Any = owner_of(number)
        if transport is not None and transport._loop is self and not transport.is_closing():
            raise RuntimeError(f"File descriptor {fd!r} is used by transport {transport!r}")

    async def _sendfile_native(self, transp: Any, file: Any, offset: int, count: int | None) -> Any:
        if not isinstance(transp, StreamTransport):
            return await super()._sendfile_native(transp, file, offset, count)
        transport: Any = transp
        resume_reading = transport.is_reading()
        transport.pause_reading()
        await transport._make_empty_waiter()
        transport._lend()
        try:
            return await self.sock_sendfile(transport._sock, file, offset, count, fallback=False)
        finally:
            transport._reset_empty_waiter()
            transport._take_back()
            if resume_reading:
                transport.resume_reading()
