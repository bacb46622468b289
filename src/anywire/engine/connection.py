"""A buffered connection on a reactor: bytes in and out with water marks, time-outs and rate limits (the idea is
libevent's bufferevent).

It owns its socket. Everything happens on the reactor's thread, in handlers; from others, `reactor.post`. No call of the
kernel blocks; in one turn a connection reads at most 256 KiB and writes what the kernel takes, so a flooding one
delays others by that. What goes wrong is the second argument of `on_end`.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._buffers import Buffer
from ._reactor import Event, Reactor, TimerEvent
from .conditions import Condition

if TYPE_CHECKING:
    from typing_extensions import Buffer as BytesLike

TURN_BYTES = 256 << 10


class RateLimit:
    """A token bucket: on average so many bytes a second, after a pause at once as many as `burst`. (Turner, "New
    directions in communications", 1986.) One may be shared by several connections of one reactor, which then have the
    rate together.

    Args:
        rate: bytes a second, above 0.
        burst: bytes; None takes a tenth of a second's, at least 1.
    """

    def __init__(self, rate: float, burst: int | None = None) -> None:
        if not 0 < rate < float("inf") or (burst is not None and burst < 1):
            raise ValueError(f"RateLimit({rate}, {burst}): a rate is above 0 and finite, a burst is at least 1")
        self.rate = rate
        self.burst = max(int(rate / 10), 1) if burst is None else burst
        self._tokens = float(self.burst)
        self._since = time.monotonic()

    def allowed(self) -> int:
        """How many bytes may go now."""
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._since) * self.rate, self.burst)
        self._since = now
        return int(self._tokens)

    def spend(self, count: int) -> None:
        """So many went."""
        self._tokens -= count

    def pause(self) -> float:
        """In how many seconds a worthwhile piece may go: a quarter of the burst: no wake-up for each byte."""
        return max((max(self.burst / 4, 1.0) - self._tokens) / self.rate, 0.0)


def _nothing(*_: object) -> None:
    """Whoever has no handler for it."""


class BufferedConnection:
    """A connected stream socket with a buffer each way.

    Args:
        reactor: calls the handlers.
        sock: connected, or under way (`begin_connect`); made non-blocking, TCP without delay, closed by `close`.
        on_data: on_data(connection), when at least `read_low` bytes are in `connection.input`, each time more have
            come; at the end for what is left, too. It takes from there what it likes.
        on_drained: on_drained(connection), when `connection.output` has come down to `write_low`.
        on_end: on_end(connection, error): None for the peer's end, after the last on_data; writing still works then. An
            OSError, a TimeoutError for a time-out, is the last call: the connection is closed.
        read_low: bytes that on_data waits for.
        read_high: bytes in `input` from which on nothing is read, until on_data or `read` has taken some.
        write_low: see on_drained.
        write_high: bytes in `output` from which on `write` returns False.
        read_timeout: seconds without a byte, while reading isn't paused.
        write_timeout: seconds without progress, while `output` isn't empty.
        read_limit, write_limit: `RateLimit`s, or None.
        priority: of its event; see `Reactor`.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        *,
        on_data: Callable[[BufferedConnection], object] = _nothing,
        on_drained: Callable[[BufferedConnection], object] = _nothing,
        on_end: Callable[[BufferedConnection, OSError | None], object] = _nothing,
        read_low: int = 1,
        read_high: int = 1 << 20,
        write_low: int = 0,
        write_high: int = 1 << 20,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        read_limit: RateLimit | None = None,
        write_limit: RateLimit | None = None,
        priority: int | None = None,
    ) -> None:
        if not 1 <= read_low <= read_high or not 0 <= write_low < write_high:
            raise ValueError(
                f"water marks: read_low {read_low} is 1 to read_high {read_high}, "
                f"write_low {write_low} is 0 or more and below write_high {write_high}"
            )
        for name, seconds in (("read_timeout", read_timeout), ("write_timeout", write_timeout)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name}={seconds}: a time-out is above 0 seconds; None is none")
        self.reactor = reactor
        self.socket = sock
        self.input = Buffer()
        self.output = Buffer()
        self.on_data, self.on_drained, self.on_end = on_data, on_drained, on_end
        self.read_low, self.read_high = read_low, read_high
        self.write_low, self.write_high = write_low, write_high
        self.read_timeout, self.write_timeout = read_timeout, write_timeout
        self.read_limit, self.write_limit = read_limit, write_limit
        self.closed = False
        self.read_bytes = 0
        """Bytes that came so far."""
        self.written_bytes = 0
        """Bytes that the kernel took so far."""
        self._paused = False
        self._ended = False
        self._shutting = False
        self._shut = False
        self._timers: dict[str, TimerEvent] = {}
        self._last_read = self._last_written = time.monotonic()
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Small writes go at once: what is to go together is together in `output`.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fd = sock.fileno()
        self._event: Event = reactor.watch(sock, Condition.READ, self._ready, priority=priority)
        self._arm()

    def write(self, data: BytesLike | Buffer) -> bool:
        """Send bytes, now or as soon as the peer takes them.

        Args:
            data: the caller may change it afterwards. A `Buffer` is emptied, without a copy.

        Returns:
            False when `write_high` bytes or more wait: better stop until on_drained. They are kept all the same.

        Raises:
            BrokenPipeError: the connection is closed, or `shutdown` was called.
        """
        if self.closed or self._shutting:
            what = "is closed" if self.closed else "was shut down for writing"
            raise BrokenPipeError(errno.EPIPE, f"this connection {what}")
        idle = not self.output
        if isinstance(data, Buffer):
            self.output.move(data)
        else:
            self.output.append(data)
        if idle:
            self._last_written = time.monotonic()
            # At once: the next turn may be far. What fails is told by on_end, in a turn of its own, not from in here.
            self._drain(quiet=True)
            self._arm()
        return len(self.output) < self.write_high

    def read(self, most: int = 1 << 62) -> bytes:
        """Take bytes from `input`; b"" if there are none. Reading goes on if it was over `read_high`."""
        taken = self.input.take(most)
        self._arm()
        return taken

    def pause(self) -> None:
        """Read nothing until `resume`: the peer will find its writes blocked."""
        self._paused = True
        self._arm()

    def resume(self) -> None:
        """Read on after `pause`."""
        self._paused = False
        self._last_read = time.monotonic()
        self._arm()

    def shutdown(self) -> None:
        """Send the end, after what still waits in `output`. Reading goes on."""
        if not self._shutting and not self.closed:
            self._shutting = True
            self._finish_writing()

    def close(self) -> None:
        """Close the socket at once; what waits in `output` is lost. No handler is called any more."""
        if self.closed:
            return
        self.closed = True
        self._event.remove()
        self._event.handler = _nothing  # or the two would keep each other, and the buffers, until the next collection
        for timer in self._timers.values():
            timer.remove()
        self._timers.clear()
        self.socket.close()

    def _wants(self) -> Condition:
        wanted = Condition(0)
        if not self._ended and not self._paused and len(self.input) < self.read_high and "read" not in self._timers:
            wanted |= Condition.READ
        if self.output and "write" not in self._timers:
            wanted |= Condition.WRITE
        return wanted

    def _arm(self) -> None:
        """Watch for what is wanted now, and have the time-outs run that apply."""
        if self.closed:
            return
        wanted = self._wants()
        if wanted != self._event.watched_for:
            if wanted & Condition.READ and not self._event.watched_for & Condition.READ:
                self._last_read = time.monotonic()
            self._event.change(wanted)
        if self.read_timeout is not None and wanted & Condition.READ and "read_timeout" not in self._timers:
            self._timers["read_timeout"] = self.reactor.after(self.read_timeout, self._read_timed_out)
        if self.write_timeout is not None and self.output and "write_timeout" not in self._timers:
            self._timers["write_timeout"] = self.reactor.after(self.write_timeout, self._write_timed_out)

    def _ready(self, event: Event, conditions: Condition) -> None:
        if conditions & Condition.WRITE or (conditions & Condition.ERROR and self.output):
            self._drain()
        if not self.closed and conditions & ~Condition.WRITE:
            self._fill()
        self._arm()

    def _fill(self) -> None:
        """Read once, within the turn's budget, the limit and the high-water mark. Then tell.

        Level-triggered: what is left is reported again, after the others had their turn.
        """
        if self._ended:
            return
        got = 0
        error: OSError | None = None
        most = min(TURN_BYTES, self.read_high - len(self.input))
        if self.read_limit is not None and most > 0:
            most = min(most, self.read_limit.allowed())
            if most < 1:
                self._wait_for("read", self.read_limit)
        if most > 0 and not self._paused:
            try:
                count = self.input.fill(self._fd, most)
            except OSError as caught:
                error = caught
            else:
                self._ended = count == 0
                got = count or 0
        if got:
            self._last_read = time.monotonic()
            self.read_bytes += got
            if self.read_limit is not None:
                self.read_limit.spend(got)
        if (got and len(self.input) >= self.read_low) or (self._ended and self.input):
            self.on_data(self)
        if self.closed:
            return
        if error is not None:
            self._fail(error)
        elif self._ended:
            self._drop_timer("read_timeout")
            self.on_end(self, None)

    def _drain(self, quiet: bool = False) -> None:
        """Write what the kernel and the limit allow. Then tell, unless `quiet`."""
        most = 1 << 62
        if self.write_limit is not None:
            most = self.write_limit.allowed()
            if most < 1:
                self._wait_for("write", self.write_limit)
                return
        try:
            count = self.output.drain(self._fd, most) or 0
        except OSError as error:
            if quiet:
                # A connect that is under way takes no bytes yet; all else comes again with the next report.
                return
            self._fail(error)
            return
        if count:
            self._last_written = time.monotonic()
            self.written_bytes += count
            if self.write_limit is not None:
                self.write_limit.spend(count)
                if self.output and self.write_limit.allowed() < 1:
                    self._wait_for("write", self.write_limit)
        if not self.output:
            self._drop_timer("write_timeout")
            self._finish_writing()
        if count and not quiet and len(self.output) <= self.write_low:
            self.on_drained(self)

    def _finish_writing(self) -> None:
        if self._shutting and not self._shut and not self.output:
            self._shut = True
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # the peer is gone: reading tells
                    raise

    def _wait_for(self, way: str, limit: RateLimit) -> None:
        """Nothing that way until the limit allows some."""

        def go_on(event: TimerEvent, deadline: float) -> None:
            self._timers.pop(way, None)
            # Waiting for the limit is no silence of the peer's.
            if way == "read":
                self._last_read = time.monotonic()
            else:
                self._last_written = time.monotonic()
            self._arm()

        if way not in self._timers:
            self._timers[way] = self.reactor.after(limit.pause(), go_on)

    def _drop_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.remove()

    # One timer for each, looked at when it is due, instead of a new one with each read. The last look is at the kernel:
    # after a turn that took long the bytes may be here, or the peer may have made room.

    def _read_timed_out(self, event: TimerEvent, deadline: float) -> None:
        assert self.read_timeout is not None
        if self._wants() & Condition.READ and self._last_read + self.read_timeout <= time.monotonic():
            before = self.read_bytes
            self._fill()
            if self.closed or self._ended:
                return
            if self.read_bytes == before and self._wants() & Condition.READ:
                self._fail(TimeoutError(errno.ETIMEDOUT, f"nothing came for {self.read_timeout} s"))
                return
        if self._wants() & Condition.READ:
            event.change(self._last_read + self.read_timeout - time.monotonic())
        else:
            self._timers.pop("read_timeout", None)
        self._arm()

    def _write_timed_out(self, event: TimerEvent, deadline: float) -> None:
        assert self.write_timeout is not None
        left = self._last_written + self.write_timeout - time.monotonic()
        if "write" in self._timers:  # the limit holds it back, not the peer
            left = self.write_timeout
        elif left <= 0:
            before = self.written_bytes
            self._drain()
            if self.closed or not self.output:
                return
            if self.written_bytes == before and "write" not in self._timers:
                waiting = len(self.output)
                text = f"the peer took nothing of {waiting} bytes for {self.write_timeout} s"
                self._fail(TimeoutError(errno.ETIMEDOUT, text))
                return
            left = self.write_timeout
        event.change(left)
        self._arm()

    def _fail(self, error: OSError) -> None:
        pending = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if pending and isinstance(error, BrokenPipeError):
            error = OSError(pending, os.strerror(pending))  # why the pipe broke
        self.close()
        self.on_end(self, error)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.input)} bytes in, {len(self.output)} out"
        return f"<BufferedConnection {self._fd}, {state}>"
