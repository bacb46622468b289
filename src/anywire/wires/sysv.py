"""System V message queues: `sysv://0x5eed` (sysvipc(7)), shared with any program that uses them.

Owns: who makes the queues, who may have them, and who removes them. Used by the establishment generators, on the
front's thread. The listener makes the queue, or opens one that is there, and receives; who connects sends, one message
of the queue each.

- Nobody sees who is at the other end: sending needs no reader, as long as there is the queue, and what was sent stays
  in it when its sender ends. So the listener gets one channel with the messages of all; it comes with the first one.
- `reply=true`: a second queue carries messages back, to one client at a time. It is a queue of its own, not types of
  the same: requests that fill one queue for both would leave no room for the answers that they wait for.
- One listener a queue and type, and one client a reply queue: each holds a lock. System V has none that a dead process
  gives back, so it is the name of an abstract Unix socket (unix(7)), which does not outlive who has it.
- A listener removes the queues that it made. A queue that is removed is gone at once, with all that is in it; so one
  whose channel goes on is removed at that channel's end, and answers that a client has not taken are left to it.

What can go wrong: there is no queue (Refused), somebody else listens (EADDRINUSE) or is the client (Refused), somebody
removes the queue (PeerLost), and the limits of the system, which the errors name. A killed listener leaves its queue:
the next one goes on with it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, forbid, require_path
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.errors import Unsupported
from anywire.contract.options import Option, integer, size
from anywire.contract.peer import Peer
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor, Wire, wire_for
from anywire.ipc.sysv import MessageQueue, ftok
from anywire.ipc.sysv._calls import msg_status_any
from anywire.ipc.sysv.keys import space
from anywire.wires._sysv import SysvEndpoint
from anywire.wires._sysv_waiting import Watch
from anywire.wires.queues import (
    DEFAULT_MODE,
    KEEP,
    LISTEN,
    MODE,
    REPLY,
    QueueWire,
    another_size,
    answers_taken,
    check_detach,
    failed,
    no_queue,
    promises,
    receiver_there,
)

MAY_READ, MAY_WRITE = 0o444, 0o222
LARGEST_TYPE = (1 << 63) - 1
NEXT_PROJECT = 1 << 24
"""What ftok(3) adds to a key for the next project number: so much is between a queue's key and that of its answers."""
KEY = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")


def room(value: Any) -> int:
    """A size of at least one byte."""
    found = size(value)
    if not found:
        raise ValueError("a queue for no bytes takes no messages")
    return found


TYPE = Option(
    "type", integer(-LARGEST_TYPE, LARGEST_TYPE), None,
    "of the messages. Connecting: what they are sent with, default 1. Listening: which to receive: that one; below 0, "
    "the lowest up to it, as msgrcv(2); default 0, any",
)
PROJ = Option("proj", integer(1, 255), 1, "the project number of ftok(3), for addresses with a path")
MAX_BYTES = Option("max_bytes", room, None, "bytes of messages that a queue holds; default: kernel.msgmnb", LISTEN)


class SysvWire(QueueWire):
    """The wire of System V message queues."""

    schemes: ClassVar[tuple[str, ...]] = ("sysv",)
    options: ClassVar[Mapping[str, Option]] = {
        option.name: option for option in (REPLY, TYPE, PROJ, MAX_BYTES, MODE, KEEP)
    }
    one_way = promises(ordered="per writer", credentials="queue mode", message_limit="kernel.msgmax")
    two_way = replace(one_way, ordered="yes")

    def check(self, address: Address) -> None:
        """An address is a key, or the path of a file that stands for one."""
        if address.path or address.abstract or not address.host:
            forbid(address, "abstract")
            if not address.host and not address.path:
                raise address.error("host", "the key is missing; write sysv://0x5eed, or sysv:///path/of/a/file")
            require_path(address)
            return
        forbid(address, "port")
        if not KEY.fullmatch(address.host) or _number(address) >= 1 << 32:
            raise address.error("host", "a key is a number of 32 bits, as in sysv://0x5eed or sysv://24301")
        if _number(address) == 0:
            raise address.error("host", "0 is the key of queues without one (IPC_PRIVATE), which nobody can find")
        if "proj" in address.params:
            raise address.error("?proj", "proj is for addresses with a path, whose key ftok(3) makes")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[MessageEndpoint]:
        """Open the queue for sending; with `reply=true` also the one for receiving."""
        given = options["type"]
        if given is not None and given < 1:
            raise address.error("?type", "who sends gives messages a type of 1 or more")
        key = key_of(address, options)
        sender = _open(address, key, MAY_WRITE)
        status = msg_status_any(sender.id)
        peer = Peer(wire="sysv", address=str(address), uid=status[1], gid=status[2])
        receiver = -1
        lock: socket.socket | None = None
        try:
            if options["reply"]:
                answers = _open(address, reply_key(key), MAY_READ)
                lock = _claim(f"{reply_key(key):08x}/client")
                if lock is None:
                    raise answers_taken(address)
                _empty(answers)             # answers to a client that is gone
                receiver = answers.id
            return SysvEndpoint(
                receiver, sender.id, options["max_message"], type=given or 1, client=receiver >= 0, lock=lock,
                address=address, peer=peer, wire=self,
            )
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        yield  # type: ignore[unreachable] # a generator like every dial, though nothing here waits

    def bind(self, address: Address, options: Mapping[str, Any]) -> Acceptor:
        """Make the queue, or open the one that is there, and receive from it."""
        return SysvAcceptor(self, address, options)

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> SysvAcceptor:
        """Go on receiving from queues of another process; those that it made are now this process's to remove."""
        return SysvAcceptor(self, address, options, socket.socket(fileno=fds[0]), state)


