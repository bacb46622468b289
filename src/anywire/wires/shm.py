"""`shm://name`: shared memory between processes of one host, and `shm+unix://name`, which falls back to the socket.

The two sides meet on a Unix socket in the abstract namespace. Each creates the memory that it writes to, seals it and
passes it over the socket; the other checks seals and size before it maps it, and proves through the mapping that both
see the same memory. So nothing has a name in the system, and nothing is left when both are gone, however they went.
Messages then flow as `_shm.pyx` says; the socket stays as doorbell and sign of life.

Owns: the meeting. Used by the establishment generators, on the front's thread.

    connecting side                                   listening side
    preamble with what its memory is, two memfds  →   check, map, prove
            check, map, prove                     ←   preamble with what its memory is, two memfds
    one byte: mapped                              →

What can go wrong: nobody listens, the listener is another user's (both sides check), no memory, another version or a
namespace in which descriptors can't be passed: the error says which, `shm+unix` goes on over the socket and says why.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, require_name
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint, RawEndpoint
from anywire.contract.errors import AnywireError, BadFrame, PeerLost, Refused, TimedOut
from anywire.contract.options import Option, one_of, size
from anywire.contract.traits import Traits
from anywire.contract.waits import READ, WRITE, Steps, Wait
from anywire.contract.wire import Latest, Wire
from anywire.framing.preamble import MAGIC, Preamble, decode, missing, refuse
from anywire.wires import establish, sockets, unix
from anywire.wires._descriptor import UnixBytes
from anywire.wires._shm import ShmEndpoint
from anywire.wires._shm_broadcast import MOST_READERS, Broadcast, BroadcastReader, Seat, SeatedEndpoint
from anywire.wires._shm_latest import SAYINGS, LatestBroadcast, LatestIncoming, LatestReader
from anywire.wires._shm_memory import VERSION, Incoming, Outgoing
from anywire.wires._shm_stream import ShmStream

log = logging.getLogger("anywire")

MEMORY = 2
"""Extension of the preamble: what the sender's memory is (`_HELLO`), and then the CPUs that it may run on."""
NO_MEMORY = 3
"""Extension: why there is no shared memory on this connection, UTF-8; both sides go on over the socket."""
BROADCAST = 4
"""Extension: the connecting side is a subscriber that can read a broadcast (`_BOTH`: of either mode); the listening one
lets it read its own, and this is what the subscriber's first `recv` brings; of mode latest, `Latest.sayings` follow.
Who does not know it makes an ordinary connection."""
_BOTH = b"\x01"
_HELLO = struct.Struct("<IIQQQ")
_STREAM = 1
"""Flag of `_HELLO`: bytes, not messages."""
_MAPPED = b"M"
_CONTROL = socket.CMSG_SPACE(8 * 4) + socket.CMSG_SPACE(12)
"""Bytes of ancillary data: up to 8 descriptors (two are right), and who wrote (unix(7), SCM_CREDENTIALS)."""
_LEAST, _MOST = 4096, 1 << 30
_ANSWERS = 1 << 20
"""Bytes of a subscriber's pool: it only says that it takes messages, or leaves."""

TRAITS = Traits(
    kind=frozenset({"message", "stream"}),
    connection=True,
    ordered="yes",
    reliable="yes",
    clean_end="yes",
    sees_death="at once",
    half_close="yes",
    crosses_hosts=False,
    credentials="pid, uid, gid",
    copies="0–2",
    message_limit="pool, larger streamed",
)


def ring_size(value: Any) -> int:
    """Bytes of a ring: a power of two from 4 KiB to 1 GiB."""
    nbytes = size(value)
    if not _LEAST <= nbytes <= _MOST or nbytes & (nbytes - 1):
        raise ValueError("a power of two from 4KiB to 1GiB")
    return nbytes


def pool_size(value: Any) -> int:
    """Bytes of a pool: whole pages, from 1 MiB to 1 TiB."""
    nbytes = size(value)
    if not 1 << 20 <= nbytes <= 1 << 40:
        raise ValueError("a size from 1MiB to 1TiB")
    return (nbytes + 4095) // 4096 * 4096


