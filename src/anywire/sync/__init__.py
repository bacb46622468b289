"""The blocking front door: the names of `anywire`, each waiting by itself.

No hidden event loop and no helper thread: `connect` waits in the kernel, `serve` runs a thread per connection, as said,
and `publish`, `push` and `pull` have one thread for all their peers.
Channels may be used from any thread.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar

from anywire.contract.address import Address
from anywire.contract.blocking import Channel, Stream
from anywire.contract.counters import count_connect_retry
from anywire.contract.driver import Stepping, run_blocking, wait_for_any
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.errors import AnywireError, ChannelClosed, EndOfChannel, PeerLost, TimedOut
from anywire.contract.handle import Handle
from anywire.contract.peer import Peer
from anywire.contract.waits import Steps
from anywire.contract.wire import Acceptor
from anywire.wires import establish
from anywire.wires.establish import curable
from anywire.wires.listening import MOST_HANDSHAKES, Bound
from anywire.wires.moving import attach_endpoint, pipe
from anywire.wires.plan import (
    ATTACH_TIMEOUT,
    CONNECT_TIMEOUT,
    HANDSHAKE_TIMEOUT,
    Plan,
    may_connect,
    plan_for,
    refused_here,
    verdict_of,
)

if TYPE_CHECKING:
    from anywire.patterns.blocking import Publisher as Publisher
    from anywire.patterns.blocking import Subscription as Subscription
    from anywire.patterns.blocking import publish as publish
    from anywire.patterns.blocking import subscribe as subscribe
    from anywire.patterns.blocking_work import Pull as Pull
    from anywire.patterns.blocking_work import Push as Push
    from anywire.patterns.blocking_work import pull as pull
    from anywire.patterns.blocking_work import push as push

log = logging.getLogger("anywire")

F = TypeVar("F", Channel, Stream)
T = TypeVar("T")
LOOK_AGAIN = 0.2
"""Seconds after which a thread in `accept()` looks whether another one still leads."""
Authorize: TypeAlias = Callable[[Peer], "bool | str | None"]

__all__ = [
    "Channel",
    "Listener",
    "Publisher",
    "Pull",
    "Push",
    "Server",
    "Stream",
    "Subscription",
    "attach",
    "connect",
    "connect_forever",
    "connect_stream",
    "listen",
    "listen_stream",
    "pipe",
    "publish",
    "pull",
    "push",
    "serve",
    "serve_stream",
    "subscribe",
]

_ABOVE = {
    **dict.fromkeys(("Publisher", "Subscription", "publish", "subscribe"), "anywire.patterns.blocking"),
    **dict.fromkeys(("Pull", "Push", "pull", "push"), "anywire.patterns.blocking_work"),
}
"""Names of a layer above this one: loaded at their first use."""


def __getattr__(name: str) -> Any:
    home = _ABOVE.get(name)
    if home is None:
        raise AttributeError(f"module 'anywire.sync' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def connect(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    **wire_options: Any,
) -> Channel:
    """Connect to `address`: a Channel, which closes as a context manager. Parameters and errors: `anywire.connect`."""
    plan = plan_for(address, "channel", "connect", max_message, handshake_timeout, wire_options)
    return Channel(_connect(plan, timeout, wait, authorize))


def connect_stream(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    authorize: Authorize | None = None,
    **wire_options: Any,
) -> Stream:
    """Connect to `address`: a Stream of bytes. Parameters and errors: `anywire.connect_stream`."""
    plan = plan_for(address, "stream", "connect", None, HANDSHAKE_TIMEOUT, wire_options)
    return Stream(_connect(plan, timeout, wait, authorize))


def _connect(plan: Plan, timeout: float | None, wait: float | None, authorize: Authorize | None) -> MessageEndpoint:
    limit = None if timeout is None else timeout + (wait or 0)
    deadline = None if limit is None else time.monotonic() + limit
    steps = establish.connect_steps(plan.wire, plan.address, plan.face, plan.options, wait)
    try:
        endpoint = run_blocking(steps, deadline)
    except TimedOut as error:
        if error.operation:
            raise
        raise TimedOut(limit or 0.0, address=str(plan.address), operation="connect") from None
    try:
        refusal = _judge(authorize, endpoint.peer)
    except BaseException:
        endpoint.release()
        raise
    if refusal is not None:
        endpoint.release()
        raise refused_here(plan, refusal)
    endpoint.count_connect()
    return endpoint


def _judge(authorize: Authorize | None, peer: Peer | None) -> str | None:
    if authorize is None:
        return may_connect(peer)
    return verdict_of(authorize(peer))  # type: ignore[arg-type]


def connect_forever(
    address: str | Address, *, backoff: tuple[float, float] = (0.05, 5.0), **options: Any
) -> Iterator[Channel]:
    """A channel, and after it is over the next one, for ever. Parameters: `anywire.connect_forever`."""
    pause = backoff[0]
    while True:
        try:
            channel = connect(address, **options)
        except (AnywireError, OSError) as error:
            if not curable(error):
                raise
            log.info("%s; next attempt in about %.2f s", establish.told("connect", address, error), pause)
            count_connect_retry()
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, backoff[1])
            continue
        pause = backoff[0]
        try:
            yield channel
        finally:
            try:
                channel.close()
            except PeerLost:
                pass


def attach(handle: Handle, *, timeout: float = ATTACH_TIMEOUT, authorize: Authorize | None = None) -> Any:
    """The channel, stream or listener of a handle that `detach()` or `pipe()` made, also in another process.

    Parameters:
        timeout: seconds to wait until the other end of a pipe is attached or connected too.
        authorize: of a listener: who may connect from now on, as for `listen`. All other options travel with the
            handle, a function can't: if the listener had an `authorize`, one must be given here (None is an error).

    Raises TimedOut, PeerLost (the other end was closed before), OSError, ValueError (the handle was used before, or
    `authorize` is missing, or given for what is no listener; then the handle can still be attached)."""
    kind, made = attach_endpoint(handle, timeout, authorize)
    if kind == "listener":
        plans, acceptors = made
        return _listener_of(handle, plans, acceptors, authorize)
    return (Channel if kind == "channel" else Stream)(run_blocking(made))


def _listener_of(handle: Handle, plans: Any, acceptors: Any, authorize: Authorize | None) -> Listener[Any]:
    listener: Listener[Any] = Listener.__new__(Listener)
    listener._set_up(Channel if handle.face == "channel" else Stream, plans, acceptors, authorize)
    return listener


def _until(stopped: Callable[[], bool], steps: Steps[T]) -> Steps[T]:
    """The same steps, ended by ChannelClosed when `stopped()` is true after a wait."""
    try:
        request = next(steps)
        while True:
            answer = yield request
            if stopped():
                raise ChannelClosed("it was closed while this waited for a connection", operation="accept")
            request = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


class Listener(Bound[F]):
    """Listening addresses whose connections you take yourself: `listener.accept()`. As `anywire.Listener`.

    Of the threads in `accept()` one leads: it waits in one poll(2) for clients to come and for all handshakes. When a
    client has said who it is, that thread goes to authorise it, and the next one leads. So no handshake needs a thread,
    and a slow `authorize` holds up its own thread only."""

    _channel = Channel

    def _ready(self) -> None:
        self._changed = threading.Condition()   # its lock guards what follows
        self._waiting = 0                       # threads inside accept()
        self._leading = 0                       # which of them leads, or is about to (threading.get_ident)
        self._turn = threading.Lock()           # held while it does: it alone touches acceptors and handshakes
        self._handshakes: list[tuple[Stepping[Any], Acceptor]] = []
        self._closing: list[Acceptor] = []      # what the leader closes as it leaves
        self._wake_fd = -1                      # what close() wakes the leader with, from the first wait on
        self._close_wake_fd: Callable[[], object] = lambda: None

    def establish(self, acceptor: Acceptor, endpoint: Any) -> F | None:
        """Handshake, authorise: a channel or stream, or None when the peer was refused. For a server."""
        plan = self._plans[acceptor]
        heard = run_blocking(establish.hear_steps(acceptor, endpoint, self._face, plan.options))
        return self._answer(acceptor, heard)

    def _answer(self, acceptor: Acceptor, heard: Any) -> F | None:
        plan = self._plans[acceptor]
        target = heard if isinstance(heard, MessageEndpoint) else heard[0]
        try:
            refusal = _judge(self._authorize, target.peer)
        except BaseException:
            target.release()
            raise
        if refusal is not None:
            log.info("accept %s: refused %s: %s", acceptor.address, target.peer, refusal)
        ready = run_blocking(establish.answer_steps(heard, plan.options, refusal))
        if ready is None:
            return None
        self._slot.add("accepts")
        return self._kind(ready)

    def accept(self, *, timeout: float | None = None) -> F:
        """The next connection that is established; those whose handshake fails are logged and passed over.

        Handshakes run beside each other, 128 at most, so a silent stranger holds up nobody. A time-out drops none of
        them: they go on in the next `accept()`. Several threads may wait here.

        Parameters: `timeout` in seconds. Raises TimedOut, ChannelClosed (closed or detached, or nobody else can come),
        Forked."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._check_open()
        with self._changed:
            self._waiting += 1
        try:
            while True:
                acceptor, heard = self._next_heard(deadline)
                try:
                    made = self._answer(acceptor, heard)
                except Exception as error:
                    self._passed_over(acceptor, error)
                    continue
                if made is not None:
                    return made
        except TimedOut:
            raise TimedOut(timeout or 0.0, address=self._name, operation="accept") from None
        finally:
            with self._changed:
                self._waiting -= 1
                self._changed.notify()          # this one may have been told to lead, and had timed out already

    def _next_heard(self, deadline: float | None) -> tuple[Acceptor, Any]:
        """The next client that said who it is, and what `answer_steps` needs. Takes its turn to lead."""
        leading = 0
        try:
            with self._changed:
                # An interrupt (Ctrl-C) may hit a leader just as it leaves: then nobody holds the turn.
                while self._leading and (self._leading != threading.get_ident() or self._turn.locked()):
                    left = math.inf if deadline is None else deadline - time.monotonic()
                    if self._changed.wait(min(left, LOOK_AGAIN)) or not self._leading:
                        continue
                    if not self._turn.locked():
                        break
                    if left <= LOOK_AGAIN:
                        raise TimedOut(0.0)
                if not self._acceptors:
                    raise self._closed()
                if self._wake_fd < 0:
                    self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                    self._close_wake_fd = weakref.finalize(self, os.close, self._wake_fd)
                self._leading = leading = threading.get_ident()
            with self._turn:
                return self._lead(self._acceptors, deadline)
        except (OSError, ValueError) as error:
            if self._acceptors or isinstance(error, AnywireError):
                raise
            raise self._closed() from None      # detached: its descriptor was gone when it was polled
        finally:
            if leading:
                with self._changed:
                    self._leading = 0
                    if not self._acceptors and not self._turn.locked():
                        self._let_go()
                    self._changed.notify()

    def _lead(self, acceptors: list[Acceptor], deadline: float | None) -> tuple[Acceptor, Any]:
        arriving: Stepping[tuple[Acceptor, Any]] | None = None
        over: ChannelClosed | None = None
        while self._acceptors:
            handshakes = list(self._handshakes)
            late = False
            if arriving is None and over is None and len(handshakes) < MOST_HANDSHAKES:
                arriving = Stepping(establish.next_steps(acceptors, self._count_error))
                able: list[tuple[Stepping[Any], list[tuple[int, int]] | None]] = [(arriving, None)]
            else:
                late = deadline is not None and time.monotonic() >= deadline
                several: list[Stepping[Any]] = [one for one, _ in handshakes]
                if arriving is not None:
                    several.append(arriving)
                able = [*wait_for_any(several, deadline, self._wake_fd)]
            of = dict(handshakes)
            for one, ready in able:
                if one is arriving:
                    try:
                        if not one.go(ready):
                            continue
                    except ChannelClosed as error:      # the last to come may be in its handshake
                        arriving, over = None, error
                        continue
                    assert one.result is not None
                    arriving, (acceptor, endpoint) = None, one.result
                    plan = self._plans[acceptor]
                    one = Stepping(establish.hear_steps(acceptor, endpoint, self._face, plan.options))
                    self._handshakes.append((one, acceptor))
                    ready = None
                    del endpoint
                else:
                    acceptor = of[one]
                if self._has_heard(one, acceptor, ready):
                    return acceptor, one.result
            if over is not None and not self._handshakes:
                raise over
            if late:
                raise TimedOut(0.0)
        raise self._closed()

    def _has_heard(self, one: Stepping[Any], acceptor: Acceptor, ready: list[tuple[int, int]] | None) -> bool:
        """Go on with a handshake: whether the client has said who it is. One that fails is passed over."""
        try:
            if one.result is None and not one.go(ready):       # else an interrupt came between that and the next line
                return False
        except Exception as error:
            self._handshakes.remove((one, acceptor))
            self._passed_over(acceptor, error)
            return False
        except BaseException:
            self._handshakes.remove((one, acceptor))
            raise
        self._handshakes.remove((one, acceptor))
        return one.result is not None

    def _drop(self) -> None:
        if self._owner != os.getpid():
            # The lock and the leader may be those of a thread that this child does not have. What the endpoints hold
            # was closed by the fork, and the eventfd still wakes the parent.
            self._changed = threading.Condition()
            self._turn = threading.Lock()
            self._handshakes = []
        with self._changed:
            if self._turn.locked():
                os.eventfd_write(self._wake_fd, 1)
            else:
                self._let_go()
            self._changed.notify_all()

    def _let_go(self) -> None:
        """Nobody polls any more: close what was polled."""
        self._close_wake_fd()
        closing, self._closing = self._closing, []
        for acceptor in closing:
            acceptor.close()
        while self._handshakes:
            self._handshakes.pop()[0].close()

    def close(self) -> None:
        """Stop listening. Clients in their handshake are dropped."""
        acceptors, self._acceptors = self._acceptors, []
        self._closing += acceptors
        self._drop()
        if acceptors:
            self._slot.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(
    *addresses: str | Address,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    **wire_options: Any,
) -> Listener[Channel]:
    """Listen on addresses and accept channels yourself. It listens when this returns. Raises AddressError, OSError."""
    return Listener(Channel, addresses, max_message, handshake_timeout, authorize, backlog, wire_options)


