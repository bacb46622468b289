"""Mode latest in shared memory: a writer that waits for nobody, and readers that believe nothing torn."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import broadcast_roles
import pattern_roles as roles
import pytest
from conformance.roles import message, number_of
from pattern_world import Many, until
from test_broadcast import LARGE, POOL, held, inner, leave_at_once, name

import anywire
from anywire.patterns.controls import END, SKIPPED, control
from anywire.wires._shm_broadcast import SeatedEndpoint
from anywire.wires._shm_latest import LatestReader

pytestmark = pytest.mark.only(wires=["shm"])


def latest(many: Many, *addresses: str, **options: Any) -> Any:
    """A publisher with a pool of 1 MiB and a ring that wraps around all the time."""
    return many.publish(*(addresses or [name()]), mode="latest", **{"max_message": POOL // 4, "pool": POOL, **options})


def whole(took: tuple[list[int], list[tuple[int, int]], dict[str, Any]], first: int, count: int) -> None:
    """What `take_runs` took is each number from `first` on, but for the gaps that it was told, and then the end."""
    numbers, gaps, error = took
    expected = list(range(first, count))
    for index, lost in gaps:
        del expected[index : index + lost]
    assert numbers == expected
    assert error["kind"] == "EndOfChannel"
    assert error["counted"] == sum(lost for _, lost in gaps)


async def test_all_subscribers_read_what_is_written_once(many: Many) -> None:
    async with latest(many) as publisher:
        address = many.client(publisher)
        async with many.subscribe(address) as one, many.subscribe(address) as other:
            for subscription in (one, other):
                assert isinstance(getattr(subscription, "inner", subscription)._channel.endpoint, LatestReader)
            seated = [one.channel.endpoint for one in inner(publisher)._subscribers.values()]
            assert [type(end) for end in seated] == [SeatedEndpoint] * 2
            loan = publisher.loan(LARGE)
            memoryview(loan)[:] = message(1, LARGE)
            await publisher.send(loan)
            views = [await subscription.recv(copy=False) for subscription in (one, other)]
            assert [number_of(view) for view in views] == [1, 1]
            assert held(publisher) == 1                     # the loan itself, which both see
            with pytest.raises(TypeError, match="read-only"):
                views[0][0] = 1
            for view in views:
                view.release()


async def test_who_is_behind_loses_the_oldest_and_is_told_also_between_messages_of_all_sizes(many: Many) -> None:
    random_ = random.Random(5)
    async with latest(many, ring=1 << 14, depth=40) as publisher:
        address = many.client(publisher)
        frozen, *others = [await many.subscriber(address) for _ in range(3)]
        await frozen.freeze()
        takers = [peer.start(roles.take_runs) for peer in others]
        count = 4000
        for number in range(count):
            assert publisher.try_send(message(number, random_.choice([8, 8, 100, 1500, 9000, LARGE])))
            if number % 50 == 0:
                await asyncio.sleep(0.001)
        assert publisher.stats().queued <= 40
        frozen.signal(signal.SIGCONT)
        takers.append(frozen.start(roles.take_runs))
        ending = asyncio.ensure_future(publisher.close())
        took = await asyncio.gather(*takers)
        for one in took:
            whole(one, 0, count)
        assert took[-1][1] and took[-1][1][0][0] == 0       # the frozen one lost what was sent first
        await ending
        assert publisher.stats().lost == sum(one[2]["counted"] for one in took)


async def test_any_bytes_arrive_also_where_messages_are_lost(many: Many) -> None:
    """What looks like a control message is one message as any other, whatever is left out before it."""
    alike = [control(END), control(SKIPPED, 5), bytes(32)]
    async with latest(many, depth=2) as publisher, many.subscribe(many.client(publisher)) as subscription:
        for data in alike:
            await publisher.send(data)
            assert await subscription.recv() == data
        await publisher.send_many(alike * 5)
        with pytest.raises(anywire.MessagesLost) as caught:
            await subscription.recv()
        assert caught.value.lost == 13
        assert [await subscription.recv() for _ in range(2)] == alike[1:]
        await publisher.send_many(alike)
        with pytest.raises(anywire.MessagesLost):
            await subscription.recv_many()
        assert bytes(await subscription.recv(copy=False)) == alike[1]
        assert await subscription.recv_many() == alike[2:]
        assert subscription.lost == publisher.stats().lost == 14


async def test_one_that_is_too_slow_keeps_getting_messages(many: Many) -> None:
    """The writer goes round the ring while the reader copies: it must come to an end with some message all the same."""
    async with latest(many, ring=4096, depth=10_000) as publisher:
        peers = [await many.subscriber(many.client(publisher)) for _ in range(2)]
        takers = [peers[0].start(roles.take_runs), peers[1].start(broadcast_roles.in_place_with_gaps)]
        number = 0
        deadline = asyncio.get_running_loop().time() + 1
        while asyncio.get_running_loop().time() < deadline:
            await publisher.send_many([message(at, 400) for at in range(number, number + 64)])
            number += 64
        ending = asyncio.ensure_future(publisher.close())
        for took in await asyncio.gather(*takers):
            whole(took, 0, number)
            assert len(took[0]) > 1000
        await ending


# -- what is in hand ---


@pytest.mark.parametrize("how", ["stay", "leave", "abort"])
async def test_messages_in_hand_are_never_written_over(many: Many, how: str) -> None:
    async with latest(many, ring=1 << 14) as publisher:
        address = many.client(publisher)
        keeper, other = await many.subscriber(address), await many.subscriber(address)
        taking = other.start(roles.take_runs)
        for number in range(2):
            await publisher.send(message(number, LARGE))
            assert await keeper.call(broadcast_roles.take_in_place, 1) == [number]
        if how != "stay":
            await keeper.call(roles.leave if how == "leave" else leave_at_once)
            await until(lambda: len(publisher.subscribers) == 1)
        for number in range(2, 60):
            await publisher.send(message(number, LARGE if number % 3 else 1000))
            if number % 10 == 0:
                await asyncio.sleep(0.002)
        assert await keeper.call(broadcast_roles.look_again) == [0, 1]
        await keeper.call(broadcast_roles.let_go, 1)
        assert await keeper.call(broadcast_roles.look_again) == [1]
        keeper.kill()                                       # what it still had comes back with its death
        await until(lambda: len(publisher.subscribers) == 1)
        ending = asyncio.ensure_future(publisher.close())
        whole(await taking, 0, 60)
        await ending


async def test_when_everything_is_in_hand_a_new_message_reaches_all_others_all_the_same(many: Many) -> None:
    async with latest(many, depth=3) as publisher:
        address = many.client(publisher)
        keepers = [await many.subscriber(address) for _ in range(2)]
        async with many.subscribe(address) as other:
            for number in range(3):                         # three quarters of the pool
                await publisher.send(message(number, POOL // 4))
                for keeper in keepers:
                    assert await keeper.call(broadcast_roles.take_in_place, 1) == [number]
                assert number_of(await other.recv()) == number
            for number in range(3, 8):
                await publisher.send(message(number, POOL // 4))
                assert number_of(await other.recv(copy=number % 2 == 0)) == number
            assert other.lost == 0
            for keeper in keepers:
                assert await keeper.call(broadcast_roles.look_again) == [0, 1, 2]
                await keeper.call(broadcast_roles.let_go)
            await publisher.send(message(8, POOL // 4))
            assert number_of(await other.recv(copy=False)) == 8


async def test_more_messages_in_hand_than_can_be_pinned(many: Many) -> None:
    async with latest(many, pool=8 * POOL, max_message=100_000, ring=1 << 12) as publisher:
        keeper = await many.subscriber(many.client(publisher))
        for number in range(300):
            await publisher.send(message(number, 3000))
            assert await keeper.call(broadcast_roles.take_in_place, 1) == [number]
        assert await keeper.call(broadcast_roles.look_again) == list(range(300))


async def test_a_message_of_any_size_has_a_place_whatever_the_pool(many: Many) -> None:
    async with latest(many, max_message=5 << 20) as publisher, many.subscribe(many.client(publisher)) as subscription:
        for number, size in enumerate([8, 5 << 20, POOL, 5 << 20]):
            await publisher.send(message(number, size))
            assert number_of(await subscription.recv(copy=number % 2 == 0)) == number
        with pytest.raises(anywire.TooLarge):
            await publisher.send(bytes((5 << 20) + 1))


# -- the dead, the narrow and the hostile ---


async def test_killed_and_stopped_subscribers_disturb_nobody(many: Many) -> None:
    random_ = random.Random(7)
    async with latest(many, ring=1 << 14) as publisher:
        address = many.client(publisher)
        staying = await many.subscriber(address)
        taking = staying.start(roles.take_runs)
        number = 0
        for round_ in range(8):
            victims = [await many.subscriber(address) for _ in range(2)]
            victims[0].start(roles.take_runs)
            victims[1].start(broadcast_roles.in_place_with_gaps)
            if round_ % 2:
                await victims[0].freeze()
            for _ in range(random_.randrange(20, 200)):
                assert publisher.try_send(message(number, random_.choice([8, 500, 9000, LARGE])))
                number += 1
                await asyncio.sleep(0)
            for victim in victims:
                victim.kill()
        await until(lambda: len(publisher.subscribers) == 1)
        stats = publisher.stats()
        assert (stats.died, stats.stalled, stats.dropped) == (16, 0, 0)
        ending = asyncio.ensure_future(publisher.close())
        whole(await taking, 0, number)
        await ending


async def test_a_message_over_a_subscribers_limit_drops_it_alone_also_if_it_is_far_behind(many: Many) -> None:
    async with latest(many, ring=1 << 14) as publisher:
        address = many.client(publisher)
        other = (await many.subscriber(address)).start(roles.take_runs)
        near, far = [await many.subscriber(address, max_message=1000) for _ in range(2)]
        await publisher.send(message(0, 1000))
        await publisher.send(message(1, 1001))
        numbers, _, error = await near.call(roles.take_runs)
        assert (numbers, error["kind"], error["size"], error["limit"]) == ([0], "TooLarge", 1001, 1000)
        for number in range(2, 100):
            await publisher.send(message(number, 900))
        numbers, _, error = await far.call(roles.take_runs)
        assert (numbers, error["kind"], error["size"], error["limit"]) == ([], "TooLarge", 1001, 1000)
        assert publisher.stats().dropped == 2
        ending = asyncio.ensure_future(publisher.close())
        whole(await other, 0, 100)
        await ending


@pytest.mark.parametrize("seed", range(2))
async def test_a_subscriber_that_scribbles_harms_nobody_else(many: Many, seed: int) -> None:
    async with latest(many, ring=1 << 14) as publisher:
        address = many.client(publisher)
        taking = (await many.subscriber(address)).start(roles.take_runs)
        number = 0
        for round_ in range(3):
            hostile = await many.subscriber(address)
            doing = hostile.start(broadcast_roles.scribble, seed * 100 + round_, 3000)
            while not doing.done() or number % 100:
                assert publisher.try_send(message(number, (number % 7) * 30_000 + 8))
                number += 1
                await asyncio.sleep(0)
            assert await doing >= 2
            publisher.stats()
            hostile.kill()
            await until(lambda: len(publisher.subscribers) == 1)
        ending = asyncio.ensure_future(publisher.close())
        whole(await taking, 0, number)
        await ending


async def test_a_subscriber_that_pins_everything_costs_the_others_a_copy(many: Many) -> None:
    async with latest(many) as publisher, many.subscribe(many.client(publisher)) as other:
        liar = await many.subscriber(many.client(publisher))
        for pin in range(128):                              # two pins a word: each unit of the pool, plus 1
            await liar.call(broadcast_roles.write_word, 2688 + 8 * pin, (2 * pin + 1) | (2 * pin + 2) << 32)
        await liar.call(broadcast_roles.write_word, 288, 1 << 31)
        for number in range(30):
            await publisher.send(message(number, LARGE))
            assert number_of(await other.recv()) == number
        assert other.lost == 0
        liar.kill()


@pytest.mark.parametrize("seed", range(3))
async def test_a_publisher_that_scribbles_crashes_no_subscriber(many: Many, seed: int) -> None:
    peer, address = await many.peer(), name()
    await peer.call(roles.publish, address, ring=1 << 14, pool=POOL, max_message=POOL // 4, mode="latest")
    victim = await many.subscriber(address, losses="count")
    ending = victim.start(broadcast_roles.take_until_an_error)
    await peer.call(roles.publish_numbers, 0, 3, LARGE)
    await peer.call(broadcast_roles.scribble, seed, 3000)
    peer.kill()
    _, error = await ending
    assert error["kind"] in ("BadFrame", "PeerLost", "TooSlow", "TooLarge", "EndOfChannel")
    assert os.path.exists(f"/proc/{victim.pid}")


async def test_others_get_the_same_messages_beside_the_broadcast(many: Many) -> None:
    async with latest(many, name(), "tcp://127.0.0.1:0") as publisher:
        takers = [(await many.subscriber(str(one))).start(roles.take_runs) for one in publisher.addresses]
        for number in range(2000):
            await publisher.send(message(number, 8 + number % 3000))
        await publisher.send_many(message(number, 100_000) for number in range(2000, 2030))
        ending = asyncio.ensure_future(publisher.close())
        for took in await asyncio.gather(*takers):
            whole(took, 0, 2030)
        await ending
