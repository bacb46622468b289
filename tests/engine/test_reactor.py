"""The reactor: one dispatch for descriptors, timers, signals and other threads; and what the pitfall lists ask for."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from anywire.engine import Condition, Reactor, SharedQueue, Trigger
from anywire.engine.demultiplexers import by_name, names

READ, WRITE, HANGUP = Condition.READ, Condition.WRITE, Condition.HANGUP


@pytest.fixture(params=names())
def reactor(request: pytest.FixtureRequest) -> Iterator[Reactor]:
    with Reactor(by_name(request.param)) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe() for _ in range(8)]
    yield made
    for end in [end for ends in made for end in ends]:
        with contextlib.suppress(OSError):
            os.close(end)


def test_read_and_write(reactor, pair) -> None:
    a, b = pair
    seen = []
    event = reactor.watch(a, READ, lambda event, what: seen.append((event, what, a.recv(9))))
    assert event.watched_for == READ and event.watched
    assert reactor.turn(0) == 0
    b.send(b"one")
    assert reactor.turn() == 1
    assert seen == [(event, READ, b"one")]
    event.change(READ | WRITE)
    event.handler = lambda event, what: seen.append(what)
    assert reactor.turn() == 1 and seen[-1] == WRITE
    assert event.remove() and not event.remove() and not event.watched_for
    assert reactor.turn(0) == 0
    event.add(a, WRITE)
    assert reactor.turn() == 1


def test_once(reactor, pair) -> None:
    seen = []

    def handler(event, what) -> None:
        seen.append(event.watched)
        if len(seen) < 3:
            event.add(pair[0], WRITE)

    reactor.watch(pair[0], WRITE, handler, once=True)
    reactor.run()
    assert seen == [False] * 3, "an event that is watched once may watch itself again, from its own handler"


def test_one_shot_is_armed_again(reactor, pair) -> None:
    seen = []
    event = reactor.watch(pair[0], WRITE, lambda event, what: seen.append(what), trigger=Trigger.ONESHOT)
    assert (reactor.turn(), reactor.turn(0)) == (1, 0)
    event.change(WRITE)
    assert (reactor.turn(), reactor.turn(0)) == (1, 0)


def test_a_handler_removes_others_of_its_batch(reactor, pipes) -> None:
    """All are ready in one batch; whoever comes first removes all others, itself included."""
    called = []
    events = []

    def handler(event, what) -> None:
        called.append(event)
        for other in events:
            other.remove()

    for reading, writing in pipes:
        events.append(reactor.watch(reading, READ, handler))
        os.write(writing, b"x")
    assert reactor.turn() == 1 and len(called) == 1
    assert reactor.turn(0) == 0


def test_a_number_that_is_used_again_within_one_batch(reactor, pipes) -> None:
    """Whoever comes first closes all others and opens new ones under the same numbers: none of the old reports reach
    the new events, nor the old ones."""
    called = []
    events = {}

    def handler(event, what) -> None:
        called.append(event.fd)
        for reading, other in list(events.items()):
            if other is not event:
                other.remove()
                os.close(reading)
                fresh, peer = os.pipe()
                pipes.append((fresh, peer))
                kept.append(reactor.watch(fresh, READ, lambda event, what: called.append("new")))
        events.clear()

    kept: list[object] = []
    for reading, writing in pipes:
        events[reading] = reactor.watch(reading, READ, handler)
        os.write(writing, b"x")
    before = set(events)
    assert reactor.turn() == 1 and len(called) == 1
    assert before & {event.fd for event in kept}, "no number was used again: the test shows nothing"
    os.read(called[0], 1)
    assert reactor.turn(0) == 0
    assert called == called[:1]


def test_an_event_that_moves_to_another_descriptor_within_one_batch(reactor, pipes) -> None:
    """Both are ready; the first handler has the second event watch something that isn't."""
    seen: list[int] = []
    (one, feed_one), (two, feed_two), (quiet, _) = pipes[:3]
    reactor.watch(one, READ, lambda event, what: (second.remove(), second.add(quiet, READ)), priority=0, once=True)
    second = reactor.watch(two, READ, lambda event, what: seen.append(event.fd))
    os.write(feed_one, b"x")
    os.write(feed_two, b"x")
    assert reactor.turn() == 1 and seen == []
    assert reactor.turn(0) == 0 and second.fd == quiet