def microseconds(value: Any) -> float:
    """A time in microseconds, 0 or more."""
    try:
        time_us = float(value)
    except (TypeError, ValueError):
        time_us = -1.0
    if not 0 <= time_us <= 1e6:
        raise ValueError("microseconds, from 0 to 1000000")
    return time_us


class ShmWire(Wire):
    """The shared-memory wire."""

    schemes: ClassVar[tuple[str, ...]] = ("shm", "shm+unix")
    broadcasts: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        option.name: option
        for option in (
            Option("ring", ring_size, 1 << 18, "bytes of the ring that this side sends through, a power of two"),
            Option("pool", pool_size, 64 << 20, "bytes of this side's pool for large messages; used as needed"),
            Option(
                "waiting",
                one_of("adaptive", "spin", "sleep"),
                "adaptive",
                "blocking calls: look for a while before sleeping if that pays, look for ever, or sleep at once",
            ),
            Option("spin_us", microseconds, 0.0, "microseconds that an awaited receive looks before it suspends"),
        )
    }

    def traits(self, address: Address) -> Traits:
        """What it promises."""
        return TRAITS

    def check(self, address: Address) -> None:
        """An address is a name."""
        require_name(address)
        if len(_socket_name(address)) > unix.LONGEST_PATH + 1:
            raise address.error("host", "this name is too long; the kernel takes about 90 bytes (unix(7))")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[ByteEndpoint | MessageEndpoint]:
        """Connect, exchange memory, and return the endpoint."""
        sock = yield from unix.connect_steps(_meeting_place(address), socket.SOCK_STREAM)
        meeting = Meeting(sock, address, self, options, "connect")
        try:
            return (yield from meeting.connect_steps())
        except BaseException:
            meeting.drop()
            raise

    def bind(self, address: Address, options: Mapping[str, Any]) -> ShmAcceptor:
        """Listen on a name."""
        try:
            sock, _ = unix.listen(_meeting_place(address), socket.SOCK_STREAM, options["backlog"], None)
        except OSError as error:
            why = "somebody listens there" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            raise OSError(error.errno, f"listen {address}: {why}") from None
        return ShmAcceptor(self, address, sock, options)

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> ShmAcceptor:
        """Go on accepting on a socket from another process."""
        return ShmAcceptor(self, address, socket.socket(fileno=fds[0]), options)


