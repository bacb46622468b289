"""FIFOs: `fifo:///path`, between unrelated processes that agree on a file name (fifo(7)).

Owns: how a writer finds the reader and how the file comes and goes. Used by the establishment generators, on the
front's thread. The listener makes the FIFO and reads; who connects writes. Three kinds:

- a stream of bytes, one way, for each writer: framed, or bare for programs like `cat`. The default.
- `reply=true`: the same, and a private reply FIFO that each client makes. Its name goes as soon as it is open.
- `writers=many`: whole messages from any number of writers, one way, in one FIFO. The listener gets one channel with
  the messages of all.

For the first two a FIFO must belong to one writer alone. So when the first bytes are there, the listener keeps that
FIFO for this connection and puts a new one in the place of its name, in one step. A writer is sure to be the first when
it holds the lock, the FIFO is empty, and the name still leads to it; otherwise it tries again. So each connection is a
pipe of its own, whose other end's death the kernel tells.

What can go wrong: nobody reads (Refused; no open here ever waits), the file is no FIFO, the directory can't be written
(the listener makes and renames files there), a living listener in the way (EADDRINUSE). A FIFO that a killed listener
left is replaced; what killed clients left is deleted by the next listener.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, require_path
from anywire.contract.counters import count_connect_retry
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint
from anywire.contract.errors import BadFrame, ChannelClosed, PeerLost, Refused, TimedOut
from anywire.contract.options import Option, octal_mode, one_of
from anywire.contract.peer import Peer
from anywire.contract.traits import Traits
from anywire.contract.waits import READ, Steps, Wait
from anywire.contract.wire import Acceptor, Wire
from anywire.framing.fragments import Fragments
from anywire.ipc import fifo, names
from anywire.wires._descriptor import PipeBytes
from anywire.wires._fifo import AtomicPipe, FifoReader, FifoWriter

WRITERS = Option(
    "writers", one_of("one", "many"), "one", "one: a stream for each writer; many: the messages of all", shapes=True
)
REPLY = Option("reply", bool, False, "two ways, over a private reply FIFO for each client", shapes=True)
MODE = Option("mode", octal_mode, None, "file mode, octal; default: 0600", frozenset({"listen"}))

DEFAULT_MODE = 0o600
LONGEST_NAME = 220
"""Bytes of the file's name: with what is put around it for reply FIFOs it stays below NAME_MAX (255)."""

HELLO = b"\x89anyfifo"
"""What a client of `reply=true` sends first; then one byte, the length of its reply FIFO's name, and the name."""
WELCOME = b"\x89"
"""What the listener answers, first of all, on the reply FIFO."""

MANY = Traits(
    kind=frozenset({"message"}),
    connection=False,
    ordered="per writer",
    reliable="yes",
    clean_end="no",
    sees_death="no",
    half_close="–",
    crosses_hosts=False,
    credentials="file mode",
    copies="2",
    message_limit="configured",
)
ONE = replace(MANY, kind=frozenset({"stream"}), ordered="yes", clean_end="yes (framed)", sees_death="as end")
REPLYING = replace(ONE, connection=True, sees_death="at once", half_close="yes")


class FifoWire(Wire):
    """The wire of named pipes."""

    schemes: ClassVar[tuple[str, ...]] = ("fifo",)
    options: ClassVar[Mapping[str, Option]] = {option.name: option for option in (WRITERS, REPLY, MODE)}

    def traits(self, address: Address) -> Traits:
        """What it promises."""
        if "reply" in address.params and REPLY.convert(address.params["reply"]):
            return REPLYING
        return MANY if address.params.get("writers") == "many" else ONE

    def check(self, address: Address) -> None:
        """An address is the path of a file."""
        path = require_path(address)
        if "writers" in address.params and REPLY.convert(address.params.get("reply", "no")):
            raise address.error("?writers", "with reply=true each client has a FIFO of its own; leave writers= out")
        length = len(os.fsencode(os.path.basename(path)))
        if length > LONGEST_NAME:
            raise address.error("path", f"this file name has {length} bytes; a FIFO's may have {LONGEST_NAME}")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint | MessageEndpoint]:
        """Open the FIFO for writing; with `reply=true` make the reply FIFO and wait until the listener has it."""
        if options["writers"] == "many":
            return _join(self, address, options)
        session = yield from _session_steps(self, address)
        if not options["reply"]:
            return session
        return (yield from _reply_steps(address, session, options["handshake_timeout"]))

    def bind(self, address: Address, options: Mapping[str, Any]) -> Acceptor:
        """Make the FIFO and read from it; one that nobody reads is replaced."""
        listening = Listening(self, address, options["mode"])
        if options["reply"]:
            return ReplyAcceptor(address, listening, options["handshake_timeout"])
        if options["writers"] == "many":
            return SharedAcceptor(address, listening, options["max_message"])
        return SessionAcceptor(address, listening)

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Acceptor:
        """Go on listening with the read end from another process; the file is now this process's to delete."""
        listening = Listening(self, address, state["mode"], fds[0])
        if options["reply"]:
            return ReplyAcceptor(address, listening, options["handshake_timeout"])
        return SessionAcceptor(address, listening)