def test_a_number_that_is_used_again_without_removing(pipes) -> None:
    """Closed without a word: the new descriptor of that number gets an event, the old event gets nothing."""
    with Reactor() as reactor:
        seen = []
        (one, _), (two, feed_two) = pipes[:2]
        old = reactor.watch(one, READ, lambda event, what: seen.append("old"))
        os.close(one)
        os.dup2(two, one)
        new = reactor.watch(one, READ, lambda event, what: seen.append("new"))
        assert not old.watched and new.watched
        os.write(feed_two, b"x")
        assert reactor.turn() == 1 and seen == ["new"]
        assert not old.remove()
        assert new.watched, "the old event's removal must not touch the new one's descriptor"
        with pytest.raises(ValueError, match="add it first"):
            old.change(WRITE)
        assert reactor.turn() == 1


def test_a_number_that_another_thread_uses_again(pair) -> None:
    """A thread closes and opens descriptors all the time; each event reports only bytes of its own."""
    with Reactor() as reactor:
        wrong = []
        for round_number in range(200):
            a, b = socket.socketpair()
            tag = round_number.to_bytes(2, "big")

            def handler(event, what, a=a, tag=tag) -> None:
                with contextlib.suppress(BlockingIOError):
                    if a.recv(2, socket.MSG_DONTWAIT) != tag:
                        wrong.append(tag)
                event.remove()
                a.close()

            reactor.watch(a, READ, handler)
            thread = threading.Thread(target=lambda b=b, tag=tag: (b.send(tag), b.close()))
            thread.start()
            reactor.turn()
            thread.join()
        assert wrong == [] and reactor.watches.count == 1


def test_a_duplicate_of_a_closed_descriptor(pair) -> None:
    """epoll(7), Q6: the closed number goes on being reported, for the file is open under another; it can't be removed
    by number. The demultiplexer is made anew once, and the reports end."""
    with Reactor(by_name("epoll")) as reactor:
        seen = []
        other, feed = socket.socketpair()
        a, b = socket.socketpair()
        event = reactor.watch(a, READ, lambda event, what: seen.append("closed"))
        reactor.watch(pair[0], READ, lambda event, what: seen.append(pair[0].recv(1)))
        kept = a.dup()
        a.close()
        event.remove()
        # It gets the slot of the one that was removed, and nothing is there for it to read.
        reactor.watch(other, READ, lambda event, what: seen.append("another's report"))
        b.send(b"x")
        for _ in range(5):
            assert reactor.turn(0) == 0
        assert reactor.watches.resets == 1 and reactor.watches.stale <= 2
        pair[1].send(b"y")
        assert reactor.turn() == 1 and seen == [b"y"], "the others are watched as before"
        reactor.post(seen.append, "posted")
        assert reactor.turn() == 1 and seen[-1] == "posted"
        for end in (other, feed, b, kept):
            end.close()


def test_one_event_for_each_descriptor(reactor, pair) -> None:
    event = reactor.watch(pair[0], READ, print)
    for conditions in (READ, 0):
        with pytest.raises(FileExistsError):
            reactor.watch(pair[0], conditions, print)
    event.change(0)
    for conditions in (READ, 0):
        with pytest.raises(FileExistsError):
            reactor.watch(pair[0], conditions, print)
    with pytest.raises(OSError, match="descriptor 999"):
        reactor.watch(999, READ, print)
    with pytest.raises(ValueError, match="already"):
        event.add(pair[1], READ)
    assert reactor.watches.count == 2, "what failed leaves nothing behind"
    event.remove()
    reactor.watch(pair[0], READ, print).remove()


def test_what_is_asked_for_no_longer(reactor, pair) -> None:
    """Readable and writable came in one report; the first handler of the batch takes an interest of the second away."""
    a, b = pair
    seen = []
    c, d = socket.socketpair()
    with c, d:
        first = reactor.watch(c, WRITE, lambda event, what: second.change(READ), priority=0)
        second = reactor.watch(a, READ | WRITE, lambda event, what: seen.append(what))
        b.send(b"x")
        reactor.turn()
        assert seen == [READ]
        first.handler = lambda event, what: second.change(0)
        reactor.turn()
        assert seen == [READ]
        first.remove()


