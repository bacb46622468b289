"""Every wire as the suite sees it: what it promises, and how to make an address of it.

Owns: the table of promises, copied by hand from the table "What each wire promises". It is never read from the
implementation: `test_traits.py` compares the two. Called by conftest.py (which wires run a scenario) and world.py.
A wire that breaks a promise fails; a wire that doesn't make a promise is tested for what its line says instead.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from anywire.ipc import MessageQueue, sysv

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Promise:
    """One line of the table, word for word."""

    kind: str  # "stream", "message" or "message and stream"
    connection: bool
    ordered: str  # "yes", "no", "per writer"
    reliable: bool
    clean_end: bool  # a clean end is told from a loss
    death: str  # the peer's death is seen: "at once", "as end", "no"
    half_close: bool
    crosses_hosts: bool
    credentials: str  # "tls certificate", "process" (pid, uid, gid), "inherited", "file mode", "queue mode", "none"


@dataclass(frozen=True)
class Setup:
    """One wire in one way of using it, with what a test must know to open it."""

    name: str
    promise: Promise
    listen: Callable[[Path], str]  # the address to listen on, from an empty directory
    two_way: bool = True
    framed: bool = True  # our frames travel on it, so raw bytes can be tested
    processes: bool = True  # the peer is a process of its own
    first_byte: bool = False  # a listener learns of a stream's writer by the first byte
    moves: bool = True  # an open connection can go to another process
    shape: str = "listener"  # "listener", or "pair" (an anonymous pipe made by one process for both)
    largest: int = 20 * MIB  # bytes: the largest message that the size scenario sends, above the default limit's 16 MiB
    empty: bool = True  # an empty message is a message
    announced: bool = True  # connecting is seen by the listener; without connections only a message is
    room: int = 1000  # small messages that the wire takes while nobody receives
    several: bool = True  # several clients at a time
    again: Callable[[str], str] = lambda real: real  # the address to listen on once more, of a listener's real one
    listen_options: dict[str, Any] = field(default_factory=dict)
    dial_options: Callable[[Path], dict[str, Any]] = lambda directory: {}
    name_left: Callable[[str], bool] = lambda address: False  # does the address still exist in the system?
    sweep: Callable[[str], object] = lambda address: None  # take away what a killed listener left in the system

    def __str__(self) -> str:
        return self.name


def client_address(real: object) -> str:
    """The address that a client uses for a listener's real address: without the parts that are the server's own."""
    text = str(real)
    if text.startswith("tls:"):
        return text.split("?")[0].replace("//127.0.0.1", "//localhost")
    return text


_numbers = itertools.count()


def _unique() -> str:
    return f"anywire-test-{os.getpid()}-{next(_numbers)}"


def _file_left(address: str) -> bool:
    path = address.split("://", 1)[1].split("?")[0]
    return os.path.exists(path)


def _abstract_left(address: str) -> bool:
    return address.split("unix:", 1)[1].split("?")[0] in Path("/proc/net/unix").read_text()


def _shm_left(address: str) -> bool:
    return "@anywire/shm/" + address.split("//", 1)[1].split("?")[0] in Path("/proc/net/unix").read_text()


def _queue_name(address: str) -> str:
    return address.split("://", 1)[1].split("?")[0]


def _queue_left(address: str) -> bool:
    try:
        MessageQueue.open(_queue_name(address)).close()
    except FileNotFoundError:
        return False
    return True


def _sweep_queue(address: str) -> None:
    for suffix in ("", ".reply"):
        with contextlib.suppress(FileNotFoundError):
            MessageQueue.unlink(_queue_name(address) + suffix)


def _key() -> str:
    return f"{0x40000000 | secrets.randbelow(1 << 24):#x}"


def _key_left(address: str) -> bool:
    try:
        sysv.MessageQueue.open(int(_queue_name(address), 16))
    except FileNotFoundError:
        return False
    return True


def _sweep_key(address: str) -> None:
    key = int(_queue_name(address), 16)
    for one in (key, key + (1 << 24)):
        with contextlib.suppress(FileNotFoundError):
            sysv.MessageQueue.unlink(one)


@cache
def certificates() -> tuple[str, str, str]:
    """Paths of an authority, and of the certificate and key that it issued for localhost."""
    import atexit
    import shutil
    import tempfile

    import trustme

    directory = tempfile.mkdtemp(prefix="anywire-test-tls-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    ca, cert, key = (f"{directory}/{name}.pem" for name in ("ca", "cert", "key"))
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(ca)
    leaf.cert_chain_pems[0].write_to_path(cert)
    leaf.private_key_pem.write_to_path(key)
    return ca, cert, key


def _tls_listen(directory: Path) -> str:
    return _tls_again("tls://127.0.0.1:0")


def _tls_again(real: str) -> str:
    """The real address leaves out what is the listener's own; a client would take it for its own certificate."""
    _ca, cert, key = certificates()
    return f"{real}?cert={cert}&key={key}"


