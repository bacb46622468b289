"""Publish and subscribe on the blocking front: the names of `anywire`, each waiting by itself.

A subscription is a channel, and waits in the kernel. A publisher has one thread (`service.py`) that runs the async one;
`send` only puts the message into its log, and wakes that thread when somebody waits for a message. Both may be used
from any thread.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, overload

from anywire import sync
from anywire.contract.address import Address
from anywire.contract.blocking import Channel
from anywire.contract.endpoint import Loan
from anywire.contract.errors import Busy, ChannelClosed, EndOfChannel, PeerLost, TimedOut
from anywire.contract.loans import loan_array
from anywire.contract.peer import Peer
from anywire.patterns import publishing
from anywire.patterns.controls import LEAVING, SIZE, SUBSCRIBE, control
from anywire.patterns.incoming import FEW, SMALL, Face, Incoming, Losses
from anywire.patterns.publishing import Mode, PublisherStats, let_go
from anywire.patterns.service import Served, Service
from anywire.patterns.terms import largest, need_channels, of_the_wire
from anywire.wires.plan import CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, plan_for


class Publisher(Served):
    """Sends each message to every subscriber. Made by `publish`; use it with `with`, or `start` and `close` it."""

    _role = "publish"
    _inner: publishing.Publisher

    def __init__(self, make: Callable[[], publishing.Publisher]) -> None:
        inner = make()
        super().__init__(inner, inner._name)

    @property
    def mode(self) -> Mode:
        """ "reliable" or "latest"."""
        return self._inner.mode

    @property
    def max_message(self) -> int:
        """The largest message that it sends, in bytes."""
        return self._inner.max_message

    @property
    def addresses(self) -> list[Address]:
        """The real addresses, in the order given."""
        return self._inner.addresses

    @property
    def subscribers(self) -> list[Peer]:
        """Who subscribes now, as far as the wire tells."""
        return self._inner.subscribers

    def stats(self) -> PublisherStats:
        """What happened so far."""
        return self._inner.stats()

    def _running(self, operation: str) -> Service:
        if self._service is None:
            self._inner._check_open(operation)
            raise ChannelClosed("the publisher is closed", operation=operation)
        self._service.check(operation)
        return self._service

    def loan(self, nbytes: int) -> Loan:
        """Writable memory for one message: fill it, then `send(loan)`. Errors: `anywire.Publisher.loan`."""
        self._running("loan")
        return self._inner.loan(nbytes)

    def loan_array(self, shape: int | tuple[int, ...], dtype: Any = "uint8") -> Any:
        """As `loan`, as an uninitialised NumPy array. Parameters and errors: `anywire.Publisher.loan_array`."""
        return loan_array(self.loan, shape, dtype)

    def send(self, message: Any, *, timeout: float | None = None) -> None:
        """Publish a message: any contiguous buffer, or a loan. Parameters and errors: `anywire.Publisher.send`."""
        given = message
        if type(message) is not bytes or len(message) > self._inner.max_message:
            message = self._inner._checked(message, "send")
        service, inner = self._running("send"), self._inner
        if inner._turns.line or not inner._log.put(message):
            service.run("send", inner.send(message if type(message) is bytes else given, timeout=timeout))
        elif inner._log.idle:
            service.soon(inner._wake_idle)
        if message is not given:
            let_go(given)

    def try_send(self, message: Any) -> bool:
        """Publish without waiting: False when there is no room now."""
        checked = self._inner._checked(message, "try_send")
        service, inner = self._running("try_send"), self._inner
        if inner._turns.line or not inner._log.put(checked):
            return False
        if inner._log.idle:
            service.soon(inner._wake_idle)
        let_go(message)
        return True

    def send_many(self, messages: Iterable[Any], *, timeout: float | None = None) -> None:
        """Publish messages in order. Interrupted or timed out, a first part of them went."""
        given = list(messages)
        service, inner = self._running("send_many"), self._inner
        todo = [inner._checked(message, "send_many") for message in given]
        done = 0 if inner._turns.line else inner._log.put_many(todo)
        if inner._log.idle:
            service.soon(inner._wake_idle)
        for message in given[:done]:
            let_go(message)
        if done < len(todo):
            # In the form in which they were given: who knows what went is the one who puts it.
            service.run("send_many", inner.send_many(given[done:], timeout=timeout))


def publish(
    *addresses: str | Address,
    mode: Mode = "reliable",
    stall_timeout: float = 5.0,
    depth: int = 1024,
    depth_bytes: int = 64 << 20,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: sync.Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Publisher:
    """Publish messages to all who subscribe at the addresses. Parameters and errors: `anywire.publish`.

    `authorize` is called in the publisher's own thread."""
    own: Publisher | None = of_the_wire("publisher", "blocking", locals())
    if own is not None:
        return own
    return Publisher(
        lambda: publishing.publish(
            *addresses,
            mode=mode,
            stall_timeout=stall_timeout,
            depth=depth,
            depth_bytes=depth_bytes,
            max_message=max_message,
            handshake_timeout=handshake_timeout,
            authorize=authorize,
            backlog=backlog,
            close_timeout=close_timeout,
            **wire_options,
        )
    )