def test_priorities(reactor, pipes) -> None:
    order: list[int] = []
    for number, (reading, writing) in enumerate(pipes):
        os.write(writing, b"x")
        reactor.watch(reading, READ, lambda event, what: order.append(event.priority), priority=number % 3)
    reactor.after(0, lambda event, deadline: order.append(0), priority=0)
    assert reactor.turn() == 9
    assert order == sorted(order)
    with pytest.raises(ValueError, match="0 .urgent. to 2"):
        reactor.after(0, print, priority=3)


def test_a_spurious_report(reactor, pair) -> None:
    """Another reader was faster: the handler finds nothing, and the next bytes are reported all the same."""
    seen = []

    def handler(event, what) -> None:
        try:
            seen.append(pair[0].recv(1))
        except BlockingIOError:
            seen.append(None)

    reactor.watch(pair[0], READ, handler)
    pair[1].send(b"x")
    reactor.after(0, lambda event, deadline: pair[0].recv(1), priority=0)
    reactor.turn()
    assert seen == [None]
    pair[1].send(b"y")
    reactor.turn()
    assert seen == [None, b"y"]


def test_edge_with_a_budget(pair) -> None:
    """What a handler leaves for the sake of others is reported again by itself, or an edge would lose it."""
    a, b = pair
    with Reactor(by_name("epoll")) as reactor:
        got = bytearray()
        turns = []

        def handler(event, what) -> None:
            got.extend(a.recv(1000))
            turns.append(reactor.turns)
            if len(got) < 10_000:
                event.activate(READ)

        event = reactor.watch(a, READ, handler, trigger=Trigger.EDGE)
        b.send(bytes(10_000))
        while len(got) < 10_000:
            assert reactor.turn(5)
        assert turns == list(range(turns[0], turns[0] + 10)), "one call a turn"
        event.activate(READ)
        event.remove()
        assert reactor.turn(0) == 0, "removed: not called any more"


def test_timers(reactor) -> None:
    seen: list[object] = []
    start = time.monotonic()
    late = reactor.after(0.02, lambda event, deadline: seen.append((deadline, time.monotonic())))
    gone = reactor.after(0.01, lambda event, deadline: seen.append("cancelled"))
    assert gone.remove() and not gone.remove()
    assert late.pending
    reactor.run()
    ((deadline, now),) = seen
    assert start + 0.02 <= deadline <= now and not late.pending
    late.change(0)
    late.handler = lambda event, deadline: seen.append("again")
    assert reactor.turn() == 1 and seen[-1] == "again"


def test_a_timer_that_is_due_does_not_wait(reactor) -> None:
    """rloop #40: a deadline in the past made the poll wait for ever."""
    seen = []
    reactor.at(time.monotonic() - 1, lambda event, deadline: seen.append(1))
    assert reactor.turn(30) == 1


def test_a_timer_cancelled_by_another_of_the_same_moment(reactor) -> None:
    seen = []
    now = time.monotonic()
    reactor.at(now, lambda event, deadline: (seen.append("first"), second.remove()))
    second = reactor.at(now, lambda event, deadline: seen.append("second"))
    third = reactor.at(now, lambda event, deadline: seen.append("third"))
    reactor.turn()
    assert seen == ["first", "third"] and not second.pending and not third.pending


def test_every(reactor) -> None:
    deadlines: list[float] = []

    def tick(event, deadline) -> None:
        deadlines.append(deadline)
        if len(deadlines) == 3:
            assert event.remove()
        time.sleep(0.005 if len(deadlines) == 1 else 0)

    reactor.every(0.002, tick)
    reactor.run()
    assert len(deadlines) == 3
    for earlier, later in itertools.pairwise(deadlines):
        steps = (later - earlier) / 0.002
        assert steps > 0.9 and abs(steps - round(steps)) < 1e-3, "on the grid, though one was late"
    for period in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="period"):
            reactor.every(period, tick)


