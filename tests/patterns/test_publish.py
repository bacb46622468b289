"""Publish and subscribe: what every subscriber gets, whatever happens to the others."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from typing import Any

import pattern_roles as roles
import pytest
from conformance.fronts import ABANDONED
from conformance.roles import message, number_of
from conformance.wires import client_address
from pattern_world import WIRES, Many, until

import anywire
from anywire.contract.wire import register, unregister
from anywire.patterns.controls import END, SKIPPED, control
from anywire.wires.inproc import InprocWire

PROCESSES = [wire for wire in WIRES if wire != "inproc"]
SMALL = 1 << 10


async def fill(publisher: Any, first: int = 0) -> int:
    """Publish numbered messages until there is no room; the number after the last one."""
    for number in itertools.count(first):
        for _ in range(100):
            if publisher.try_send(message(number, SMALL)):
                break
            await asyncio.sleep(0.002)          # the channel's own buffers take some more
        else:
            return number
    raise AssertionError


# -- what a subscriber gets ---


async def test_every_subscriber_gets_every_message_in_order(many: Many) -> None:
    async with many.publish() as publisher:
        address = many.client(publisher)
        peers = [await many.subscriber(address) for _ in range(3)]
        assert len(publisher.subscribers) == 3
        ways = (roles.take_numbers, roles.take_batches, roles.take_runs)
        taking = [peer.start(way) for peer, way in zip(peers, ways, strict=True)]
        for number in range(1000):
            await publisher.send(message(number, 8 + number % 300))
        await publisher.send_many(message(number) for number in range(1000, 6000))
        assert publisher.stats().sent == 6000
    numbers, batches, (runs, gaps, error) = await asyncio.gather(*taking)
    assert numbers == batches == runs == list(range(6000))
    assert gaps == []
    assert error["kind"] == "EndOfChannel"


async def test_a_subscription_on_this_front_gets_all_up_to_the_end(many: Many) -> None:
    peer, address = await many.publisher()
    async with many.subscribe(address) as subscription:
        sending = peer.start(roles.publish_numbers, 0, 500)
        assert number_of(await subscription.recv()) == 0
        assert number_of(await subscription.recv(copy=False)) == 1
        numbers = []
        while len(numbers) < 100:
            numbers += map(number_of, await subscription.recv_many(100 - len(numbers)))
        assert numbers == list(range(2, 102))
        await sending
        ending = peer.start(roles.end)
        assert [number_of(data) async for data in subscription] == list(range(102, 500))
        with pytest.raises(anywire.EndOfChannel):
            await subscription.recv()
        with pytest.raises(anywire.EndOfChannel):
            await subscription.recv_many()
        assert subscription.lost == 0
    await ending


async def test_messages_of_every_size_come_whole_also_what_looks_like_a_control_message(many: Many) -> None:
    largest = 60 << 10 if many.setup.name == "seqpacket" else 3 << 20
    alike = [control(END), control(SKIPPED, 5), os.urandom(31), bytes(32)]
    messages = [b"", b"x", *alike, os.urandom(largest), control(END)]
    async with many.publish() as publisher, many.subscribe(many.client(publisher)) as subscription:
        for data in messages:
            await publisher.send(data)
            assert await subscription.recv() == data
        sending = asyncio.ensure_future(publisher.send_many(messages))
        got: list[bytes] = []
        while len(got) < len(messages):
            got += await subscription.recv_many()
        assert got == messages
        await sending
        await publisher.send(bytearray(b"a buffer"))
        assert bytes(await subscription.recv(copy=False)) == b"a buffer"


async def test_who_joins_gets_what_is_sent_from_then_on_and_leaving_disturbs_nobody(many: Many) -> None:
    async with many.publish() as publisher:
        address = many.client(publisher)
        staying = (await many.subscriber(address)).start(roles.take_numbers)
        number = 0
        for _ in range(5):
            guest = await many.subscriber(address)
            first = number
            taking = guest.start(roles.take_numbers, 40)
            for _ in range(50):
                await publisher.send(message(number))
                number += 1
            assert await taking == list(range(first, first + 40))
            await guest.call(roles.leave)
            await until(lambda: len(publisher.subscribers) == 1)
        assert publisher.stats().left == 5
    assert await staying == list(range(number))


@pytest.mark.only(wires=["unix"])
async def test_one_publisher_on_several_wires(many: Many) -> None:
    addresses = [many.listen_address(), "tcp://127.0.0.1:0", f"inproc://{os.getpid()}-several"]
    async with many.publish(*addresses) as publisher:
        assert [address.scheme for address in publisher.addresses] == ["unix", "tcp", "inproc"]
        takers = []
        for address in publisher.addresses[:2]:
            takers.append((await many.subscriber(str(address))).start(roles.take_numbers))
        async with many.subscribe(addresses[2]) as subscription:
            await publisher.send_many(map(message, range(100)))
            assert [number_of(await subscription.recv()) for _ in range(100)] == list(range(100))
    assert await asyncio.gather(*takers) == [list(range(100))] * 2


# -- the slow, the stopped and the dead ---


async def test_the_slowest_live_subscriber_gates_the_writer(many: Many) -> None:
    async with many.publish(depth=50, stall_timeout=60) as publisher:
        peer = await many.subscriber(many.client(publisher))
        sent = await fill(publisher)
        with pytest.raises(anywire.TimedOut):
            await publisher.send(message(sent, SMALL), timeout=0.05)
        assert publisher.stats().queued <= 50
        sending = asyncio.ensure_future(publisher.send(message(sent, SMALL)))
        taking = peer.start(roles.take_numbers)
        await sending
    assert await taking == list(range(sent + 1))


@pytest.mark.only(wires=PROCESSES)
async def test_a_killed_subscriber_is_dropped_at_once(many: Many) -> None:
    async with many.publish(depth=50, stall_timeout=3600) as publisher:
        address = many.client(publisher)
        victim, other = await many.subscriber(address), await many.subscriber(address)
        taking = other.start(roles.take_numbers)
        sent = await fill(publisher)                # the victim takes nothing, and the writer waits for it
        sending = asyncio.ensure_future(publisher.send(message(sent, SMALL)))
        victim.kill()
        await sending
        assert len(publisher.subscribers) == 1
        stats = publisher.stats()
        assert (stats.died, stats.left) == (1, 0)
    assert await taking == list(range(sent + 1))


@pytest.mark.only(wires=PROCESSES)
async def test_an_idle_subscriber_that_is_killed_is_gone_at_once(many: Many) -> None:
    async with many.publish() as publisher:
        victim = await many.subscriber(many.client(publisher))
        victim.kill()
        await until(lambda: not publisher.subscribers)
        stats = publisher.stats()
        assert (stats.died, stats.left) == (1, 0)
        await publisher.send(b"to nobody")


async def test_a_stopped_subscriber_is_dropped_after_the_writers_patience_and_told_why(many: Many) -> None:
    async with many.publish(depth=50, stall_timeout=0.5) as publisher:
        address = many.client(publisher)
        stopped, other = await many.subscriber(address), await many.subscriber(address)
        if many.setup.processes:
            await stopped.freeze()
        taking = other.start(roles.take_numbers)
        count = 8000
        for number in range(count):
            await publisher.send(message(number, SMALL))
        stats = publisher.stats()
        assert (stats.stalled, stats.subscribers, stats.died) == (1, 1, 0)
        if many.setup.processes:
            stopped.signal(signal.SIGCONT)
        numbers, gaps, error = await stopped.call(roles.take_runs)
        assert numbers == list(range(len(numbers))) and len(numbers) < count
        assert gaps == []
        assert error["kind"] == "TooSlow" and "ConnectionAbortedError" in error["classes"]
        assert error["seconds"] == 0.5
        assert (await stopped.call(roles.take_runs))[2]["kind"] == "TooSlow"        # also the next time
        await publisher.send(message(count, SMALL))
    assert await taking == list(range(count + 1))


@pytest.mark.only(wires=["unix", "inproc"])
async def test_a_slow_subscriber_is_not_taken_for_a_stopped_one(many: Many) -> None:
    async with many.publish(depth=20, stall_timeout=1.0) as publisher:
        peer = await many.subscriber(many.client(publisher))
        taking = peer.start(roles.take_numbers, 12, 0.2)
        sent = await fill(publisher)                # its channel holds more than it will take in the writer's patience
        await publisher.send(message(sent, SMALL), timeout=None if sent < 12 else 0.01) if sent < 12 else None
        assert await taking == list(range(12))
        assert publisher.stats().stalled == 0
        rest = peer.start(roles.take_numbers)
        await publisher.send(message(sent, SMALL))
    assert await rest == list(range(12, sent + 1))


@pytest.mark.only(wires=["unix", "tcp", "shm"])
async def test_a_publisher_that_was_stopped_itself_blames_nobody_for_it(many: Many) -> None:
    peer, address = await many.publisher(stall_timeout=0.6, depth=10)
    async with many.subscribe(address) as subscription:
        count = 12000
        sending = peer.start(roles.publish_numbers, 0, count, SMALL)
        assert number_of(await subscription.recv()) == 0
        await asyncio.sleep(0.1)                    # what its channel holds is full
        await peer.freeze()
        await asyncio.sleep(1.0)
        peer.signal(signal.SIGCONT)
        await asyncio.sleep(0.05)
        for number in range(1, count):
            assert number_of(await subscription.recv()) == number
        await sending


@pytest.mark.only(wires=["unix", "tls", "inproc"])
async def test_authorize_and_waiting_for_the_publisher(many: Many) -> None:
    asked: list[Any] = []
    address = await many.free_address()
    peer = await many.peer()
    options = many.client_options(wait=20)
    subscribing = peer.start(roles.subscribe, client_address(address), **options)
    await asyncio.sleep(0.05)
    async with many.publish(address, authorize=lambda peer: asked.append(peer) or len(asked) != 2) as publisher:
        await subscribing
        assert len(publisher.subscribers) == len(asked) == 1
        with pytest.raises(anywire.Refused if many.setup.name != "inproc" else anywire.AnywireError):
            async with many.subscribe(many.client(publisher)):
                pass
        await publisher.send(message(0))
        assert await peer.call(roles.take_numbers, 1) == [0]
        await peer.call(roles.leave)


async def test_a_message_over_a_subscribers_limit_drops_it_alone_and_tells_it(many: Many) -> None:
    async with many.publish() as publisher:
        address = many.client(publisher)
        other = (await many.subscriber(address)).start(roles.take_numbers)
        if many.setup.name == "seqpacket":
            with pytest.raises(anywire.TooLarge):
                await publisher.send(bytes(17 << 20))
        else:
            narrow = await many.subscriber(address, max_message=1000)
            await publisher.send(message(0, 1000))
            await publisher.send(message(1, 1001))
            numbers, _, error = await narrow.call(roles.take_runs)
            assert numbers == [0]
            assert error["kind"] == "TooLarge" and (error["size"], error["limit"]) == (1001, 1000)
            await until(lambda: publisher.stats().dropped == 1)
    assert await other == ([] if many.setup.name == "seqpacket" else [0, 1])


# -- loans ---


async def test_a_loan_goes_to_every_subscriber_and_is_closed_when_it_went(many: Many) -> None:
    async with many.publish(depth=50, stall_timeout=3600, close_timeout=0.2) as publisher:
        address = many.client(publisher)
        sizes = [8, 32, 5000, 60_000 if many.setup.name == "seqpacket" else 300_000]
        takers = [(await many.subscriber(address)).start(roles.take_numbers, len(sizes)) for _ in range(2)]
        for number, size in enumerate(sizes):
            loan = publisher.loan(size)
            assert len(loan) == size
            with memoryview(loan) as view:
                view[:] = message(number, size)
            if number % 2:
                await publisher.send(loan)
            else:
                await publisher.send_many([loan])
            with pytest.raises(BufferError, match="was sent"):
                memoryview(loan)
            with pytest.raises(BufferError, match="was sent"):
                publisher.try_send(loan)
        loan = publisher.loan(32)
        memoryview(loan)[:] = control(END)                  # which it only looks like
        slow = await many.subscriber(address)
        await publisher.send(loan)
        assert await slow.call(take_one) == control(END)
        assert await asyncio.gather(*takers) == [list(range(len(sizes)))] * 2
    with pytest.raises(anywire.ChannelClosed):
        publisher.loan(8)


def take_one(peer: Any) -> bytes:
    taken: bytes = peer.channel.recv()
    return taken


async def test_a_loan_that_found_no_room_is_still_the_callers(many: Many) -> None:
    async with many.publish(depth=50, stall_timeout=3600) as publisher:
        peer = await many.subscriber(many.client(publisher))
        sent = await fill(publisher)
        loan = publisher.loan(SMALL)
        memoryview(loan)[:] = message(sent, SMALL)
        assert not publisher.try_send(loan)
        with pytest.raises(anywire.TimedOut):
            await publisher.send(loan, timeout=0.02)
        assert bytes(memoryview(loan)) == message(sent, SMALL)
        taking = peer.start(roles.take_numbers)
        await publisher.send(loan)
    assert await taking == list(range(sent + 1))


# -- latest ---


async def test_latest_never_waits_and_each_loss_is_told_exactly(many: Many) -> None:
    async with many.publish(mode="latest", depth=100) as publisher:
        address = many.client(publisher)
        behind, other = await many.subscriber(address), await many.subscriber(address, losses="count")
        if many.setup.processes:
            await behind.freeze()
        quick = other.start(roles.take_runs)
        count = 6000
        for number in range(count):
            assert publisher.try_send(message(number, SMALL))
            if number % 100 == 0:
                await asyncio.sleep(0)
        assert publisher.stats().queued <= 100 + 64 + 100 // 8
        if many.setup.processes:
            behind.signal(signal.SIGCONT)
        closing = asyncio.ensure_future(publisher.close())
        await asyncio.sleep(0.05)           # who is behind finds the end there already, which displaces no message
        slow = behind.start(roles.take_runs)
        await closing
        for (numbers, gaps, error), told in ((await slow, True), (await quick, False)):
            assert error["kind"] == "EndOfChannel"
            assert len(numbers) + error["counted"] == count
            assert numbers[-100:] == list(range(count - 100, count))      # who is behind has at least the latest
            if told:
                assert gaps, "it was never behind"
                assert sum(lost for _, lost in gaps) == error["counted"]
                expected = list(range(count))
                for index, lost in gaps:
                    del expected[index : index + lost]
                assert numbers == expected
            else:
                assert gaps == [] and numbers == sorted(set(numbers))
        stats = publisher.stats()
        assert stats.stalled == 0


async def test_both_sides_count_the_same_losses_and_the_subscription_goes_on(many: Many) -> None:
    async with many.publish(mode="latest", depth=10) as publisher:
        async with many.subscribe(many.client(publisher)) as subscription:
            count = lost = 0
            for _ in range(3):
                while publisher.stats().queued < 10 or count < 5000:    # until its channel is full, and the log too
                    await publisher.send(message(count, SMALL))
                    count += 1
                count += 100
                await publisher.send_many(message(number, SMALL) for number in range(count - 100, count))
                expected = 0 if not lost else None
                while expected != count:
                    try:
                        number = number_of(await subscription.recv())
                        assert expected in (None, number)
                        expected = number + 1
                    except anywire.MessagesLost as error:
                        lost += error.lost
                        expected = None if expected is None else expected + error.lost
                        assert subscription.lost == lost
                assert publisher.stats().lost == lost > 0
        with pytest.raises(ValueError, match="losses"):
            async with many.subscribe(many.client(publisher), losses="ignore"):
                pass


@pytest.mark.parametrize("mode", ["latest", "reliable"])
async def test_queues_are_bounded_in_bytes(many: Many, mode: str) -> None:
    options = {"mode": mode, "depth_bytes": 100_000, "stall_timeout": 60, "close_timeout": 0.05}
    async with many.publish(**options) as publisher, many.subscribe(many.client(publisher)):
        for _ in range(600):
            publisher.try_send(bytes(20_000))
            assert publisher.stats().queued_bytes < 120_000
            await asyncio.sleep(0)
        if mode == "reliable":
            await until(lambda: not publisher.try_send(bytes(20_000)))
        await (publisher.abort() if not many.blocking else many.front.threads.run(publisher.abort))


# -- ends, and strangers ---


@pytest.mark.only(wires=PROCESSES)
async def test_the_publishers_death_is_a_loss(many: Many) -> None:
    peer, address = await many.publisher()
    async with many.subscribe(address) as subscription:
        await peer.call(roles.publish_numbers, 0, 3)
        for number in range(3):
            assert number_of(await subscription.recv()) == number
        receiving = asyncio.ensure_future(subscription.recv())
        await asyncio.sleep(0)
        peer.kill()
        with pytest.raises(anywire.PeerLost):
            await receiving
        with pytest.raises(anywire.PeerLost):
            await subscription.recv_many()


async def test_a_publisher_that_aborts_is_a_loss(many: Many) -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        async with many.publish() as publisher:
            peer = await many.subscriber(many.client(publisher))
            await publisher.send(message(0))
            assert await peer.call(roles.take_numbers, 1) == [0]
            raise RuntimeError("on purpose")
    assert (await peer.call(roles.take_runs))[2]["kind"] == "PeerLost"


async def test_strangers_are_refused_and_nobody_else_notices(many: Many) -> None:
    async with many.publish(handshake_timeout=0.2) as publisher:
        address = many.client(publisher)
        taking = (await many.subscriber(address)).start(roles.take_numbers)
        garbage = await many.connect(address)
        await garbage.send(b"GET / HTTP/1.1\r\n\r\n")
        await garbage.recv()                                    # told that this is a publisher
        with pytest.raises(anywire.AnywireError):
            await garbage.recv()
        silent = await many.connect(address)
        with pytest.raises(anywire.AnywireError):
            await silent.recv()
        talking = await many.connect(address)
        await talking.send(control(roles.SUBSCRIBE))
        await talking.recv()
        assert len(publisher.subscribers) == 2
        await talking.send(b"more than a subscriber may say")
        await until(lambda: len(publisher.subscribers) == 1)
        stats = publisher.stats()
        assert (stats.refused, stats.dropped) == (2, 1)
        await publisher.send(message(0))
    assert await taking == [0]


async def test_subscribing_to_what_is_no_publisher_is_refused(many: Many) -> None:
    async def echo(channel: Any) -> None:
        async for data in channel:
            await channel.send(data)

    async with many.front.serve(echo, many.listen_address()) as server:
        with pytest.raises(anywire.Refused, match="is a subscriber, not a publisher") as caught:
            async with many.subscribe(many.client(server)):
                pass
        assert caught.value.answered


async def test_a_closed_publisher_says_so(many: Many) -> None:
    async with many.publish() as publisher:
        address = many.client(publisher)
    with pytest.raises(anywire.ChannelClosed):
        await publisher.send(b"too late")
    with pytest.raises(anywire.ChannelClosed):
        publisher.try_send(b"too late")
    with pytest.raises(anywire.Refused):
        async with many.subscribe(address):
            pass


@pytest.mark.only(wires=["unix"])
async def test_wires_that_keep_no_order_are_refused_early(many: Many) -> None:
    for address in ("udp://127.0.0.1:0", f"fifo://{many.directory}/fifo"):
        with pytest.raises(anywire.Unsupported):
            async with many.publish(address):
                pass
        with pytest.raises(anywire.Unsupported):
            async with many.opened("subscribe", address):
                pass


@pytest.mark.only(wires=["unix"], fronts=["blocking"])
async def test_in_a_forked_child_a_blocking_publisher_says_so(many: Many) -> None:
    async with many.publish() as publisher:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                publisher.inner.send(b"from the child")
            except anywire.Forked:
                os.write(writing, b"forked")
            finally:
                os._exit(0)
        os.close(writing)
        assert os.read(reading, 100) == b"forked"
        os.close(reading)
        os.waitpid(pid, 0)


# -- cancelling ---


async def test_abandoned_calls_lose_and_double_nothing(many: Many) -> None:
    front = many.front
    async with many.publish(depth=20, stall_timeout=60) as publisher:
        address = many.client(publisher)
        peer = await many.subscriber(address)
        taking = peer.start(roles.take_numbers)
        async with many.subscribe(address) as subscription:
            sent: list[int] = []
            got: list[int] = []
            abandoned = {"send": 0, "recv": 0}
            enough = asyncio.Event()

            async def sender() -> None:
                for number in itertools.count():
                    if enough.is_set() or number > 6000:
                        return
                    way = front.ways_to_abandon[number % len(front.ways_to_abandon)]
                    result = await front.abandon(
                        publisher.send, message(number, 8 + 1000 * (number % 7)), turns=number % 4, way=way
                    )
                    if result is ABANDONED:
                        abandoned["send"] += 1
                    sent.append(number)

            async def receiver() -> None:
                for number in itertools.count():
                    way = front.ways_to_abandon[number % len(front.ways_to_abandon)]
                    call = subscription.recv if number % 3 else subscription.recv_many
                    try:
                        result = await front.abandon(call, turns=number % 5, way=way)
                    except anywire.EndOfChannel:
                        return
                    if result is ABANDONED:
                        abandoned["recv"] += 1
                        if abandoned["recv"] > 60 and abandoned["send"] > 20:
                            enough.set()
                    else:
                        got.extend(map(number_of, result if isinstance(result, list) else [result]))
                        if number % 10 == 0:
                            await asyncio.sleep(0.001)          # so that the writer must wait too

            receiving = asyncio.ensure_future(receiver())
            await sender()
            closing = asyncio.ensure_future(
                publisher.close() if not many.blocking else front.threads.run(publisher.inner.close)
            )
            await receiving
        await closing
    assert abandoned["recv"]
    assert got == sorted(set(got)) and set(got) <= set(sent)
    assert await taking == got                  # each message went to all or to nobody


# -- idle ---


@pytest.mark.only(wires=PROCESSES)
async def test_no_cpu_while_idle(many: Many) -> None:
    peer, address = await many.publisher(stall_timeout=0.1)
    async with many.subscribe(address) as subscription:
        subscriber = await many.subscriber(address)
        await peer.call(roles.publish_numbers, 0, 1)
        assert number_of(await subscription.recv()) == 0
        assert await subscriber.call(roles.take_numbers, 1) == [0]
        await asyncio.sleep(0.3)                # what was under way (the watch for stalls) comes to rest
        waiting = asyncio.ensure_future(subscription.recv())
        assert await peer.call(roles.switches, 1.0) <= 5      # the watch for stalls would be ten
        await peer.call(roles.publish_numbers, 1, 1)
        assert number_of(await waiting) == 1


# -- a wire's own broadcast ---


class OwnBroadcast(InprocWire):
    """A wire that brings both ends itself."""

    schemes = ("ownbroadcast",)

    def publisher(self, front: Any, address: Any, settings: Any) -> Any:
        return ("publisher", front, str(address), settings["mode"], settings["own"])

    def subscriber(self, front: Any, address: Any, settings: Any) -> Any:
        return ("subscriber", front, str(address), settings["losses"], settings["own"])


def test_a_wires_own_publisher_and_subscriber_come_first() -> None:
    address = "ownbroadcast://news"
    register(OwnBroadcast)
    try:
        for front, module in (("async", anywire), ("blocking", anywire.sync)):
            made = module.publish(address, mode="latest", own=1)
            assert made == ("publisher", front, address, "latest", 1)
            made = module.subscribe(address, own=2)
            assert made == ("subscriber", front, address, "raise", 2)
        several = anywire.publish(address, "inproc://news")
        assert isinstance(several, anywire.Publisher)
    finally:
        unregister(OwnBroadcast)
