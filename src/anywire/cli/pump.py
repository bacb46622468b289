"""Moving standard input to a connection and the connection to standard output, for `anywire cat`.

Owns: how bytes of input become messages and messages become output, and when both directions are over. The caller's
thread receives; one thread of its own reads input and sends. Each direction holds one chunk, so a slow side slows the
other: memory stays flat whatever the size of the input.

What can go wrong: whatever the channel raises; `OutputGone` when nobody reads standard output; OSError of the input.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anywire.contract.errors import ChannelClosed, EndOfChannel, PeerLost, TimedOut, TooLarge, Unsupported

INPUT, OUTPUT = 0, 1
LOOK = 0.1              # seconds between looks at what a wire does not wake us for


class OutputGone(Exception):
    """Nobody reads standard output any more."""


@dataclass(frozen=True)
class Framing:
    """How input becomes messages: up to a `separator`, or if that is empty, chunks as they come, of at most `chunk`
    bytes. `raw`: no messages at all, the connection is a stream."""

    separator: bytes
    chunk: int
    raw: bool


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, also to a descriptor that somebody made non-blocking. Raises OutputGone, or OSError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:
            select.select([], [fd], [])
        except BrokenPipeError:
            raise OutputGone from None
        except OSError as error:
            raise _of(error, "standard output") from None


def _of(error: OSError, name: str) -> OSError:
    return OSError(error.errno, error.strerror, name)


def _read(fd: int, size: int) -> bytes:
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            select.select([fd], [], [])
        except OSError as error:
            raise _of(error, "standard input") from None


def batches(fd: int, framing: Framing, limit: int, advice: str) -> Iterator[list[bytes]]:
    """The messages of an input, in batches as they come. A last line without its end counts.

    `limit`: bytes; raises TooLarge, with the advice, for a line over it, instead of collecting it."""
    if not framing.separator:
        while chunk := _read(fd, framing.chunk):
            yield [chunk]
        return
    rest = bytearray()
    while chunk := _read(fd, 65536):
        first, *others = chunk.split(framing.separator)
        rest += first
        if len(rest) > limit:
            raise TooLarge(len(rest), limit, operation="read standard input", advice=advice)
        if others:
            yield [bytes(rest), *others[:-1]]
            rest = bytearray(others[-1])
    if rest:
        yield [bytes(rest)]


class Pump:
    """One connection between standard input and output. `sent` and `received` count bytes of content.

    `half_close`: the end of the input is told to the peer, whose own end is then waited for. Without it nobody is told:
    `linger` is the seconds of silence after which it is over, once the input has ended. `stays`: not so if the input
    turns out to have been empty; then only the wire or a signal ends it."""

    def __init__(
        self, channel: Any, framing: Framing, *, linger: float, half_close: bool, stays: bool = False
    ) -> None:
        self.channel = channel
        self.framing = framing
        self.linger = linger
        self.half_close = half_close
        self.stays = stays
        self.sent = self.received = 0
        self._had_input = False
        self._ended = threading.Event()         # no more input
        self._wake = os.eventfd(0)              # the same, for poll(2); one a process, closed by its end
        self._last_byte = 0.0                   # when input ended, or something came
        self._failure: BaseException | None = None

    def send_only(self) -> None:
        """Send the input, then close: what comes is not looked at."""
        try:
            self._send_messages()
            self._close()
        finally:
            self.channel.abort()

    def both(self, *, sending: bool) -> None:
        """Send the input and print what comes, until both have ended (without `sending`: until the peer's end)."""
        sending = sending and self._can("write_fd")
        try:
            if sending:
                threading.Thread(target=self._run_sender, name="anywire cat input", daemon=True).start()
            if self._can("read_fd"):
                finished = self._print_all() or os.isatty(INPUT)    # a person sees that the other side has ended
            else:
                finished = False
            if sending and not finished:
                self._wait_for_sender()
            if self._failure is not None:
                raise self._failure
            self._close()
        finally:
            self.channel.abort()

    def _wait_for_sender(self) -> None:
        """Until the input has ended, or the peer has gone: it may have half-closed first, and closed later."""
        endpoint, poll = self.channel.endpoint, select.poll()
        poll.register(self._wake, select.POLLIN)
        # Bare bytes and packets only have the half-close of shutdown(2): there POLLRDHUP may mean just that, and
        # POLLHUP, which always comes, that both directions are over. Frames have a half-close of their own.
        if hasattr(endpoint, "decoder") and endpoint.read_fd >= 0:
            poll.register(endpoint.read_fd, select.POLLRDHUP)
        elif endpoint.read_fd >= 0 and endpoint.read_fd == endpoint.write_fd:
            poll.register(endpoint.read_fd, 0)
        # Shared memory says it in memory, and its socket ends only when the peer waits for us no longer.
        wait = LOOK * 1000 if hasattr(endpoint, "takes_nothing") else None
        while not poll.poll(wait):
            if endpoint.takes_nothing:
                return

    def _can(self, direction: str) -> bool:
        # Only byte wires have one-way ends; their descriptor of the missing direction is -1.
        endpoint = self.channel.endpoint
        return not hasattr(endpoint, "bytes") or getattr(endpoint, direction) >= 0

    # ---- input to the wire

    def _run_sender(self) -> None:
        try:
            self._send_input()
        except BaseException as error:
            self._failure = error
            if not isinstance(error, (ChannelClosed, PeerLost, Unsupported)):
                self.channel.abort()            # the receiver can't notice: wake it
        finally:
            self._last_byte = time.monotonic()
            self._ended.set()
            os.eventfd_write(self._wake, 1)

    def _send_input(self) -> None:
        self._send_messages()
        try:
            (self.channel.write_eof if self.framing.raw else self.channel.send_eof)()
        except Unsupported:
            pass                                # `linger` is for this

    def _send_messages(self) -> None:
        channel, framing = self.channel, self.framing
        advice = "raise --max-message on both sides"
        if not framing.raw and channel.traits.message_limit == "message_size":
            advice = "pass -o message_size= where the queue is made"
        elif not framing.raw and channel.traits.message_limit == "kernel.msgmax":
            advice = "raise sysctl -w kernel.msgmax=, and pass -o max_bytes= where the queue is made"
        for batch in batches(INPUT, framing, 0 if framing.raw else channel.max_message, advice):
            self._had_input = True
            if framing.raw:
                channel.write(batch[0])
            elif len(batch) == 1:
                channel.send(batch[0])
            else:
                channel.send_many(batch)
            self.sent += sum(map(len, batch))

    # ---- the wire to output

    def _print_all(self) -> bool:
        """Print until the peer's end; True when the peer takes nothing more either."""
        wait = None if self.half_close else LOOK
        while True:
            try:
                data = self._receive(wait)
            except EndOfChannel:
                decoder = getattr(self.channel.endpoint, "decoder", None)
                if decoder is not None:
                    return bool(decoder.closed)
                return bool(getattr(self.channel.endpoint, "takes_nothing", False))
            except Unsupported:
                return False                    # a one-way wire
            except TimedOut:
                if wait is None:
                    raise
                over = self._ended.is_set() and (self._had_input or not self.stays)
                if over and time.monotonic() - self._last_byte >= self.linger:
                    return True
                continue
            except ChannelClosed:
                if self._failure is not None:   # the sender dropped the connection, and knows why
                    return True
                raise
            if data is None:
                return False
            write_all(OUTPUT, data)
            self._last_byte = time.monotonic()

    def _receive(self, wait: float | None) -> bytes | None:
        if self.framing.raw:
            data: bytes = self.channel.read(timeout=wait)
            self.received += len(data)
            return data or None
        separator = self.framing.separator
        if not separator:
            message: bytes = self.channel.recv(timeout=wait)
            self.received += len(message)
            return message
        messages = self.channel.recv_many(timeout=wait)
        self.received += sum(map(len, messages))
        return separator.join(messages) + separator

    def _close(self) -> None:
        self.channel.close()
        left = self.channel.unconfirmed if getattr(self.channel.endpoint, "confirms", False) else 0
        if left:
            raise ChannelClosed(
                f"the peer closed without taking the last {left} message{'s' if left != 1 else ''}",
                address=self.channel.address,
                operation="send",
            )
