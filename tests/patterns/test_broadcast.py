"""Shared memory's own publish and subscribe: one write for all readers, and what only shared memory can get wrong."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from typing import Any

import broadcast_roles
import pattern_roles as roles
import pytest
from conformance.roles import message, number_of
from pattern_world import Many, until

import anywire
from anywire.wires._shm_broadcast import MOST_READERS, BroadcastReader, SeatedEndpoint

pytestmark = pytest.mark.only(wires=["shm"])

NAMES = itertools.count()
LARGE = 200_000
POOL = 1 << 20


def name() -> str:
    """An address of this test's own, without options."""
    return f"shm://{os.getpid()}-broadcast-{next(NAMES)}"


def inner(end: Any) -> Any:
    """The publisher that does the work."""
    end = getattr(end, "inner", end)
    return getattr(end, "_inner", end)


def held(publisher: Any) -> int:
    """Pieces of the pool that are in use."""
    count: int = inner(publisher)._broadcast.memory_held()
    return count


async def test_all_subscribers_read_what_is_written_once(many: Many) -> None:
    async with many.publish(name(), pool=POOL) as publisher:
        address = many.client(publisher)
        async with many.subscribe(address) as one, many.subscribe(address) as other:
            for subscription in (one, other):
                end = getattr(subscription, "inner", subscription)._channel.endpoint
                assert isinstance(end, BroadcastReader)
            seated = [one.channel.endpoint for one in inner(publisher)._subscribers.values()]
            assert [type(end) for end in seated] == [SeatedEndpoint] * 2
            await publisher.send(message(1, LARGE))
            views = [await subscription.recv(copy=False) for subscription in (one, other)]
            assert [number_of(view) for view in views] == [1, 1]
            assert held(publisher) == 1                     # one copy, which both see
            with pytest.raises(TypeError, match="read-only"):
                views[0][0] = 1
            views[0].release()
            assert held(publisher) == 1
            views[1].release()
            assert held(publisher) == 0


