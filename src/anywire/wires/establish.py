"""Connecting and accepting, once for every wire and both fronts: generators that yield what they wait for.

Called by the async and the blocking facade, which only differ in how they run these. Runs on the caller's thread.

What can go wrong: nobody listens (`Refused`; retried while `wait` lasts, as all that is `curable`), the other side is
no anywire peer (`BadFrame`, at the first wrong byte), it says nothing (`TimedOut` after `handshake_timeout`), the
process has no descriptors left (accepting pauses and goes on). Whatever fails, every descriptor opened here is closed
here.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from anywire.contract.address import Address
from anywire.contract.counters import count_connect_retry
from anywire.contract.endpoint import ByteEndpoint, MessageEndpoint, RawEndpoint
from anywire.contract.errors import AnywireError, BadFrame, ChannelClosed, PeerLost, Refused, TimedOut, Unsupported
from anywire.contract.waits import READ, WRITE, Steps, Wait
from anywire.contract.wire import Acceptor, Wire
from anywire.framing.preamble import MAGIC, Preamble, decode, missing, refuse
from anywire.wires._framed import FramedEndpoint

log = logging.getLogger("anywire")

PASSING = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EAGAIN, errno.EPERM}
"""accept(2): this one connection failed before we had it; the next may be well. After anything else (EMFILE, ENFILE,
ENOBUFS, ENOMEM: nothing left for now, and the connection stays in the backlog) accepting pauses instead of spinning."""
ABSENT = {errno.ECONNREFUSED, errno.ENOENT, errno.ENXIO, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH}
"""connect(2): nobody is there yet. An error about a file that is not the address's own path is another matter."""
TRANSIENT = {
    *(errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
"""What the system can do nothing about just now: too little of something, or the way to the other host is cut."""


def write_steps(below: ByteEndpoint, data: bytes) -> Steps[None]:
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        done = below.write_some(view)
        if done is None:
            yield Wait([(below.write_fd if below.want == WRITE else below.read_fd, below.want)])
        else:
            view = view[done:]


def read_preamble_steps(below: ByteEndpoint, timeout: float, operation: str) -> Steps[Preamble]:
    """Read the peer's preamble, and not one byte more."""
    data = b""
    deadline = time.monotonic() + timeout
    try:
        while need := missing(data):
            chunk = below.read_some(need)
            if chunk is None:
                left = deadline - time.monotonic()
                fd = below.write_fd if below.want == WRITE else below.read_fd
                if left <= 0 or (not (yield Wait([(fd, below.want)], left)) and time.monotonic() >= deadline):
                    raise TimedOut(
                        timeout,
                        address=str(below.address),
                        operation=operation,
                        advice=f"the peer sent {len(data)} bytes of a preamble; is it an anywire peer of this face?",
                    )
            elif not chunk:
                raise PeerLost(
                    f"the peer closed the connection before its preamble was whole ({len(data)} bytes came)",
                    address=str(below.address),
                    operation=operation,
                    advice="is it a listener of this wire? Its log says more" if operation == "connect" else "",
                )
            else:
                data += chunk
        return decode(data)
    except BadFrame as error:
        error.address, error.operation = str(below.address), operation
        if operation == "accept" and data.startswith(MAGIC) and below.write_fd >= 0:
            below.write_some(refuse(error.what))  # it speaks some version of our preamble, so it is told why
        raise


def framed(below: ByteEndpoint, peer: Preamble | None, options: Mapping[str, Any], address: Address) -> FramedEndpoint:
    """The framed endpoint over a connection whose preambles are exchanged (`peer` is None on a one-way writer)."""
    largest = options["max_message"]
    two_way = below.read_fd >= 0 and below.write_fd >= 0
    return FramedEndpoint(
        below,
        largest,
        min(peer.max_message, 1 << 62) if peer is not None else largest,
        confirms=two_way,
        descriptors=getattr(below, "carries_fds", False),
        address=address,
    )


def greet_steps(below: ByteEndpoint, options: Mapping[str, Any], address: Address) -> Steps[FramedEndpoint]:
    """The connecting side: say who we are, hear who they are. Closes `below` when it fails."""
    try:
        if below.write_fd >= 0:
            yield from write_steps(below, Preamble(options["max_message"]).encode())
        if below.read_fd < 0:
            return framed(below, None, options, address)
        peer = yield from read_preamble_steps(below, options["handshake_timeout"], "connect")
        if peer.refusal is not None:
            raise Refused(peer.refusal, address=str(address), operation="connect", answered=True)
        return framed(below, peer, options, address)
    except OSError as error:
        below.release()
        if isinstance(error, AnywireError):
            raise
        reason = f"{error.strerror or error}, while the preambles were exchanged"
        raise PeerLost(reason, address=str(address), operation="connect") from error
    except BaseException:
        below.release()
        raise


def dial_steps(wire: Wire, address: Address, face: str, options: Mapping[str, Any]) -> Steps[MessageEndpoint]:
    """Connect once. `face` is "channel" or "stream"."""
    endpoint = yield from wire.dial(address, options)
    if isinstance(endpoint, MessageEndpoint):
        if face == "stream" and not isinstance(endpoint, RawEndpoint):
            endpoint.release()
            raise no_stream(address)
        return endpoint
    if face == "stream":
        return RawEndpoint(endpoint, address)
    return (yield from greet_steps(endpoint, options, address))


def no_stream(address: Address) -> Unsupported:
    """The error for asking bytes of a message wire."""
    return Unsupported(
        f"{address.scheme} carries messages, not a stream of bytes; use connect() or serve()",
        address=str(address),
        operation="stream",
    )


def connect_steps(
    wire: Wire, address: Address, face: str, options: Mapping[str, Any], wait: float | None
) -> Steps[MessageEndpoint]:
    """Connect; after what is `curable`, try again for `wait` seconds, the last time at its end."""
    begun = time.monotonic()
    deadline = None if wait is None else begun + wait
    pause = 0.01
    while True:
        try:
            return (yield from dial_steps(wire, address, face, options))
        except (AnywireError, OSError) as error:
            failure = explained(error, address, begun)
        left = 0.0 if deadline is None else deadline - time.monotonic()
        if left <= 0 or not curable(failure):
            if wait and isinstance(failure, Refused) and not failure.answered:
                failure.advice = f"tried for {wait:g} s; start the listener, or wait longer"
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame
        count_connect_retry()
        yield Wait([], min(pause, left))
        pause = min(pause * 1.6, 0.5)


def explained(error: Exception, address: Address, begun: float) -> Exception:
    """The error of an attempt that began at `begun` (time.monotonic), as an AnywireError or naming the address."""
    if isinstance(error, AnywireError) or not isinstance(error, OSError):
        return error
    if isinstance(error, socket.gaierror):
        return Refused(f"the name was not found: {error.strerror}", address=str(address), operation="connect")
    if error.errno == errno.ETIMEDOUT:  # the kernel's own patience, of minutes, was shorter than the caller's
        late = TimedOut(time.monotonic() - begun, address=str(address), operation="connect")
        late.__cause__ = error
        return late
    about_another_file = error.filename is not None and error.filename != address.path
    if error.errno in ABSENT and not about_another_file:
        return Refused(
            f"nobody listens there ({error.strerror})",
            address=str(address),
            operation="connect",
            advice="start the server first, or pass wait=SECONDS",
        )
    if error.errno is None or str(address) in str(error):
        return error
    what = f"connect {address}: {error.strerror}"
    named = type(error)(error.errno, what) if error.filename is None else type(error)(error.errno, what, error.filename)
    named.__cause__ = error
    return named


def told(operation: str, address: object, error: Exception) -> str:
    """For the log: "<operation> <address>: what happened". Where it was is not repeated; most errors begin with it."""
    text = str(error)
    if isinstance(error, AnywireError):
        # An option may stand in one of the addresses only: unix:///x with type="seqpacket" is unix:///x?type=seqpacket.
        if error.address.partition("?")[0] == str(address).partition("?")[0]:
            met_by = "" if error.operation in ("", operation) else f"{error.operation}: "
            where = f"{error.operation} {error.address}: ".lstrip()
            text = met_by + text.removeprefix(where) if text.startswith(where) else text
    elif str(address) in text:
        return text
    return f"{operation} {address}: {text}"


def curable(error: Exception) -> bool:
    """Whether another attempt to connect may succeed although nobody changes anything on this side.

    Nobody listens there yet (or the name or path is not there yet), it took too long, the peer was lost while the
    connection was made, or the system was short of something. Not: a refusal by somebody who answered, a peer that
    speaks something else (BadFrame), a file of this side that is missing, a permission that is denied."""
    if isinstance(error, Refused):
        return not error.answered
    if isinstance(error, AnywireError):
        return isinstance(error, (TimedOut, PeerLost))
    return isinstance(error, OSError) and error.errno in TRANSIENT


def next_steps(acceptors: Sequence[Acceptor], on_error: Any = None) -> Steps[tuple[Acceptor, Any]]:
    """The next connection of any acceptor. Never spins and never ends for lack of descriptors (`on_error` is told).

    Raises ChannelClosed when nobody can come any more."""
    pause = 0.02
    while True:
        exhausted = False
        for acceptor in acceptors:
            try:
                endpoint = acceptor.accept()
            except OSError as error:
                if on_error is not None:
                    on_error(error)
                if acceptor.fileno() < 0:
                    raise
                if error.errno not in PASSING:
                    log.warning("%s; trying again in %.2f s", told("accept", acceptor.address, error), pause)
                    exhausted = True
                continue
            if endpoint is not None:
                return acceptor, endpoint
        if exhausted:
            yield Wait([], pause)
            pause = min(pause * 2, 1.0)
            continue
        open_ones = [acceptor for acceptor in acceptors if not acceptor.over]
        if not open_ones:
            raise ChannelClosed(
                "the one peer has come, and nobody else can come here",
                address=", ".join(str(acceptor.address) for acceptor in acceptors),
                operation="accept",
                advice="the log says why a peer was passed over; close the listener",
            )
        yield Wait([(acceptor.fileno(), READ) for acceptor in open_ones])


def hear_steps(acceptor: Acceptor, endpoint: Any, face: str, options: Mapping[str, Any]) -> Steps[Any]:
    """The listening side, first half: the wire's own handshake, then the peer's preamble.

    Returns what `answer_steps` needs: a MessageEndpoint that is ready, or (byte endpoint, peer's preamble)."""
    try:
        endpoint = yield from acceptor.greet(endpoint)
        if isinstance(endpoint, MessageEndpoint):
            if face == "stream" and not endpoint.wire.traits(acceptor.address).has_stream:
                raise no_stream(acceptor.address)
            return endpoint
        if face == "stream":
            return RawEndpoint(endpoint, endpoint.address)
        if endpoint.read_fd < 0:
            return endpoint, None
        return endpoint, (yield from read_preamble_steps(endpoint, options["handshake_timeout"], "accept"))
    except BaseException:
        endpoint.release()
        raise


def answer_steps(heard: Any, options: Mapping[str, Any], refusal: str | None) -> Steps[MessageEndpoint | None]:
    """The listening side, second half: our preamble, or the refusal (then the connection is closed; None)."""
    if isinstance(heard, MessageEndpoint):
        return (yield from heard.answer_steps(refusal))
    below, peer = heard
    try:
        if refusal is not None:
            if below.write_fd >= 0:
                yield from write_steps(below, refuse(refusal))
                below.shutdown_write()
            below.release()
            return None
        if below.write_fd >= 0:
            yield from write_steps(below, Preamble(options["max_message"]).encode())
        return framed(below, peer, options, below.address)
    except BaseException:
        below.release()
        raise
