"""Unix sockets: `unix:///path` and `unix:@name` (abstract), as a stream or, with `type=seqpacket`, as kernel messages.

Owns: how such a connection comes about, who is at its other end (SO_PEERCRED), and the socket file. Used by the
establishment generators, on the front's thread.

The socket file is the hard part, for a server that was killed leaves it behind. `bind` replaces it only when a
connect(2) probe is refused, which the kernel does only when nobody listens. Two servers that start together must not
both find the stale file and each delete the other's new one, so all of that happens under a flock(2) on the directory:
a lock that leaves no file behind, dies with its holder, and is shared by everybody who can see the directory (an
abstract socket as lock would not be, across network namespaces; link(2) and rename(2) alone cannot exchange a name only
if it is still the same file). `close` deletes the file only if it is still the one that this acceptor made.

What can go wrong: a path over 107 bytes (AddressError), a living server or a file that is no socket in the way
(EADDRINUSE), a full backlog (connecting waits for room; unix(7): EAGAIN).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, forbid, require_path
from anywire.contract.counters import count_connect_retry
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint
from anywire.contract.options import Option, octal_mode, one_of, size
from anywire.contract.peer import Peer
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps, Wait
from anywire.contract.wire import Wire
from anywire.ipc import names
from anywire.wires import sockets
from anywire.wires._descriptor import UnixBytes
from anywire.wires._packet import PacketEndpoint

LONGEST_PATH = 107
"""Bytes: sun_path has 108, the last one for the terminating NUL (unix(7))."""

TYPE = Option(
    "type", one_of("stream", "seqpacket"), "stream", "a stream of bytes, or messages kept by the kernel", shapes=True
)
MODE = Option("mode", octal_mode, None, "file mode of the socket, octal; default: by the umask", frozenset({"listen"}))
SEND_BUFFER = 212992
"""Bytes; SO_SNDBUF as we set it unasked. It is the kernel's own default and what any user may ask for (wmem_default,
wmem_max: socket(7)), but what is asked for is doubled. A sender of large messages then sleeps half as often."""
SNDBUF = Option(
    "sndbuf",
    size,
    SEND_BUFFER,
    "bytes for the socket's send buffer (SO_SNDBUF; the kernel doubles it), which bounds a seqpacket message",
)

STREAM = Traits(
    kind=frozenset({"stream"}),
    connection=True,
    ordered="yes",
    reliable="yes",
    clean_end="yes",
    sees_death="at once",
    half_close="yes",
    crosses_hosts=False,
    credentials="pid, uid, gid",
    copies="2",
    message_limit="configured",
)

SEQPACKET = replace(STREAM, kind=frozenset({"message"}), clean_end="no", message_limit="socket buffer")


class UnixWire(Wire):
    """The Unix socket wire."""

    schemes: ClassVar[tuple[str, ...]] = ("unix",)
    options: ClassVar[Mapping[str, Option]] = {option.name: option for option in (TYPE, MODE, SNDBUF)}

    def traits(self, address: Address) -> Traits:
        """What it promises."""
        return SEQPACKET if address.params.get("type") == "seqpacket" else STREAM

    def check(self, address: Address) -> None:
        """An address is a path or an abstract name, short enough for the kernel."""
        if address.abstract:
            forbid(address, "host", "port")
        else:
            require_path(address)
        length = len(address.path_bytes)
        if length > LONGEST_PATH:
            what = "name" if address.abstract else "path"
            raise address.error("path", f"this {what} has {length} bytes; the kernel takes {LONGEST_PATH} (unix(7))")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint | MessageEndpoint]:
        """Connect."""
        sock = yield from connect_steps(address, kind_of(options))
        try:
            return self.endpoint(sock, address, options)
        except BaseException:
            sock.close()
            raise

    def endpoint(
        self, sock: socket.socket, address: Address, options: Mapping[str, Any]
    ) -> ByteEndpoint | MessageEndpoint:
        """The endpoint of a connected socket, which it takes over."""
        peer = peer_of(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, min(options["sndbuf"], 1 << 30))
        if options["type"] == "seqpacket":
            return PacketEndpoint(sock.detach(), options["max_message"], address=address, peer=peer, wire=self)
        return UnixBytes(sock.detach(), address=address, peer=peer, wire=self)

    def bind(self, address: Address, options: Mapping[str, Any]) -> UnixAcceptor:
        """Listen; a file that nobody listens on is replaced."""
        sock, file = listen(address, kind_of(options), options["backlog"], options["mode"])
        return UnixAcceptor(self, address, sock, options, file)

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> UnixAcceptor:
        """Go on accepting on a socket from another process; the file is now this process's to delete."""
        file = state["file"]
        return UnixAcceptor(self, address, socket.socket(fileno=fds[0]), options, tuple(file) if file else None)