def path_of(address: Address) -> str:
    """The file."""
    return os.fsdecode(address.path_bytes)


# --- connecting ------------------------------------------------------------------------------------------------------


def _open(address: Address) -> tuple[int, Peer]:
    """The FIFO's write end, and who made the FIFO. Raises Refused when nobody reads."""
    try:
        fd = fifo.open_writer(path_of(address))
    except OSError as error:
        if error.errno == errno.ENXIO:
            why = "the FIFO is there, but nobody reads it"
        elif error.errno == errno.ENOENT:
            why = "there is no FIFO of this name"
        else:
            raise OSError(error.errno, f"connect {address}: {error.strerror}") from None
        advice = "start the listener first, or pass wait=SECONDS"
        raise Refused(why, address=str(address), operation="connect", advice=advice) from None
    status = os.fstat(fd)
    return fd, Peer(wire="fifo", address=str(address), uid=status.st_uid, gid=status.st_gid)


def _join(wire: Wire, address: Address, options: Mapping[str, Any]) -> MessageEndpoint:
    """One more writer."""
    fd, peer = _open(address)
    below = AtomicPipe(-1, fd, address=address, peer=peer, wire=wire)
    writer = secrets.randbits(62)
    fifo.claim_writer(fd, writer)
    endpoint = FifoWriter(below, writer, options["max_message"], address=address)
    endpoint.say_hello()
    return endpoint


def _session_steps(wire: Wire, address: Address) -> Steps[PipeBytes]:
    """The write end of a FIFO that nobody has written to yet. The caller's time-out bounds the wait for the others."""
    pause = 0.001
    while True:
        fd, peer = _open(address)
        try:
            # In this order: bytes that were read before we looked were read after the name was given to a new FIFO.
            if fifo.claim_session(fd) and not fifo.pending(fd) and _leads_to(path_of(address), fd):
                return PipeBytes(-1, fd, address=address, peer=peer, wire=wire)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        count_connect_retry()
        yield Wait([], pause)
        pause = min(pause * 2, 0.05)


