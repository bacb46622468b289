"""The other side of `shm://` in plain Python: its own memories and meeting, so that a test can break any rule of it.

Nothing of the library is used: the layout below is the one drawn in docs/design/shared-memory.md, and wrong if that is.
Used by test_shm_meeting.py and, as the attacker of a real second process, by shm_rounds.py.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import struct

MAGIC = b"\x89anyw\r\n\n"
RING_MAGIC = 0x31676E6972777961
VERSION = 1
CONTROL_BYTES = 4096
# Offsets in a control page.
MAGIC_AT, VERSION_AT, NONCE_AT, ECHO_AT = 0, 8, 16, 24
HEAD, TAIL, TAKEN, RETURNED = 128, 256, 264, 272
DATA_WANTED, CLOSED, ROOM_WANTED, RETURNS = 384, 388, 512, 640
MOST_RETURNS = 512
UNIT = 4096
INLINE, EXTENT, FIRST, NEXT, ABANDONED, END = range(6)
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE = 1, 2, 4, 8, 16
DATA_SEALS = SHRINK | GROW | FUTURE_WRITE | SEAL
CONTROL_SEALS = SHRINK | GROW | SEAL
HELLO = struct.Struct("<IIQQQ")
STREAM = 1


def preamble(extensions: dict[int, bytes], max_message: int = 1 << 20, flags: int = 0) -> bytes:
    tail = b"".join(struct.pack("<HH", kind, len(data)) + data for kind, data in extensions.items())
    return struct.pack("<8sBBHIQ", MAGIC, 1, 0, len(tail), flags, max_message) + tail


def meeting_place(address: str) -> str:
    return "\0anywire/shm/" + address.split("//")[1].split("?")[0]


class Memories:
    """What one side sends through: a data and a control memory, sealed."""

    def __init__(
        self,
        ring: int = 1 << 16,
        pool: int = 1 << 20,
        *,
        data_seals: int = DATA_SEALS,
        control_seals: int = CONTROL_SEALS,
        data_size: int | None = None,
        magic: int = RING_MAGIC,
        version: int = VERSION,
        nonce_there: int | None = None,
    ) -> None:
        self.ring, self.pool = ring, pool
        self.nonce = int.from_bytes(os.urandom(8), "little")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.fds = [os.memfd_create("test-shm-data", flags), os.memfd_create("test-shm-control", flags)]
        size = ring + pool if data_size is None else data_size
        os.ftruncate(self.fds[0], size)
        os.ftruncate(self.fds[1], CONTROL_BYTES)
        # Mapped before it is sealed: nothing can be mapped to write afterwards. No more than the front of a huge pool.
        self.data = mmap.mmap(self.fds[0], min(size, ring + (64 << 20)))
        self.control = mmap.mmap(self.fds[1], CONTROL_BYTES)
        for fd, seals in zip(self.fds, (data_seals, control_seals), strict=True):
            if seals:
                fcntl.fcntl(fd, F_ADD_SEALS, seals)
        struct.pack_into("<QI", self.control, MAGIC_AT, magic, version)
        there = self.nonce if nonce_there is None else nonce_there
        struct.pack_into("<Q", self.control, NONCE_AT, there)
        self.head = 0

    def hello(
        self, version: int = VERSION, ring: int | None = None, pool: int | None = None, flags: int = 0
    ) -> bytes:
        return HELLO.pack(
            version, flags, self.ring if ring is None else ring, self.pool if pool is None else pool, self.nonce
        )

    def close(self) -> None:
        self.data.close()
        self.control.close()
        for fd in self.fds:
            os.close(fd)

    # -- as an honest producer ----------------------------------------------------------------------------------------

    def put(self, at: int, data: bytes) -> None:
        """Write into the ring, around its end."""
        at %= self.ring
        first = min(len(data), self.ring - at)
        self.data[at : at + first] = data[:first]
        self.data[: len(data) - first] = data[first:]

    def record(self, kind: int, data: bytes = b"", length: int | None = None) -> int:
        """Write a record behind the last one; its place. `show` publishes it."""
        at = self.head
        self.put(at, struct.pack("<II", len(data) if length is None else length, kind) + data)
        self.head += 8 + (len(data) + 7) // 8 * 8
        return at

    def show(self) -> None:
        self.set("Q", HEAD, self.head & (1 << 64) - 1)

    def set(self, form: str, offset: int, value: int) -> None:
        struct.pack_into("<" + form, self.control, offset, value & (1 << 8 * struct.calcsize(form)) - 1)

    def get(self, form: str, offset: int) -> int:
        return int(struct.unpack_from("<" + form, self.control, offset)[0])


class Theirs:
    """What the other side sends through, mapped here."""

    def __init__(self, fds: list[int], hello: bytes) -> None:
        self.version, _, self.ring, self.pool, self.nonce = HELLO.unpack_from(hello)
        self.fds = fds
        self.data = mmap.mmap(fds[0], self.ring + self.pool, prot=mmap.PROT_READ)
        self.control = mmap.mmap(fds[1], CONTROL_BYTES)

    def prove(self) -> None:
        struct.pack_into("<Q", self.control, ECHO_AT, self.nonce)

    def set(self, form: str, offset: int, value: int) -> None:
        struct.pack_into("<" + form, self.control, offset, value & (1 << 8 * struct.calcsize(form)) - 1)

    def get(self, form: str, offset: int) -> int:
        return int(struct.unpack_from("<" + form, self.control, offset)[0])

    def close(self) -> None:
        self.data.close()
        self.control.close()
        for fd in self.fds:
            os.close(fd)


def read_exactly(sock: socket.socket, count: int, fds: list[int]) -> bytes:
    data = b""
    while len(data) < count:
        chunk, ancillary, _, _ = sock.recvmsg(count - len(data), socket.CMSG_SPACE(64))
        for _, _, value in ancillary:
            got = array.array("i")
            got.frombytes(value[: len(value) // 4 * 4])
            fds += got
        if not chunk:
            raise EOFError(data)
        data += chunk
    return data


def read_preamble(sock: socket.socket) -> tuple[int, dict[int, bytes], list[int]]:
    """Flags, extensions and descriptors of the other side's preamble."""
    fds: list[int] = []
    head = read_exactly(sock, 24, fds)
    assert head[:8] == MAGIC
    length, flags = struct.unpack_from("<HI", head, 10)
    rest = read_exactly(sock, length, fds)
    extensions = {}
    while rest:
        kind, size = struct.unpack_from("<HH", rest)
        extensions[kind] = rest[4 : 4 + size]
        rest = rest[4 + size :]
    return flags, extensions, fds


def dial(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(meeting_place(address))
    return sock


def meet(address: str, ours: Memories, flags: int = 0) -> tuple[socket.socket, Theirs]:
    """Connect by all rules."""
    sock = dial(address)
    socket.send_fds(sock, [preamble({2: ours.hello(flags=flags) + b"\x03"})], ours.fds)
    refused, extensions, fds = read_preamble(sock)
    assert not refused & 1, extensions
    theirs = Theirs(fds, extensions[2])
    theirs.prove()
    sock.sendall(b"M")
    return sock, theirs