class UnixAcceptor(sockets.SocketAcceptor):
    """A listening Unix socket and the file that it owns: (path, device, inode), None for an abstract name."""

    def __init__(
        self,
        wire: UnixWire,
        address: Address,
        sock: socket.socket,
        options: Mapping[str, Any],
        file: tuple[str, int, int] | None,
    ) -> None:
        super().__init__(wire, address, sock, lambda accepted, _: wire.endpoint(accepted, address, options))
        self.file = file
        self.owner = os.getpid()

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the listening socket away, and with it the duty to delete the file."""
        file, self.file = self.file, None
        return [self.sock.detach()], {"file": file}

    def close(self) -> None:
        """Delete the file if it is still ours, then stop listening: in this order, as nobody replaces a living one."""
        file, self.file = self.file, None
        if file is not None and self.owner == os.getpid():
            path, device, inode = file
            names.remove_if(path, (device, inode))
        super().close()


def kind_of(options: Mapping[str, Any]) -> int:
    """The socket type."""
    return socket.SOCK_SEQPACKET if options["type"] == "seqpacket" else socket.SOCK_STREAM


def name_of(address: Address) -> bytes:
    """What bind(2) and connect(2) are given; an abstract name starts with a NUL (unix(7))."""
    return b"\0" + address.path_bytes if address.abstract else address.path_bytes


def peer_of(sock: socket.socket) -> Peer:
    """Who connected, or whom we connected to: SO_PEERCRED gives the user of connect(2), or of listen(2) (unix(7))."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    name = sock.getpeername()
    text = ""
    if isinstance(name, bytes) and name.startswith(b"\0"):
        text = str(Address("unix", path=os.fsdecode(name[1:]), abstract=True))
    elif isinstance(name, str) and name.startswith("/"):
        text = str(Address("unix", path=name))
    return Peer(wire="unix", address=text, pid=pid, uid=uid, gid=gid)


def connect_steps(address: Address, kind: int) -> Steps[socket.socket]:
    """A connected socket. A full backlog shows as EAGAIN and can't be polled (unix(7)): wait a little and try again.

    The caller's time-out bounds that. Raises OSError (ECONNREFUSED, ENOENT: nobody listens)."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        pause = 0.001
        while True:
            code = sock.connect_ex(name_of(address))
            if code == 0:
                sock.setblocking(True)  # the blocking front waits inside recv(2); the async one uses MSG_DONTWAIT
                return sock
            if code == errno.EPROTOTYPE:
                raise OSError(code, f"connect {address}: the server listens with another type=")
            if code != errno.EAGAIN:
                raise OSError(code, os.strerror(code))
            count_connect_retry()
            yield Wait([], pause)
            pause = min(pause * 2, 0.05)
    except BaseException:
        sock.close()
        raise


def listen(
    address: Address, kind: int, backlog: int, mode: int | None
) -> tuple[socket.socket, tuple[str, int, int] | None]:
    """A listening socket, and the file it made: (absolute path, device, inode)."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if address.abstract:
            _bind(sock, address)
            sock.listen(backlog)
            return sock, None
        path = os.fsdecode(address.path_bytes)
        with names.locked(os.path.dirname(path), f"listen {address}"):
            try:
                _bind(sock, address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(address, path, kind)
                _bind(sock, address)
            try:
                device, inode = names.identity(path)
                if mode is not None:
                    # Before listen(2): until then nobody can connect, so no moment with the umask's wider mode counts.
                    os.chmod(path, mode)
                sock.listen(backlog)
            except BaseException:
                os.unlink(path)
                raise
        return sock, (path, device, inode)
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, address: Address) -> None:
    try:
        sock.bind(name_of(address))
    except OSError as error:
        why = "somebody listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(error.errno, f"listen {address}: {why}") from None


def _remove_stale(address: Address, path: str, kind: int) -> None:
    """Delete the socket file if nobody listens on it. Raises EADDRINUSE when somebody does, or when it is no socket."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EADDRINUSE, f"listen {address}: the file is no socket; delete it or choose another path")
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        code = probe.connect_ex(name_of(address))
    # EAGAIN (a full backlog), EPROTOTYPE (another type) and success all mean: somebody listens. EACCES: can't know.
    if code == errno.ECONNREFUSED:
        os.unlink(path)
    elif code != errno.ENOENT:
        why = "somebody listens there" if code in (0, errno.EAGAIN, errno.EPROTOTYPE) else os.strerror(code)
        raise OSError(errno.EADDRINUSE, f"listen {address}: {why}")