def listen_stream(
    *addresses: str | Address, authorize: Authorize | None = None, backlog: int = 1024, **wire_options: Any
) -> Listener[Stream]:
    """As `listen`, for streams of bytes."""
    return Listener(Stream, addresses, None, HANDSHAKE_TIMEOUT, authorize, backlog, wire_options)


class Server(Generic[F]):
    """Runs a blocking handler in a thread for each connection. Made by `serve`; as a context manager it serves."""

    def __init__(
        self,
        handler: Callable[[F], object],
        make_listener: Callable[[], Listener[F]],
        limit: int | None,
        close_timeout: float,
    ) -> None:
        if not callable(handler):
            raise TypeError(f"a handler is a function of one argument, the connection, not {handler!r}")
        if inspect.iscoroutinefunction(handler):
            raise TypeError(f"{handler!r} is a coroutine function: serve it with anywire.serve")
        if limit is not None and limit < 1:
            raise ValueError(f"a server's limit must be at least 1 connection, not {limit}")
        self._handler: Callable[[F], object] = handler
        self._make_listener: Callable[[], Listener[F]] = make_listener
        self._room = None if limit is None else threading.Semaphore(limit)
        self._close_timeout = close_timeout
        self._listener: Listener[F] | None = None
        self._accepting: threading.Thread | None = None
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._stopped = threading.Event()
        self._wake_fd = -1
        self._addresses: list[Address] = []
        self.connections: set[F] = set()
        """The channels or streams whose handlers run now."""

    @property
    def addresses(self) -> list[Address]:
        """The real addresses, in the order given."""
        return list(self._addresses)

    def start(self) -> Server[F]:
        """Listen, and accept in a background thread. `with` does this."""
        if self._listener is None:
            self._stopping = False
            self._stopped.clear()
            self._listener = self._make_listener()
            self._addresses = self._listener.addresses
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._accepting = threading.Thread(
                target=self._accept, args=(self._listener,), name="anywire accept", daemon=True
            )
            self._accepting.start()
        return self

    def _accept(self, listener: Listener[F]) -> None:
        while not self._stopping:
            if self._room is not None and not self._room.acquire(timeout=0.2):
                continue                                    # the rest waits in the kernel's backlog
            try:
                steps = establish.next_steps(listener._acceptors, listener._count_error)
                acceptor, endpoint = run_blocking(_until(lambda: self._stopping, steps), wake_fd=self._wake_fd)
            except ChannelClosed:
                return
            thread = threading.Thread(
                target=self._run, args=(listener, acceptor, endpoint), name="anywire handler", daemon=True
            )
            with self._lock:
                self._threads.add(thread)
            thread.start()
            del endpoint, thread                            # else the last connection stays until the next one comes

    def _run(self, listener: Listener[F], acceptor: Any, endpoint: Any) -> None:
        connection: F | None = None
        try:
            connection = listener.establish(acceptor, endpoint)
            if connection is None:
                return
            with self._lock:
                self.connections.add(connection)
            try:
                answer = self._handler(connection)
                if inspect.iscoroutine(answer):
                    answer.close()
                    raise TypeError(f"{self._handler!r} gave a coroutine, which nothing runs here: use anywire.serve")
            except EndOfChannel:
                pass                                        # the peer ended, and the handler let recv() say so
            connection.close(timeout=self._close_timeout)
        except Exception as error:
            if connection is None and isinstance(error, (AnywireError, OSError)):
                log.info("%s", establish.told("accept", acceptor.address, error))
                listener._slot.add("accept_errors")
            elif listener._is_peers_doing(error):
                log.info("%s", establish.told("handler of", acceptor.address, error))
            elif not (self._stopping and isinstance(error, ChannelClosed)):
                listener._slot.add("handler_errors")
                log.exception("handler of %s failed; the connection was dropped", acceptor.address)
        finally:
            if connection is not None:
                connection.abort()
            with self._lock:
                self._threads.discard(threading.current_thread())
                if connection is not None:
                    self.connections.discard(connection)
            if self._room is not None:
                self._room.release()

    def serve_forever(self) -> None:
        """Serve until `close` is called from elsewhere, or Ctrl-C; then drain."""
        self.start()
        try:
            self._stopped.wait()
        finally:
            self.close()

    def close(self, *, timeout: float | None = None) -> None:
        """Stop listening, let handlers finish for `timeout` seconds (default: the server's), then drop connections."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        assert self._accepting is not None
        self._accepting.join()
        os.close(self._wake_fd)
        listener.close()                    # at once: a client that comes now is refused instead of waiting for nothing
        deadline = time.monotonic() + (self._close_timeout if timeout is None else timeout)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = list(self.connections)
        for connection in left:
            connection.abort()
        for thread in threads:
            thread.join(1.0)
        self._stopped.set()

    def abort(self) -> None:
        """Stop listening and drop every connection at once."""
        self.close(timeout=0.0)

    def __enter__(self) -> Server[F]:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
        else:
            self.close()

    def __repr__(self) -> str:
        where = ", ".join(str(address) for address in self._addresses) or "not started"
        return f"<anywire.sync.Server {where}, {len(self.connections)} connections>"


def serve(
    handler: Callable[[Channel], object],
    *addresses: str | Address,
    limit: int | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Server[Channel]:
    """Serve `handler(channel)`, a plain function, in a thread per connection. Parameters: `anywire.serve`."""

    def listener() -> Listener[Channel]:
        return Listener(Channel, addresses, max_message, handshake_timeout, authorize, backlog, wire_options)

    return Server(handler, listener, limit, close_timeout)


def serve_stream(
    handler: Callable[[Stream], object],
    *addresses: str | Address,
    limit: int | None = None,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Server[Stream]:
    """As `serve`, for streams of bytes."""

    def listener() -> Listener[Stream]:
        return Listener(Stream, addresses, None, HANDSHAKE_TIMEOUT, authorize, backlog, wire_options)

    return Server(handler, listener, limit, close_timeout)
