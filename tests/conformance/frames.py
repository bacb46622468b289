"""The bytes of a framed connection, written by hand from docs/design/interfaces.md, and raw peers that send them.

Owns: what a stranger or a crashing peer puts on the wire. It shares no code with the library on purpose: a mistake in
the library's encoder can't hide here. Called by the tests; raw peers block, so tests drive them through `world.raw_*`.
"""

from __future__ import annotations

import array
import fcntl
import os
import re
import select
import socket
import ssl
import struct
import termios
import time
from typing import Any

from .wires import certificates

MAGIC = b"\x89anyw\r\n\n"
END = 0xFFFFFFFF
CLOSE = 0xFFFFFFFE
LARGE = 0xFFFFFFFD
CONFIRM = 0xFFFFFFFC
DESCRIPTORS = 0xFFFFFFFB
HEADER = 8  # bytes


def preamble(
    *, major: int = 1, minor: int = 0, flags: int = 0, limit: int = 16 << 20, extensions: bytes = b""
) -> bytes:
    return MAGIC + struct.pack("<BBHIQ", major, minor, len(extensions), flags, limit) + extensions


def refusal(reason: str) -> bytes:
    text = reason.encode()
    return preamble(flags=1, extensions=struct.pack("<HH", 1, len(text)) + text)


def header(length_or_kind: int, confirms: int = 0) -> bytes:
    return struct.pack("<II", length_or_kind, confirms)


def frame(message: bytes, confirms: int = 0) -> bytes:
    return header(len(message), confirms) + message


class Raw:
    """A peer that is nothing but a socket or a pair of pipe descriptors. Every call blocks, ten seconds at most."""

    def __init__(self, sock: Any = None, *, read_fd: int = -1, write_fd: int = -1) -> None:
        self.sock = sock
        self.read_fd = read_fd
        self.write_fd = write_fd
        if sock is not None:
            sock.settimeout(10)

    def send(self, data: bytes) -> None:
        if self.sock is not None:
            self.sock.sendall(data)
            return
        view = memoryview(data)
        while view:
            view = view[os.write(self.write_fd, view) :]

    def send_what_fits(self, data: bytes) -> None:
        """Send, not minding that the other side may hang up in the middle."""
        try:
            self.send(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def recv(self, size: int = 65536) -> bytes:
        """Some bytes; b"" at the end, which a reset is too."""
        try:
            if self.sock is not None:
                return bytes(self.sock.recv(size))
            if not select.select([self.read_fd], [], [], 10)[0]:
                raise TimeoutError("nothing came for 10 s")
            return os.read(self.read_fd, size)
        except ConnectionResetError:
            return b""

    def recv_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.recv(size - len(data))
            if not chunk:
                raise EOFError(f"the end after {data!r}")
            data += chunk
        return data

    def recv_all(self) -> bytes:
        data = b""
        while chunk := self.recv():
            data += chunk
        return data

    def recv_preamble(self) -> bytes:
        fixed = self.recv_exactly(24)
        assert fixed[:8] == MAGIC, fixed
        return fixed + self.recv_exactly(struct.unpack_from("<H", fixed, 10)[0])

    def recv_message(self) -> bytes:
        """The next message; confirmations are skipped."""
        while True:
            (length, _confirms) = struct.unpack("<II", self.recv_exactly(HEADER))
            if length < 0xFFFFFFF0:
                return self.recv_exactly(length)
            assert length == CONFIRM, f"kind {length:#x}"

    def greet(self, **fields: Any) -> bytes:
        """The dialing side's part of the preamble exchange; the other side's preamble."""
        self.send(preamble(**fields))
        return self.recv_preamble()

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)
        self.read_fd = self.write_fd = -1

    def reset(self) -> None:
        """Close so that TCP sends a reset instead of an end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def _socket_address(address: str) -> tuple[int, Any]:
    text = address.split("?")[0]
    if match := re.fullmatch(r"(?:tcp|tls)://(?:\[(.+)\]|([^:]+)):(\d+)", text):
        host = match[1] or match[2]
        return (socket.AF_INET6 if match[1] else socket.AF_INET), (host, int(match[3]))
    if text.startswith("unix:@"):
        return socket.AF_UNIX, "\0" + text[6:]
    assert text.startswith("unix://"), address
    return socket.AF_UNIX, text[7:]


HELLO, WELCOME = b"\x89anyfifo", b"\x89"


class _RawFifo(Raw):
    """A client of a FIFO with replies: the listener's welcome comes before everything else."""

    welcomed = False

    def recv(self, size: int = 65536) -> bytes:
        if not self.welcomed:
            self.welcomed = True
            if (first := super().recv(1)) != WELCOME:
                assert first == b""
                return b""
        return super().recv(size)


