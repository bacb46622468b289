"""The ways of a file from a server process to a client process: what `anywire bench copies` measures.

The server reads the file and hands it over in chunks; the client writes it into another file. Both files are in the
page cache, so each byte is copied in memory only: four times by way of a pipe or socket (file, server's buffer,
kernel's, client's buffer, file), twice where both processes see the same memory. W. R. Stevens draws both in "UNIX
Network Programming", volume 2, chapter 12.

To add a way: its line in WAYS, which says how often each byte is copied and why, and its opener in OPENERS. The kernel
objects that only a parent can make are `pair.INHERITED`.

Run as a program (`python -m anywire.cli.ways NAME ROLE CORE ADDRESS CHUNK`) it is one side of one way, as
`pair.Children` wants it. An order is `{"file": path, "size": bytes, "times": n}`; each side does it and answers with
its clock and what the kernel says that it cost, or with why it fails. One thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from anywire.cli.contenders import Announce, announce, anywire_channel, say, telling_why
from anywire.contract.wire import known_schemes
from anywire.ipc import MessageQueue, Semaphore, SharedMemory, sysv

Fill = Callable[[memoryview], int]      # read the file's next bytes into this memory
Drain = Callable[[memoryview], object]  # write these bytes into the other file
# How a side does one chunk. The server's takes a Fill and the chunk's size; the client's takes a Drain, and returns how
# many bytes came: a pipe gives what it has.
ServerSide = Callable[[Fill, int], None]
ClientSide = Callable[[Drain, int], int]
Side = Any                              # one of the two, as its role says

PR_SET_PDEATHSIG = 1                    # prctl(2); the standard library has no name for it
SLOTS = 16                              # chunks that fit into the block of shared memory
AT_ONCE = 16 << 20                      # bytes hashed or cleared in one piece, outside the timed part


@dataclass(frozen=True)
class Way:
    """One way: `copies` of each byte from file to file, and `why` so many; the rest is as in `contenders.Contender`."""

    name: str
    opener: str                         # key of OPENERS
    copies: int
    why: str
    address: str = ""
    inherits: str = ""
    scheme: str = ""                    # the wire that this version must have

    @property
    def missing(self) -> bool:
        return bool(self.scheme) and self.scheme not in known_schemes()


BY_KERNEL = "file → server's buffer → {} → client's buffer → file"
WAYS = (
    Way("pipe", "pipe", 4, BY_KERNEL.format("pipe"), inherits="pipe"),
    Way("FIFO", "fifo", 4, BY_KERNEL.format("FIFO"), "{directory}/fifo"),
    Way("POSIX message queue", "posix_queue", 4, BY_KERNEL.format("message queue"), "/anywire-{name}"),
    Way("System V message queue", "sysv_queue", 4, BY_KERNEL.format("message queue")),
    Way("Unix socket", "unix", 4, BY_KERNEL.format("socket"), "{directory}/socket"),
    Way("anywire pipe", "anywire", 4, BY_KERNEL.format("pipe"), inherits="pipes"),
    Way("anywire fifo", "anywire", 4, BY_KERNEL.format("FIFO"), "fifo://{directory}/fifo?reply=true"),
    Way("anywire unix", "anywire", 4, BY_KERNEL.format("socket"), "unix://{directory}/socket"),
    Way("shared memory + semaphores", "semaphores", 2, "file → shared block → file", inherits="memory"),
    Way("anywire shm", "anywire", 4, BY_KERNEL.format("shared ring"), "shm://{name}", scheme="shm"),
    Way("anywire shm in place", "anywire_loan", 2, "file → loan in shared memory → file", "shm://{name}", scheme="shm"),
)


def ways() -> list[Way]:
    """Those that this version has."""
    return [way for way in WAYS if not way.missing]


# ---- openers: opener(role, address, chunk, announce, stack) -> Side


def by_descriptor(role: str, fd: int, chunk: int) -> Side:
    """read(2) and write(2) with one buffer, as in every textbook."""
    buffer = memoryview(bytearray(chunk))

    def send(fill: Fill, size: int) -> None:
        write_all(fd, buffer[: fill(buffer[:size])])

    def recv(drain: Drain, size: int) -> int:
        got = os.readv(fd, [buffer[:size]])
        if not got:
            raise EOFError("the server has ended")
        drain(buffer[:got])
        return got

    return send if role == "server" else recv


def open_pipe(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    announce(address)
    return by_descriptor(role, int(address), chunk)


def open_fifo(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    if role == "server":
        os.mkfifo(address, 0o600)
        announce(address)
    # Each open waits for the other side's: fifo(7).
    fd = os.open(address, os.O_WRONLY if role == "server" else os.O_RDONLY)
    stack.callback(os.close, fd)
    return by_descriptor(role, fd, chunk)


def in_pieces(
    role: str, put: Callable[[memoryview], object], take: Callable[[memoryview], int], chunk: int, piece: int
) -> Side:
    """Messages of at most `piece` bytes through a queue, with one buffer."""
    buffer = memoryview(bytearray(chunk))

    def send(fill: Fill, size: int) -> None:
        got = fill(buffer[:size])
        for start in range(0, got, piece):
            put(buffer[start : min(start + piece, got)])

    def recv(drain: Drain, size: int) -> int:
        got = take(buffer)
        drain(buffer[:got])
        return got

    return send if role == "server" else recv


def open_posix_queue(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    """A POSIX message queue of the system's own size, so a chunk goes in pieces."""
    if role == "server":
        piece = min(chunk, MessageQueue.limits().msgsize_default)
        queue = stack.enter_context(MessageQueue.create(address, message_size=piece, access="w", owner=True))
        announce(address)
    else:
        queue = stack.enter_context(MessageQueue.open(address, access="r"))
        queue.unlink()                      # both have it: so nothing is left, however they end
    return in_pieces(role, queue.send, queue.recv_into, chunk, queue.message_size)


