"""The demo's one table of addresses: every wire, where its server listens in this run, and why one takes no part.

Plain data, made once on the main thread. A wire that the registry knows and this table doesn't is listed with that
reason, so that none is forgotten. What can go wrong: a wire that isn't in this installation, or lacks what it needs
here (certificates), gets its reason; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from anywire.cli.certificates import NoAuthority, make
from anywire.cli.demo.material import LARGEST
from anywire.contract.address import Address
from anywire.contract.errors import AddressError, UnknownWire, Unsupported
from anywire.contract.traits import Traits
from anywire.contract.wire import known_schemes, wire_for
from anywire.ipc import MessageQueue, sysv
from anywire.wires.plan import HANDSHAKE_TIMEOUT, plan_for

PIPE = "pipe:"
THREAD_NOTE = "the server is a thread here: it stays in one process"


@dataclass
class Place:
    """A wire at an address. `listen`: what the server gets, `reason`: why it takes no part, "" if it does."""

    name: str
    listen: str
    note: str = ""
    reason: str = ""
    authority: str = ""                 # tls: the certificate file that the client trusts
    threaded: bool = False              # the server is a thread of this process

    def reach(self, real: str) -> str:
        """What the client connects to: the listener's real address, and what only the client needs."""
        if not self.authority:
            return real
        return str(Address.parse(real).with_params({"ca": self.authority}))

    @property
    def traits(self) -> Traits:
        """What the wire promises there."""
        address = Address.parse("pipe:?read=0&write=1" if self.listen == PIPE else self.listen)
        return wire_for(address).traits(address)


def _tls(place: Place, directory: Path) -> None:
    wire_for("tls://127.0.0.1:0")
    ca, cert, key = make(directory)
    place.authority = str(ca)
    place.listen = str(Address.parse("tls://127.0.0.1:0").with_params({"cert": str(cert), "key": str(key)}))


# What a wire needs before it has an address.
_PREPARE: dict[str, Callable[[Place, Path], None]] = {"tls": _tls}


def places(directory: Path, wanted: Iterable[str] | None = None) -> list[Place]:
    """Every wire there is. `directory`: for sockets, FIFOs and certificates. `wanted`: only these names."""
    table = [
        Place("tcp", "tcp://127.0.0.1:0"),
        Place("tls", "tls://127.0.0.1:0", "its own throwaway certificates"),
        Place("unix", f"unix://{directory}/stream"),
        Place("shm", f"shm://{directory.name}"),
        Place("shm+unix", "", reason="shm, with the socket to fall back on; nothing keeps it from shared memory here"),
        Place("seqpacket", f"unix://{directory}/packets?type=seqpacket", "a unix socket with ?type=seqpacket"),
        Place("pipe", PIPE, "both ends connect: a pipe has no listener"),
        Place("fifo", f"fifo://{directory}/both?reply=true", "with ?reply=true"),
        Place("fifo one-way", f"fifo://{directory}/oneway",
              reason="no answer can come back; with ?reply=true it can"),
        Place("mq", f"mq:///{directory.name}?reply=true&depth=4", "with ?reply=true, one client at a time"),
        Place("sysv", f"sysv://{directory}?reply=true", "the directory's key, with ?reply=true, one client at a time"),
        # Nobody says goodbye over udp: the server is done when the client has been silent for so long.
        Place("udp", "udp://127.0.0.1:0?idle_timeout=0.3", "with ?idle_timeout=0.3"),
        Place("inproc", "inproc://demo", THREAD_NOTE, threaded=True),
    ]
    known = {Address.parse(place.listen).scheme for place in table if place.listen not in (PIPE, "")}
    known |= {"pipe", "shm+unix"}
    table += [
        Place(scheme, "", reason="registered here, but the demo knows no address for it")
        for scheme in known_schemes() if scheme not in known
    ]
    if wanted is not None:
        names = set(wanted)
        table = [place for place in table if place.name.split()[0] in names]
    for place in table:
        if not place.reason:
            place.reason = _why_not(place, directory)
    return table


def _why_not(place: Place, directory: Path) -> str:
    """Make it ready; "" when it can take part as far as is known now."""
    try:
        prepare = _PREPARE.get(place.name)
        if prepare is not None:
            prepare(place, directory)
        if place.listen == PIPE:
            place.traits  # noqa: B018 - it imports the wire
        else:
            plan_for(place.listen, "channel", "listen", None, HANDSHAKE_TIMEOUT, {})
    except (UnknownWire, ImportError, AddressError, Unsupported) as error:
        return f"not in this version ({str(error).splitlines()[0]})"
    except NoAuthority as error:
        return str(error)
    return ""


def largest_file(wanted: Iterable[str] | None) -> int:
    """Bytes of the largest file that one of these wires takes (None: all wires)."""
    return max((_limit(name) for name in wanted or ()), default=LARGEST)


def _limit(name: str) -> int:
    """Of the demo, or of the system, which sets that of its queues."""
    limit = LARGEST
    if name == "mq":
        posix = MessageQueue.limits()
        limit = min(posix.msgsize_default, posix.msgsize_max)
    elif name == "sysv":
        system_v = sysv.limits()
        limit = min(system_v.msgmax, system_v.msgmnb)
    return limit if 0 <= limit < LARGEST else LARGEST       # -1: it can't be read


def names() -> list[str]:
    """What may be asked for by name."""
    return list(dict.fromkeys([
        "tcp", "tls", "unix", "shm", "seqpacket", "pipe", "fifo", "mq", "sysv", "udp", "inproc", *known_schemes(),
    ]))
