"""Every error that anywire raises on purpose.

Owns: the classes, their text, their attributes. Imports nothing of anywire, so any layer may raise them.
Called from every thread. An instance is plain data: it pickles and copies with all its attributes, so that it can
cross a process border (a handler in another process, a future's result).

Each class is a child of `AnywireError` and of the builtin that people already catch. The text always reads
"<operation> <address>: what happened; what to do next". It is composed when it is printed, so that a lower layer,
which does not know the address, may raise and the layer above may set `error.address` and `error.operation`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, ClassVar

PREAMBLE_MAGIC = b"\x89anyw\r\n\n"
"""The first eight bytes of a framed connection (docs/design/wire-format.md); here only to name a version mismatch."""

_EXCERPT = 48  # bytes of foreign input shown in an error: a line on a terminal


class AnywireError(Exception):
    """Something went wrong on a wire.

    Parameters: `what` happened, the `address` and the `operation` that met it, and `advice`: what to do next.
    All are attributes, all may be set later, and `message` (what `str()` gives) follows them.
    """

    errno_of_class: ClassVar[int] = 0

    what: str
    address: str
    operation: str
    advice: str

    def __init__(self, what: str = "", *, address: object = "", operation: str = "", advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.address = str(address)
        self.operation = operation
        self.advice = advice
        _set_errno(self)

    @property
    def message(self) -> str:
        """`<operation> <address>: <what>; <advice>`, leaving out what is not known."""
        where = " ".join(part for part in (self.operation, self.address) if part)
        text = "; ".join(part for part in (self.what, self.advice) if part)
        return f"{where}: {text}" if where and text else where or text

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls cls(*args), which loses keyword attributes, and OSError's own drops everything but args.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[AnywireError], args: tuple[Any, ...], state: dict[str, Any]) -> AnywireError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    _set_errno(error)
    return error


def _set_errno(error: BaseException) -> None:
    # OSError keeps these in C fields, outside __dict__. People test e.errno, so they must be right.
    if isinstance(error, OSError) and isinstance(error, AnywireError):
        error.errno = error.errno_of_class or None
        error.strerror = error.what


class AddressError(AnywireError, ValueError):
    """An address is malformed, or means nothing on its wire. `text[start:end]` is the bad part.

    >>> print(AddressError("tcp://host:99999", 11, 16, "a port is 0 to 65535"))
    a port is 0 to 65535
        tcp://host:99999
                   ^^^^^
    """

    def __init__(self, text: str, start: int, end: int, reason: str, *, operation: str = "") -> None:
        super().__init__(reason, address=text, operation=operation)
        self.text = text
        self.start = max(0, min(start, len(text)))
        self.end = max(self.start, min(end, len(text)))
        self.reason = reason

    @property
    def message(self) -> str:
        line, column, width = _caret(self.text, self.start, self.end)
        head = f"{self.operation}: {self.reason}" if self.operation else self.reason
        return f"{head}\n    {line}\n    {' ' * column}{'^' * width}"


def _caret(text: str, start: int, end: int, limit: int = 200) -> tuple[str, int, int]:
    """The line to show, and the column and width (in terminal cells) of the carets below `text[start:end]`."""
    # A very long address is cut to a window around the bad part; the cut is marked.
    first = 0 if len(text) <= limit else max(0, min(start - limit // 4, len(text) - limit))
    last = min(len(text), first + limit)
    before = ("..." if first else "") + "".join(map(_shown, text[first:start]))
    bad = "".join(map(_shown, text[start : min(end, last)]))
    after = "".join(map(_shown, text[min(end, last) : last])) + ("..." if last < len(text) else "")
    return before + bad + after, _cells(before), max(1, _cells(bad))


def _shown(char: str) -> str:
    return char if char.isprintable() else ascii(char)[1:-1]


def _cells(text: str) -> int:
    if text.isascii():
        return len(text)
    import unicodedata  # a shared object: loaded only for the rare address that needs it

    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


class UnknownWire(AnywireError, ValueError):
    """No wire has this scheme. `known`: the schemes that have one here. `hint` replaces the usual advice."""

    def __init__(
        self, scheme: str, known: Iterable[str] = (), *, hint: str = "", address: object = "", operation: str = ""
    ) -> None:
        self.scheme = scheme
        self.known = tuple(sorted(known))
        advice = "; ".join(filter(None, (hint, f"known wires: {', '.join(self.known)}" if self.known else "")))
        super().__init__(f"there is no wire {scheme!r}", address=address, operation=operation, advice=advice)


class Unsupported(AnywireError, NotImplementedError):
    """This wire cannot do that. `advice` says which can."""


class EndOfChannel(AnywireError, EOFError):
    """The peer ended cleanly: all it sent has been received. Not a failure.

    `unconfirmed`: messages that this side sent and that are not known to have reached the peer's application.
    """

    def __init__(
        self,
        what: str = "the peer ended the channel cleanly",
        *,
        address: object = "",
        operation: str = "",
        unconfirmed: int = 0,
        advice: str = "",
    ) -> None:
        self.unconfirmed = unconfirmed
        super().__init__(what + _unconfirmed(unconfirmed), address=address, operation=operation, advice=advice)


class PeerLost(AnywireError, ConnectionResetError):
    """The peer went away without ending: killed, crashed, or the network between is gone.

    `reason`: how it was told. `unconfirmed`: how many sent messages may never have reached the peer's application.
    """

    errno_of_class = errno.ECONNRESET

    def __init__(
        self,
        reason: str = "the connection ended without an end frame",
        *,
        address: object = "",
        operation: str = "",
        unconfirmed: int = 0,
        advice: str = "",
    ) -> None:
        self.reason = reason
        self.unconfirmed = unconfirmed
        super().__init__(
            f"the peer was lost ({reason}){_unconfirmed(unconfirmed)}",
            address=address,
            operation=operation,
            advice=advice or ("connect again and send again what must arrive" if unconfirmed else "connect again"),
        )


def _unconfirmed(count: int) -> str:
    if not count:
        return ""
    return f", {count} sent message{'s' if count != 1 else ''} may not have reached its application"


class ChannelClosed(AnywireError, BrokenPipeError):
    """Used after this side closed it, or (`by_peer`) sending to a peer that has closed.

    `unconfirmed`: messages that this side had sent to that peer and that are not known to have reached its application.
    """

    errno_of_class = errno.EPIPE

    def __init__(
        self,
        what: str = "it is closed",
        *,
        address: object = "",
        operation: str = "",
        by_peer: bool = False,
        unconfirmed: int = 0,
        advice: str = "",
    ) -> None:
        self.by_peer = by_peer
        self.unconfirmed = unconfirmed
        super().__init__(what, address=address, operation=operation, advice=advice)


_NOBODY = "nobody listens there"
_START_FIRST = "start the listener first, or wait for it with connect(wait=seconds)"


class Refused(AnywireError, ConnectionRefusedError):
    """Nobody listens there, or one side refused the other; `reason` is the kernel's, the peer's or this side's.

    `answered`: False: nobody listens there now, which waiting may cure (`connect(wait=)` and `connect_forever` try
    again). True: somebody answered, and waiting does not cure it: the peer refused (its `authorize`, another version),
    a certificate was not accepted by either side, or this side's `authorize` refused.
    """

    errno_of_class = errno.ECONNREFUSED

    def __init__(
        self,
        reason: str = _NOBODY,
        *,
        address: object = "",
        operation: str = "",
        answered: bool = False,
        advice: str = "",
    ) -> None:
        self.reason = reason
        self.answered = answered
        super().__init__(
            f"refused: {reason}",
            address=address,
            operation=operation,
            advice=advice or (_START_FIRST if reason == _NOBODY else ""),
        )


class TimedOut(AnywireError, TimeoutError):
    """It took longer than `seconds`. Nothing was lost: the operation can be tried again."""

    errno_of_class = errno.ETIMEDOUT

    def __init__(
        self, seconds: float, what: str = "", *, address: object = "", operation: str = "", advice: str = ""
    ) -> None:
        self.seconds = seconds
        super().__init__(
            what or f"took longer than {seconds:g} s",
            address=address,
            operation=operation,
            advice=advice or "try again, or pass a larger timeout",
        )


class TooLarge(AnywireError, ValueError):
    """A message of `size` bytes is over the `limit`; `option` is the argument that sets it."""

    def __init__(
        self,
        size: int,
        limit: int,
        *,
        address: object = "",
        operation: str = "",
        option: str = "max_message",
        advice: str = "",
    ) -> None:
        self.size = size
        self.limit = limit
        self.option = option
        super().__init__(
            f"a message of {size:,} bytes is over the limit of {limit:,}",
            address=address,
            operation=operation,
            advice=advice or (f"raise {option}= on the receiving side, or send it in parts" if option else ""),
        )


class MessagesLost(AnywireError, BufferError):
    """This subscriber was behind, and `lost` messages were left out just here. The subscription goes on."""

    def __init__(self, lost: int, *, address: object = "", operation: str = "", advice: str = "") -> None:
        self.lost = lost
        super().__init__(
            f"{lost} message{'s were' if lost != 1 else ' was'} left out, because this subscriber was behind",
            address=address,
            operation=operation,
            advice=advice or "go on receiving; losses='count' only counts",
        )


class TooSlow(AnywireError, ConnectionAbortedError):
    """The publisher dropped this subscriber, which took nothing for `seconds` while messages waited for it."""

    errno_of_class = errno.ECONNABORTED

    def __init__(self, seconds: float, *, address: object = "", operation: str = "", advice: str = "") -> None:
        self.seconds = seconds
        super().__init__(
            f"the publisher dropped this subscriber, which took no message for {seconds:g} s",
            address=address,
            operation=operation,
            advice=advice or "subscribe again; the publisher sets stall_timeout=",
        )


class BadFrame(AnywireError, ConnectionError):
    """The peer sent what is not our protocol. `received`: the bytes that came (as many as were kept)."""

    errno_of_class = errno.EPROTO

    def __init__(
        self,
        what: str = "the peer does not speak anywire's framing",
        *,
        received: bytes | bytearray | memoryview = b"",
        address: object = "",
        operation: str = "",
        advice: str = "",
    ) -> None:
        self.received = bytes(received)
        super().__init__(
            f"{what}: {describe_bytes(self.received)}" if self.received else what,
            address=address,
            operation=operation,
            advice=advice or "check that both ends use anywire on this address, in the same version",
        )


class Busy(AnywireError, RuntimeError):
    """A second receiver while one waits: only one may receive from a channel at a time.

    Also a send from a signal handler that interrupted a send of the same thread."""

    def __init__(
        self,
        what: str = "another task or thread is receiving already",
        *,
        address: object = "",
        operation: str = "",
        advice: str = "receive in one place and hand the messages out, or open one channel for each receiver",
    ) -> None:
        super().__init__(what, address=address, operation=operation, advice=advice)


class Forked(AnywireError, RuntimeError):
    """A channel or listener was used in a forked child: two processes would take each other's messages and clients."""

    def __init__(
        self,
        what: str = "it was opened before this process was forked",
        *,
        address: object = "",
        operation: str = "",
        advice: str = "connect again in the child, or hand it over with detach() and attach()",
    ) -> None:
        super().__init__(what, address=address, operation=operation, advice=advice)


