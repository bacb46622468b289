"""Wires: the page each one implements, and the registry that finds one by an address's scheme.

Owns: the abstract classes `Wire` and `Acceptor`, and the table of schemes. The facade asks `wire_for(address)`; one
instance of each wire class serves the whole process, so a wire keeps no state of a connection. Any thread.

A wire is imported when its scheme is first used: the table below costs `import anywire` nothing. Other packages add
wires by an entry point of group `anywire.wires` (name = scheme, value = Wire subclass); those are looked at only for a
scheme that is not built in, because reading the installed packages' metadata takes milliseconds.

What can go wrong: UnknownWire for a scheme nobody has; a package's wire that fails to load or is none is an UnknownWire
too, which names that package.
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from anywire.contract.address import Address
from anywire.contract.errors import AnywireError, UnknownWire, Unsupported
from anywire.contract.options import Option
from anywire.contract.traits import Traits
from anywire.contract.waits import Steps

if TYPE_CHECKING:
    from anywire.contract.endpoint import ByteEndpoint, Loan, MessageEndpoint

    Endpoint: TypeAlias = ByteEndpoint | MessageEndpoint


Front: TypeAlias = Literal["async", "blocking"]


class Wire(ABC):
    """One way to carry bytes or messages. Subclass it, implement four methods, and register the class.

    `schemes`: the address schemes it serves. `options`: the wire options it understands, by name; they arrive resolved
    in `dial` and `bind`, each with a value. Called from any thread, at most once a connection: keep no state here.
    """

    schemes: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Option]] = {}
    broadcasts: ClassVar[bool] = False
    """Whether its acceptors have a `broadcast`: one write for all subscribers of a publisher."""

    @abstractmethod
    def traits(self, address: Address) -> Traits:
        """What this wire promises at this address."""

    @abstractmethod
    def check(self, address: Address) -> None:
        """Raise AddressError if the address means nothing on this wire. No I/O; `address.error` points at the part."""

    @abstractmethod
    def dial(self, address: Address, options: Mapping[str, Any]) -> Steps[Endpoint]:
        """Connect: a generator that yields `Wait` and `Resolve` requests and returns a ByteEndpoint or MessageEndpoint.

        Never blocks. Closes what it opened when it fails or is closed in mid-way. Raises Refused, TimedOut, OSError.
        """

    @abstractmethod
    def bind(self, address: Address, options: Mapping[str, Any]) -> Acceptor:
        """Listen, at once. Raises OSError (address in use, permission denied) or Unsupported."""

    def publisher(self, front: Front, address: Address, settings: Mapping[str, Any]) -> Any:
        """This wire's own publisher for `anywire.publish` at this one address, or None: a channel for each subscriber.

        It has the face of the front's `Publisher`. `settings` are the arguments of `publish`, wire options included."""
        return None

    def subscriber(self, front: Front, address: Address, settings: Mapping[str, Any]) -> Any:
        """What `anywire.subscribe` is to return here (async: awaitable and a context manager), or None: a channel's."""
        return None

    def adopt_listener(
        self, address: Address, fds: list[int], state: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Acceptor:
        """The acceptor of descriptors that `Acceptor.detach` gave away in another process."""
        raise Unsupported("this wire's listener can't move to another process", address=address, operation="attach")


class Acceptor(ABC):
    """A bound address that connections come to. Used by one thread at a time."""

    address: Address
    """The real address: with the port that the kernel chose."""

    on_drop: Callable[[int], object] | None = None
    """Set by the listener: called with a number of messages that had to be dropped, for its counters (UDP)."""

    @property
    def over(self) -> bool:
        """Whether no connection can come any more, for good (a pipe's one peer has come)."""
        return False

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable when a connection waits (an eventfd(2) if it has none); -1 once closed."""

    @abstractmethod
    def accept(self) -> Endpoint | None:
        """The next connection, None when nothing waits now. Never blocks.

        OSErrors such as EMFILE are raised as they are: backing off is the caller's part.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening and take the name away. Safe to call twice. Connections made stay open."""

    def greet(self, endpoint: Endpoint) -> Steps[Endpoint]:
        """The wire's own handshake with an accepted connection, before anything else is read from it (TLS).

        A generator like `dial`, run beside the accepting; returns the endpoint to use.
        """
        yield from ()
        return endpoint

    def broadcast(self, greeting: bytes, latest: Latest | None = None) -> Broadcast | None:
        """Memory in which a publisher writes once for all subscribers that connect from now on, or None.

        `greeting` is the first message of each. With `latest` nobody is ever waited for. A connection that asks
        for it (option `face` is "subscription") and gets it has an endpoint that the Broadcast `has`; any other is an
        ordinary one."""
        return None

    def detach(self) -> tuple[list[int], dict[str, Any]]:
        """Give the listening descriptors away, for another process: (descriptors, state for `Wire.adopt_listener`)."""
        what = "this wire's listener can't move to another process"
        raise Unsupported(what, address=self.address, operation="detach")


@dataclass(frozen=True, slots=True)
class Latest:
    """What a broadcast of mode latest keeps for readers that are behind, and what it tells them.

    `depth`, `depth_bytes`: most messages, and bytes. `max_message`: bytes of the largest message. `sayings`: two
    messages of the greeting's length; the first one, with how many in its last eight bytes (little-endian), comes where
    some were lost, the second one before a message that begins with the same 16 bytes."""

    depth: int
    depth_bytes: int
    max_message: int
    sayings: bytes


class Broadcast(Protocol):
    """One writer's memory, which many read.

    `put`, `put_many` and `pump` by one thread at a time, `loan` and `lent` by any, all else on the loop's thread.

    Its readers come and go by their connections: an endpoint that is released is removed."""

    when_room: Callable[[], object] | None
    """Called on the loop's thread: `put` may have room again."""
    when_full: Callable[[], object] | None
    """Called by whoever puts: there is no room, and `stalled` is to be asked from now on."""
    when_bad: Callable[[], object] | None
    """Called by whoever puts: `take_bad` has something."""

    @property
    def refused(self) -> int:
        """Connections that found no place."""

    def has(self, endpoint: Any) -> bool:
        """Whether this endpoint is that of a reader."""

    def join(self, endpoint: Any) -> None:
        """Give the reader its greeting, and then every message from now on."""

    def remove(self, endpoint: Any, why: int = ...) -> None:
        """Wait for the reader no more. `why`: the milliseconds for which it read nothing, if that is the reason."""

    def loan(self, nbytes: int) -> Loan:
        """Memory for a message, the readers' if there is a place now. Any thread."""

    def lent(self, message: Any) -> Any:
        """What to `put` for a loan, or for what lies in one, so that it is not copied; None for anything else. It has a
        length, and `bytes` copies it."""

    def put(self, data: Any, prefix: bytes | None = None) -> bool:
        """Show a message (bytes, or what `lent` gave) to all readers: False when there is no room now.

        `prefix` goes right before a message of its own length that begins with the same 16 bytes."""

    def put_many(self, messages: list[Any], start: int, prefix: bytes | None = None) -> int:
        """Put messages from number `start` of the list on, and wake each reader once: the number of the first that
        found no room."""

    def pump(self) -> bool:
        """Go on with a message that went in part: True when nothing is left of it."""

    def stalled(self, patience: float, anew: bool = False) -> tuple[list[Any], float | None]:
        """Endpoints of readers that read nothing for `patience` seconds while `put` waited for them, and the seconds
        until there may be more (None: nobody is waited for). `anew`: their time begins now."""

    def take_bad(self) -> list[tuple[Any, AnywireError]]:
        """Readers that can't go on, and why: TooLarge, a message over their limit went; else they broke the rules."""

    def close(self) -> None:
        """Nothing is written any more."""

    @property
    def lost(self) -> int:
        """Messages that readers were told to have lost, summed over them."""

    def behind(self) -> tuple[int, int]:
        """Of mode latest: messages, and bytes, that are kept and not taken by all readers."""


_BUILT_IN = {
    "tcp": "anywire.wires.tcp:TcpWire",
    "tls": "anywire.wires.tls:TlsWire",
    "udp": "anywire.wires.udp:UdpWire",
    "unix": "anywire.wires.unix:UnixWire",
    "pipe": "anywire.wires.pipe:PipeWire",
    "fifo": "anywire.wires.fifo:FifoWire",
    "mq": "anywire.wires.mq:MqWire",
    "sysv": "anywire.wires.sysv:SysvWire",
    "inproc": "anywire.wires.inproc:InprocWire",
    "shm": "anywire.wires.shm:ShmWire",
    "shm+unix": "anywire.wires.shm:ShmWire",
}

_NOT_YET = ("ucx", "mpi", "nats", "kafka", "auto")

GROUP = "anywire.wires"

_lock = threading.Lock()
_wires: dict[str, Wire] = {}


def register(wire_class: type[Wire]) -> type[Wire]:
    """Make a wire known in this process under its schemes; usable as a decorator. Packages use an entry point instead.

    A scheme that is registered again, or is built in, goes to the new class: a program may replace a wire.
    """
    given: object = wire_class
    if not (isinstance(given, type) and issubclass(given, Wire)):
        raise TypeError(f"a wire is a subclass of anywire's Wire, not {wire_class!r}")
    if not wire_class.schemes:
        raise TypeError(f"{wire_class.__qualname__} names no schemes")
    wire = wire_class()
    with _lock:
        _wires.update(dict.fromkeys(wire_class.schemes, wire))
    return wire_class


def unregister(wire_class: type[Wire]) -> None:
    """Forget a class that was registered; a built-in wire of the same scheme is found again."""
    with _lock:
        for scheme in [scheme for scheme, wire in _wires.items() if type(wire) is wire_class]:
            del _wires[scheme]


def wire_for(address: Address | str) -> Wire:
    """The wire of an address's scheme. Raises AddressError, UnknownWire. Does not `check` the address.

    >>> wire_for("tcq://host:1")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    UnknownWire: there is no wire 'tcq'
    """
    address = Address.parse(address)
    scheme = address.scheme
    wire = _wires.get(scheme)
    if wire is not None:
        return wire
    target = _BUILT_IN.get(scheme)
    if target is not None:
        module, _, name = target.partition(":")
        wire = getattr(importlib.import_module(module), name)()
    else:
        wire = _from_entry_point(address)
    with _lock:
        # Two threads may have made one each: both use the first.
        return _wires.setdefault(scheme, wire)


def known_schemes() -> list[str]:
    """All schemes that an address can have here: built in, registered, and from installed packages. Sorted."""
    return sorted({*_BUILT_IN, *_wires, *(entry.name for entry in _entry_points())})


def _entry_points() -> Any:
    from importlib import metadata  # 10 ms to import, and only third-party schemes need it

    return metadata.entry_points(group=GROUP)


def _from_entry_point(address: Address) -> Wire:
    scheme = address.scheme
    for entry in _entry_points():
        if entry.name != scheme:
            continue
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            wire_class = entry.load()
        except Exception as error:
            raise UnknownWire(
                scheme,
                hint=f"the package {package!r} brings one, but loading {entry.value} failed: "
                f"{type(error).__name__}: {error}",
                address=address,
                operation="load",
            ) from error
        if not (isinstance(wire_class, type) and issubclass(wire_class, Wire)):
            raise UnknownWire(
                scheme,
                hint=f"the package {package!r} names {entry.value}, which is no subclass of anywire's Wire",
                address=address,
                operation="load",
            )
        try:
            return wire_class()
        except TypeError as error:  # abstract methods are missing
            raise UnknownWire(
                scheme, hint=f"the package {package!r}: {error}", address=address, operation="load"
            ) from error
    hint = f"{scheme}: is planned, and not in this version of anywire" if scheme in _NOT_YET else ""
    raise UnknownWire(scheme, known_schemes(), hint=hint, address=address, operation="use")