STREAM = Promise("stream", True, "yes", True, True, "at once", True, False, "process")
TCP = Promise("stream", True, "yes", True, True, "at once", True, True, "none")
TLS = Promise("stream", True, "yes", True, True, "at once", True, True, "tls certificate")
SEQPACKET = Promise("message", True, "yes", True, False, "at once", True, False, "process")
UDP = Promise("message", False, "no", False, False, "no", False, True, "none")
PIPE = Promise("stream", True, "yes", True, True, "at once", True, False, "inherited")
FIFO_ONE = Promise("stream", False, "yes", True, True, "as end", False, False, "file mode")
FIFO_MANY = Promise("message", False, "per writer", True, False, "no", False, False, "file mode")
FIFO_REPLY = Promise("stream", True, "yes", True, True, "at once", True, False, "file mode")
SHM = Promise("message and stream", True, "yes", True, True, "at once", True, False, "process")
MQ = Promise("message", False, "per writer", True, False, "no", False, False, "file mode")
MQ_REPLY = Promise("message", False, "yes", True, False, "no", False, False, "file mode")
SYSV = Promise("message", False, "per writer", True, False, "no", False, False, "queue mode")
SYSV_REPLY = Promise("message", False, "yes", True, False, "no", False, False, "queue mode")
INPROC = Promise("message", True, "yes", True, True, "no", True, False, "none")


def _queue(name: str, promise: Promise, address: str, **more: Any) -> Setup:
    """A message queue of the system: nobody is seen at its other end, and what a killed listener left there stays."""
    posix, replies = address.startswith("mq:"), "reply=true" in address
    return Setup(
        name,
        promise,
        lambda directory: address.format(name=_unique(), key=_key()),
        two_way=replies,
        several=not replies,
        framed=False,
        moves=False,
        largest=8000,
        announced=False,
        name_left=_queue_left if posix else _key_left,
        sweep=_sweep_queue if posix else _sweep_key,
        **more,
    )


SETUPS = [
    Setup("tcp", TCP, lambda directory: "tcp://127.0.0.1:0"),
    Setup("inproc", INPROC, lambda directory: f"inproc://{_unique()}", framed=False, processes=False),
    # A small pool: it is what back-pressure is bounded by, and the largest message must stream through it.
    Setup(
        "shm",
        SHM,
        lambda directory: f"shm://{_unique()}?pool=4MiB",
        framed=False,
        moves=False,
        name_left=_shm_left,
    ),
    Setup("unix", STREAM, lambda directory: f"unix://{directory}/socket", name_left=_file_left),
    Setup("abstract", STREAM, lambda directory: f"unix:@{_unique()}", name_left=_abstract_left),
    Setup(
        "seqpacket",
        SEQPACKET,
        lambda directory: f"unix://{directory}/packets?type=seqpacket",
        framed=False,
        largest=100 * KIB,
        name_left=_file_left,
    ),
    Setup(
        "tls",
        TLS,
        _tls_listen,
        moves=False,
        dial_options=lambda directory: {"ca": certificates()[0]},
        again=_tls_again,
    ),
    Setup("udp", UDP, lambda directory: "udp://127.0.0.1:0", framed=False, largest=60 * KIB, announced=False),
    Setup("pipe", PIPE, lambda directory: "pipe:", shape="pair"),
    Setup("pipe-one-way", PIPE, lambda directory: "pipe:", shape="pair", two_way=False),
    Setup(
        "fifo",
        FIFO_ONE,
        lambda directory: f"fifo://{directory}/fifo",
        two_way=False,
        first_byte=True,
        name_left=_file_left,
    ),
    Setup(
        "fifo-many",
        FIFO_MANY,
        lambda directory: f"fifo://{directory}/fifo?writers=many",
        two_way=False,
        framed=False,
        name_left=_file_left,
    ),
    Setup(
        "fifo-reply",
        FIFO_REPLY,
        lambda directory: f"fifo://{directory}/fifo?reply=true",
        name_left=_file_left,
    ),
    # Small queues: all those of a user share one limit.
    _queue("mq", MQ, "mq:///{name}?depth=6", room=4),
    _queue("mq-reply", MQ_REPLY, "mq:///{name}?depth=4&reply=true", room=4),
    _queue("sysv", SYSV, "sysv://{key}"),
    _queue("sysv-reply", SYSV_REPLY, "sysv://{key}?reply=true"),
]
# The wires that exist so far. A wire joins the suite by its name here; from then on it keeps every promise of its line.
LANDED = [setup.name for setup in SETUPS]


def promising(*conditions: Callable[[Setup], bool]) -> list[Setup]:
    """The wires whose line fulfils all conditions."""
    return [setup for setup in SETUPS if setup.name in LANDED and all(condition(setup) for condition in conditions)]