class ShmAcceptor(sockets.SocketAcceptor):
    """A listening meeting place."""

    def __init__(self, wire: ShmWire, address: Address, sock: socket.socket, options: Mapping[str, Any]) -> None:
        super().__init__(wire, address, sock, self._endpoint, self._hear)
        self._options = options
        self._broadcast: Broadcast | None = None

    def broadcast(self, greeting: bytes, latest: Latest | None = None) -> Broadcast | None:
        """One ring for all subscribers that come from now on; None without memory for it."""
        ring, pool = self._options["ring"], self._options["pool"]
        try:
            if latest is None:
                self._broadcast = Broadcast(ring, pool, greeting)
            else:                                       # a quarter of the pool must hold any message
                pool = max(pool, (4 * latest.max_message + 4095) // 4096 * 4096)
                said = greeting + latest.sayings
                self._broadcast = LatestBroadcast(ring, pool, said, latest.depth, latest.depth_bytes)
        except (OSError, MemoryError) as error:
            log.warning("publish %s: no memory for a broadcast, each subscriber has a ring: %s", self.address, error)
        return self._broadcast

    def _endpoint(self, sock: socket.socket, name: Any) -> ShmEndpoint:
        meeting = Meeting(sock, self.address, self.wire, self._options, "accept")
        meeting.broadcast = self._broadcast
        endpoint = HeardEndpoint(sock.fileno(), self.address, meeting.peer, self.wire, self._options["max_message"])
        endpoint.half = meeting
        return endpoint

    def _hear(self, endpoint: HeardEndpoint) -> Steps[HeardEndpoint]:
        yield from endpoint.half.hear_steps()
        return endpoint

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the listening socket away."""
        return [self.sock.detach()], {}


class HeardEndpoint(ShmEndpoint):
    """A peer that came and was not answered yet: `answer_steps` makes the connection, or refuses."""

    def answer_steps(self, refusal: str | None) -> Steps[MessageEndpoint | None]:
        """The listener's answer, after `authorize`."""
        meeting = self.half
        try:
            answered: MessageEndpoint | None = yield from meeting.answer_steps(refusal)
            return answered
        except BaseException:
            meeting.drop()
            raise
        finally:
            self.forget()

    def forget(self) -> None:
        """The socket belongs to the endpoint that was made of it."""
        self.give_socket_away()
        super().release()

    def release(self) -> None:
        """It will not be answered."""
        if self.half is not None:
            self.half.drop()
            self.half = None
        self.forget()


class Meeting:
    """One exchange over a connected Unix socket, which it owns until the endpoint does."""

    def __init__(
        self, sock: socket.socket, address: Address, wire: Any, options: Mapping[str, Any], operation: str
    ) -> None:
        sock.setblocking(False)
        # With every message the kernel tells who wrote it: a listener that was moved, or shared by forked workers, is
        # accepted from by another process than the one that SO_PEERCRED names, which called listen(2).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.sock = sock
        self.writer = 0
        self.address = address
        self.wire = wire
        self.options = options
        self.operation = operation
        self.may_fall_back = address.scheme == "shm+unix"
        self.subscribes = options["face"] == "subscription"
        self.broadcast: Broadcast | None = None
        self.peer = replace(unix.peer_of(sock), wire=address.scheme)
        self.deadline = time.monotonic() + options["handshake_timeout"]
        self.theirs: Preamble | None = None
        self.fds: list[int] = []

    def drop(self) -> None:
        """Close everything that is still ours."""
        self.sock.close()
        self._close_fds()

    def _close_fds(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    # -- the two sides ----------------------------------------------------------------------------------------------

    def connect_steps(self) -> Steps[MessageEndpoint]:
        """The connecting side."""
        ours, why = self._make()
        if ours is None and not self.may_fall_back:
            raise OSError(errno.ENOMEM, f"connect {self.address}: {why}")
        yield from self._send(self._preamble(ours, why), ours)
        theirs = yield from self._read_preamble()
        if theirs.refusal is not None:
            raise Refused(theirs.refusal, address=str(self.address), operation="connect", answered=True)
        if NO_MEMORY in theirs.extensions or ours is None:
            why = theirs.extensions.get(NO_MEMORY, b"").decode("utf-8", "replace") or why
            if not self.may_fall_back:
                raise Refused(why, address=str(self.address), operation="connect", answered=True)
            return self._socket_instead(theirs, why)
        inc, why = self._map(theirs)
        if inc is None:
            yield from self._send(refuse(why), None)
            if not self.may_fall_back:
                raise Refused(f"the peer's memory can't be used: {why}", address=str(self.address),
                              operation="connect", answered=True)  # fmt: skip
            return self._socket_instead(theirs, why)
        if not ours.proven():
            raise BadFrame("the listener did not map our memory", address=str(self.address), operation="connect")
        yield from self._send(_MAPPED, None)
        return self._endpoint(ours, inc, theirs)

    def hear_steps(self) -> Steps[None]:
        """The listening side, first half: what the peer says of itself, and its descriptors."""
        self.theirs = yield from self._read_preamble()

    def answer_steps(self, refusal: str | None) -> Steps[MessageEndpoint | None]:
        """The listening side, second half."""
        theirs = self.theirs
        assert theirs is not None
        if refusal is not None:
            yield from self._send(refuse(refusal), None)
            self.drop()
            return None
        inc: Incoming | None
        ours: Outgoing | None
        ours, why = None, theirs.extensions.get(NO_MEMORY, b"").decode("utf-8", "replace")
        if not why:
            inc, why = self._map(theirs)
            if inc is not None and self.broadcast is not None and self._reads(self.broadcast, theirs):
                ours = self.broadcast.admit()
                if ours is None:
                    why = f"{MOST_READERS} subscribers read this broadcast, and that is as many as can"
                    yield from self._send(refuse(why), None)
                    raise Refused(why, address=str(self.address), operation="accept")
            elif inc is not None:
                ours, why = self._make()
        if ours is None:
            if not self.may_fall_back:
                yield from self._send(refuse(why), None)
                raise BadFrame(why, address=str(self.address), operation="accept")
            yield from self._send(self._preamble(None, why), None)
            return self._socket_instead(theirs, why)
        assert inc is not None
        yield from self._send(self._preamble(ours, ""), ours)
        answer = yield from self._read(1, "its word that it mapped the memory")
        if answer != _MAPPED:
            rest = yield from self._read_preamble(answer)
            why = rest.refusal or "it gave no reason"
            if not self.may_fall_back:
                raise Refused(f"the peer can't use our memory: {why}", address=str(self.address), operation="accept")
            return self._socket_instead(theirs, why)
        if not ours.proven():
            raise BadFrame("the peer did not map our memory", address=str(self.address), operation="accept")
        return self._endpoint(ours, inc, theirs)

    # -- what they are made of --------------------------------------------------------------------------------------

    def _make(self) -> tuple[Outgoing | None, str]:
        """Our memory, or why there is none."""
        try:
            if self.subscribes:
                return Outgoing(_LEAST, _ANSWERS), ""
            return Outgoing(self.options["ring"], self.options["pool"]), ""
        except (OSError, MemoryError) as error:
            return None, f"no shared memory: {error.strerror if isinstance(error, OSError) else error}"

    def _reads(self, broadcast: Broadcast, theirs: Preamble) -> bool:
        """Whether the peer is a subscriber that can read this broadcast."""
        can = theirs.extensions.get(BROADCAST)
        return can is not None and (can == _BOTH or not isinstance(broadcast, LatestBroadcast))

    def _is_latest(self, theirs: Preamble) -> bool:
        """Whether what the peer lets us read is a broadcast of mode latest."""
        return self.subscribes and len(theirs.extensions.get(BROADCAST, b"")) == SAYINGS * 32

    def _map(self, theirs: Preamble) -> tuple[Incoming | None, str]:
        """The peer's memory, or why it can't be used. Its descriptors are closed here."""
        try:
            hello = theirs.extensions.get(MEMORY, b"")
            if len(hello) < _HELLO.size:
                return None, "the peer speaks no shared memory"
            version, flags, ring, pool, nonce = _HELLO.unpack_from(hello)
            if version != VERSION:
                return None, f"its memory has layout {version}, ours {VERSION}"
            if flags != self._flags():
                theirs_is, ours_is = ("a stream", "a channel") if flags == _STREAM else ("a channel", "a stream")
                return None, f"it has {theirs_is} at its end, and this side {ours_is}"
            if len(self.fds) != 2:
                return None, f"{len(self.fds)} descriptors of its memory came, not 2"
            if not _LEAST <= ring <= _MOST or ring & (ring - 1) or not 0 <= pool <= 1 << 40 or pool % 4096:
                return None, f"a ring of {ring} and a pool of {pool} bytes make no sense"
            made = LatestIncoming if self._is_latest(theirs) else Incoming
            return made(self.fds[0], self.fds[1], ring, pool, nonce), ""
        except BadFrame as error:
            return None, error.what
        except (OSError, MemoryError) as error:
            return None, f"mapping its memory failed: {error}"
        finally:
            self._close_fds()

    def _preamble(self, ours: Outgoing | None, why: str) -> bytes:
        if ours is None:
            extensions = {NO_MEMORY: why.encode()[:1000]}
        else:
            cpus = sum(1 << cpu for cpu in os.sched_getaffinity(0))
            hello = _HELLO.pack(VERSION, self._flags(), ours.ring_size, ours.pool_size, ours.nonce)
            extensions = {MEMORY: hello + cpus.to_bytes((cpus.bit_length() + 7) // 8, "little")}
            if self.subscribes or isinstance(ours, Seat):
                extensions[BROADCAST] = ours.greeting if isinstance(ours, Seat) else _BOTH
        return Preamble(self.options["max_message"], extensions=extensions).encode()

    def _flags(self) -> int:
        return _STREAM if self.options["face"] == "stream" else 0

    def _endpoint(self, ours: Outgoing, inc: Incoming, theirs: Preamble) -> MessageEndpoint:
        cpus = int.from_bytes(theirs.extensions[MEMORY][_HELLO.size :], "little")
        cpus |= sum(1 << cpu for cpu in os.sched_getaffinity(0))
        death = self._pidfd()
        ours.close_descriptors()
        made: type[ShmEndpoint] = ShmEndpoint
        if isinstance(ours, Seat):
            made = SeatedEndpoint
        elif self.subscribes and BROADCAST in theirs.extensions:
            made = LatestReader if self._is_latest(theirs) else BroadcastReader
        endpoint = made(self.sock.detach(), self.address, self.peer, self.wire, self.options["max_message"])
        if isinstance(endpoint, BroadcastReader):
            endpoint.begin(theirs.extensions[BROADCAST])
        endpoint.complete(
            ours, inc, death, min(theirs.max_message, 1 << 62), self.options["waiting"], self.options["spin_us"],
            cpus.bit_count() < 2,
        )  # fmt: skip
        return ShmStream(endpoint) if self._flags() == _STREAM else endpoint

    def _pidfd(self) -> int:
        """The peer's pidfd, -1 where its process can't be seen (another PID namespace)."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        if self.writer <= 0:
            return -1
        try:
            return os.pidfd_open(self.writer)
        except OSError:
            return -1

    def _socket_instead(self, theirs: Preamble, why: str) -> MessageEndpoint:
        log.warning("%s %s: no shared memory, the messages go over the socket: %s", self.operation, self.address, why)
        self._close_fds()
        below = UnixBytes(self.sock.detach(), address=self.address, peer=self.peer, wire=self.wire)
        if self._flags() == _STREAM:
            return RawEndpoint(below, self.address)
        return establish.framed(below, theirs, self.options, self.address)

    # -- bytes over the socket --------------------------------------------------------------------------------------

    def _wait(self, mask: int, what: str) -> Steps[None]:
        left = self.deadline - time.monotonic()
        if left <= 0 or (not (yield Wait([(self.sock.fileno(), mask)], left)) and time.monotonic() >= self.deadline):
            raise TimedOut(
                self.options["handshake_timeout"],
                address=str(self.address),
                operation=self.operation,
                advice=f"the peer did not send {what}; is it an anywire peer?",
            )

    def _send(self, data: bytes, ours: Outgoing | None) -> Steps[None]:
        """Write all of `data`, with the descriptors of our memory at its first byte."""
        fds = [ours.data_fd, ours.control_fd] if ours is not None else []
        view = memoryview(data)
        while view:
            try:
                if fds:
                    done = socket.send_fds(self.sock, [view], fds, socket.MSG_NOSIGNAL)
                else:
                    done = self.sock.send(view, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                yield from self._wait(WRITE, "room for our greeting")
                continue
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from None
            fds = []
            view = view[done:]

    def _read(self, count: int, what: str) -> Steps[bytes]:
        """Exactly so many bytes; descriptors that come with them go to `fds`."""
        data = b""
        while len(data) < count:
            try:
                chunk, ancillary, flags, _ = self.sock.recvmsg(count - len(data), _CONTROL, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                yield from self._wait(READ, what)
                continue
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from None
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self.fds += struct.unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4])
                elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                    self.writer = struct.unpack("3i", value)[0]
            if flags & socket.MSG_CTRUNC or len(self.fds) > 8:
                raise self._lost("descriptors of its memory were lost, or too many came; are too many open here?")
            if not chunk:
                raise self._lost(f"the peer closed the connection before {what} was whole")
            data += chunk
        return data

    def _read_preamble(self, data: bytes = b"") -> Steps[Preamble]:
        try:
            while need := missing(data):
                data += yield from self._read(need, "its preamble")
            return decode(data)
        except BadFrame as error:
            error.address, error.operation = str(self.address), self.operation
            if self.operation == "accept" and data.startswith(MAGIC):
                yield from self._send(refuse(error.what), None)
            raise

    def _lost(self, reason: str) -> AnywireError:
        return PeerLost(reason, address=str(self.address), operation=self.operation)


def _socket_name(address: Address) -> bytes:
    return b"anywire/shm/" + os.fsencode(address.host)


def _meeting_place(address: Address) -> Address:
    return Address("unix", path=os.fsdecode(_socket_name(address)), abstract=True)



