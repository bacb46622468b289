"""The async front door: connect, serve, listen, pipe, attach.

Owns: turning an address and options into channels and streams, and the servers. Everything runs on the running event
loop; any asyncio loop that can watch descriptors will do. The same names without `await` are in `anywire.sync`.

What can go wrong is told by errors that carry the address and the operation; a handler that fails is logged to the
logger `anywire` and counted, its connection is dropped (the peer sees a loss), and the server goes on.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import inspect
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar

from anywire.contract.address import Address
from anywire.contract.channel import Channel
from anywire.contract.counters import count_connect_retry
from anywire.contract.driver import driver_for
from anywire.contract.endpoint import MessageEndpoint
from anywire.contract.errors import AnywireError, ChannelClosed, EndOfChannel, PeerLost, TimedOut
from anywire.contract.handle import Handle
from anywire.contract.peer import Peer
from anywire.contract.stream import Stream
from anywire.contract.wire import Acceptor
from anywire.wires import establish
from anywire.wires.establish import curable
from anywire.wires.listening import MOST_HANDSHAKES, Bound
from anywire.wires.moving import attach_endpoint
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

log = logging.getLogger("anywire")

F = TypeVar("F", Channel, Stream)
C = TypeVar("C", bound=AbstractAsyncContextManager[Any])
Authorize: TypeAlias = Callable[[Peer], "bool | str | Awaitable[bool | str | None] | None"]


class Connecting(Generic[C]):
    """What `connect` returns: await it for the channel, or enter it with `async with`, which also closes it."""

    __slots__ = ("_make", "_result")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._result: C | None = None

    def __await__(self) -> Generator[Any, None, C]:
        return self._make().__await__()  # type: ignore[no-any-return]

    async def __aenter__(self) -> C:
        result: C = await self._make()
        self._result = result
        return result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._result is not None
        await self._result.__aexit__(kind, error, traceback)


def connect(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    **wire_options: Any,
) -> Connecting[Channel]:
    """Connect to `address`; gives a Channel.

    Parameters:
        timeout: seconds for all of it, with `wait` for `timeout + wait`: the name's look-up, connecting, the handshakes
            and an `authorize` that is a coroutine function (a plain function can't be interrupted). None for ever.
        wait: keep trying for this many seconds after what waiting may cure: nobody listens yet, the name or path is not
            there yet, an attempt took too long or lost its peer, the system was short of something. What somebody who
            answered refused (`Refused.answered`, BadFrame) is raised at once. None: the first failure is raised.
        max_message: largest message to receive, bytes (16 MiB where the wire has a limit of its own choosing).
        handshake_timeout: seconds that the other side may be silent before its preamble.
        authorize: asked with the Peer; False or a text refuses it. On one host the default is: same user, or root.
        wire_options: what the wire understands (see its page); an unknown name is an error.

    Raises: AddressError, UnknownWire, Refused, TimedOut, BadFrame, PeerLost, OSError.

    >>> async def main():
    ...     async def echo(channel):
    ...         async for message in channel:
    ...             await channel.send(message)
    ...     async with serve(echo, "inproc://greet"), connect("inproc://greet") as channel:
    ...         await channel.send(b"hello")
    ...         return await channel.recv()
    >>> asyncio.run(main())
    b'hello'
    """
    plan = plan_for(address, "channel", "connect", max_message, handshake_timeout, wire_options)
    return Connecting(lambda: _connect(Channel, plan, timeout, wait, authorize))


def connect_stream(
    address: str | Address,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    wait: float | None = None,
    authorize: Authorize | None = None,
    **wire_options: Any,
) -> Connecting[Stream]:
    """Connect to `address`: a Stream of bytes. Parameters and errors as `connect`; Unsupported on message wires."""
    plan = plan_for(address, "stream", "connect", None, HANDSHAKE_TIMEOUT, wire_options)
    return Connecting(lambda: _connect(Stream, plan, timeout, wait, authorize))


async def _connect(
    kind: type[F], plan: Plan, timeout: float | None, wait: float | None, authorize: Authorize | None
) -> F:
    driver = driver_for()
    steps = establish.connect_steps(plan.wire, plan.address, plan.face, plan.options, wait)
    limit = None if timeout is None else timeout + (wait or 0)
    try:
        async with asyncio.timeout(limit) as limited:
            endpoint = await driver.run(steps)
            try:
                refusal = await _judge(authorize, endpoint, plan)
            except BaseException:           # also the time-out, or the task's cancellation
                endpoint.release()
                raise
    except TimeoutError as error:
        if isinstance(error, AnywireError) or not limited.expired():
            raise
        raise TimedOut(limit or 0.0, address=str(plan.address), operation="connect") from None
    if refusal is not None:
        endpoint.release()
        raise refused_here(plan, refusal)
    endpoint.count_connect()
    return kind(endpoint, driver)


async def _judge(authorize: Authorize | None, endpoint: Any, plan: Plan) -> str | None:
    """Why the peer may not connect, or None."""
    peer: Peer = endpoint.peer
    if authorize is None:
        return may_connect(peer)
    answer = authorize(peer)
    if inspect.isawaitable(answer):
        answer = await answer
    return verdict_of(answer)


async def connect_forever(
    address: str | Address, *, backoff: tuple[float, float] = (0.05, 5.0), **options: Any
) -> AsyncIterator[Channel]:
    """A channel, and after it is over the next one, for ever: `async for channel in connect_forever(...)`.

    Parameters: `backoff`: first and longest pause between attempts in seconds; pauses double and are jittered. The rest
    as `connect`. Retried is what `wait` would retry; all else is raised, and the iteration is over: what somebody who
    answered refused (`Refused.answered`), BadFrame, a missing file of this side."""
    pause = backoff[0]
    while True:
        try:
            channel = await connect(address, **options)
        except (AnywireError, OSError) as error:
            if not curable(error):
                raise
            log.info("%s; next attempt in about %.2f s", establish.told("connect", address, error), pause)
            count_connect_retry()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, backoff[1])
            continue
        pause = backoff[0]
        try:
            yield channel
        finally:
            try:
                await channel.close()
            except PeerLost:
                pass


class Listener(Bound[F]):
    """Listening addresses whose connections you take yourself: `await listener.accept()`.

    `addresses` are the real ones. Closing stops listening; accepted connections live on. Used in one event loop."""

    _channel = Channel

    def _ready(self) -> None:
        self._established: collections.deque[MessageEndpoint] = collections.deque()
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()    # one for each accept()
        self._handshakes: set[asyncio.Task[None]] = set()       # they outlive a cancelled accept()
        self._stop_accepting: Callable[[], object] | None = None

    async def next(self) -> tuple[Acceptor, Any]:
        """The next raw connection, for a server: (acceptor, endpoint). Not beside `accept`."""
        self._check_open()
        return await driver_for().run(establish.next_steps(self._acceptors, self._count_error))

    async def establish(self, acceptor: Acceptor, endpoint: Any) -> F | None:
        """Handshake, authorise: a channel or stream, or None when the peer was refused."""
        ready = await self._shake_hands(acceptor, endpoint)
        return None if ready is None else self._give(ready)

    def _give(self, endpoint: MessageEndpoint) -> F:
        self._slot.add("accepts")
        return self._kind(endpoint, driver_for())

    async def _shake_hands(self, acceptor: Acceptor, endpoint: Any) -> MessageEndpoint | None:
        driver = driver_for()
        plan = self._plans[acceptor]
        heard = await driver.run(establish.hear_steps(acceptor, endpoint, self._face, plan.options))
        target = heard if isinstance(heard, MessageEndpoint) else heard[0]
        try:
            refusal = await _judge(self._authorize, target, plan)
        except BaseException:
            target.release()
            raise
        if refusal is not None:
            log.info("accept %s: refused %s: %s", acceptor.address, target.peer, refusal)
        return await driver.run(establish.answer_steps(heard, plan.options, refusal))

    async def accept(self, *, timeout: float | None = None) -> F:
        """The next connection that is established; those whose handshake fails are logged and passed over.

        Handshakes run beside each other, 128 at most, so a silent stranger holds up nobody. They go on when this is
        cancelled or times out: who comes through meanwhile is what the next `accept()` returns, and nobody is lost.
        Several tasks may wait here. Clients come from the kernel's backlog only while one does.

        Parameters: `timeout` in seconds. Raises TimedOut, ChannelClosed (closed or detached, or nobody else can come),
        Forked."""
        try:
            async with asyncio.timeout(timeout):
                endpoint = await self._next_established()
        except TimeoutError as error:
            if isinstance(error, AnywireError):
                raise
            raise TimedOut(timeout or 0.0, address=self._name, operation="accept") from None
        return self._give(endpoint)

    async def _next_established(self) -> MessageEndpoint:
        self._check_open()
        loop = asyncio.get_running_loop()
        while not self._established:
            if not self._acceptors:
                raise self._closed()
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.append(waiter)
            try:
                self._admit()
                await waiter
            finally:
                self._waiters.remove(waiter)
                if waiter.done() and not waiter.cancelled():
                    waiter.exception()          # seen, also when this was cancelled just then
                self._share_out()
        return self._established.popleft()

    def _admit(self) -> None:
        """Accept while more tasks wait than connections are there for them: the others stay in the backlog."""
        if (
            self._stop_accepting is None
            and self._acceptors
            and len(self._waiters) > len(self._established)
            and len(self._handshakes) < MOST_HANDSHAKES
        ):
            steps = establish.next_steps(self._acceptors, self._count_error)
            self._stop_accepting = driver_for().start(steps, self._came)

    def _rest(self) -> None:
        stop, self._stop_accepting = self._stop_accepting, None
        if stop is not None:
            stop()

    def _share_out(self) -> None:
        """Wake as many tasks as there are connections for; accept no more than there are tasks."""
        for _, waiter in zip(self._established, self._waiters, strict=False):
            if not waiter.done():
                waiter.set_result(None)
        if len(self._waiters) <= len(self._established):
            self._rest()

    def _came(self, arrival: tuple[Acceptor, Any] | None, error: Exception | None) -> None:
        """The loop's callback: a connection has come, or none can."""
        self._stop_accepting = None
        if arrival is not None:
            task = asyncio.create_task(self._welcome(*arrival))
            self._handshakes.add(task)
            task.add_done_callback(functools.partial(self._ended, arrival[1]))
            self._admit()
        elif not (isinstance(error, ChannelClosed) and self._handshakes):       # they may have been the last to come
            assert error is not None
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(error)

    async def _welcome(self, acceptor: Acceptor, endpoint: Any) -> None:
        try:
            ready = await self._shake_hands(acceptor, endpoint)
        except Exception as error:
            self._passed_over(acceptor, error)
            return
        if ready is not None and not self._acceptors:
            ready.release()
        elif ready is not None:
            self._established.append(ready)
            self._share_out()

    def _ended(self, endpoint: Any, task: asyncio.Task[None]) -> None:
        self._handshakes.discard(task)
        if task.cancelled():
            endpoint.release()      # it may have been cancelled before its first step
        self._admit()

    def _drop(self) -> None:
        if self._owner == os.getpid():      # a forked child's loop is the parent's: it watches and runs nothing here
            self._rest()
            for task in self._handshakes:
                if not task.get_loop().is_closed():
                    task.cancel()
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(self._closed())
        while self._established:
            self._established.popleft().release()

    def close(self) -> None:
        """Stop listening. Clients in their handshake, and who was not accepted yet, are dropped."""
        acceptors, self._acceptors = self._acceptors, []
        self._drop()                # first: a closed number that the loop watches may be another file's at any moment
        for acceptor in acceptors:
            acceptor.close()
        if acceptors:
            self._slot.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def attach(
    handle: Handle, *, timeout: float = ATTACH_TIMEOUT, authorize: Authorize | None = None
) -> Connecting[Any]:
    """The channel, stream or listener of a handle that `detach()` or `pipe()` made, also in another process.

    Await it, or enter it with `async with`, as `connect`.

    Parameters:
        timeout: seconds to wait until the other end of a pipe is attached or connected too.
        authorize: of a listener: who may connect from now on, as for `listen`. All other options travel with the
            handle, a function can't: if the listener had an `authorize`, one must be given here (None is an error).

    Raises TimedOut, PeerLost (the other end was closed before), OSError, ValueError (the handle was used before, or
    `authorize` is missing, or given for what is no listener; then the handle can still be attached)."""
    return Connecting(lambda: _attach(handle, timeout, authorize))


async def _attach(handle: Handle, timeout: float, authorize: Authorize | None) -> Any:
    kind, made = attach_endpoint(handle, timeout, authorize)
    if kind == "listener":
        listener: Listener[Any] = Listener.__new__(Listener)
        plans, acceptors = made
        listener._set_up(Channel if handle.face == "channel" else Stream, plans, acceptors, authorize)
        return listener
    driver = driver_for()
    return (Channel if kind == "channel" else Stream)(await driver.run(made), driver)


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
    """Runs a handler for each connection. Made by `serve`; use it with `async with`, or `start` and `close` it."""

    def __init__(
        self,
        handler: Callable[[F], Awaitable[object]],
        make_listener: Callable[[], Listener[F]],
        limit: int | None,
        close_timeout: float,
    ) -> None:
        if not callable(handler):
            raise TypeError(f"a handler is a coroutine function of one argument, the connection, not {handler!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"a server's limit must be at least 1 connection, not {limit}")
        self._handler: Callable[[F], Awaitable[object]] = handler
        self._make_listener: Callable[[], Listener[F]] = make_listener
        self._limit = limit
        self._close_timeout = close_timeout
        self._listener: Listener[F] | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._addresses: list[Address] = []
        self.connections: set[F] = set()
        """The channels or streams whose handlers run now."""

    @property
    def addresses(self) -> list[Address]:
        """The real addresses, in the order given."""
        return list(self._addresses)

    async def start(self) -> Server[F]:
        """Listen and accept. `async with` does this."""
        if self._listener is None:
            self._listener = self._make_listener()
            self._addresses = self._listener.addresses
            self._accepting = asyncio.create_task(self._accept(self._listener))
        return self

    async def _accept(self, listener: Listener[F]) -> None:
        while True:
            if self._limit is not None:
                while len(self._tasks) >= self._limit:      # the rest waits in the kernel's backlog
                    self._room.clear()
                    await self._room.wait()
            try:
                acceptor, endpoint = await listener.next()
            except ChannelClosed:           # nobody else can come (a pipe): serve those who are here, until the close
                await asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._run(listener, acceptor, endpoint))
            self._tasks.add(task)
            task.add_done_callback(self._done)
            del endpoint, task              # else the last connection stays until the next one comes

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.set()

    async def _run(self, listener: Listener[F], acceptor: Any, endpoint: Any) -> None:
        try:
            connection: F | None = await listener.establish(acceptor, endpoint)
        except asyncio.CancelledError:
            endpoint.release()
            raise
        except Exception as error:
            listener._passed_over(acceptor, error)
            return
        if connection is None:
            return
        self.connections.add(connection)
        try:
            try:
                await self._handler(connection)
            except EndOfChannel:
                pass                        # the peer ended, and the handler let recv() say so
            await connection.close(timeout=self._close_timeout)
        except asyncio.CancelledError:
            connection.abort()
            raise
        except Exception as error:
            if listener._is_peers_doing(error):
                log.info("%s", establish.told("handler of", connection.address, error))
            else:
                listener._slot.add("handler_errors")
                log.exception("handler of %s failed; the connection was dropped", connection.address)
            connection.abort()
        finally:
            self.connections.discard(connection)

    async def serve_forever(self) -> None:
        """Serve until cancelled, then drain."""
        await self.start()
        assert self._accepting is not None
        try:
            await asyncio.shield(self._accepting)
        finally:
            await self.close()

    async def close(self, *, timeout: float | None = None) -> None:
        """Stop listening, let handlers finish for `timeout` seconds (default: the server's), then cancel them."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        await self._stop_accepting(listener)
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=self._close_timeout if timeout is None else timeout)
        await self._cancel_handlers()

    async def abort(self) -> None:
        """Stop listening and drop every connection at once."""
        listener, self._listener = self._listener, None
        if listener is not None:
            await self._stop_accepting(listener)
        await self._cancel_handlers()

    async def _stop_accepting(self, listener: Listener[F]) -> None:
        assert self._accepting is not None
        self._accepting.cancel()
        await asyncio.wait([self._accepting])
        listener.close()

    async def _cancel_handlers(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Server[F]:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await self.abort()
        else:
            await self.close()

    def __repr__(self) -> str:
        where = ", ".join(str(address) for address in self._addresses) or "not started"
        return f"<anywire.Server {where}, {len(self.connections)} connections>"


def serve(
    handler: Callable[[Channel], Awaitable[object]],
    *addresses: str | Address,
    limit: int | None = None,
    max_message: int | None = None,
    handshake_timeout: float = HANDSHAKE_TIMEOUT,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Server[Channel]:
    """Serve `handler(channel)`, a coroutine function, on addresses of any wires.

    Parameters:
        limit: most connections at once; further ones wait in the backlog.
        max_message, handshake_timeout, authorize, wire_options: as `connect`.
        backlog: connections that may wait to be accepted.
        close_timeout: seconds that a closing server gives its handlers, and a closing channel its peer.

    A channel is closed politely when its handler returns, and dropped (the peer sees a loss) when the handler raises.
    """

    def listener() -> Listener[Channel]:
        return Listener(Channel, addresses, max_message, handshake_timeout, authorize, backlog, wire_options)

    return Server(handler, listener, limit, close_timeout)


def serve_stream(
    handler: Callable[[Stream], Awaitable[object]],
    *addresses: str | Address,
    limit: int | None = None,
    authorize: Authorize | None = None,
    backlog: int = 1024,
    close_timeout: float = 5.0,
    **wire_options: Any,
) -> Server[Stream]:
    """As `serve`, for streams of bytes: the handler gets a Stream. Unsupported on message wires."""

    def listener() -> Listener[Stream]:
        return Listener(Stream, addresses, None, HANDSHAKE_TIMEOUT, authorize, backlog, wire_options)

    return Server(handler, listener, limit, close_timeout)
