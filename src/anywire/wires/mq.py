"""Message queues of the system: `mq:///name` (mq_overview(7)), shared with any program that uses them.

Owns: who makes the queues, and who may have them. Used by the establishment generators, on the front's thread. The
listener makes the queue, or opens one that is there, and receives; who connects sends, one message of the queue each.

- Nobody sees who is at the other end: sending needs no reader, as long as there is the queue, and what was sent stays
  in it when its sender ends. So the listener gets one channel with the messages of all; it comes with the first one.
- `reply=true`: a second queue, `/name.reply`, carries messages back, to one client at a time.
- One listener a queue, and one client a reply queue: each holds the lock of its end (flock(2)), which the kernel takes
  back from the dead.
- A listener unlinks the queues that it made when it closes; with `keep=true`, and those that were there before, it does
  not: what is in them waits for the next one.

What can go wrong: there is no queue (Refused), somebody else listens (EADDRINUSE) or is the client (Refused), and the
limits of the system, which the errors name. A killed listener leaves its queue: the next one goes on with it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from anywire.contract.address import Address, require_path
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.options import Option, integer, size
from anywire.contract.peer import Peer
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor, Wire, wire_for
from anywire.ipc.mqueue import MessageQueue
from anywire.wires._mqueue import QueueEndpoint
from anywire.wires.queues import (
    CONNECT,
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

HIGHEST = 32767
DEPTH = Option("depth", integer(1, 65536), None, "how many messages a queue holds; default: the system's", LISTEN)
MESSAGE_SIZE = Option("message_size", size, None, "bytes of the largest message; default: the system's", LISTEN)
PRIORITY = Option("priority", integer(0, HIGHEST), 0, "of all that this side sends; higher ones are first", CONNECT)

SUFFIX = ".reply"
LONGEST_NAME = 255 - len(SUFFIX)


class MqWire(QueueWire):
    """The wire of POSIX message queues."""

    schemes: ClassVar[tuple[str, ...]] = ("mq",)
    options: ClassVar[Mapping[str, Option]] = {
        option.name: option for option in (REPLY, DEPTH, MESSAGE_SIZE, MODE, KEEP, PRIORITY)
    }
    one_way = promises(
        ordered="per writer (higher priorities first)", credentials="file mode", message_limit="message_size"
    )
    two_way = replace(one_way, ordered="yes (of one priority)")

    def check(self, address: Address) -> None:
        """An address is the name of a queue: one slash, and no other."""
        path = require_path(address)
        if "/" in path[1:]:
            raise address.error("path", "a queue's name has one slash only: mq:///name")
        if len(address.path_bytes) - 1 > LONGEST_NAME:
            raise address.error("path", f"a queue's name has at most {LONGEST_NAME} bytes here")

    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[MessageEndpoint]:
        """Open the queue for sending; with `reply=true` also the one for receiving."""
        name = name_of(address)
        sender = _open(address, name, "w")
        receiver = None
        try:
            status = os.fstat(sender.fileno())
            if options["reply"]:
                receiver = _open(address, name + SUFFIX, "r")
                if not _claim(receiver):
                    raise answers_taken(address)
                while receiver._try_recv() is not None:  # answers to a client that is gone
                    pass
            peer = Peer(wire="mq", address=str(address), uid=status.st_uid, gid=status.st_gid)
            return QueueEndpoint(
                receiver, sender, options["max_message"], priority=options["priority"], address=address, peer=peer,
                wire=self,
            )
        except BaseException:
            sender.close()
            if receiver is not None:
                receiver.close()
            raise
        yield  # type: ignore[unreachable] # a generator like every dial, though nothing here waits

    def bind(self, address: Address, options: Mapping[str, Any]) -> Acceptor:
        """Make the queue, or open the one that is there, and receive from it."""
        return MqAcceptor(self, address, options)

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> MqAcceptor:
        """Go on receiving from queues of another process; those that it made are now this process's to unlink."""
        return MqAcceptor(self, address, options, _queues_of(fds), state["made"])


def taken_over(address: Address, fds: list[int], state: Mapping[str, Any], peer: Peer | None) -> QueueEndpoint:
    """The connecting end that `QueueEndpoint.detach_state` gave away; it takes the descriptors."""
    queues: list[MessageQueue | None] = [*_queues_of(fds)]
    receiver, sender = queues if state["receives"] else (None, *queues)
    endpoint = QueueEndpoint(
        receiver, sender, state["max_message"], priority=state["priority"], address=address, peer=peer,
        wire=wire_for(address),
    )
    endpoint.restore_state(state)
    return endpoint


def _queues_of(fds: list[int]) -> list[MessageQueue]:
    queues: list[MessageQueue] = []
    try:
        for fd in fds:
            os.set_inheritable(fd, False)  # spawn and forkserver left them open to grandchildren
            queues.append(MessageQueue.from_fd(fd))
    except BaseException:
        for queue in queues:
            queue.close()
        for fd in fds[len(queues):]:
            os.close(fd)
        raise
    return queues