def _leads_to(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _reply_steps(address: Address, session: PipeBytes, timeout: float) -> Steps[PipeBytes]:
    """Make the reply FIFO, name it to the listener, wait until it is open at its other end. Takes `session` over."""
    path = path_of(address)
    name = f".{os.path.basename(path)}.{secrets.token_hex(8)}.reply"
    reply = os.path.join(os.path.dirname(path), name)
    read = -1
    try:
        try:
            # Another user's listener can open it only if all may write to it.
            mode = 0o600 if session.peer.uid in (0, os.geteuid()) else 0o622
            read = fifo.make(reply, mode)
            made = names.identity(reply)
        except OSError as error:
            why = f"the reply FIFO can't be made in {os.path.dirname(path)}: {error.strerror}"
            raise OSError(error.errno, f"connect {address}: {why}") from None
        try:
            encoded = os.fsencode(name)
            _send_hello(address, session.write_fd, HELLO + bytes([len(encoded)]) + encoded)
            yield from _welcome_steps(address, session.write_fd, read, timeout)
        finally:
            names.remove_if(reply, made)
        write = session.detach_state()[1][0]
        both = PipeBytes(read, write, address=address, peer=session.peer, wire=session.wire)
        read = -1
        return both
    finally:
        if read >= 0:
            os.close(read)
        session.release()


def _send_hello(address: Address, fd: int, hello: bytes) -> None:
    try:
        os.write(fd, hello)  # at most PIPE_BUF bytes into an empty pipe: all of it
    except BrokenPipeError:
        raise Refused("the listener closed", address=str(address), operation="connect") from None


def _welcome_steps(address: Address, write: int, read: int, timeout: float) -> Steps[None]:
    deadline = time.monotonic() + timeout
    while True:
        # The write end becomes "readable" only by an error: when the listener is gone (poll(2), POLLERR).
        ready = yield Wait([(read, READ), (write, READ)], max(0.0, deadline - time.monotonic()))
        try:
            answer = os.read(read, 1)
        except BlockingIOError:
            answer = None
        if answer == WELCOME:
            return
        if answer:
            raise BadFrame(
                "the listener answered something else", received=answer, address=str(address), operation="connect"
            )
        if any(fd == write for fd, _ in ready) or (answer == b"" and fifo.hung_up(read)):
            raise Refused("the listener went away", address=str(address), operation="connect")
        if time.monotonic() >= deadline:
            raise TimedOut(
                timeout, address=str(address), operation="connect", advice="does the listener have reply=true too?"
            )


# --- listening -------------------------------------------------------------------------------------------------------


class Listening:
    """The FIFO that a name leads to, and its read end. Not thread-safe."""

    def __init__(self, wire: Wire, address: Address, mode: int | None, adopted: int = -1) -> None:
        self.wire, self.address = wire, address
        self.path = path_of(address)
        self.owner = os.getpid()
        self.mode: int
        self.group: int | None
        self.end: PipeBytes | None
        if adopted >= 0:
            assert mode is not None
            self.mode, self.group = mode, os.fstat(adopted).st_gid
            self.end = self._end_of(adopted)
            return
        directory = os.path.dirname(self.path)
        with names.locked(directory, f"listen {address}"):
            self.mode, self.group = self._clear(mode)
            fifo.sweep(self.path)
            try:
                self.end = self._make()
            except OSError as error:
                why = f"a FIFO can't be made in {directory}: {error.strerror}"
                raise OSError(error.errno, f"listen {address}: {why}") from None

    def _clear(self, mode: int | None) -> tuple[int, int | None]:
        """See that nobody reads there: (the mode, the group) of the FIFO to be made. One in the way lends its own."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return (DEFAULT_MODE if mode is None else mode), None
        if not stat.S_ISFIFO(status.st_mode):
            raise OSError(
                errno.EADDRINUSE, f"listen {self.address}: the file is no FIFO; delete it or choose another path"
            )
        try:
            os.close(fifo.open_writer(self.path))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise OSError(error.errno, f"listen {self.address}: {error.strerror}") from None
        else:
            raise OSError(errno.EADDRINUSE, f"listen {self.address}: somebody reads there")
        return (stat.S_IMODE(status.st_mode) if mode is None else mode), status.st_gid

    def _make(self) -> PipeBytes:
        return self._end_of(fifo.put_in_place(self.path, self.mode, self.group))

    def _end_of(self, fd: int) -> PipeBytes:
        return PipeBytes(fd, -1, address=self.address, peer=Peer(wire="fifo"), wire=self.wire)

    @property
    def fd(self) -> int:
        """The read end, -1 when there is none any more."""
        return self.end.read_fd if self.end is not None else -1

    def pending(self) -> bool:
        """Whether a writer has written. One that came and left without a word is forgotten."""
        if self.fd < 0:
            return False
        if fifo.pending(self.fd):
            return True
        if fifo.hung_up(self.fd):
            again = self._end_of(fifo.reopen_reader(self.fd))
            assert self.end is not None
            self.end.release()
            self.end = again
        return False

    def hand_over(self) -> PipeBytes:
        """The read end for one connection alone; from now on the name leads to a new FIFO. OSError changes nothing."""
        assert self.end is not None
        kept, self.end = self.end, None
        try:
            # When somebody took the name away, this was the last connection.
            self.end = self._make() if _leads_to(self.path, kept.read_fd) else None
        except BaseException:
            self.end = kept
            raise
        return kept

    def close(self) -> None:
        """Delete the file if it is still ours, and stop reading."""
        end, self.end = self.end, None
        if end is None or end.read_fd < 0:  # closed before, or a forked child's copy
            return
        status = os.fstat(end.read_fd)
        if self.owner == os.getpid():
            names.remove_if(self.path, (status.st_dev, status.st_ino))
            fifo.sweep(self.path)
        end.release()


class SessionAcceptor(Acceptor):
    """One writer after the other, each with a FIFO of its own."""

    def __init__(self, address: Address, listening: Listening) -> None:
        self.address = address
        self.listening = listening

    def fileno(self) -> int:
        """The read end: readable when a writer has written; -1 when closed."""
        return self.listening.fd

    @property
    def over(self) -> bool:
        """Whether the name was taken away: the last connection kept the FIFO, and no other can come."""
        return self.listening.end is None

    def accept(self) -> ByteEndpoint | None:
        """The connection of a writer who has written."""
        return self.listening.hand_over() if self.listening.pending() else None

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the read end away, and with it the duty to delete the file."""
        end, self.listening.end = self.listening.end, None
        if end is None:
            raise ChannelClosed("the listener is closed", address=str(self.address), operation="detach")
        return end.detach_state()[1], {"mode": self.listening.mode}

    def close(self) -> None:
        """Take the name away."""
        self.listening.close()


class ReplyAcceptor(SessionAcceptor):
    """As SessionAcceptor, and each client names its reply FIFO first."""

    def __init__(self, address: Address, listening: Listening, handshake_timeout: float) -> None:
        super().__init__(address, listening)
        self.handshake_timeout = handshake_timeout
        name = re.escape(os.path.basename(listening.path))
        self.names = re.compile(rf"\.{name}\.[0-9a-f]{{16}}\.reply")

    def greet(self, endpoint: Any) -> Steps[Any]:
        """Read the client's hello, open its reply FIFO, delete its name, answer. Takes `endpoint` over."""
        address = str(self.address)
        write = -1
        try:
            head = yield from self._read_steps(endpoint, len(HELLO) + 1)
            if head[:-1] != HELLO:
                raise BadFrame("the first bytes are no hello", received=head, address=address, operation="accept")
            name = os.fsdecode((yield from self._read_steps(endpoint, head[-1])))
            if not self.names.fullmatch(name):
                raise BadFrame("no reply FIFO of ours", received=os.fsencode(name), address=address, operation="accept")
            reply = os.path.join(os.path.dirname(self.listening.path), name)
            try:
                write = fifo.open_writer(reply)
                os.unlink(reply)
                os.write(write, WELCOME)
            except OSError as error:
                why = f"the client is gone ({error.strerror})"
                raise PeerLost(why, address=address, operation="accept") from None
            read = endpoint.detach_state()[1][0]
            both = PipeBytes(read, write, address=self.address, peer=endpoint.peer, wire=endpoint.wire)
            write = -1
            return both
        except BaseException:
            if write >= 0:
                os.close(write)
            raise
        finally:
            endpoint.release()

    def _read_steps(self, endpoint: PipeBytes, size: int) -> Steps[bytes]:
        data = b""
        deadline = time.monotonic() + self.handshake_timeout
        while len(data) < size:
            chunk = endpoint.read_some(size - len(data))
            if chunk == b"":
                raise PeerLost("the client left before its hello", address=str(self.address), operation="accept")
            if chunk is not None:
                data += chunk
                continue
            left = deadline - time.monotonic()
            if left <= 0 or (not (yield Wait([(endpoint.read_fd, READ)], left)) and time.monotonic() >= deadline):
                raise TimedOut(self.handshake_timeout, address=str(self.address), operation="accept")
        return data


class SharedAcceptor(Acceptor):
    """The messages of all writers, as one connection. It comes with the first writer; closed, it comes again."""

    def __init__(self, address: Address, listening: Listening, max_message: int) -> None:
        self.address = address
        self.listening = listening
        self.fragments = Fragments(max_message)  # outlives a connection: nothing that came is lost between two
        self.reader: FifoReader | None = None
        self.event = -1
        self.keeper: PipeBytes | None = None
        try:
            # Without a writer of our own the FIFO would be over whenever the last of the others leaves. An endpoint,
            # because a forked child must not keep its copy.
            self.keeper = PipeBytes(-1, fifo.keep_open(listening.fd))
            self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The read end while there is no connection; while there is one, an eventfd that tells of its end."""
        return self.event if self.reader is not None else self.listening.fd

    def accept(self) -> MessageEndpoint | None:
        """The connection, when there is none and something has come."""
        if self.event < 0:
            return None
        try:
            os.eventfd_read(self.event)
        except BlockingIOError:
            pass
        if self.reader is not None or not (self.fragments.ready or fifo.pending(self.listening.fd)):
            return None
        end = self.listening.end
        assert end is not None
        read = os.dup(end.read_fd)
        try:
            assert self.keeper is not None
            below = PipeBytes(read, os.dup(self.keeper.write_fd), address=self.address, peer=end.peer, wire=end.wire)
        except BaseException:
            os.close(read)
            raise
        self.reader = FifoReader(below, self.fragments, self._released, address=self.address)
        return self.reader

    def _released(self) -> None:
        """The connection is closed; any thread."""
        self.reader = None
        if self.event >= 0 and self.listening.owner == os.getpid():
            os.eventfd_write(self.event, 1)

    def close(self) -> None:
        """Take the name away. The connection goes on until the last writer has left."""
        self.listening.close()
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            keeper.release()
        event, self.event = self.event, -1
        if event >= 0:
            os.close(event)
        reader = self.reader
        if reader is not None:
            reader.no_more_writers()
