"""Where in the pool of a shared-memory connection the next message goes."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anywire
from anywire import sync

TURN = 2 << 20          # bytes that are lent in turn: _shm_memory.pyx


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Any, Any]]:
    address = f"shm://pool-{uuid.uuid4().hex}"
    async with anywire.listen(address) as listener:
        accepting = asyncio.ensure_future(listener.accept())
        async with anywire.connect(address, **options) as one, await accepting as other:
            yield one, other
            one.abort()             # closing would wait for the other, which is next
            other.abort()


def place(loan: Any) -> int:
    """Where its memory is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(loan))


async def passed(one: Any, other: Any, nbytes: int) -> int:
    """Pass one message in place and give it back; where it was."""
    loan = one.loan(nbytes)
    where = place(loan)
    await one.send(loan)
    (await other.recv(copy=False)).release()
    return where


def test_messages_take_turns_in_the_pool_s_front() -> None:
    """Memory that the receiver has just read is slow to write: it is not used again at once."""

    async def main() -> None:
        async with pair() as (one, other):
            for nbytes in (64 << 10, 100_000, 1 << 20):
                places = [await passed(one, other, nbytes) for _ in range(3 * (TURN // nbytes))]
                round_ = TURN // nbytes
                assert len(set(places)) == round_
                assert places[:round_] == places[round_ : 2 * round_] == sorted(set(places))
                assert places[round_ - 1] - places[0] < TURN

    asyncio.run(main())


def test_a_message_that_is_larger_than_a_turn_lies_at_the_front() -> None:
    async def main() -> None:
        async with pair() as (one, other):
            first = await passed(one, other, 64 << 10)
            for _ in range(3):
                assert await passed(one, other, TURN + 1) == first
            assert await passed(one, other, TURN) == first

    asyncio.run(main())


def test_what_is_still_held_is_passed_over_and_every_place_is_found() -> None:
    async def main() -> None:
        async with pair(pool=4 << 20) as (one, other):
            held, places, views = 256 << 10, [], []
            for _ in range((4 << 20) // held):
                loan = one.loan(held)
                places.append(place(loan))
                await one.send(loan)
                views.append(await other.recv(copy=False))
            # The whole pool is out, without a gap.
            assert sorted(places) == list(range(min(places), min(places) + (4 << 20), held))
            for number in (5, 11, 12):          # one within the first turn, two beyond it
                views[number].release()
            small, large = one.loan(held), one.loan(2 * held)
            assert (place(small), place(large)) == (places[5], places[11])
            # Now it is full again: private memory, which the send copies once there is room.
            last = one.loan(held)
            assert place(last) not in places
            del loan, small, large, last        # a loan keeps its memory for as long as somebody could write to it
            for view in views:
                view.release()
            assert await passed(one, other, 4 << 20) == min(places)

    asyncio.run(main())


@contextmanager
def blocking_pair(**options: Any) -> Iterator[tuple[Any, Any]]:
    with sync.listen(f"shm://pool-{uuid.uuid4().hex}?waiting=spin") as listener, ThreadPoolExecutor(1) as beside:
        accepting = beside.submit(listener.accept)
        with sync.connect(listener.addresses[0], **options) as one, accepting.result() as other:
            yield one, other
            one.abort()
            other.abort()


def test_a_full_pool_gives_private_memory_also_where_a_loan_looks_for_a_place_first() -> None:
    """The blocking front looks for what the receiver may return, but not for what only this side can give back."""
    with blocking_pair(pool=1 << 20) as (one, other):
        held = [one.loan(256 << 10) for _ in range(4)]
        front = place(held[0])
        assert place(one.loan(256 << 10)) not in range(front, front + (1 << 20))
        one.send(held[2])
        view = other.recv(copy=False)
        del held[2]
        view.release()
        assert place(one.loan(256 << 10)) == front + (512 << 10)


def test_a_loan_finds_what_the_receiver_gives_back_meanwhile() -> None:
    """Whoever streams large loans must not fall back to copies each time he is quicker than the receiver."""
    nbytes, interval = 16 << 20, sys.getswitchinterval()
    with blocking_pair(pool=2 * nbytes) as (one, other), ThreadPoolExecutor(1) as beside:
        beside.submit(int).result()                 # its thread exists
        found = tries = 0
        while not found and tries < 500:
            tries += 1
            held = one.loan(nbytes)                 # never sent
            one.send(one.loan(nbytes))
            view, before = other.recv(copy=False), one.endpoint.private_loans
            # The other thread can't run until this one lets go of the GIL: while it looks, and not before.
            sys.setswitchinterval(100)
            try:
                released = beside.submit(view.release)
                loan = one.loan(nbytes)
            finally:
                sys.setswitchinterval(interval)
            released.result()
            found = one.endpoint.private_loans == before
            del held, loan
        assert found