def _raw_fifo_writer(path: str) -> int:
    """Become the one writer of a FIFO that nobody wrote to."""
    while True:
        write = os.open(path, os.O_WRONLY)
        try:
            fcntl.flock(write, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waiting = array.array("i", [0])
            fcntl.ioctl(write, termios.FIONREAD, waiting)
            if not waiting[0] and os.path.samestat(os.stat(path), os.fstat(write)):
                return write
        except BlockingIOError:  # another client's: the listener will put a new one in its place
            pass
        os.close(write)
        time.sleep(0.001)


def _raw_fifo_dial(path: str) -> Raw:
    """Become the one writer, and name our reply FIFO."""
    write = _raw_fifo_writer(path)
    directory, name = os.path.split(path)
    reply = f".{name}.{os.urandom(8).hex()}.reply"
    os.mkfifo(os.path.join(directory, reply), 0o600)
    read = os.open(os.path.join(directory, reply), os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(read, True)
    raw = _RawFifo(read_fd=read, write_fd=write)
    raw.send(HELLO + bytes([len(reply)]) + reply.encode())
    return raw


class _RawFifoListener:
    def __init__(self, address: str) -> None:
        self.address, self.path = address, address.split("://")[1].split("?")[0]
        self._make()

    def _make(self) -> None:
        os.mkfifo(self.path + ".new", 0o600)
        self.read = os.open(self.path + ".new", os.O_RDONLY | os.O_NONBLOCK)
        os.rename(self.path + ".new", self.path)

    def accept(self) -> Raw:
        raw = Raw(read_fd=self.read)
        assert select.select([raw.read_fd], [], [], 10)[0]
        self._make()
        assert raw.recv_exactly(len(HELLO)) == HELLO
        reply = os.path.join(os.path.dirname(self.path), raw.recv_exactly(raw.recv_exactly(1)[0]).decode())
        os.set_blocking(raw.read_fd, True)
        raw.write_fd = os.open(reply, os.O_WRONLY)
        os.unlink(reply)
        raw.send(WELCOME)
        return raw

    def close(self) -> None:
        os.unlink(self.path)
        os.close(self.read)


def raw_dial(address: str) -> Raw:
    if address.startswith("fifo:"):
        return _raw_fifo_dial(address.split("://")[1].split("?")[0])
    family, name = _socket_address(address)
    kind = socket.SOCK_SEQPACKET if "type=seqpacket" in address else socket.SOCK_STREAM
    sock = socket.socket(family, kind)
    sock.settimeout(10)
    sock.connect(name)
    if address.startswith("tls:"):
        return Raw(ssl.create_default_context(cafile=certificates()[0]).wrap_socket(sock, server_hostname="localhost"))
    return Raw(sock)


def silent_dial(address: str) -> Raw:
    """A stranger that connects and then is silent; a FIFO's listener knows of one only by a first byte."""
    if address.startswith("fifo:"):
        raw = Raw(write_fd=_raw_fifo_writer(address.split("://")[1].split("?")[0]))
        raw.send(HELLO[:1])
        return raw
    family, name = _socket_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(name)
    return Raw(sock)


class RawListener:
    """Listens where the library is going to dial, and answers by hand."""

    def __new__(cls, address: str) -> Any:
        return _RawFifoListener(address) if address.startswith("fifo:") else super().__new__(cls)

    def __init__(self, address: str) -> None:
        family, name = _socket_address(address)
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.bind(name)
        self.sock.listen()
        self.tls = address.startswith("tls:")
        port = self.sock.getsockname()[1] if family != socket.AF_UNIX else 0
        self.address = re.sub(r":0(?=$|\?)", f":{port}", address)

    def accept(self) -> Raw:
        connection, _address = self.sock.accept()
        connection.settimeout(10)
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificates()[1:])
            connection = context.wrap_socket(connection, server_side=True)
        return Raw(connection)

    def close(self) -> None:
        self.sock.close()