def open_sysv_queue(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    """A System V message queue of the system's own size: messages as large as it takes, at least two of them."""
    # Nobody has such a queue open, so it has to be removed: a death of who started us must not kill the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    die_with_parent(signal.SIGTERM)
    if role == "server":
        queue = stack.enter_context(sysv.MessageQueue.create(sysv.PRIVATE, owner=True))
        announce(str(queue.id))
    else:
        queue = sysv.MessageQueue.from_id(int(address))
    piece = max(1, min(chunk, sysv.limits().msgmax, queue.stat().max_bytes // 2))
    return in_pieces(role, queue.send, lambda buffer: queue.recv_into(buffer)[0], chunk, piece)


def open_unix(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    if role == "client":
        sock.connect(address)
    else:
        sock.bind(address)
        sock.listen(1)
        announce(address)
        sock = stack.enter_context(sock.accept()[0])
    return by_descriptor(role, sock.fileno(), chunk)


def open_anywire(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    channel = anywire_channel(role, address, announce, stack)
    buffer = memoryview(bytearray(chunk))

    def send(fill: Fill, size: int) -> None:
        channel.send(buffer[: fill(buffer[:size])])

    def recv(drain: Drain, size: int) -> int:
        got: int = channel.recv_into(buffer)
        drain(buffer[:got])
        return got

    return send if role == "server" else recv


def open_anywire_loan(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    channel = anywire_channel(role, address, announce, stack)

    def send(fill: Fill, size: int) -> None:
        loan = channel.loan(size)
        with memoryview(loan) as memory:
            fill(memory)
        channel.send(loan)

    def recv(drain: Drain, size: int) -> int:
        with channel.recv(copy=False) as message:
            drain(message)
            return len(message)

    return send if role == "server" else recv


def open_semaphores(role: str, address: str, chunk: int, announce: Announce, stack: ExitStack) -> Side:
    """A block of SLOTS chunks used round and round, and two POSIX semaphores in it that count the free and full ones.

    anywire.ipc's: unnamed ones, which work between processes (sem_overview(7)). Each has a cache line of its own.
    """
    page = mmap.PAGESIZE
    if role == "server":
        os.ftruncate(int(address), page + SLOTS * chunk)
    memory = SharedMemory.from_fd(int(address))

    def close() -> None:
        with suppress(BufferError):     # the traceback of an error may have a view: then the process's end closes it
            memory.close()

    stack.callback(close)
    # Only the server makes them; the client comes when they are there.
    if role == "server":
        free, full = Semaphore.create_in(memory, 0, SLOTS), Semaphore.create_in(memory, 64, 0)
    else:
        free, full = Semaphore.open_in(memory, 0), Semaphore.open_in(memory, 64)
    for each in (free, full):
        stack.callback(each.close)
    announce(address)
    whole = stack.enter_context(memoryview(memory))
    slots = [stack.enter_context(whole[page + slot * chunk :][:chunk]) for slot in range(SLOTS)]
    turn = 0

    def send(fill: Fill, size: int) -> None:
        nonlocal turn
        free.acquire()
        fill(slots[turn][:size])
        full.release()
        turn = (turn + 1) % SLOTS

    def recv(drain: Drain, size: int) -> int:
        nonlocal turn
        full.acquire()
        drain(slots[turn][:size])
        free.release()
        turn = (turn + 1) % SLOTS
        return size

    return send if role == "server" else recv


def write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data):]


OPENERS: dict[str, Callable[[str, str, int, Announce, ExitStack], Side]] = {
    "pipe": open_pipe,
    "fifo": open_fifo,
    "posix_queue": open_posix_queue,
    "sysv_queue": open_sysv_queue,
    "unix": open_unix,
    "anywire": open_anywire,
    "anywire_loan": open_anywire_loan,
    "semaphores": open_semaphores,
}


# ---- the two sides


def serve_file(send: ServerSide, fd: int, size: int, chunk: int) -> None:
    """Hand the file over once, from its start."""
    os.lseek(fd, 0, os.SEEK_SET)

    def fill(memory: memoryview) -> int:
        got = os.readv(fd, [memory])
        # A regular file gives all that is asked for, if it has it: read(2).
        if got != len(memory):
            raise OSError(f"the file has become shorter than {size} bytes")
        return got

    for done in range(0, size, chunk):
        send(fill, min(chunk, size - done))


def take_file(recv: ClientSide, fd: int, size: int, chunk: int) -> None:
    """Write it into the client's file once, from its start."""
    os.lseek(fd, 0, os.SEEK_SET)
    drain = functools.partial(write_all, fd)
    done = 0
    while done < size:
        done += recv(drain, min(chunk, size - done))


def digest(fd: int, size: int) -> str:
    """Of a file's first bytes."""
    found = hashlib.blake2b()
    for offset in range(0, size, AT_ONCE):
        found.update(os.pread(fd, min(AT_ONCE, size - offset), offset))
    return found.hexdigest()


def clear(fd: int, size: int) -> None:
    """Fill with zeros: the file then has its memory, and what comes in the next turn can't be left from this one."""
    zeros = bytes(min(AT_ONCE, size))
    for offset in range(0, size, AT_ONCE):
        os.pwrite(fd, zeros[: size - offset], offset)


def timed(work: Callable[[], None], times: int) -> dict[str, float]:
    """Do it `times` times: the clock before and after in ns, CPU seconds, and how often the process slept."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic_ns()
    for _ in range(times):
        work()
    ended, after = time.monotonic_ns(), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "began": began,
        "ended": ended,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "sleeps": after.ru_nvcsw - before.ru_nvcsw,
    }


def die_with_parent(number: signal.Signals) -> None:
    """Have this signal sent to us when who started us ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def run(way: Way, role: str, address: str, chunk: int) -> None:
    with ExitStack() as stack, telling_why():
        if role == "server":
            side = OPENERS[way.opener](role, address, chunk, announce, stack)
        else:
            side = OPENERS[way.opener](role, address, chunk, lambda address: None, stack)
            announce(address)
        out = os.memfd_create("anywire-bench-out") if role == "client" else -1
        while line := sys.stdin.readline():
            order = json.loads(line)
            size = order["size"]
            if role == "server":
                fd = os.open(order["file"], os.O_RDONLY)
                say(timed(lambda: serve_file(side, fd, size, chunk), order["times"]))  # noqa: B023 - done by then
                os.close(fd)
            else:
                clear(out, size)
                say({})                 # now the server is told
                spent = timed(lambda: take_file(side, out, size, chunk), order["times"])  # noqa: B023 - the same
                say({**spent, "digest": digest(out, size)})


def main() -> None:
    name, role, core, address, chunk = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    # A side whose peer has died may wait at its semaphore for ever; at least it ends with who started it.
    die_with_parent(signal.SIGKILL)
    run(next(way for way in WAYS if way.name == name), role, address, int(chunk))


if __name__ == "__main__":
    main()
