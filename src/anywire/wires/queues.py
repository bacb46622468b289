"""What the wires of the system's message queues share: `mq://` and `sysv://`.

Owns: the options and promises that are the same for both, and the words of their errors. Plain functions and values,
any thread. How a queue is found, made, had alone and taken away is each wire's own. What can go wrong: the errors that
are made here.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from anywire.contract.address import Address
from anywire.contract.errors import Busy, ChannelClosed, Refused
from anywire.contract.options import Option, Side, octal_mode
from anywire.contract.traits import Traits
from anywire.contract.wire import Wire

LISTEN: frozenset[Side] = frozenset({"listen"})
CONNECT: frozenset[Side] = frozenset({"connect"})
DEFAULT_MODE = 0o600
REPLY = Option("reply", bool, False, "two ways, by a second queue; one client at a time", shapes=True)
MODE = Option("mode", octal_mode, None, "mode of a queue that is made, octal; default: 0600", LISTEN)
KEEP = Option("keep", bool, False, "leave the queue, with what is in it, when the listener closes", LISTEN)


def promises(*, ordered: str, credentials: str, message_limit: str) -> Traits:
    """What a queue promises; the parameters are where the two differ."""
    return Traits(
        kind=frozenset({"message"}),
        connection=False,
        ordered=ordered,
        reliable="yes, kept by the kernel",
        clean_end="no",
        sees_death="no",
        half_close="–",
        crosses_hosts=False,
        credentials=credentials,
        copies="2",
        message_limit=message_limit,
    )


class QueueWire(Wire):
    """A wire of queues: one way, or two by a second queue."""

    one_way: ClassVar[Traits]
    two_way: ClassVar[Traits]

    def traits(self, address: Address) -> Traits:
        """What it promises."""
        return self.two_way if REPLY.convert(address.params.get("reply", "no")) else self.one_way


def no_queue(address: Address, what: str) -> Refused:
    """Of who connects: `what` is not there."""
    advice = "start the listener first, or pass wait=SECONDS"
    return Refused(f"there is no {what}", address=str(address), operation="connect", advice=advice)


def answers_taken(address: Address) -> Refused:
    """Of who connects: somebody else receives the answers."""
    why = "another client has the answers of this queue"
    return Refused(why, address=str(address), operation="connect", answered=True)


def receiver_there(address: Address) -> OSError:
    """Of who listens: somebody else does."""
    return OSError(errno.EADDRINUSE, f"listen {address}: somebody receives from this queue")


def another_size(address: Address, size: str, remover: str) -> OSError:
    """Of who listens and says how large: the queue is there, of another `size`, and `remover` would remove it."""
    advice = f"pass the same, or remove it first ({remover})"
    return OSError(errno.EEXIST, f"listen {address}: the queue is there already, for {size}: {advice}")


def failed(operation: str, address: Address, error: OSError) -> OSError:
    """The kernel's error, with the address."""
    return OSError(error.errno, f"{operation} {address}: {error.strerror}")


def check_detach(address: Address, *, closed: bool, connected: bool) -> None:
    """Raise why a listener can't go to another process: ChannelClosed, or Busy with its connection."""
    if closed:
        raise ChannelClosed("the listener is closed", address=str(address), operation="detach")
    if connected:
        what = "its channel is open, and a queue has one receiver"
        raise Busy(what, address=str(address), operation="detach", advice="close the channel first")