def name_of(address: Address) -> str:
    """The queue's name."""
    return os.fsdecode(address.path_bytes)


def _open(address: Address, name: str, access: Any) -> MessageQueue:
    try:
        return MessageQueue.open(name, access=access)
    except FileNotFoundError:
        raise no_queue(address, f"message queue {name}") from None
    except OSError as error:
        raise failed("connect", address, error) from None


def _claim(queue: MessageQueue) -> bool:
    """Become the only one of this end of the queue (flock(2)); copies of the descriptor have the lock too."""
    try:
        fcntl.flock(queue.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _copy(queue: MessageQueue) -> MessageQueue:
    return MessageQueue.from_fd(os.dup(queue.fileno()))


class MqAcceptor(Acceptor):
    """The queue that a name leads to, as one connection. It comes with the first message; closed, it comes again."""

    def __init__(
        self,
        wire: Wire,
        address: Address,
        options: Mapping[str, Any],
        adopted: list[MessageQueue] | None = None,
        made: Sequence[bool] = (),
    ) -> None:
        self.wire, self.address = wire, address
        self.owner = os.getpid()
        self.keep: bool = options["keep"]
        self.max_message: int = options["max_message"]
        self.queues: list[MessageQueue] = []
        self.made: list[MessageQueue] = []
        self.reader: QueueEndpoint | None = None
        self.event = -1
        name = name_of(address)
        try:
            if adopted is not None:
                self.queues += adopted
                self.made += [queue for queue, ours in zip(adopted, made, strict=True) if ours and queue.name]
            else:
                self._add(name, "r", options)
                if not _claim(self.queues[0]):
                    raise receiver_there(address)
                if options["reply"]:
                    self._add(name + SUFFIX, "w", options)
            self.event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, access: Any, options: Mapping[str, Any]) -> None:
        depth, largest = options["depth"], options["message_size"]
        mode = DEFAULT_MODE if options["mode"] is None else options["mode"]
        while True:
            try:
                queue = MessageQueue.create(name, depth, largest, access=access, mode=mode)
                os.fchmod(queue.fileno(), mode)  # whatever the umask
                self.made.append(queue)
            except FileExistsError:
                try:
                    queue = MessageQueue.open(name, access=access)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise failed("listen", self.address, error) from None
            except OSError as error:
                raise failed("listen", self.address, error) from None
            self.queues.append(queue)
            if largest not in (None, queue.message_size) or depth not in (None, queue.max_messages):
                there = f"{queue.max_messages} messages of {queue.message_size} bytes"
                raise another_size(self.address, there, "anywire.ipc.MessageQueue.unlink")
            return

    def fileno(self) -> int:
        """The queue while there is no connection; while there is one, an eventfd that tells of its end."""
        if self.event < 0:
            return -1
        return self.event if self.reader is not None else self.queues[0].fileno()

    def accept(self) -> MessageEndpoint | None:
        """The connection, when there is none and something has come."""
        if self.event < 0:
            return None
        try:
            os.eventfd_read(self.event)
        except BlockingIOError:
            pass
        if self.reader is not None or not self.queues[0].depth:
            return None
        receiver, *rest = copies = [_copy(queue) for queue in self.queues]
        try:
            self.reader = QueueEndpoint(
                receiver, rest[0] if rest else None, self.max_message, ends=True, on_release=self._released,
                address=self.address, peer=Peer(wire="mq"), wire=self.wire,
            )
        except BaseException:
            for queue in copies:
                queue.close()
            raise
        return self.reader

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the queues away, with the lock of the one who receives, and the duty to unlink what was made here."""
        check_detach(self.address, closed=self.event < 0, connected=self.reader is not None)
        fds: list[int] = []
        try:
            for queue in self.queues:
                fds.append(os.dup(queue.fileno()))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        state = {"made": [queue in self.made for queue in self.queues]}
        self.made.clear()
        self.close()
        return fds, state

    def _released(self) -> None:
        """The connection is closed; any thread."""
        self.reader = None
        if self.event >= 0 and self.owner == os.getpid():
            os.eventfd_write(self.event, 1)

    def close(self) -> None:
        """Take the names away, of what was made here. The connection goes on until the queue is empty."""
        event, self.event = self.event, -1
        if self.owner == os.getpid() and not self.keep:
            for queue in self.made:
                with suppress(OSError):         # not ours to unlink, or somebody was faster
                    queue._unlink_own()
        self.made.clear()
        while self.queues:
            self.queues.pop().close()
        if event >= 0:
            os.close(event)
        reader = self.reader
        if reader is not None:
            reader.no_more()
