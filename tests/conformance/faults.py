"""Faults to seed: the library broken on purpose, so that the suite can show that it notices.

Owns: one function a fault, which replaces something the library's Python code looks up by name: the Channel class of a
facade, or a step of establishment. Nothing in the library knows of this. Called by conftest.py and by the peers' host,
in a process that the environment variable ANYWIRE_FAULT tells to. `test_faults.py` says which scenarios must turn red.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import anywire
import anywire.facade
import anywire.sync
from anywire.contract import blocking, channel
from anywire.framing.preamble import Preamble
from anywire.wires import establish

FAULTS: dict[str, tuple[str, Callable[[], None]]] = {}
"""By name: which scenarios must fail (an expression for pytest -k), and what installs the fault."""


def fault(scenarios: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(install: Callable[[], None]) -> Callable[[], None]:
        FAULTS[install.__name__] = (scenarios, install)
        return install

    return add


def install(name: str) -> None:
    FAULTS[name][1]()


def use(async_class: Any = None, blocking_class: Any = None) -> None:
    """Make the facades build channels of these classes."""
    if async_class is not None:
        anywire.facade.Channel = async_class
    if blocking_class is not None:
        anywire.sync.Channel = blocking_class  # type: ignore[misc]


# -- receiving ---


@fault("test_echo and inproc and async")
def lost_wakeup() -> None:
    """A receiver that found nothing is not woken by what comes."""

    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            operation = super().recv(**options)
            try:
                operation.send(None)
            except StopIteration as returned:
                return returned.value
            return await asyncio.get_running_loop().create_future()

    use(Channel)


@fault("test_an_abandoned_recv_leaves_the_message and tcp and async")
def message_dropped_on_cancel() -> None:
    """The message is taken, and then there is one more await."""

    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            message = await super().recv(**options)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return message

    use(Channel)


@fault("test_a_thousand_random_abandonments_under_load and tcp and blocking")
def message_dropped_on_time_out() -> None:
    """A message that arrives together with the time-out is thrown away."""

    class Channel(blocking.Channel):
        def recv(self, *, timeout: float | None = None, **options: Any) -> Any:
            started = time.monotonic()
            message = super().recv(timeout=timeout, **options)
            if timeout is not None and time.monotonic() - started > timeout / 2:
                raise anywire.TimedOut(timeout)
            return message

    use(None, Channel)


@fault("test_ten_thousand_in_order_received and inproc")
def reordered() -> None:
    """Now and then two neighbours change places."""

    def recv_many(original: Any) -> Any:
        return list(reversed(original)) if len(original) == 2 or len(original) > 20 else original

    class Channel(channel.Channel):
        async def recv_many(self, *args: Any, **options: Any) -> Any:
            return recv_many(await super().recv_many(*args, **options))

    class Blocking(blocking.Channel):
        def recv_many(self, *args: Any, **options: Any) -> Any:
            return recv_many(super().recv_many(*args, **options))

    use(Channel, Blocking)


@fault("test_ten_thousand_in_order_received and tcp")
def duplicated() -> None:
    """Every thousandth message is sent twice."""

    class Channel(blocking.Channel):
        def send_many(self, messages: Any, **options: Any) -> Any:
            messages = list(messages)
            super().send_many([*messages, *messages[-1:]] if len(messages) < 64 else messages, **options)

    use(None, Channel)


@fault("test_an_abandoned_recv_into and tcp and async")
def recv_into_writes_later() -> None:
    """A cancelled recv_into keeps its buffer and writes into it when the message comes."""

    class Channel(channel.Channel):
        async def recv_into(self, buffer: Any, **options: Any) -> Any:
            try:
                return await super().recv_into(buffer, **options)
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_later(0.001, self.write_later, memoryview(buffer))
                raise

        @staticmethod
        def write_later(view: memoryview) -> None:
            view[:1] = b"\x01"

    use(Channel)


@fault("test_a_second_receiver_gets_busy and tcp")
def busy_not_enforced() -> None:
    """A second receiver waits its turn, and nobody learns of the mistake."""

    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            while True:
                try:
                    return await super().recv(**options)
                except anywire.Busy:
                    await asyncio.sleep(0.001)

    class Blocking(blocking.Channel):
        def recv(self, **options: Any) -> Any:
            while True:
                try:
                    return super().recv(**options)
                except anywire.Busy:
                    time.sleep(0.001)

    use(Channel, Blocking)


@fault("test_recv_with_a_timeout_says_so and tcp and blocking")
def timeout_ignored() -> None:
    class Channel(blocking.Channel):
        def recv(self, *, timeout: float | None = None, **options: Any) -> Any:
            return super().recv(**options)

    use(None, Channel)


# -- sending ---


@fault("test_sender_waits_for_a_reader_that_stopped and inproc and async")
def unbounded_buffer() -> None:
    """Sends never wait: what the wire doesn't take is kept in a list."""

    class Channel(channel.Channel):
        def try_send(self, data: Any) -> bool:
            kept = _kept.setdefault(id(self), [])
            if not super().try_send(data):
                kept.append(bytes(data))
            return True

    _kept: dict[int, list[bytes]] = {}
    use(Channel)