_HTTP_METHODS = (b"GET ", b"POST ", b"HEAD ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"TRACE ")


def describe_bytes(data: bytes) -> str:
    """Say what foreign bytes look like, with a printable excerpt, for an error's text.

    Knows what usually knocks at a wrong port: a browser (RFC 9112 section 3, RFC 9113 section 3.4), a TLS client
    (RFC 8446 section 5.1), SSH (RFC 4253 section 4.2), another version of anywire.

    >>> describe_bytes(b"GET / HTTP/1.1\\r\\n")
    "an HTTP request, b'GET / HTTP/1.1\\\\r\\\\n'"
    """
    shown = repr(data[:_EXCERPT]) + ("..." if len(data) > _EXCERPT else "")
    kind = _kind_of(data)
    return f"{kind}, {shown}" if kind else shown


def _kind_of(data: bytes) -> str:
    if not data:
        return "no bytes"
    if data.startswith(PREAMBLE_MAGIC):
        if len(data) >= 10:
            return f"an anywire preamble of version {data[8]}.{data[9]}"
        return "the start of an anywire preamble"
    if data.startswith(PREAMBLE_MAGIC.replace(b"\r\n", b"\n")[:6]):
        return "an anywire preamble whose line ends were translated on the way"
    if data.startswith(b"PRI * HTTP/2"):
        return "an HTTP/2 client"
    if data.startswith(_HTTP_METHODS):
        return "an HTTP request"
    if data.startswith(b"HTTP/"):
        return "an HTTP response"
    if data.startswith(b"SSH-"):
        return "an SSH banner"
    # Record type, then legacy version major 3. Handshake type 1 is ClientHello, 2 is ServerHello; 0x15 an alert.
    if data[:2] == b"\x16\x03":
        what = {1: "a TLS ClientHello", 2: "a TLS ServerHello"}.get(data[5] if len(data) > 5 else 0, "a TLS handshake")
        return f"{what} (one end uses tls://, the other does not)"
    if data[:2] == b"\x15\x03":
        return "a TLS alert (one end uses tls://, the other does not)"
    return ""