def taken_over(address: Address, fds: list[int], state: Mapping[str, Any], peer: Peer | None) -> SysvEndpoint:
    """The connecting end that `SysvEndpoint.detach_state` gave away; it takes the descriptors."""
    bell, *rest = fds
    os.close(bell)
    lock = socket.socket(fileno=rest[0]) if rest else None
    try:
        _same_space(address, state)
        if lock is not None:
            lock.set_inheritable(False)     # spawn and forkserver left it open to grandchildren
        endpoint = SysvEndpoint(
            state["recv_id"], state["send_id"], state["max_message"], type=state["type"], early=state["early"],
            client=state["client"], lock=lock, address=address, peer=peer, wire=wire_for(address),
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    endpoint.restore_state(state)
    return endpoint


def _number(address: Address) -> int:
    return int(address.host, 16 if address.host[:2] in ("0x", "0X") else 10)


def key_of(address: Address, options: Mapping[str, Any]) -> int:
    """The queue's key, 1 to 2³²-1. OSError: the file of a path can't be looked up."""
    if address.path:
        return ftok(os.fsdecode(address.path_bytes), options["proj"]) & 0xFFFFFFFF
    return _number(address)


def reply_key(key: int) -> int:
    """The key of the queue for the answers: that of the next project number, for the key of a path."""
    return (key + NEXT_PROJECT) & 0xFFFFFFFF or NEXT_PROJECT


def _open(address: Address, key: int, access: int) -> MessageQueue:
    try:
        return MessageQueue(key, access)    # msgget(2) looks whether these rights are granted
    except FileNotFoundError:
        raise no_queue(address, f"System V message queue with the key {key:#x}") from None
    except OSError as error:
        raise failed("connect", address, error) from None


def _empty(queue: MessageQueue) -> None:
    try:
        while True:
            queue.recv(truncate=0, block=False)
    except BlockingIOError:
        pass


def _same_space(address: Address, state: Mapping[str, Any]) -> None:
    """The ids of queues mean others in another IPC namespace, or none."""
    if state["space"] != space():
        what = "the queue is in another IPC namespace, which this process can't reach"
        raise Unsupported(what, address=address, operation="attach", advice="attach in a process of the same one")


def _claim(what: str) -> socket.socket | None:
    """Become the only one that has this, until the socket and its copies are closed; None if somebody else has it.

    The name has the IPC namespace in it, and is known in one network namespace."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        found.bind(f"\0anywire/sysv/{space()}/{what}")
    except OSError as error:
        found.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    except BaseException:
        found.close()
        raise
    return found


class SysvAcceptor(Acceptor):
    """The queue that a key leads to, as one connection. It comes with the first message; closed, it comes again."""

    def __init__(
        self,
        wire: Wire,
        address: Address,
        options: Mapping[str, Any],
        lock: socket.socket | None = None,
        adopted: Mapping[str, Any] | None = None,
    ) -> None:
        self.wire, self.address = wire, address
        self.owner = os.getpid()
        self.keep: bool = options["keep"]
        self.max_message: int = options["max_message"]
        self.type: int = options["type"] or 0
        self.made: list[MessageQueue] = []
        self.reader: SysvEndpoint | None = None
        self.lock = lock
        self.watch: Watch | None = None
        self.early = 0
        self.answers: MessageQueue | None
        try:
            if lock is not None and adopted is not None:
                lock.set_inheritable(False)
                _same_space(address, adopted)
                self.early = adopted["early"]
                self.queue, *rest = queues = [MessageQueue.from_id(ident) for ident in adopted["ids"]]
                self.answers = rest[0] if rest else None
                self.made += [queue for queue, ours in zip(queues, adopted["made"], strict=True) if ours]
                self.watch = Watch(self.queue.id, self.type)
                if self.early:
                    self.watch.ring()
                return
            key = key_of(address, options)
            self.lock = _claim(f"{key:08x}/{self.type}")
            if self.lock is None:
                raise receiver_there(address)
            self.queue = self._get(key, MAY_READ, options)
            self.answers = self._get(reply_key(key), MAY_WRITE, options) if options["reply"] else None
            self.watch = Watch(self.queue.id, self.type)
        except BaseException:
            self.close()
            raise

    def _get(self, key: int, access: int, options: Mapping[str, Any]) -> MessageQueue:
        most: int | None = options["max_bytes"]
        mode: int = DEFAULT_MODE if options["mode"] is None else options["mode"]
        while True:
            try:
                queue = MessageQueue.create(key, mode, max_bytes=most)
                self.made.append(queue)
                return queue
            except FileExistsError:
                pass
            except OSError as error:
                raise failed("listen", self.address, error) from None
            try:
                queue = MessageQueue(key, access)
                there = msg_status_any(queue.id)[8]
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in (errno.EIDRM, errno.EINVAL):
                    continue
                raise failed("listen", self.address, error) from None
            if most not in (None, there):
                raise another_size(self.address, f"{there} bytes", "anywire.ipc.sysv.MessageQueue.unlink")
            return queue

    def fileno(self) -> int:
        """Readable when there is a message and no connection, or a connection has ended."""
        return -1 if self.watch is None else self.watch.fd

    def accept(self) -> MessageEndpoint | None:
        """The connection, when there is none and something has come."""
        if self.watch is None:
            return None
        self.watch.clear()
        if self.reader is not None:
            return None
        try:
            found = None if self.early else self.watch.look()
        except OSError as error:
            if error.errno not in (errno.EIDRM, errno.EINVAL):
                raise
            self.close()
            raise OSError(errno.EIDRM, f"accept {self.address}: the queue was removed; listen again") from None
        if found is None and not self.early:
            return None
        self.early = found or self.early
        answers = -1 if self.answers is None else self.answers.id
        self.reader = SysvEndpoint(
            self.queue.id, answers, self.max_message, wanted=self.type, early=self.early, on_end=self._ended,
            address=self.address, peer=Peer(wire="sysv"), wire=self.wire,
        )
        self.early = 0
        return self.reader

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the lock away, the queues' ids, and the duty to remove what was made here."""
        watch, lock = self.watch, self.lock
        check_detach(self.address, closed=watch is None or lock is None, connected=self.reader is not None)
        assert watch is not None and lock is not None
        fds = [os.dup(lock.fileno())]
        if not self.early:
            try:
                self.early = watch.look() or 0     # an empty message that was taken goes along
            except OSError:                             # the queue was removed, as the next one will see
                pass
        queues = [self.queue] if self.answers is None else [self.queue, self.answers]
        state = {
            "ids": [queue.id for queue in queues],
            "made": [queue in self.made for queue in queues],
            "early": self.early,
            "space": space(),
        }
        self.made.clear()
        self.close()
        return fds, state

    def _ended(self, released: bool) -> None:
        """Of the channel: its end was reached, or it is closed; any thread."""
        if released:
            self.reader = None
        if self.watch is not None:
            if self.owner == os.getpid():
                self.watch.ring()
        else:
            self._remove(answers=released)
            if released and self.lock is not None:
                self.lock.close()

    def _remove(self, *, answers: bool) -> None:
        """Remove what was made here; the answers only if none is left that their client could take."""
        if self.owner != os.getpid() or self.keep:
            return
        for queue in list(self.made):
            try:
                # The answers come last: a client that finds none looks then whether the other queue is gone.
                if queue is not self.answers or (answers and not queue.depth):
                    self.made.remove(queue)
                    queue.remove()
            except OSError:                             # somebody was faster
                pass

    def close(self) -> None:
        """Remove what was made here; what is in it while there is no connection goes too. A connection goes on until
        the queue is empty, and the queue is removed then."""
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()
        reader = self.reader
        if reader is not None and self.owner == os.getpid():
            reader.no_more()
            return
        self._remove(answers=True)
        if self.lock is not None:
            self.lock.close()