def test_signals(reactor) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    seen: list[tuple[object, int]] = []
    event = reactor.signal(signal.SIGUSR1, lambda event, count: seen.append((event, count)))
    with pytest.raises(FileExistsError, match="SIGUSR1"):
        reactor.signal(signal.SIGUSR1, print)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    while not seen:
        reactor.turn()
    assert seen == [(event, 1)]
    other = reactor.signal(signal.SIGUSR2, lambda event, count: seen.append((event, count)), once=True)
    os.kill(os.getpid(), signal.SIGUSR2)
    reactor.turn(5)
    assert seen[-1] == (other, 1)
    assert not other.remove(), "watched once"
    assert event.remove() and signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises((ValueError, OSError)):
        reactor.signal(signal.SIGKILL, print)
    assert signal.set_wakeup_fd(-1) == -1 and reactor.watches.count == 1


def test_a_signal_flood_loses_the_reactor_no_signal(reactor) -> None:
    total = []
    reactor.signal(signal.SIGUSR1, lambda event, count: total.append(count))
    done = threading.Event()

    def flood() -> None:
        for _ in range(3000):
            os.kill(os.getpid(), signal.SIGUSR1)
        done.set()

    thread = threading.Thread(target=flood)
    thread.start()
    while not done.is_set():
        reactor.turn(1)
    thread.join()
    calls = len(total)
    os.kill(os.getpid(), signal.SIGUSR1)
    while len(total) == calls:
        assert reactor.turn(5), "the last signal was lost"
    assert total


def test_signals_in_the_main_thread_only(reactor) -> None:
    errors = []

    def try_it() -> None:
        try:
            reactor.signal(signal.SIGUSR1, print)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


def test_interrupted(reactor) -> None:
    """Ctrl-C ends the wait, and the reactor can be used afterwards."""
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
    reactor.after(0, lambda event, deadline: timer.start())
    reactor.after(30, print)
    with pytest.raises(KeyboardInterrupt):
        reactor.run()
    timer.join()
    assert reactor.turn(0) == 0


def test_posts_from_eight_threads(reactor) -> None:
    """In the order of each thread's posts, all of them, with few writes."""
    count, threads = 1500, 8
    seen: list[tuple[int, int]] = []

    def hammer(name: int) -> None:
        for number in range(count):
            reactor.post(seen.append, (name, number))

    reactor.after(60, print)  # keeps it running
    hammering = [threading.Thread(target=hammer, args=(name,)) for name in range(threads)]
    for thread in hammering:
        thread.start()
    while len(seen) < count * threads:
        assert reactor.turn(20), "a post was lost"
    for thread in hammering:
        thread.join()
    for name in range(threads):
        assert [number for other, number in seen if other == name] == list(range(count))


def test_posts_in_a_turn_cost_one_write(reactor) -> None:
    before = reactor.wake_writes
    for _ in range(100):
        reactor.post(int)
    assert reactor.wake_writes == before + 1
    assert reactor.turn() == 100


def test_a_post_that_posts_itself_lets_others_have_a_turn(reactor, pair) -> None:
    posts = []

    def again() -> None:
        posts.append(1)
        reactor.post(again)

    reactor.post(again)
    reactor.watch(pair[0], WRITE, lambda event, what: reactor.stop())
    reactor.run()
    assert len(posts) <= 2


def test_other_threads_are_told_to_post(reactor, pair) -> None:
    errors: list[str] = []

    def change() -> None:
        try:
            reactor.watch(pair[0], READ, print)
        except RuntimeError as error:
            errors.append(str(error))
        reactor.post(lambda: reactor.watch(pair[0], WRITE, lambda event, what: reactor.stop()))

    thread = threading.Thread(target=change)
    reactor.after(0.001, lambda event, deadline: (thread.start(), thread.join()))
    reactor.run()
    assert "reactor.post" in errors[0]


def test_stop_from_another_thread(reactor, pair) -> None:
    reactor.watch(pair[0], READ, print)
    threading.Timer(0.02, reactor.stop).start()
    reactor.run()