@fault("test_senders_side_by_side_stay_whole and tcp and async")
def senders_interleave() -> None:
    """Larger messages go in two parts, between which another sender may come."""

    class Channel(channel.Channel):
        async def send(self, data: Any, **options: Any) -> None:
            if len(data) > 1000:
                await super().send(data[: len(data) // 2], **options)
                await super().send(data[len(data) // 2 :], **options)
            else:
                await super().send(data, **options)

    use(Channel)


@fault("test_limit_exactly_and_one_byte_more and tcp")
def over_limit_dropped() -> None:
    """A message over the limit is dropped without a word."""

    class Channel(channel.Channel):
        async def send(self, data: Any, **options: Any) -> None:
            try:
                await super().send(data, **options)
            except anywire.TooLarge:
                pass

    class Blocking(blocking.Channel):
        def send(self, data: Any, **options: Any) -> None:
            try:
                super().send(data, **options)
            except anywire.TooLarge:
                pass

    use(Channel, Blocking)


@fault("test_an_abandoned_send_goes_whole_or_not_at_all and tcp and async")
def cancelled_send_loses_the_frame() -> None:
    """A cancelled send leaves a part of a frame on the wire, so the next one is out of step."""

    class Channel(channel.Channel):
        out_of_step = False

        async def send(self, data: Any, **options: Any) -> None:
            while self.out_of_step:
                sock = socket.socket(fileno=self.endpoint.write_fd)
                try:
                    sock.send(b"\x10\0\0", socket.MSG_DONTWAIT)       # its own descriptor would block
                    self.out_of_step = False
                except BlockingIOError:
                    pass
                finally:
                    sock.detach()
                if self.out_of_step:
                    if "timeout" in options:
                        raise anywire.TimedOut(options["timeout"])
                    await asyncio.sleep(0.001)
            try:
                await super().send(data, **options)
            except asyncio.CancelledError:
                self.out_of_step = True
                raise

    use(Channel)


@fault("test_counters_equal_what_happened and tcp")
def counters_wrong() -> None:
    """Messages sent in a batch are counted as one."""

    class Stats:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            value = getattr(self.real, name)
            return value - 2 if name == "messages_sent" else value

    class Channel(channel.Channel):
        def stats(self) -> Any:
            return Stats(super().stats())

    class Blocking(blocking.Channel):
        def stats(self) -> Any:
            return Stats(super().stats())

    use(Channel, Blocking)


# -- ends ---


@fault("(test_an_abort_is_a_loss or test_an_end_at_every_offset) and tcp")
def loss_taken_for_a_clean_end() -> None:
    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            try:
                return await super().recv(**options)
            except anywire.PeerLost as error:
                raise anywire.EndOfChannel from error

    class Blocking(blocking.Channel):
        def recv(self, **options: Any) -> Any:
            try:
                return super().recv(**options)
            except anywire.PeerLost as error:
                raise anywire.EndOfChannel from error

    use(Channel, Blocking)


@fault("test_an_end_inside_a_large_message and tcp and async")
def truncated_frame_accepted() -> None:
    """The part of a message that came before the loss is given out as a message."""

    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            try:
                return await super().recv(**options)
            except anywire.PeerLost:
                return b"what came"

    use(Channel)


@fault("(test_we_half_close or test_half_close_wakes) and inproc")
def half_close_closes_both() -> None:
    class Channel(channel.Channel):
        async def send_eof(self, **options: Any) -> None:
            await super().send_eof(**options)
            self.abort()

    class Blocking(blocking.Channel):
        def send_eof(self, **options: Any) -> None:
            super().send_eof(**options)
            self.abort()

    use(Channel, Blocking)


@fault("test_close_with_unread_input_destroys_nothing and tcp")
def close_does_not_read_to_the_end() -> None:
    class Channel(channel.Channel):
        async def close(self, **options: Any) -> None:
            self.abort()

    class Blocking(blocking.Channel):
        def close(self, **options: Any) -> None:
            self.abort()

    use(Channel, Blocking)


@fault("test_close_keeps_its_deadline and tcp")
def close_waits_for_ever() -> None:
    class Channel(channel.Channel):
        async def close(self, *, timeout: float = 5.0) -> None:
            await super().close(timeout=1000)

    class Blocking(blocking.Channel):
        def close(self, *, timeout: float = 5.0) -> None:
            super().close(timeout=1000)

    use(Channel, Blocking)


@fault("test_unconfirmed_is_exact_after_a_reply and tcp")
def unconfirmed_wrong() -> None:
    """Whatever was sent is taken for confirmed."""

    class Channel(channel.Channel):
        unconfirmed = 0

    class Blocking(blocking.Channel):
        unconfirmed = 0

    use(Channel, Blocking)


@fault("test_a_waiting_receiver_sees_it_within_100_ms and tcp and async")
def death_seen_late() -> None:
    """The kind of bug that a heartbeat is: death is noticed by a timer."""

    class Channel(channel.Channel):
        async def recv(self, **options: Any) -> Any:
            try:
                return await super().recv(**options)
            except anywire.PeerLost:
                await asyncio.sleep(0.3)
                raise

    use(Channel)


# -- connections ---


@fault("(test_a_thousand_connections or test_aborted_channels) and tcp and async")
def leaked_descriptor() -> None:
    """Each channel keeps one descriptor for good."""

    class Channel(channel.Channel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    use(Channel)


@fault("test_strangers_at_the_server and tcp")
def garbage_accepted() -> None:
    """Any 24 bytes are a preamble."""

    def read_anything(below: Any, timeout: float, operation: str) -> Any:
        data = b""
        while len(data) < 24:
            chunk = below.read_some(24 - len(data))
            if chunk is None:
                yield establish.Wait([(below.read_fd, below.want)], timeout)
            elif not chunk:
                raise anywire.PeerLost("the end")
            else:
                data += chunk
        return Preamble(16 << 20)

    establish.read_preamble_steps = read_anything


@fault("test_silence_fails_and_holds_nobody_up and tcp")
def silence_waits_for_ever() -> None:
    """The hand-shake's time-out is forgotten."""
    original = establish.read_preamble_steps

    def read_patiently(below: Any, timeout: float, operation: str) -> Any:
        return original(below, 1000.0, operation)

    establish.read_preamble_steps = read_patiently


@fault("test_exhausted_descriptors and tcp")
def exhaustion_spins() -> None:
    """Without descriptors, accept is tried again at once, for ever."""
    original = establish.Wait

    def impatient(watch: Any, timeout: float | None = None) -> Any:
        return original(watch, 0.0 if not watch else timeout)

    establish.Wait = impatient  # type: ignore[assignment, misc]


@fault("test_exhausted_descriptors and tcp")
def exhaustion_stops_the_listener() -> None:
    """Without descriptors, the listener gives up for good."""
    original = establish.next_steps

    def next_steps(acceptors: Any, on_error: Any = None) -> Any:
        def give_up(error: OSError) -> None:
            raise error

        return original(acceptors, give_up)

    establish.next_steps = next_steps


@fault("(test_authorize_refuses or test_authorize_by_yes_and_no) and tcp")
def authorize_ignored() -> None:
    def admit(answer: Any) -> None:
        return None

    anywire.facade.verdict_of = admit
    anywire.sync.verdict_of = admit


@fault("test_a_forked_child_is_refused_everything and tcp")
def fork_not_refused() -> None:
    class Channel(channel.Channel):
        def try_send(self, data: Any) -> bool:
            try:
                return super().try_send(data)
            except anywire.Forked:
                return True

    class Blocking(blocking.Channel):
        def try_send(self, data: Any) -> bool:
            try:
                return super().try_send(data)
            except anywire.Forked:
                return True

    use(Channel, Blocking)


# -- message queues ---


@fault("test_sender_waits_for_a_reader_that_stopped and mq-async")
def full_queue_forgets() -> None:
    """What a full queue has no room for is thrown away, and said to be sent."""
    from anywire.wires import mq

    class Sender:
        def __init__(self, queue: Any) -> None:
            self.queue = queue

        def __getattr__(self, name: str) -> Any:
            return getattr(self.queue, name)

        def _try_send(self, data: Any, priority: int) -> bool:
            self.queue._try_send(data, priority)
            return True

    def opened(address: Any, name: str, access: Any) -> Any:
        queue = original(address, name, access)
        return Sender(queue) if access == "w" else queue

    original, mq._open = mq._open, opened


@fault("test_ten_thousand_in_order_received and mq-async")
def priorities_change() -> None:
    """Every other message has a higher priority, so it overtakes the one before."""
    from anywire.wires import mq

    original = mq.MessageQueue._try_send
    turn = iter(range(10**9))

    class Sender:
        def __init__(self, queue: Any) -> None:
            self.queue = queue

        def __getattr__(self, name: str) -> Any:
            return getattr(self.queue, name)

        def _try_send(self, data: Any, priority: int) -> bool:
            return original(self.queue, data, next(turn) % 7)

    opened = mq._open
    mq._open = lambda address, name, access: (
        Sender(opened(address, name, access)) if access == "w" else opened(address, name, access)
    )


@fault("test_sender_waits_for_a_reader_that_stopped and sysv-async")
def full_queue_lets_try_send_pass() -> None:
    """What a System V queue has no room for is thrown away, and said to be sent."""

    class Channel(channel.Channel):
        def try_send(self, data: Any) -> bool:
            super().try_send(data)
            return True

        async def send(self, data: Any, **options: Any) -> None:
            super().try_send(data)

    use(Channel)


@fault("test_ten_thousand_in_order_received and sysv-async")
def types_overtake() -> None:
    """Messages have one of seven types, and the listener takes the lowest first."""
    from anywire.wires import sysv

    class Channel(blocking.Channel):
        def send_many(self, messages: Any, **options: Any) -> None:
            for number, message in enumerate(messages):
                self.endpoint.type = 1 + number % 7
                super().send_many([message], **options)

    original = sysv.SysvEndpoint
    sysv.SysvEndpoint = lambda recv, *args, wanted=0, **more: original(  # type: ignore[assignment, misc]
        recv, *args, wanted=-7 if recv >= 0 else 0, **more
    )
    use(None, Channel)
