"""What the loop's own core does: order, timers, wake-ups, descriptors, errors, forks, figures. The interpreter's tests
of asyncio (scripts/asyncio_tests.py) have the rest."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import signal
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import anywire
from anywire.engine._timers import Timer
from anywire.loop import Loop


@pytest.fixture(params=["epoll", "poll", "select"])
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    made = anywire.new_event_loop(demultiplexer=request.param)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def turns(loop: Loop, count: int = 1) -> None:
    for _ in range(count):
        loop.call_soon(loop.stop)
        loop.run_forever()


def test_run_and_runner() -> None:
    async def main() -> str:
        assert type(asyncio.get_running_loop()) is Loop
        await asyncio.sleep(0)
        return "done"

    assert anywire.run(main()) == "done"
    with asyncio.Runner(loop_factory=anywire.new_event_loop) as runner:
        assert runner.run(main()) == "done"


def test_run_within_a_running_loop_is_refused() -> None:
    async def inner() -> None:
        pass

    async def main() -> None:
        coroutine = inner()
        with pytest.raises(RuntimeError, match=r"anywire\.run.*await the coroutine"):
            anywire.run(coroutine)
        await coroutine

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anywire.run(main())
        asyncio.run(main())


def test_handles_are_asyncios(loop: Loop) -> None:
    soon, later = loop.call_soon(print), loop.call_later(10, print)
    assert isinstance(soon, asyncio.Handle) and not isinstance(soon, asyncio.TimerHandle)
    assert isinstance(later, asyncio.TimerHandle) and isinstance(later, asyncio.Handle)
    assert later.when() == pytest.approx(loop.time() + 10, abs=5)
    assert later > loop.call_later(1, print)
    assert repr(soon).startswith("<Handle print(") and repr(later).startswith("<TimerHandle when=")
    for handle in (soon, later):
        handle.cancel()
        assert handle.cancelled() and "cancelled" in repr(handle)
    assert loop.stats().timers == 1     # the cancelled one has left nothing


def test_order_of_a_turn(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    # As the standard loop: what was ready, then reports, then timers; what they add comes in the next turn.
    seen: list[str] = []
    ours, theirs = pair
    theirs.send(b"x")

    def readable() -> None:
        loop.remove_reader(ours)
        seen.append("report")

    loop.add_reader(ours, readable)
    loop.call_at(loop.time() - 1, seen.append, "timer")
    loop.call_soon(lambda: (seen.append("first"), loop.call_soon(seen.append, "next turn")))
    loop.call_soon(seen.append, "second")
    turns(loop, 2)
    assert seen == ["first", "second", "report", "timer", "next turn"]


def test_reports_come_while_callbacks_make_callbacks(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    def again() -> None:
        loop.call_soon(again)

    loop.add_reader(ours, loop.stop)
    loop.call_soon(again)
    theirs.send(b"x")
    loop.run_forever()                  # the test's time-out is the failure


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.003])
def test_timers_are_never_early(loop: Loop, delay: float) -> None:
    late: list[float] = []

    async def main() -> None:
        for _ in range(5):
            fired = loop.create_future()
            handle = loop.call_later(delay, fired.set_result, None)
            await fired
            late.append(loop.time() - handle.when())

    loop.run_until_complete(main())
    assert min(late) >= 0


def test_timer_edges(loop: Loop) -> None:
    seen: list[int] = []
    when = loop.time() + 0.001
    for number in range(20):
        loop.call_at(when, seen.append, number)
    loop.call_at(float("-inf"), seen.append, -1)
    never = loop.call_at(float("inf"), seen.append, 99)
    loop.call_later(1e12, seen.append, 99)
    with pytest.raises(ValueError, match="NaN"):
        loop.call_later(float("nan"), print)
    loop.call_at(when + 0.001, loop.stop)
    loop.run_forever()
    assert seen == [-1, *range(20)]     # equal deadlines keep their order
    assert never.when() == float("inf")


def test_a_timer_that_makes_timers_lets_others_run(loop: Loop) -> None:
    def again() -> None:
        loop.call_at(0, again)

    again()
    loop.call_later(0.002, loop.stop)
    loop.run_forever()


def test_cancel_in_the_same_turn(loop: Loop) -> None:
    seen: list[str] = []
    second = loop.call_at(loop.time(), seen.append, "second")
    first = loop.call_at(second.when() - 1, lambda: (seen.append("first"), second.cancel()))
    turns(loop)
    assert seen == ["first"]
    first.cancel()                      # has run: nothing happens


def test_threads_wake_it(loop: Loop) -> None:
    # Eight threads; a wake that is lost between the last look at the queue and the sleep stops the loop for ever.
    left = 8 * 300

    def one() -> None:
        nonlocal left
        left -= 1
        if not left:
            loop.stop()

    def hammer() -> None:
        for number in range(300):
            loop.call_soon_threadsafe(one)
            if number % 50 == 0:
                time.sleep(0)

    threads = [threading.Thread(target=hammer) for _ in range(8)]
    loop.call_soon(lambda: [thread.start() for thread in threads])
    loop.run_forever()
    for thread in threads:
        thread.join()
    assert left == 0


@pytest.mark.parametrize(("demultiplexer", "left"), [("epoll", 3), ("poll", 0), ("select", 0)])
def test_what_a_wake_leaves(demultiplexer: str, left: int) -> None:
    # An epoll reports each write to the eventfd, so nothing is read from it; the others would report one for ever.
    def counters() -> dict[str, int]:
        found = {}
        for fd in os.listdir("/proc/self/fdinfo"):
            with contextlib.suppress(OSError):              # the directory's own descriptor is gone
                for line in Path("/proc/self/fdinfo", fd).read_text().splitlines():
                    if line.startswith("eventfd-count:"):
                        found[fd] = int(line.split()[1], 16)
        return found

    def stop_when_asleep(sleeps: int) -> None:
        while loop.stats().sleeps < sleeps:
            time.sleep(0)
        loop.call_soon_threadsafe(loop.stop)

    others = counters()
    loop = anywire.new_event_loop(demultiplexer=demultiplexer)
    [fd] = counters().keys() - others.keys()
    for sleeps in (1, 2, 3):
        thread = threading.Thread(target=stop_when_asleep, args=[sleeps])
        thread.start()
        loop.run_forever()
        thread.join()
    assert loop.stats().wakeups == 3
    assert counters()[fd] == left
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    assert loop.stats().sleeps == 4
    loop.close()


def test_a_signal_handler_wakes_it(loop: Loop) -> None:
    former = signal.signal(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(loop.stop))
    try:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        loop.run_forever()
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_contexts(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    variable = contextvars.ContextVar("variable", default=0)
    ours, theirs = pair
    theirs.send(b"x")
    seen: list[int] = []

    def look() -> None:
        seen.append(variable.get())
        variable.set(99)

    def look_once() -> None:
        look()
        loop.remove_reader(ours)

    given = contextvars.copy_context()
    given.run(variable.set, 7)
    variable.set(1)
    loop.call_soon(look)
    loop.call_soon(look)
    loop.add_reader(ours, look_once)
    loop.call_later(0, look)
    loop.call_soon(look, context=given)
    loop.call_soon(look, context=given)
    variable.set(2)
    loop.add_reader(ours, look_once)
    turns(loop, 2)
    assert sorted(seen) == [1, 1, 1, 2, 7, 99]
    assert variable.get() == 2


def test_errors_go_to_the_handler_and_exits_end_the_run(loop: Loop) -> None:
    reports: list[dict[str, Any]] = []
    seen: list[str] = []
    loop.set_exception_handler(lambda _, report: reports.append(report))

    def fail() -> None:
        raise ValueError("bad")

    handle = loop.call_soon(fail)
    loop.call_soon(seen.append, "after")
    turns(loop)
    assert seen == ["after"]
    assert reports[0]["handle"] is handle and isinstance(reports[0]["exception"], ValueError)
    assert "fail" in reports[0]["message"]

    def leave() -> None:
        raise SystemExit(3)

    loop.call_soon(leave)
    loop.call_soon(seen.append, "kept")
    with pytest.raises(SystemExit):
        loop.run_forever()
    turns(loop)
    assert seen == ["after", "kept"]


def test_a_report_for_a_closed_descriptor_is_dropped(loop: Loop) -> None:
    # Two descriptors are ready in one batch; the first handler closes the second one, and its number is used again.
    seen: list[str] = []
    first, second = socket.socketpair(), socket.socketpair()
    for mine, other in (first, second):
        other.send(b"x")
        mine.setblocking(False)
    kept: list[Any] = []

    def handler(name: str, victim: socket.socket) -> None:
        seen.append(name)
        loop.remove_reader(first[0])
        loop.remove_reader(second[0])
        victim.close()
        kept.extend(socket.socketpair())
        loop.add_reader(kept[-2], seen.append, "new")
        loop.add_reader(kept[-1], seen.append, "new")

    loop.add_reader(first[0], handler, "first", second[0])
    loop.add_reader(second[0], handler, "second", first[0])
    turns(loop, 3)
    assert len(seen) == 1 and "new" not in seen
    for end in kept[-2:]:
        loop.remove_reader(end)
    for end in (*first, *second, *kept):
        end.close()


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A socket that is not ready for anything: its peer takes nothing and says nothing."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(1 << 16))
        yield ours


def test_a_cancelled_connect_whose_number_is_used_again(
    loop: Loop, pair: tuple[socket.socket, socket.socket], full: socket.socket,
) -> None:
    """It is connected, and the report is on its way, when the handler of another one cancels it, closes it, and watches
    a new socket of the same number."""
    seen: list[str] = []
    first, feed = pair
    connecting = socket.socket()
    connecting.setblocking(False)
    number = connecting.fileno()

    def give_up() -> None:
        seen.append("gave up")
        loop.remove_reader(first)
        task.cancel()
        connecting.close()
        os.dup2(full.fileno(), number)
        loop.add_writer(number, seen.append, "stale")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop.add_reader(first, give_up)
        loop.call_soon(feed.send, b"x")                      # before the connect begins, so it is reported before that
        task = loop.create_task(loop.sock_connect(connecting, listener.getsockname()))
        turns(loop)
        assert not task.done() and not seen, "nothing was on its way: the test shows nothing"
        turns(loop, 3)
    assert task.cancelled()
    assert seen == ["gave up"]
    assert loop.remove_writer(number), "what the cancelled one left took the new one's writer with it"
    os.close(number)


def test_readers_and_writers(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    seen: list[str] = []
    loop.add_writer(ours, seen.append, "write")
    loop.add_reader(ours, seen.append, "read")
    turns(loop)
    assert seen == ["write"]
    theirs.send(b"x")
    turns(loop)
    assert seen == ["write", "read", "write"]
    loop.add_reader(ours, seen.append, "other")     # replaces
    assert loop.remove_writer(ours) and not loop.remove_writer(ours)
    turns(loop)
    assert seen[3:] == ["other"]
    assert loop.remove_reader(ours) and not loop.remove_reader(ours)
    turns(loop)
    assert seen[4:] == []
    with pytest.raises(ValueError, match="descriptor"):
        loop.add_reader(-1, print)
    with pytest.raises(OSError):
        loop.add_reader(os.sysconf("SC_OPEN_MAX") - 1, print)
    assert loop.stats().watched == 2                # its own: the failed ones have left nothing


def test_a_child_refuses_the_parents_loop() -> None:
    loop = anywire.new_event_loop()
    ours, theirs = socket.socketpair()
    loop.add_reader(ours, loop.stop)

    def child() -> int:
        refused = 0
        for call in (
            lambda: loop.call_soon(print), lambda: loop.call_soon_threadsafe(print), lambda: loop.call_later(1, print),
            lambda: loop.add_reader(theirs, print), loop.run_forever,
        ):
            try:
                call()
            except RuntimeError as error:
                refused += "parent process" in str(error)
        loop.remove_reader(ours)        # must not reach into the set that both processes share
        loop.close()
        anywire.run(asyncio.sleep(0))   # one of its own works
        return refused

    pid = os.fork()
    if not pid:
        try:
            os._exit(child())
        except BaseException:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    theirs.send(b"x")
    loop.run_forever()
    loop.close()
    ours.close()
    theirs.close()


@pytest.mark.filterwarnings("ignore:unclosed event loop")
def test_an_abandoned_loop_is_collected() -> None:
    loop = anywire.new_event_loop()

    async def forever() -> None:
        await asyncio.sleep(1000)

    task = loop.create_task(forever())
    turns(loop)
    loop.call_soon(print, loop)
    loop.call_later(1000, print, loop)
    task._log_destroy_pending = False   # type: ignore[attr-defined]
    gone = weakref.ref(loop)
    open_before = len(os.listdir("/proc/self/fd"))
    del loop, task
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/fd")) == open_before - 4      # epoll, eventfd, the two ends for signals


def test_the_collector_sees_handles_that_are_held(loop: Loop) -> None:
    # Handles in the queue of a running loop aren't tracked; one that somebody holds is again, when it has been called.
    class Holder:
        def __init__(self) -> None:
            self.handle = loop.call_soon(self.called)

        def called(self) -> None:
            pass

    async def main() -> list[weakref.ref[Holder]]:
        gone = [weakref.ref(Holder()), weakref.ref(Holder())]
        holder = gone[1]()
        if holder is not None:
            holder.handle.get_context()
            holder.handle.cancel()
        del holder
        await asyncio.sleep(0)
        gc.collect()
        gone.append(weakref.ref(Holder()))
        loop.call_soon(print, "never")
        return gone

    gone = loop.run_until_complete(main())
    assert [one() for one in gone[:2]] == [None, None]
    turns(loop)
    gc.collect()
    assert gone[2]() is None


def test_the_collector_sees_timers_that_are_held(loop: Loop) -> None:
    # Timers of a running loop aren't tracked; one that somebody holds is again, when it is due, cancelled, asked for
    # its context, or the loop stops.
    kept: contextvars.ContextVar[object] = contextvars.ContextVar("kept")

    class Holder:
        def __init__(self, delay: float) -> None:
            kept.set(self)                      # in the timer's own context, too
            self.handle = loop.call_later(delay, self.called)

        def called(self) -> None:
            pass

    def held(delay: float) -> Holder:
        return contextvars.copy_context().run(Holder, delay)

    async def main() -> list[weakref.ref[Holder]]:
        gone = [weakref.ref(held(0)) for _ in range(3)]
        for use in ("cancel", "get_context"):
            holder = held(0.002)
            getattr(holder.handle, use)()
            gone.append(weakref.ref(holder))
        holder = held(3600)
        assert Timer.cancel(holder.handle)      # type: ignore[arg-type]    # the base class's own
        gone.append(weakref.ref(holder))
        del holder
        await asyncio.sleep(0.01)
        gc.collect()
        gone.append(weakref.ref(held(3600)))
        for _ in range(1000):
            loop.call_later(3600, print)
        return gone

    gone = loop.run_until_complete(main())
    assert [one() for one in gone[:-1]] == [None] * 6
    gc.collect()
    assert gone[-1]() is not None               # it will be called
    loop.close()
    gc.collect()
    assert gone[-1]() is None


@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])
def test_all_ways_to_give_arguments(loop: Loop, name: str) -> None:
    call, called = getattr(loop, name), []
    delay: tuple[Any, ...] = () if "soon" in name else (0.0,)
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    context = contextvars.copy_context()
    context.run(variable.set, "given")

    def note(*arguments: object) -> None:
        called.append((*arguments, variable.get()))

    for debug in (False, True):
        loop.set_debug(debug)
        called.clear()
        call(*delay, note)
        call(*delay, note, 1, 2, 3)
        call(*delay, note, 4, context=context)
        call(*delay, note, context=None)
        call(*delay, callback=note)
        call(*delay, note, **{str(b"context", "ascii"): context})       # a key that isn't the very same object
        loop.call_later(0.005, loop.stop)
        loop.run_forever()
        assert called == [("none",), (1, 2, 3, "none"), (4, "given"), ("none",), ("none",), ("given",)]
        for wrong, options in (
            ((), {}), ((*delay, note), {"nonsense": 1}), ((*delay, note), {"context": None, "nonsense": 1}),
        ):
            with pytest.raises(TypeError):
                call(*wrong, **options)
    loop.set_debug(False)
    if delay:
        for wrong in (((None, note)), (("1", note)), ((float("nan"), note))):
            with pytest.raises((TypeError, ValueError)):
                call(*wrong)
    with pytest.raises(TypeError):
        getattr(Loop, name)(object(), *delay, note)
    assert name in (getattr(Loop, name).__doc__ or "") or name == "call_at"


def test_many_timers_in_order(loop: Loop) -> None:
    """Those that are due together, beside those that are due later and those that are cancelled meanwhile."""
    chance, called, want = random.Random(3), [], []
    now = loop.time()
    handles = []
    for number in range(5000):
        when = now + chance.randrange(50) / 1e4
        handles.append(loop.call_at(when, called.append, (when, number)))
    for handle in chance.sample(handles, 2000):
        handle.cancel()
    want = sorted((handle.when(), number) for number, handle in enumerate(handles) if not handle.cancelled())

    def cancel_next() -> None:
        # In the same batch: it is not called any more.
        second.cancel()
        loop.call_at(now + 0.01, late)

    def late() -> None:
        called.append("late")
        loop.stop()

    loop.call_at(now + 0.009, cancel_next)
    second = loop.call_at(now + 0.009, called.append, "cancelled")
    loop.run_forever()
    assert called == [*want, "late"]
    assert loop.stats().timers == 0


def test_sock_recv(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    async def main() -> None:
        waiting = [loop.create_task(loop.sock_recv(ours, 10)) for _ in range(3)]
        await asyncio.sleep(0)
        # Cancelled when the bytes are here already: it has taken nothing, the others get them, one after the other.
        theirs.send(b"x")
        await asyncio.sleep(0)
        waiting[0].cancel()
        done, _ = await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [b"x"]
        theirs.send(b"y" * 10)
        assert sorted([await task for task in waiting[1:]]) == [b"x", b"y" * 10]
        # With a reader and a writer of the same descriptor.
        seen: list[str] = []
        loop.add_reader(ours, seen.append, "read")
        receive = loop.create_task(loop.sock_recv(ours, 10))
        await asyncio.sleep(0)
        loop.remove_reader(ours)
        loop.add_writer(ours, seen.append, "write")
        await asyncio.sleep(0.001)
        theirs.send(b"z")
        assert await receive == b"z"
        loop.remove_writer(ours)
        assert "write" in seen and "read" not in seen
        # The number is used again.
        receive = loop.create_task(loop.sock_recv(ours, 10))
        await asyncio.sleep(0)
        number = ours.detach()
        os.close(number)
        receive.cancel()
        others = socket.socketpair()
        for end in others:
            end.setblocking(False)
        loop.call_soon(others[1].send, b"w")
        assert await loop.sock_recv(others[0], 10) == b"w"
        others[1].close()
        assert await loop.sock_recv(others[0], 10) == b""
        others[0].close()
        with pytest.raises(OSError):
            await loop.sock_recv(others[0], 10)

    loop.run_until_complete(main())


def test_closed(loop: Loop) -> None:
    timer = loop.call_later(1, print)
    loop.call_soon(print, "never")
    loop.close()
    loop.close()
    timer.cancel()
    for call in (loop.call_soon, loop.call_soon_threadsafe):
        with pytest.raises(RuntimeError, match="closed"):
            call(print)
    assert loop.stats().ready == loop.stats().timers == 0


def test_busy_poll(pair: tuple[socket.socket, socket.socket]) -> None:
    loop = anywire.new_event_loop(busy_poll=20_000_000)
    ours, theirs = pair
    loop.add_reader(ours, loop.stop)
    loop.call_later(0.001, theirs.send, b"x")
    loop.run_forever()
    loop.remove_reader(ours)
    thread = threading.Timer(0.001, loop.call_soon_threadsafe, (loop.stop,))
    thread.start()
    loop.run_forever()
    thread.join()
    assert loop.stats().sleeps == 0
    loop.close()
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="microseconds"):
            anywire.new_event_loop(busy_poll=wrong)


def test_figures() -> None:
    async def slow_one() -> None:
        time.sleep(0.006)
        await asyncio.sleep(0.01)

    with contextlib.closing(anywire.new_event_loop(slow_callbacks=0.005)) as loop:
        loop.run_until_complete(loop.create_task(slow_one(), name="culprit"))
        figures = loop.stats()
        # A busy machine makes any callback slow; the first one is.
        assert figures.slow[0][0].split(":")[0] == "culprit" and "slow_one" in figures.slow[0][0]
        assert figures.slow[0][1] >= 0.006 and all(took >= 0.005 for _, took in figures.slow)
        assert len(figures.slow) < figures.callbacks
        assert 0.009 <= figures.slept <= figures.seconds - 0.006
        assert 0 < figures.utilisation < 1
        assert figures.callbacks >= 3 and figures.turns >= 2 and figures.sleeps >= 1 and figures.watched == 2


def test_debug_mode(loop: Loop) -> None:
    loop.set_debug(True)
    handle = loop.call_soon(print)
    assert "test_debug_mode" not in repr(handle) and f"created at {__file__}" in repr(handle)
    loop._thread_id = -1                # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        loop.call_soon(print)
    loop._thread_id = None              # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="callable"):
        loop.call_later(1, 3)           # type: ignore[arg-type]
    handle.cancel()