async def test_a_loan_is_published_without_a_copy_and_its_memory_comes_back(many: Many) -> None:
    async with many.publish(name(), pool=POOL) as publisher, many.subscribe(many.client(publisher)) as one:
        loan = publisher.loan(LARGE)
        assert held(publisher) == 1
        del loan
        assert held(publisher) == 0                         # nobody sent it
        loan = publisher.loan(LARGE)
        with memoryview(loan) as filled:
            filled[:] = message(1, LARGE)
        await publisher.send(loan)
        view = await one.recv(copy=False)
        assert number_of(view) == 1 and held(publisher) == 1        # a copy would be a second one
        view.release()
        assert held(publisher) == 0                         # though somebody still has the closed loan
        del loan
        array = publisher.loan_array((LARGE // 8,), "uint64")
        array[:] = 7
        await publisher.send(array)
        assert held(publisher) == 1
        assert await one.recv() == (7).to_bytes(8, "little") * (LARGE // 8)
        assert held(publisher) == 1                         # it shows that memory
        await publisher.send(array)                         # so this is a copy
        assert held(publisher) == 2
        del array
        while held(publisher) != 1:                         # the thread that sent it forgets it in its own time
            await asyncio.sleep(0.001)
        assert len(await one.recv()) == LARGE // 8 * 8
        assert held(publisher) == 0


async def test_a_loan_that_finds_the_pool_full_is_private_and_its_send_waits(many: Many) -> None:
    async with many.publish(name(), pool=POOL, stall_timeout=3600) as publisher:
        peer = await many.subscriber(many.client(publisher))
        count = 0
        while held(publisher) < POOL // LARGE and publisher.try_send(message(count, LARGE)):
            count += 1
        loan = publisher.loan(LARGE)
        assert held(publisher) == count
        memoryview(loan)[:] = message(count, LARGE)
        sending = asyncio.ensure_future(publisher.send(loan))
        await asyncio.wait([sending], timeout=0.1)
        assert not sending.done()
        taking = peer.start(roles.take_numbers)
        await sending
    assert await taking == list(range(count + 1))


async def test_a_batch_wakes_each_reader_once(many: Many) -> None:
    # All batches fit into the ring: a full one is told of in the middle of a batch.
    async with many.publish(name(), ring=1 << 20, close_timeout=0.2) as publisher:
        address = many.client(publisher)
        takers = [
            (await many.subscriber(address, waiting="sleep")).start(roles.take_numbers, 2000) for _ in range(3)
        ]
        ends = [one.channel.endpoint for one in inner(publisher)._subscribers.values()]
        for first in range(0, 2000, 200):
            before = [end.doorbells for end in ends]
            await publisher.send_many(message(number, 200) for number in range(first, first + 200))
            assert max(now.doorbells - then for now, then in zip(ends, before, strict=True)) <= 1
            await until(lambda: not any(end.unconfirmed for end in ends))
            await asyncio.sleep(0.01)                  # they have taken it all, and now they go to sleep
        assert await asyncio.gather(*takers) == [list(range(2000))] * 3
        assert min(end.doorbells for end in ends) >= 1


async def test_the_subscriber_after_the_last_seat_is_refused_and_gets_one_when_somebody_leaves(many: Many) -> None:
    async with many.publish(name()) as publisher:
        address = many.client(publisher)
        subscriptions = [await anywire.subscribe(address) for _ in range(MOST_READERS)]
        with pytest.raises(anywire.Refused, match="64 subscribers") as caught:
            async with many.subscribe(address):
                pass
        assert caught.value.answered
        assert publisher.stats().refused == 1
        await publisher.send(b"to all")
        assert [await subscription.recv() for subscription in subscriptions] == [b"to all"] * MOST_READERS
        await subscriptions.pop().close()
        await until(lambda: len(publisher.subscribers) == MOST_READERS - 1)
        subscriptions.append(await anywire.subscribe(address))
        await publisher.send(b"again")
        assert [await subscription.recv() for subscription in subscriptions] == [b"again"] * MOST_READERS
        for subscription in subscriptions:
            subscription.abort()


async def test_others_get_the_same_messages_beside_the_broadcast(many: Many) -> None:
    addresses = [name(), "tcp://127.0.0.1:0"]
    async with many.publish(*addresses) as publisher:
        shm, tcp = (str(address) for address in publisher.addresses)
        takers = [(await many.subscriber(address)).start(roles.take_numbers) for address in (shm, tcp, shm)]
        for number in range(2000):
            await publisher.send(message(number, 8 + number % 3000))
        await publisher.send_many(message(number, 100_000) for number in range(2000, 2050))
    assert await asyncio.gather(*takers) == [list(range(2050))] * 3


async def test_killed_subscribers_under_load_disturb_nobody(many: Many) -> None:
    random_ = random.Random(7)
    async with many.publish(name(), stall_timeout=3600, ring=1 << 16, pool=POOL) as publisher:
        address = many.client(publisher)
        staying = [await many.subscriber(address) for _ in range(2)]
        takers = [staying[0].start(roles.take_numbers), staying[1].start(broadcast_roles.in_place_to_the_end)]
        over = asyncio.Event()
        number = 0

        async def send() -> None:
            nonlocal number
            while not over.is_set():
                size = random_.choice([8, 500, 9000, LARGE, 400_000])
                await publisher.send(message(number, size))
                number += 1

        sending = asyncio.ensure_future(send())
        for round_ in range(12):
            victims = [await many.subscriber(address) for _ in range(2)]
            for victim, role in zip(victims, (roles.take_numbers, broadcast_roles.take_in_place), strict=True):
                victim.start(role, *([10_000] if role is broadcast_roles.take_in_place else []))
            if round_ % 3 == 0:
                await victims[0].freeze()                   # it dies with the writer waiting for it
            await asyncio.sleep(random_.random() * 0.05)
            for victim in victims:
                victim.kill()
        await until(lambda: len(publisher.subscribers) == 2)
        over.set()
        await sending
        stats = publisher.stats()
        assert (stats.died, stats.stalled, stats.dropped) == (24, 0, 0)
        assert number > 100
    assert await asyncio.gather(*takers) == [list(range(number))] * 2
    assert inner(publisher)._broadcast.memory_held() == 0


async def test_large_messages_that_are_kept_never_stop_the_writer(many: Many) -> None:
    """When the pool is full of what somebody keeps, messages go through the ring in parts: in order, and whole."""
    async with many.publish(name(), pool=POOL, stall_timeout=60) as publisher:
        address = many.client(publisher)
        keeper, other = await many.subscriber(address), await many.subscriber(address)
        keeping = keeper.start(broadcast_roles.take_in_place, 40)
        taking = other.start(roles.take_numbers)
        for number in range(40):
            await publisher.send(message(number, LARGE))
        assert await keeping == list(range(40))
        assert 0 < held(publisher) <= POOL // LARGE
        await keeper.call(broadcast_roles.let_go)
        await until(lambda: held(publisher) == 0)
        await publisher.send(message(40, LARGE))
        assert await keeper.call(broadcast_roles.take_in_place, 1) == [40]
        assert held(publisher) == 1
        await keeper.call(roles.leave)
    assert await taking == list(range(41))


async def test_a_subscriber_that_has_the_whole_pool_in_hand_and_is_busy_stops_nobody(many: Many) -> None:
    async with many.publish(name(), pool=POOL, stall_timeout=3600) as publisher:
        keeper = await many.subscriber(many.client(publisher))
        count = 0
        while held(publisher) < POOL // LARGE and publisher.try_send(message(count, LARGE)):
            count += 1
        sending = asyncio.ensure_future(publisher.send(message(count, LARGE)))
        await asyncio.wait([sending], timeout=0.1)
        assert not sending.done()                           # what nobody has read yet is waited for
        keeping = keeper.start(broadcast_roles.take_in_place, count)
        await sending                                       # it comes for no more messages
        assert await keeping == list(range(count))
        for number in range(count + 1, count + 4):
            await publisher.send(message(number, 20_000))
        assert await keeper.call(broadcast_roles.take_in_place, 4) == list(range(count, count + 4))
        await keeper.call(roles.leave)


async def test_a_message_that_is_larger_than_the_pool_arrives_in_parts(many: Many) -> None:
    async with many.publish(name(), pool=POOL, ring=1 << 16) as publisher:
        address = many.client(publisher)
        takers = [(await many.subscriber(address)).start(roles.take_numbers) for _ in range(2)]
        for number, size in enumerate([8, 3 << 20, POOL // 4, POOL // 4 + 1, 8, 9 << 20]):
            await publisher.send(message(number, size))
    assert await asyncio.gather(*takers) == [list(range(6))] * 2


@pytest.mark.parametrize("how", ["drop", "leave", "abort"])
async def test_memory_in_hand_is_not_written_over_after_its_reader_was_dropped_or_left(many: Many, how: str) -> None:
    async with many.publish(name(), pool=POOL, ring=1 << 14, stall_timeout=2) as publisher:
        address = many.client(publisher)
        keeper, other = await many.subscriber(address), await many.subscriber(address)
        taking = other.start(roles.take_numbers)
        for number in range(3):
            await publisher.send(message(number, LARGE))
        assert await keeper.call(broadcast_roles.take_in_place, 2) == [0, 1]
        if how == "drop":
            await keeper.freeze()
        else:
            await keeper.call(roles.leave if how == "leave" else leave_at_once)
            await until(lambda: len(publisher.subscribers) == 1)
        count = 3
        while len(publisher.subscribers) == 2 or count < 60:
            await publisher.send(message(count, LARGE if count % 3 else 1000))
            count += 1
        if how == "drop":
            keeper.signal(signal.SIGCONT)
        assert await keeper.call(broadcast_roles.look_again) == [0, 1]
        assert held(publisher) >= 2
        await keeper.call(broadcast_roles.let_go, 1)
        if how == "drop":
            assert (await keeper.call(roles.take_runs))[2]["kind"] == "TooSlow"
        assert await keeper.call(broadcast_roles.look_again) == [1]
        keeper.kill()                                       # what it still had comes back with its death
        await until(lambda: held(publisher) == 0)
    assert await taking == list(range(count))
    assert inner(publisher)._broadcast.memory_held() == 0


def leave_at_once(peer: Any) -> None:
    peer.channel.abort()


async def test_a_dropped_subscriber_hands_out_nothing_torn(many: Many) -> None:
    """It is stopped at random moments, and the writer goes round the ring over what it was reading."""
    random_ = random.Random(3)
    async with many.publish(name(), ring=4096, pool=POOL, stall_timeout=0.02) as publisher:
        address = many.client(publisher)
        number = 0
        for _ in range(10):
            peer = await many.subscriber(address)
            first = number
            taking = peer.start(roles.take_runs)
            for _ in range(random_.randrange(1, 300)):
                await publisher.send(message(number, random_.choice([8, 100, 480, 3000, LARGE])))
                number += 1
            await peer.freeze()
            before = publisher.stats()
            while publisher.stats().subscribers:
                await publisher.send(message(number, random_.choice([8, 100, 480, 3000, LARGE])))
                number += 1
            assert publisher.stats().stalled == before.stalled + 1 or before.subscribers == 0
            peer.signal(signal.SIGCONT)
            numbers, _, error = await taking                # each was looked at byte by byte
            assert numbers == list(range(first, first + len(numbers)))
            assert error["kind"] == "TooSlow" and error["seconds"] == 0.02


async def test_joining_and_leaving_while_the_writer_writes(many: Many) -> None:
    async with many.publish(name(), ring=1 << 14, pool=POOL) as publisher:
        address = many.client(publisher)
        over = False
        number = 0

        async def send() -> None:
            nonlocal number
            while not over:
                await publisher.send(message(number, (number % 5) * 70_000 + 8))
                number += 1

        sending = asyncio.ensure_future(send())

        async def guest() -> None:
            for _ in range(8):
                async with anywire.subscribe(address, wait=5) as subscription:
                    numbers = [number_of(await subscription.recv()) for _ in range(20)]
                    assert numbers == list(range(numbers[0], numbers[0] + 20))

        await asyncio.gather(*(guest() for _ in range(4)))
        over = True
        await sending
        assert publisher.stats().left + len(publisher.subscribers) == 32


# -- the hostile ---


@pytest.mark.parametrize("seed", range(4))
async def test_a_subscriber_that_scribbles_harms_nobody_else(many: Many, seed: int) -> None:
    async with many.publish(name(), ring=1 << 14, pool=POOL, stall_timeout=1.5) as publisher:
        address = many.client(publisher)
        taking = (await many.subscriber(address)).start(roles.take_numbers)
        number = 0
        for round_ in range(4):
            hostile = await many.subscriber(address)
            doing = hostile.start(broadcast_roles.scribble, seed * 100 + round_, 3000)
            while not doing.done() or number % 100:
                await publisher.send(message(number, (number % 7) * 60_000 + 8))
                number += 1
            assert await doing >= 2
            hostile.kill()
            await until(lambda: len(publisher.subscribers) == 1)
    assert await taking == list(range(number))


# Offsets in the control page: `tail`, `returned`.
@pytest.mark.parametrize(("offset", "word"), [(256, 12), (256, 1 << 40), (272, 600), (272, 1)])
async def test_a_subscriber_that_lies_is_dropped_alone(many: Many, offset: int, word: int) -> None:
    async with many.publish(name(), ring=1 << 14, pool=POOL, stall_timeout=3600) as publisher:
        address = many.client(publisher)
        taking = (await many.subscriber(address)).start(roles.take_numbers)
        liar = await many.subscriber(address)
        await liar.call(broadcast_roles.write_word, offset, word)
        number = 0
        while len(publisher.subscribers) == 2:
            await publisher.send(message(number, LARGE if number % 2 else 1000))
            number += 1
        assert publisher.stats().dropped == 1
        assert (await liar.call(broadcast_roles.take_until_an_error))[1]["kind"] in ("PeerLost", "BadFrame")
    assert await taking == list(range(number))


@pytest.mark.parametrize("seed", range(3))
async def test_a_publisher_that_scribbles_crashes_no_subscriber(many: Many, seed: int) -> None:
    peer, address = await many.peer(), name()
    await peer.call(roles.publish, address, ring=1 << 14, pool=POOL)
    victim = await many.subscriber(address)
    ending = victim.start(broadcast_roles.take_until_an_error)
    await peer.call(roles.publish_numbers, 0, 3, LARGE)
    await peer.call(broadcast_roles.scribble, seed, 3000)
    peer.kill()
    _, error = await ending
    assert error["kind"] in ("BadFrame", "PeerLost", "TooSlow", "TooLarge", "EndOfChannel")
    assert os.path.exists(f"/proc/{victim.pid}")
