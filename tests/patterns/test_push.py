"""Push and pull: each message to one end, and what is told when an end is lost."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pattern_roles as roles
import pytest
from conformance.fronts import ABANDONED
from conformance.roles import message, number_of
from pattern_world import WIRES, Many, until

import anywire
from anywire.patterns.controls import END, PULL, TAKEN, control

PROCESSES = [wire for wire in WIRES if wire != "inproc"]


# -- who gets what ---


async def test_each_message_goes_to_one_puller(many: Many) -> None:
    async with many.push(prefetch=8) as jobs:
        pullers = [await many.puller(many.client(jobs)) for _ in range(3)]
        assert len(jobs.pullers) == 3
        taking = [puller.start(roles.take_numbers) for puller in pullers]
        for number in range(1500):
            await jobs.send(message(number, 8 + number % 200))
        await jobs.send_many(message(number) for number in range(1500, 3000))
    stats = jobs.stats()
    assert (stats.sent, stats.confirmed, stats.lost, stats.unconfirmed) == (3000, 3000, 0, 0)
    shares = await asyncio.gather(*taking)
    assert all(share == sorted(share) for share in shares)
    assert sorted(itertools.chain(*shares)) == list(range(3000))


async def test_messages_that_look_like_control_messages_are_messages(many: Many) -> None:
    messages = [control(END), b"", control(TAKEN, 5), bytes(32), control(END)]
    async with many.push() as jobs, many.pull(many.client(jobs)) as inbox:
        await jobs.send_many(messages)
        assert [await inbox.recv() for _ in messages] == messages
        closing = asyncio.ensure_future(jobs.close() if not many.blocking else many.front.threads.run(jobs.inner.close))
        with pytest.raises(anywire.EndOfChannel):
            await inbox.recv()
        await closing


async def test_pullers_that_all_have_room_are_served_in_turns(many: Many) -> None:
    async with many.push(prefetch=100) as jobs:
        pullers = [await many.puller(many.client(jobs)) for _ in range(4)]
        for number in range(40):
            assert jobs.try_send(message(number))
        for index, puller in enumerate(pullers):
            assert await puller.call(roles.take_numbers, 10) == list(range(index, 40, 4))
            await puller.call(roles.leave)
        await until(lambda: jobs.stats().left == 4)
        assert jobs.stats().unconfirmed == 0


async def test_a_pull_end_on_this_front(many: Many) -> None:
    peer, address = await many.listening(roles.push, prefetch=16)
    async with many.pull(address) as inbox:
        sending = peer.start(roles.push_numbers, list(range(300)), 1000)
        assert number_of(await inbox.recv()) == 0
        taken = [0]
        while len(taken) < 100:
            taken += map(number_of, await inbox.recv_many(10))
        while len(taken) < 300:
            taken.append(number_of(await inbox.recv()))
        await sending
        assert taken == list(range(300))
        with pytest.raises(anywire.TimedOut):
            await inbox.recv(timeout=0.01)          # coming back confirms
        stats = await peer.call(roles.push_stats)
        assert stats == {"sent": 300, "confirmed": 300, "lost": 0, "unconfirmed": 0}
        ending = peer.start(roles.end)
        with pytest.raises(anywire.EndOfChannel):
            await inbox.recv()
        with pytest.raises(anywire.EndOfChannel):
            await inbox.recv_many()
    await ending


async def test_send_waits_until_somebody_has_room(many: Many) -> None:
    async with many.push(prefetch=2) as jobs:
        assert not jobs.try_send(message(0))        # nobody is there
        with pytest.raises(anywire.TimedOut):
            await jobs.send(message(0), timeout=0.02)
        sending = asyncio.ensure_future(jobs.send(message(0)))
        puller = await many.puller(many.client(jobs))
        await sending
        await jobs.send(message(1))
        assert not jobs.try_send(message(2))        # two are outstanding there
        assert jobs.unconfirmed == 2
        sending = asyncio.ensure_future(jobs.send(message(2)))
        assert await puller.call(roles.take_numbers, 3) == [0, 1, 2]
        await sending
        await puller.call(roles.leave)
        await until(lambda: jobs.unconfirmed == 0)      # which is told when its leave has come


async def test_a_puller_may_ask_for_fewer(many: Many) -> None:
    async with many.push(prefetch=50) as jobs:
        puller = await many.puller(many.client(jobs), prefetch=1)
        assert jobs.try_send(message(0))
        assert not jobs.try_send(message(1))
        await puller.call(roles.leave)              # what it did not take stays here
        await until(lambda: jobs.unconfirmed == 1)
        other = await many.puller(many.client(jobs))
        assert await other.call(roles.take_numbers, 1) == [0]
        await other.call(roles.leave)


async def test_a_slow_puller_slows_nobody_else(many: Many) -> None:
    async with many.push(prefetch=4, close_timeout=0.2, on_loss=lambda peer, messages: None) as jobs:
        slow = await many.puller(many.client(jobs))
        if many.setup.processes:
            await slow.freeze()
        quick = (await many.puller(many.client(jobs))).start(roles.take_numbers)
        for number in range(2000):
            await jobs.send(message(number, 1 << 10))
        await until(lambda: jobs.unconfirmed == 4)
    taken = await quick
    assert len(taken) == len(set(taken)) == 1996
    assert jobs.lost == 4


async def test_what_waits_at_a_pull_end_is_bounded_in_bytes(many: Many) -> None:
    size = 100 << 10 if many.setup.name == "seqpacket" else 1 << 20
    async with many.pull(listen=True, max_message=size) as results:
        pusher = await many.pusher(many.client(results), prefetch=1000)
        count = (60 << 20) // size
        sending = pusher.start(roles.push_numbers, list(range(count)), size)
        taken = []
        while len(taken) < count:
            taken.append(number_of(await results.recv()))
            assert results.stats().waiting * size <= 33 << 20
            if len(taken) % 10 == 0:
                await asyncio.sleep(0.002)          # so that it is the pull end that is slow
        assert taken == list(range(count))
        await sending


# -- losses ---


@pytest.mark.only(wires=PROCESSES)
async def test_what_a_killed_puller_had_is_told_and_nothing_comes_twice(many: Many) -> None:
    told: list[int] = []
    peers: list[Any] = []

    def on_loss(peer: Any, messages: list[bytes]) -> None:
        peers.append(peer)
        told.extend(map(number_of, messages))
        assert len(messages) <= 10

    pullers, taking = [], []
    async with many.push(prefetch=10, on_loss=on_loss) as jobs:
        address = many.client(jobs)
        for _ in range(4):
            pullers.append(await many.puller(address))
            taking.append(pullers[-1].start(roles.take_and_report))
        number = 0
        for victim in pullers[:3]:
            for _ in range(400):
                await jobs.send(message(number, 300))
                number += 1
            victim.kill()
            await until(lambda: jobs.stats().died + jobs.stats().left == len(peers) or jobs.stats().died)
            await victim.until_gone()
        for _ in range(400):
            await jobs.send(message(number, 300))
            number += 1
        await until(lambda: jobs.stats().died == 3)
    await asyncio.wait(taking)                              # what they reported before is here then
    handed = []
    for puller in pullers:
        while not puller.reports.empty():
            handed.append(puller.reports.get_nowait())
    assert len(handed) == len(set(handed))                  # nothing twice
    assert len(told) == len(set(told)) == jobs.lost
    assert set(handed) | set(told) == set(range(number))    # and what is missing was told: an upper bound,
    assert len(set(handed) & set(told)) <= 3 * 10           # for some were in the victims' hands
    stats = jobs.stats()
    assert stats.sent == stats.confirmed + stats.lost == number


@pytest.mark.only(wires=PROCESSES)
async def test_what_a_killed_puller_had_in_its_hands_is_told(many: Many) -> None:
    told: list[int] = []
    async with many.push(prefetch=8, on_loss=lambda peer, messages: told.extend(map(number_of, messages))) as jobs:
        for _ in range(20):
            victim = await many.puller(many.client(jobs))
            for number in range(5):
                await jobs.send(message(number))
            assert await victim.call(roles.take_numbers, 2, 0.002) == [0, 1]
            await until(lambda: jobs.unconfirmed <= 4)      # it came back from the first, and holds the second
            await victim.call(roles.until_received, 5)      # what was not sent yet would be another's
            victim.kill()
            await until(lambda: told)
            assert told == [1, 2, 3, 4]
            told.clear()


@pytest.mark.only(wires=PROCESSES)
async def test_a_lost_puller_is_logged_and_counted_without_a_callback(many: Many, caplog: Any) -> None:
    async with many.push(prefetch=5) as jobs:
        victim = await many.puller(many.client(jobs))
        for number in range(5):
            await jobs.send(message(number))
        assert await victim.call(roles.take_numbers, 1) == [0]
        await victim.call(roles.until_received, 5)          # what was not sent yet would be another's
        victim.kill()
        await until(lambda: jobs.stats().died == 1)
        assert 4 <= jobs.lost <= 5                          # the first was in its hands
        assert jobs.unconfirmed == 0
    assert "are unconfirmed" in caplog.text


async def test_what_a_puller_that_leaves_did_not_take_goes_to_others(many: Many) -> None:
    async with many.push(prefetch=20) as jobs:
        address = many.client(jobs)
        leaving = await many.puller(address)
        for number in range(20):
            await jobs.send(message(number))
        assert await leaving.call(roles.take_numbers, 5) == list(range(5))
        await leaving.call(roles.leave)
        await until(lambda: jobs.unconfirmed == 15)
        assert not jobs.pullers
        other = (await many.puller(address)).start(roles.take_numbers)
        await jobs.send(message(20))
    assert await other == list(range(5, 21))
    assert jobs.stats().lost == 0


async def test_closing_tells_what_was_not_confirmed(many: Many) -> None:
    told: list[bytes] = []
    async with many.push(close_timeout=0.1, on_loss=lambda peer, messages: told.extend(messages)) as jobs:
        await many.puller(many.client(jobs))
        await jobs.send(b"never taken")
    assert told == [b"never taken"]
    with pytest.raises(anywire.PeerLost) as caught:
        async with many.push(close_timeout=0.1) as jobs:
            await many.puller(many.client(jobs))
            await jobs.send(b"never taken")
    assert caught.value.unconfirmed == 1
    with pytest.raises(anywire.ChannelClosed):
        await jobs.send(b"too late")


# -- the collector ---


async def test_a_listening_pull_end_takes_from_all_in_turns(many: Many) -> None:
    async with many.pull(listen=True) as results:
        address = many.client(results)
        pushers = [await many.pusher(address, prefetch=50) for _ in range(3)]
        assert len(results.pushers) == 3
        sending = []
        for index, pusher in enumerate(pushers):
            numbers = list(range(index * 1000, index * 1000 + 200))
            sending.append(pusher.start(roles.push_numbers, numbers))
        await until(lambda: results.stats().waiting == 150)         # each as far as it may
        first = [number_of(await results.recv()) // 1000 for _ in range(30)]
        assert sorted(first) == [0] * 10 + [1] * 10 + [2] * 10
        rest = [number_of(await results.recv()) for _ in range(570)]
        for index in range(3):
            mine = [number for number in rest if number // 1000 == index]
            assert mine == list(range(index * 1000 + 10, index * 1000 + 200))
        await asyncio.gather(*sending)
        with pytest.raises(anywire.TimedOut):
            await results.recv(timeout=0.01)
        for pusher in pushers:
            assert (await pusher.call(roles.push_stats))["confirmed"] == 200
            await pusher.call(roles.end)
        await until(lambda: results.stats().left == 3)


@pytest.mark.only(wires=PROCESSES)
async def test_a_killed_pusher_leaves_only_whole_messages(many: Many) -> None:
    async with many.pull(listen=True) as results:
        address = many.client(results)
        victim, other = await many.pusher(address), await many.pusher(address)
        victim.start(roles.push_numbers, list(range(10**6)), 5000)
        taken = [number_of(await results.recv()) for _ in range(50)]
        victim.kill()
        await other.call(roles.push_numbers, [10**7])
        while taken[-1] != 10**7:
            taken.append(number_of(await results.recv()))
        await until(lambda: results.stats().died == 1)
        taken.remove(10**7)
        while results.stats().waiting:
            taken.append(number_of(await results.recv()))
        assert taken == list(range(len(taken)))


@pytest.mark.only(wires=PROCESSES)
async def test_a_connected_push_end_says_what_its_lost_pull_end_may_not_have(many: Many) -> None:
    peer, address = await many.listening(roles.pull)
    with pytest.raises(anywire.PeerLost) as caught:
        async with many.push(address, listen=False) as out:
            for number in range(3):
                await out.send(message(number))
            peer.kill()
            await until(lambda: not out.pullers)
            with pytest.raises(anywire.PeerLost) as first:
                await out.send(message(3))
            assert first.value.unconfirmed == 3
    assert caught.value.unconfirmed == 3


async def test_a_connected_push_end_learns_that_its_pull_end_closed(many: Many) -> None:
    peer, address = await many.listening(roles.pull)
    async with many.push(address, listen=False) as out:
        await out.send(message(0))
        assert await peer.call(roles.take_numbers, 1) == [0]
        await peer.call(roles.end)
        with pytest.raises(anywire.ChannelClosed) as caught:
            while True:
                await out.send(message(1))
        assert caught.value.by_peer
        lost = out.unconfirmed
        with pytest.raises(anywire.PeerLost if lost else ZeroDivisionError):
            if not lost:
                raise ZeroDivisionError
            await out.close()


@pytest.mark.only(wires=PROCESSES)
async def test_a_connected_pull_end_hears_of_a_loss_after_what_came(many: Many) -> None:
    peer, address = await many.listening(roles.push)
    async with many.pull(address) as inbox:
        await peer.call(roles.push_numbers, [0, 1, 2])
        await until(lambda: inbox.stats().waiting == 3)
        peer.kill()
        for number in range(3):
            assert number_of(await inbox.recv()) == number
        with pytest.raises(anywire.PeerLost):
            await inbox.recv()


# -- strangers, cancelling, idling ---


async def test_strangers_and_liars_disturb_nobody(many: Many) -> None:
    async with many.push(handshake_timeout=0.2) as jobs:
        address = many.client(jobs)
        taking = (await many.puller(address)).start(roles.take_numbers)
        garbage = await many.connect(address)
        await garbage.send(b"what is this?")
        silent = await many.connect(address)
        with pytest.raises(anywire.AnywireError):
            await silent.recv()
        liar = await many.connect(address)
        await liar.send(control(PULL, number=5))
        await liar.recv()
        await until(lambda: len(jobs.pullers) == 2)
        await liar.send(control(TAKEN, 1000))
        await until(lambda: jobs.stats().dropped == 1)
        assert jobs.stats().refused == 2
        with pytest.raises(anywire.Refused, match="push end, not a publisher"):
            async with many.subscribe(address):
                pass
        await jobs.send(message(0))
    assert await taking == [0]


async def test_abandoned_calls_lose_and_double_nothing(many: Many) -> None:
    front = many.front
    peer, address = await many.listening(roles.push, prefetch=8)
    count = 3000
    async with many.pull(address) as inbox:
        sending = peer.start(roles.push_numbers, list(range(count)), 100)
        got: list[int] = []
        abandoned = 0
        for turn in itertools.count():
            if len(got) == count:
                break
            way = front.ways_to_abandon[turn % len(front.ways_to_abandon)]
            call = inbox.recv if turn % 3 else inbox.recv_many
            result = await front.abandon(call, turns=turn % 5, way=way)
            if result is ABANDONED:
                abandoned += 1
            else:
                got.extend(map(number_of, result if isinstance(result, list) else [result]))
        assert got == list(range(count))
        assert abandoned
        await sending


async def test_abandoned_sends_go_whole_or_not_at_all(many: Many) -> None:
    front = many.front
    async with many.push(prefetch=1) as jobs:       # each send waits for the confirmation of the one before
        taking = (await many.puller(many.client(jobs))).start(roles.take_numbers)
        sent = []
        abandoned = 0
        for number in range(3000):
            way = front.ways_to_abandon[number % len(front.ways_to_abandon)]
            result = await front.abandon(jobs.send, message(number), turns=number % 3, way=way)
            if result is ABANDONED:
                abandoned += 1
            else:
                sent.append(number)
        assert abandoned
    taken = await taking
    assert taken == sorted(set(taken))
    assert set(sent) <= set(taken)
    assert jobs.stats().sent == len(taken)


@pytest.mark.only(wires=PROCESSES)
async def test_no_cpu_while_idle(many: Many) -> None:
    peer, address = await many.listening(roles.push)
    async with many.pull(address) as inbox:
        other = await many.puller(address)
        await peer.call(roles.push_numbers, [0, 1])
        taken = [number_of(await inbox.recv()), *await other.call(roles.take_numbers, 1)]
        assert sorted(taken) == [0, 1]
        waiting = asyncio.ensure_future(inbox.recv())
        await asyncio.sleep(0.1)
        assert await peer.call(roles.switches, 1.0) <= 5
        waiting.cancel()
        await asyncio.wait([waiting])


@pytest.mark.only(wires=["unix", "inproc"], fronts=["blocking"])
async def test_threads_share_a_blocking_end_and_a_close_wakes_who_waits(many: Many) -> None:
    run = many.front.threads.run
    async with many.push(prefetch=10) as jobs:
        async with many.pull(many.client(jobs)) as inbox:

            def send(thread: int) -> None:
                for number in range(500):
                    jobs.inner.send(message(thread * 1000 + number))

            def receive() -> list[int]:
                taken = []
                try:
                    while True:
                        taken.append(number_of(inbox.inner.recv()))
                except anywire.ChannelClosed:
                    return taken

            receiving = [asyncio.ensure_future(run(receive)) for _ in range(3)]
            await asyncio.gather(*(run(send, thread) for thread in range(4)))
            await until(lambda: jobs.unconfirmed == 0)
        taken = sorted(itertools.chain(*await asyncio.gather(*receiving)))
        assert taken == sorted(thread * 1000 + number for thread in range(4) for number in range(500))
        waiting = asyncio.ensure_future(run(jobs.inner.send, b"nobody is there"))
        await until(lambda: jobs.inner._inner._turns.line)
    with pytest.raises(anywire.ChannelClosed):
        await waiting


@pytest.mark.only(wires=["unix"], fronts=["blocking"])
async def test_a_callback_may_send_again_and_may_not_wait(many: Many) -> None:
    refused: list[str] = []

    def on_loss(peer: Any, messages: list[bytes]) -> None:
        try:
            jobs.inner.send(messages[0])
        except RuntimeError as error:
            refused.append(str(error))
            assert jobs.inner.try_send(messages[0])

    async with many.push(prefetch=1, on_loss=on_loss) as jobs:
        victim = await many.puller(many.client(jobs))
        await jobs.send(message(7))
        other = await many.puller(many.client(jobs))
        await jobs.send(message(8))
        taking = other.start(roles.take_numbers)
        await until(lambda: jobs.unconfirmed == 1)
        victim.kill()
        await until(lambda: jobs.stats().died == 1)
    assert sorted(await taking) in ([7, 8], [8])
    assert all("use try_send" in text for text in refused)
