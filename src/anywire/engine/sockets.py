"""What non-blocking sockets need of the caller: begin a connect and learn its result, low-water marks."""

import errno
import os
import socket
from typing import Any

# From connect(2): what a non-blocking connect says while it goes on. EINTR goes on, too.
_UNDER_WAY = {errno.EINPROGRESS, errno.EINTR, errno.EALREADY}
# tcp(7); missing from the socket module before 3.12.
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def begin_connect(sock: socket.socket, address: Any) -> bool:
    """Begin to connect; returns whether it is done. If not, watch the socket for WRITE, then ask `connect_result`.

    Args:
        sock: made non-blocking by this.
        address: as for socket.connect, of numbers: names are looked up by blocking calls.

    Raises:
        OSError: it failed at once. A Unix socket whose listener has no room fails so, with EAGAIN: try again later.
    """
    sock.setblocking(False)
    number = sock.connect_ex(address)
    if number in _UNDER_WAY:
        return False
    if number not in {0, errno.EISCONN}:
        raise OSError(number, f"connecting to {address}: {os.strerror(number)}")
    return True


def connect_result(sock: socket.socket) -> None:
    """The result of a connect that was under way, once the socket is ready for WRITE. Clears SO_ERROR.

    Raises:
        OSError: it failed (ConnectionRefusedError, ...), or is still under way (EINPROGRESS: the report was spurious).
    """
    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number == 0:
        try:
            sock.getpeername()
        except OSError as error:
            # Neither an error nor a peer: not yet, unless a peer came and went.
            if error.errno != errno.ENOTCONN:
                raise
            if not _hung_up(sock):
                number = errno.EINPROGRESS
    if number:
        raise OSError(number, f"connecting: {os.strerror(number)}")


def _hung_up(sock: socket.socket) -> bool:
    """Whether there is an end to read; reads nothing."""
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) is not None
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.ENOTCONN)


def set_low_water(sock: socket.socket, *, read: int | None = None, unsent: int | None = None) -> None:
    """From when on a socket is ready.

    Args:
        read: READ is reported from so many bytes on (SO_RCVLOWAT), or at the end or an error, whatever is here.
        unsent: WRITE of a TCP socket is reported only below so many bytes not yet sent (TCP_NOTSENT_LOWAT). Linux has
            no other low-water mark for writing (socket(7): SO_SNDLOWAT can't be changed).

    Raises:
        ValueError: below 1.
        OSError: the socket has no such mark.
    """
    for name, value in (("read", read), ("unsent", unsent)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: a low-water mark is at least one byte")
    if read is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, read)
    if unsent is not None:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, unsent)