class Subscription(Face):
    """The messages of a publisher. Made by `subscribe`. One receiver at a time, in any thread."""

    _channel: Channel

    def __init__(self, channel: Channel, incoming: Incoming) -> None:
        super().__init__(channel, incoming)
        self._receiving = threading.Lock()

    def _before(self, operation: str) -> None:
        if not self._receiving.acquire(blocking=False):
            raise Busy(address=self._channel.address, operation=operation)
        try:
            if self._incoming.over is not None and not self._channel.closed:
                raise self._incoming.failure(operation)
            if time.monotonic() >= self._incoming.report_at:
                self._incoming.report()
        except BaseException:
            self._receiving.release()
            raise

    @overload
    def recv(self, *, copy: Literal[True] = True, timeout: float | None = None) -> bytes: ...
    @overload
    def recv(self, *, copy: Literal[False], timeout: float | None = None) -> memoryview: ...
    def recv(self, *, copy: bool = True, timeout: float | None = None) -> bytes | memoryview:
        """The next message. Parameters and errors: `anywire.Subscription.recv`."""
        incoming = self._incoming
        ahead = incoming.ahead
        self._before("recv")
        try:
            deadline = None if timeout is None else time.monotonic() + timeout
            while True:
                while ahead:
                    message = ahead.popleft()
                    if len(message) != SIZE or incoming.is_message(message, "recv"):
                        incoming.size = len(message)
                        return message if copy else memoryview(message)
                if copy and incoming.size <= SMALL:
                    self._fetch(FEW, timeout)
                else:
                    got: Any
                    if copy:
                        got = self._channel.recv(timeout=timeout)
                    else:
                        got = self._channel.recv(copy=False, timeout=timeout)
                    if incoming.is_message(got, "recv"):
                        incoming.size = len(got)
                        return got  # type: ignore[no-any-return]
                if deadline is not None:
                    timeout = max(0.0, deadline - time.monotonic())
        except (EndOfChannel, PeerLost) as error:
            raise incoming.ended(error) from None
        finally:
            self._receiving.release()

    def _fetch(self, limit: int, timeout: float | None) -> None:
        """Put what is here into `ahead`, in one call of C: no signal handler runs between the two and loses it."""
        receive = functools.partial(self._channel.recv_many, timeout=timeout)
        self._incoming.ahead.extend(itertools.chain.from_iterable(map(receive, (limit,))))

    def recv_many(self, limit: int = 1024, *, timeout: float | None = None) -> list[bytes]:
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        incoming = self._incoming
        self._before("recv_many")
        try:
            deadline = None if timeout is None else time.monotonic() + timeout
            while True:
                if incoming.ahead:
                    messages = incoming.from_ahead(limit, "recv_many")
                    if messages:
                        return messages
                self._fetch(limit, None if deadline is None else max(0.0, deadline - time.monotonic()))
        except (EndOfChannel, PeerLost) as error:
            raise incoming.ended(error) from None
        finally:
            self._receiving.release()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        incoming = self._incoming
        if incoming.ahead and time.monotonic() < incoming.report_at:        # recv() in short, for the usual case
            if not self._receiving.acquire(blocking=False):
                raise Busy(address=self._channel.address, operation="recv")
            try:
                if incoming.ahead and len(incoming.ahead[0]) != SIZE:
                    return incoming.ahead.popleft()
            finally:
                self._receiving.release()
        try:
            return self.recv()
        except EndOfChannel:
            raise StopIteration from None

    def close(self, *, timeout: float = 5.0) -> None:
        """Leave. The publisher goes on. Parameters: `timeout`, seconds for the polite end."""
        if not self.closed and self._incoming.over is None:
            self._tell(LEAVING)
        self._incoming.ahead.clear()
        try:
            self._channel.close(timeout=timeout)
        except PeerLost:
            pass                            # nothing of ours can be lost with it

    def abort(self) -> None:
        """Leave at once."""
        self._incoming.ahead.clear()
        self._channel.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "over" if self._incoming.over is not None else "open"
        return f"<anywire.sync.Subscription {self.address} {state}, {self.lost} lost>"


def subscribe(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    losses: Losses = "raise",
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: sync.Authorize | None = None,
    **wire_options: Any,
) -> Subscription:
    """Subscribe to a publisher: every message that is sent from now on. Parameters and errors: `anywire.subscribe`."""
    own: Subscription | None = of_the_wire("subscriber", "blocking", locals())
    if own is not None:
        return own
    need_channels([address], "subscribe")
    incoming = Incoming(address, losses, largest(max_message))
    plan = plan_for(address, "subscription", "connect", max_message, handshake_timeout, wire_options)
    deadline = None if wait is None else time.monotonic() + wait
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        channel = Channel(sync._connect(plan, timeout, left, authorize))
        try:
            channel.send(control(SUBSCRIBE), timeout=handshake_timeout)
            incoming.greeted(channel.recv(timeout=handshake_timeout))
        except (PeerLost, TimedOut):
            channel.abort()
            if deadline is None or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
        except BaseException:
            channel.abort()
            raise
        else:
            return Subscription(channel, incoming)