def test_a_handler_that_raises(reactor, pipes) -> None:
    """The error comes out; the others of the batch are handled by the next turn, once."""
    seen: list[int] = []

    def handler(event, what) -> None:
        seen.append(event.fd)
        os.read(event.fd, 1)
        raise ZeroDivisionError

    for reading, writing in pipes:
        os.write(writing, b"x")
        reactor.watch(reading, READ, handler)
    for _ in pipes:
        with pytest.raises(ZeroDivisionError):
            reactor.turn()
    assert sorted(seen) == sorted(reading for reading, _ in pipes)
    assert reactor.turn(0) == 0


def test_errors_that_are_taken_care_of(pair) -> None:
    errors = []
    with Reactor(on_error=lambda event, error: errors.append((event, error))) as reactor:
        event = reactor.watch(pair[0], WRITE, lambda event, what: 1 / 0)
        reactor.turn()
        ((where, error),) = errors
        assert where is event and isinstance(error, ZeroDivisionError)


def test_a_turn_within_a_handler(reactor, pipes) -> None:
    """It handles what is left of the batch first; nothing is handled twice."""
    seen: list[int] = []

    def handler(event, what) -> None:
        seen.append(event.fd)
        os.read(event.fd, 1)
        reactor.turn(0)

    for reading, writing in pipes:
        os.write(writing, b"x")
        reactor.watch(reading, READ, handler)
    reactor.turn()
    assert sorted(seen) == sorted(reading for reading, _ in pipes)


def test_in_a_forked_child(pair) -> None:
    with Reactor() as reactor:
        child = os.fork()
        if child == 0:
            try:
                reactor.turn(0)
            except RuntimeError as error:
                os._exit(7 if "after a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        reactor.turn(0)


def test_closed(reactor, pair) -> None:
    event = reactor.watch(pair[0], WRITE, print)
    reactor.after(0, print)
    reactor.signal(signal.SIGUSR1, print)
    before = signal.getsignal(signal.SIGUSR1)
    reactor.close()
    reactor.close()
    assert reactor.closed and not event.watched and signal.getsignal(signal.SIGUSR1) is not before
    for operation in (
        lambda: reactor.turn(0),
        lambda: reactor.post(print),
        lambda: reactor.after(1, print),
        lambda: event.add(pair[0], READ),
    ):
        with pytest.raises(ValueError, match="closed"):
            operation()
    pair[0].send(b"the descriptor is open")
    reactor.stop()


def test_cycles_are_collected(pair) -> None:
    class Owner:
        def on_event(self, event: object, what: object) -> None: ...

    owner = Owner()
    owner.reactor = Reactor()  # type: ignore[attr-defined]
    owner.event = owner.reactor.watch(pair[0], READ, owner.on_event)  # type: ignore[attr-defined]
    owner.timer = owner.reactor.after(60, owner.on_event)  # type: ignore[attr-defined]
    gone = weakref.ref(owner)
    before = len(os.listdir("/proc/self/fd"))
    del owner
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/fd")) == before - 2, "the epoll and the eventfd are closed"


def test_a_queue_for_several_event_threads() -> None:
    """One descriptor in each thread's reactor; all that is put there is taken, once."""
    queue: SharedQueue[int] = SharedQueue()
    taken: list[list[int]] = [[] for _ in range(4)]
    total, lock, done = 4000, threading.Lock(), threading.Event()
    reactors = [Reactor() for _ in taken]

    def take(mine: list[int]) -> None:
        item = queue.take()
        if item is not None:
            mine.append(item)
            with lock:
                if sum(map(len, taken)) == total:
                    done.set()

    threads = []
    for reactor, mine in zip(reactors, taken, strict=True):
        reactor.watch(queue, READ, lambda event, what, mine=mine: take(mine))
        threads.append(threading.Thread(target=reactor.run))
        threads[-1].start()
    for number in range(total):
        queue.put(number)
    assert done.wait(30), f"{sum(map(len, taken))} of {total} were taken, {len(queue)} are left"
    for reactor in reactors:
        reactor.stop()
    for thread in threads:
        thread.join()
    assert sorted(number for mine in taken for number in mine) == list(range(total))
    assert queue.take() is None
    for reactor in reactors:
        reactor.close()
    queue.close()
    with pytest.raises(ValueError, match="closed"):
        queue.put(1)
