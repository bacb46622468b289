"""Push and pull on the blocking front: each end has one thread (`service.py`) that runs the async one.

`send` only assigns its message and wakes that thread; `recv` only takes what is here already. What must wait does so in
that thread, and the caller for it. Any thread may call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from anywire import sync
from anywire.contract.address import Address
from anywire.contract.errors import ChannelClosed, EndOfChannel
from anywire.contract.peer import Peer
from anywire.patterns import pulling, pushing
from anywire.patterns.pulling import PullStats
from anywire.patterns.pushing import OnLoss, PushStats
from anywire.patterns.service import Served, Service
from anywire.wires.plan import CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT


class _End(Served):
    """What both ends show."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, inner._meeting.name)

    @property
    def addresses(self) -> list[Address]:
        """The real addresses: listened on, or connected to."""
        return self._inner.addresses  # type: ignore[no-any-return]

    @property
    def prefetch(self) -> int:
        """The most messages that may be outstanding, as given."""
        return self._inner.prefetch  # type: ignore[no-any-return]

    @property
    def max_message(self) -> int:
        """The largest message, in bytes."""
        return self._inner.max_message  # type: ignore[no-any-return]

    def _running(self, operation: str) -> Service:
        if self._service is None:
            what = "it is closed" if self._inner._closing else "it was not started"
            raise ChannelClosed(what, address=self._where, operation=operation)
        self._service.check(operation)
        return self._service


class Push(_End):
    """Sends each message to one puller. Made by `push`; use it with `with`, or `start` and `close` it."""

    _role = "push"
    _inner: pushing.Push

    @property
    def pullers(self) -> list[Peer]:
        """Who pulls now, as far as the wire tells."""
        return self._inner.pullers

    @property
    def unconfirmed(self) -> int:
        """Messages sent whose puller has not come back for more yet, and is not lost."""
        return self._inner.unconfirmed

    @property
    def lost(self) -> int:
        """Messages that were told as unconfirmed when their puller was lost."""
        return self._inner.lost

    def stats(self) -> PushStats:
        """What happened so far."""
        return self._inner.stats()

    def _put(self, message: bytes, operation: str) -> bool:
        service, inner = self._running(operation), self._inner
        if inner._turns.line or not inner._share.put(message):
            return False
        if inner._share.idle:
            service.soon(inner._wake_idle)
        return True

    def send(self, message: Any, *, timeout: float | None = None) -> None:
        """Send a message to one puller. Parameters and errors: `anywire.Push.send`."""
        message = self._inner._checked(message, "send")
        if not self._put(message, "send"):
            self._running("send").run("send", self._inner.send(message, timeout=timeout))

    def try_send(self, message: Any) -> bool:
        """Send without waiting: False when nobody has room now."""
        return self._put(self._inner._checked(message, "try_send"), "try_send")

    def send_many(self, messages: Iterable[Any], *, timeout: float | None = None) -> None:
        """Send messages, each to one puller. Interrupted or timed out, a first part of them went."""
        todo = [self._inner._checked(message, "send_many") for message in messages]
        for done, message in enumerate(todo):
            if not self._put(message, "send_many"):
                self._running("send_many").run("send_many", self._inner.send_many(todo[done:], timeout=timeout))
                return


def push(
    *addresses: str | Address,
    listen: bool = False,
    prefetch: int = 16,
    on_loss: OnLoss | None = None,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: sync.Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Push:
    """Send each message to exactly one pull end. Parameters and errors: `anywire.push`.

    `on_loss` and `authorize` are called in the end's own thread."""
    inner = pushing.push(
        *addresses,
        listen=listen,
        prefetch=prefetch,
        on_loss=on_loss,
        timeout=timeout,
        wait=wait,
        max_message=max_message,
        handshake_timeout=handshake_timeout,
        authorize=authorize,
        backlog=backlog,
        close_timeout=close_timeout,
        **wire_options,
    )
    return Push(inner)


class Pull(_End):
    """Receives what push ends send here. Made by `pull`; use it with `with`, or `start` and `close` it."""

    _role = "pull"
    _inner: pulling.Pull

    @property
    def pushers(self) -> list[Peer]:
        """Who pushes now, as far as the wire tells."""
        return self._inner.pushers

    def stats(self) -> PullStats:
        """What happened so far."""
        return self._inner.stats()

    def _receive(self, limit: int, timeout: float | None, operation: str) -> list[bytes]:
        service, inner = self._running(operation), self._inner
        if inner._inbox.settle():
            service.soon(inner._settle)
        if not inner._turns.line:
            out = inner._inbox.take(limit)
            if out:
                return out
        waiting = inner._receive(limit, timeout, operation)
        return service.run(operation, waiting, undo=inner._inbox.give_back)

    def recv(self, *, timeout: float | None = None) -> bytes:
        """The next message, from the pushers in turns. Parameters and errors: `anywire.Pull.recv`."""
        return self._receive(1, timeout, "recv")[0]

    def recv_many(self, limit: int = 1024, *, timeout: float | None = None) -> list[bytes]:
        """At least one message and at most `limit`: all that are here now. Raises what `recv` raises."""
        if limit < 1:
            raise ValueError(f"recv_many needs a limit of at least 1, not {limit}")
        return self._receive(limit, timeout, "recv_many")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            return self.recv()
        except EndOfChannel:
            raise StopIteration from None


def pull(
    *addresses: str | Address,
    listen: bool = False,
    prefetch: int = 1024,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: sync.Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Pull:
    """Receive what is pushed. Parameters and errors: `anywire.pull`. `authorize` is called in the end's own thread."""
    inner = pulling.pull(
        *addresses,
        listen=listen,
        prefetch=prefetch,
        timeout=timeout,
        wait=wait,
        max_message=max_message,
        handshake_timeout=handshake_timeout,
        authorize=authorize,
        backlog=backlog,
        close_timeout=close_timeout,
        **wire_options,
    )
    return Pull(inner)
