"""Timers: order, deadlines that are no ordinary numbers, cancelling without leftovers; against a sorted list."""

from __future__ import annotations

import gc
import math
import random
import sys
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anywire.engine._timers import TimerQueue


def test_in_order_and_equal_ones_as_added() -> None:
    queue = TimerQueue()
    for value in range(50):
        queue.add(2.0, ("late", value))
    for value in range(50):
        queue.add(1.0, ("early", value))
    assert queue.due(0.999) == []
    assert queue.due(1.0) == [("early", value) for value in range(50)]
    assert queue.due(3.0) == [("late", value) for value in range(50)]
    assert len(queue) == 0


def test_equal_ones_keep_their_order_when_others_are_cancelled() -> None:
    queue = TimerQueue()
    entries = [queue.add(1.0, value) for value in range(1000)]
    gone = set(random.Random(4).sample(range(1000), 500))
    for value in gone:
        assert entries[value].cancel()
    assert queue.due(1.0) == [value for value in range(1000) if value not in gone]


def test_no_ordinary_numbers() -> None:
    queue = TimerQueue()
    with pytest.raises(ValueError, match="NaN"):
        queue.add(math.nan, 0)
    assert len(queue) == 0
    never = queue.add(math.inf, "never")
    assert queue.timeout(0.0) is None
    queue.add(-5.0, "negative")
    queue.add(-math.inf, "first")
    queue.add(1e300, "huge")
    assert queue.timeout(0.0) == 0
    assert queue.due(0.0) == ["first", "negative"]
    timeout = queue.timeout(0.0)
    assert timeout is not None and timeout > 1e6
    assert queue.due(math.inf) == ["huge"]
    assert queue.timeout(0.0) is None
    assert never.pending and never.cancel() and not never.cancel() and not never.pending


def test_a_time_out_is_rounded_up() -> None:
    queue = TimerQueue()
    queue.add(1.0 + 1e-10, 0)
    timeout = queue.timeout(1.0)
    assert timeout is not None and 1.0 + timeout >= queue.next_deadline
    assert queue.timeout(2.0) == 0


def test_the_clock() -> None:
    """What was due by the queue's own clock is due by time.monotonic(), and the other way round."""
    queue = TimerQueue()
    for _ in range(20):
        queue.add(time.monotonic() + 0.000_05, 0)
        while not queue.due(time.monotonic()):
            assert time.monotonic() < queue.next_deadline + 1


def test_a_cancelled_one_leaves_nothing_behind() -> None:
    class Value:
        pass

    queue = TimerQueue()
    kept = queue.add(1.0, "kept")
    before = sys.getsizeof(queue)
    for _ in range(10):
        values = [Value() for _ in range(1000)]
        gone = [weakref.ref(value) for value in values]
        entries = [queue.add(random.random() * 1e6, value) for value in values]
        random.shuffle(entries)
        for entry in entries:
            entry.cancel()
        del entry, entries, values
        assert not any(ref() for ref in gone)
    assert len(queue) == 1 and sys.getsizeof(queue) == before
    assert kept.pending


def test_a_timer_of_a_queue_that_is_gone() -> None:
    queue = TimerQueue()
    entry = queue.add(1.0, queue)  # a cycle through the queue itself
    del queue
    assert entry.pending
    assert entry.cancel()
    gone = TimerQueue()
    entry = gone.add(1.0, gone)
    ref = weakref.ref(type("X", (), {"queue": gone, "entry": entry}))
    del gone, entry
    gc.collect()
    assert ref() is None, "the cycle of a queue and its timers is collected"


def test_a_hundred_thousand() -> None:
    queue = TimerQueue()
    rng = random.Random(5)
    entries = [queue.add(rng.random(), value) for value in range(100_000)]
    for entry in rng.sample(entries, 50_000):
        entry.cancel()
    left = sorted((entry.deadline, entry.value) for entry in entries if entry.pending)
    assert len(left) == len(queue) == 50_000
    assert queue.due(2.0) == [value for _, value in left]


def test_many_due_at_a_time() -> None:
    """A few, or most of them, at each look: some were added since the last, some are cancelled between."""
    queue, rng, now, number = TimerQueue(), random.Random(6), 0.0, 0
    model: dict[int, tuple[float, int]] = {}
    entries = {}
    while now < 40:
        for _ in range(rng.choice((0, 1, 3, 300, 2000))):
            when = now + rng.choice((rng.random(), rng.random() * 20, float(rng.randrange(4)), -1.0))
            entries[number] = queue.add(when, number)
            model[number] = (when, number)
            number += 1
        for one in rng.sample(sorted(model), min(len(model), rng.choice((0, 1, 200)))):
            assert entries[one].cancel()
            del model[one]
        if rng.random() < 0.3:
            assert queue.next_deadline == min(model.values(), default=(math.inf, 0))[0]
        due = sorted(item for item in model.values() if item[0] <= now)
        assert queue.due(now) == [one for _, one in due]
        for _, one in due:
            assert not entries[one].pending and not entries[one].cancel()
            del model[one]
        assert len(queue) == len(model)
        now += rng.choice((0.0, 0.01, 0.5, 3.0))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(-3, 20)),
            st.tuples(st.just("cancel"), st.integers(0, 1000)),
            st.tuples(st.just("due"), st.integers(-3, 20)),
        ),
        max_size=120,
    )
)
def test_like_a_sorted_list(steps: list[tuple[str, int]]) -> None:
    queue = TimerQueue()
    model: list[tuple[int, int]] = []
    entries = {}
    for number, (step, value) in enumerate(steps):
        if step == "add":
            entries[number] = queue.add(value, number)
            model.append((value, number))
        elif step == "cancel" and entries:
            chosen = sorted(entries)[value % len(entries)]
            pending = [item for item in model if item[1] == chosen]
            assert entries[chosen].pending == bool(pending)
            assert entries.pop(chosen).cancel() == bool(pending)
            model = [item for item in model if item[1] != chosen]
        elif step == "due":
            model.sort()
            assert queue.due(value) == [number for when, number in model if when <= value]
            model = [item for item in model if item[0] > value]
        assert len(queue) == len(model)
        assert queue.next_deadline == min((when for when, _ in model), default=math.inf)
