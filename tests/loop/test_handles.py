"""What a callback finds as its context, and what handles cost the garbage collector.

A handle has a copy of its caller's context, but no object is made for it before somebody sees it: whatever a program
does to see one must find what asyncio promises. Each test runs with such copies and with copies that are made at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import anywire
from anywire.loop import Loop
from anywire.loop._handles import _copy_contexts_at_once

variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default="default")


@pytest.fixture(params=["late", "at once"])
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    _copy_contexts_at_once(request.param == "at once")
    try:
        made = anywire.new_event_loop()
    finally:
        _copy_contexts_at_once(False)
    with contextlib.closing(made):
        yield made


def run(loop: Loop, *callbacks: Callable[[], object]) -> None:
    """Call them in this order, each as a callback of its own that nobody holds."""
    for callback in callbacks:
        loop.call_soon(callback)
    loop.call_soon(loop.stop)
    loop.run_forever()


def in_context(**values: object) -> contextvars.Context:
    context = contextvars.copy_context()
    for value in values.values():
        context.run(variable.set, value)
    return context


def test_what_one_callback_sets_the_next_does_not_see(loop: Loop) -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(variable.get())
        variable.set("changed")
        seen.append(variable.get())

    def both() -> None:
        loop.call_soon(look)
        loop.call_soon_threadsafe(look)
        loop.call_later(0, look)

    contextvars.Context().run(run, loop, look, both, look)
    run(loop)
    run(loop)
    in_context(value="outer").run(run, loop, look, look)
    assert seen == ["default", "changed"] * 5 + ["outer", "changed"] * 2
    assert variable.get() == "default"


def test_callbacks_of_callbacks_inherit_what_was_set(loop: Loop) -> None:
    seen: list[object] = []

    def outer() -> None:
        variable.set("outer")
        loop.call_soon(inner)
        loop.call_soon(lambda: seen.append(variable.get()))
        variable.set("later")

    def inner() -> None:
        seen.append(variable.get())
        variable.set("inner")

    run(loop, outer)
    run(loop)
    assert seen == ["outer", "outer"]


def test_a_thread_gives_its_own_context(loop: Loop) -> None:
    seen: list[object] = []

    def work() -> None:
        loop.call_soon_threadsafe(lambda: seen.append(variable.get()))      # it has had no context before
        variable.set("thread's")
        loop.call_soon_threadsafe(lambda: seen.append(variable.get()))
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=contextvars.Context().run, args=(work,))
    bare = threading.Thread(target=loop.call_soon_threadsafe, args=(lambda: seen.append(variable.get()),))
    for one in (bare, thread):
        one.start()
        one.join()
    in_context(value="loop's").run(loop.run_forever)
    assert seen == ["default", "default", "thread's"]


def test_a_token_belongs_to_the_callback_that_set_it(loop: Loop) -> None:
    tokens: list[contextvars.Token[Any]] = []
    errors: list[type[Exception]] = []

    def reset() -> None:
        try:
            variable.reset(tokens[0])
        except ValueError as error:
            errors.append(type(error))

    run(loop, lambda: tokens.append(variable.set(1)), reset, lambda: tokens.append(variable.set(2)))
    assert errors == [ValueError]
    assert [token.old_value for token in tokens] == [contextvars.Token.MISSING] * 2


def test_copies_that_callbacks_make_are_theirs(loop: Loop) -> None:
    copies: list[contextvars.Context] = []

    def keep() -> None:
        variable.set(len(copies))
        copies.append(contextvars.copy_context())

    run(loop, keep, keep, keep)
    assert [copy[variable] for copy in copies] == [0, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_a_callback_set_outlives_it(loop: Loop, fails: bool) -> None:
    class Value:
        pass

    gone: list[weakref.ref[Value]] = []
    loop.set_exception_handler(lambda _, report: None)

    def put() -> None:
        value = Value()
        variable.set(value)
        gone.append(weakref.ref(value))
        if fails:
            del value
            raise ValueError

    loop.call_soon(put)
    loop.call_soon(loop.stop, context=contextvars.Context())       # it doesn't use what `put` had
    loop.run_forever()
    assert gone[0]() is None


@pytest.mark.parametrize("call", ["call_soon", "call_soon_threadsafe", "call_later"])
def test_a_handle_that_is_held_shows_its_own_context(loop: Loop, call: str) -> None:
    def ask(callback: Callable[..., object], *arguments: object) -> asyncio.Handle:
        delay = (0,) if call == "call_later" else ()
        handle = getattr(loop, call)(*delay, callback, *arguments)
        assert isinstance(handle, asyncio.Handle)
        return handle

    async def main() -> None:
        asked = ask(variable.set, "first")
        before = asked.get_context()             # type: ignore[attr-defined]    # 3.12
        kept = ask(variable.set, "second")
        cancelled = ask(variable.set, "third")
        cancelled.cancel()
        done = asyncio.get_running_loop().create_future()
        loop.call_later(0.001, done.set_result, None)
        await done
        assert before.get(variable) == "first"
        assert asked.get_context() is before     # type: ignore[attr-defined]
        for handle, value in ((kept, "second"), (cancelled, None)):
            context = handle.get_context()       # type: ignore[attr-defined]
            assert context is handle._context    # type: ignore[attr-defined]
            assert context.get(variable) == value
            assert context is not before

    contextvars.Context().run(loop.run_until_complete, main())


def test_a_failed_callback_is_reported_with_its_context(loop: Loop) -> None:
    found: list[object] = []
    loop.set_exception_handler(lambda _, report: found.append(report["handle"].get_context()[variable]))

    def fail(value: str) -> None:
        variable.set(value)
        raise ValueError(value)

    run(loop, lambda: fail("first"), lambda: fail("second"))
    loop.call_later(0, fail, "third")
    loop.call_later(0.001, loop.stop)
    loop.run_forever()
    assert found == ["first", "second", "third"]


def test_a_callback_may_run_another_loops_callbacks(loop: Loop) -> None:
    seen: list[object] = []

    def nested() -> None:
        variable.set("outer")
        asyncio._set_running_loop(None)          # as nest_asyncio does
        other = anywire.new_event_loop()
        try:
            run(other, lambda: variable.set("inner"), lambda: seen.append(variable.get()))
        finally:
            other.close()
            asyncio._set_running_loop(loop)
        seen.append(variable.get())

    run(loop, nested, lambda: seen.append(variable.get()))
    assert seen == ["outer", "outer", "default"]


def test_a_callback_may_call_a_handle_itself(loop: Loop) -> None:
    seen: list[object] = []

    def by_hand() -> None:
        variable.set("by hand")
        handle = loop.call_soon(lambda: seen.append(variable.get()))
        variable.set("since")
        handle._run()
        handle.cancel()
        seen.append(variable.get())

    run(loop, by_hand)
    assert seen == ["by hand", "since"]


def test_readers_keep_what_they_set(loop: Loop) -> None:
    here, there = socket.socketpair()
    seen: list[object] = []

    def look() -> None:
        here.recv(1)
        seen.append(variable.get())
        variable.set(len(seen))
        if len(seen) == 3:
            loop.stop()
        else:
            there.send(b"x")

    with here, there:
        loop.add_reader(here, look)
        there.send(b"x")
        loop.run_forever()
        loop.remove_reader(here)
    assert seen == ["default", 1, 2]


@pytest.mark.parametrize("call", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])
def test_what_is_no_context_is_refused(loop: Loop, call: str) -> None:
    when = () if "soon" in call else (0,)
    for wrong in ("text", {}, contextvars):
        with pytest.raises(TypeError, match="context must be a contextvars.Context, not"):
            getattr(loop, call)(*when, print, context=wrong)


def test_the_collector_does_not_count_what_waits() -> None:
    # Fifty thousand callbacks and timers would begin 140 collections, which find nothing.
    many = 50_000

    def collections() -> int:
        return sum(generation["collections"] for generation in gc.get_stats())

    async def main() -> int:
        gc.collect()
        before = collections()
        for _ in range(many):
            loop.call_soon(int)
            loop.call_later(0, int)
        made = collections() - before
        await asyncio.sleep(0.001)
        return made

    loop = anywire.new_event_loop()
    with contextlib.closing(loop):
        assert loop.run_until_complete(main()) <= 2
        assert loop.stats().callbacks > 2 * many


def test_garbage_that_callbacks_leave_is_collected() -> None:
    # Handles come and go without the collector; what callbacks make and drop counts as ever.
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    async def main() -> int:
        loop = asyncio.get_running_loop()
        for _ in range(200):
            for _ in range(100):
                loop.call_soon(Cycle)
            await asyncio.sleep(0)
        return sum(isinstance(one, Cycle) for one in gc.get_objects())

    assert gc.isenabled()
    with asyncio.Runner(loop_factory=anywire.new_event_loop) as runner:
        assert runner.run(main()) < 10_000
