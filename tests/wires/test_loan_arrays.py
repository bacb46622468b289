"""`loan_array`: an array in the memory that a message goes through, on a wire that shares memory and on another."""

from __future__ import annotations

import asyncio
import functools
import gc
import pickle
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import numpy
import pytest

import anywire


def address_of(scheme: str) -> str:
    return f"{scheme}://loans-{uuid.uuid4().hex}"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test, run in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), 20))

    return run


class Pair:
    """Two connected channels."""

    def __init__(self, scheme: str) -> None:
        self.address = address_of(scheme)

    async def __aenter__(self) -> tuple[Any, Any]:
        self.listener = anywire.listen(self.address)
        await self.listener.__aenter__()
        connecting = anywire.connect(self.address)
        accepting = asyncio.ensure_future(self.listener.accept())
        self.one = await connecting
        self.other = await accepting
        return self.one, self.other

    async def __aexit__(self, *_: object) -> None:
        self.one.abort()
        self.other.abort()
        await self.listener.__aexit__(None, None, None)


@pytest.mark.parametrize("scheme", ["shm", "inproc"])
@in_a_loop
async def test_an_array_arrives(scheme: str) -> None:
    async with Pair(scheme) as (one, other):
        array = one.loan_array((300, 70), "float64")
        assert array.shape == (300, 70) and array.dtype == numpy.float64 and array.flags.writeable
        array[:] = numpy.arange(21000).reshape(300, 70)
        await one.send(array)
        with await other.recv(copy=False) as view:
            assert (numpy.frombuffer(view, "float64").reshape(300, 70) == array).all()


@in_a_loop
async def test_on_shared_memory_nothing_is_copied() -> None:
    """What is written after the send is seen by the receiver: it is the same memory."""
    async with Pair("shm") as (one, other):
        array = one.loan_array(100_000)
        array[:] = 1
        await one.send(array)
        view = await other.recv(copy=False)
        assert other.endpoint.views == 1
        array[:] = 2
        assert set(view) == {2}
        view.release()
        assert other.endpoint.views == 0


@in_a_loop
async def test_the_memory_is_lent_again_only_when_both_sides_let_go() -> None:
    async with Pair("shm") as (one, other):
        large = 3 << 20             # smaller ones take turns, and would have another place anyhow
        first = one.loan_array(large)
        place = first.ctypes.data
        await one.send(first)
        (await other.recv(copy=False)).release()
        second = one.loan_array(large)
        assert second.ctypes.data != place, "the first array still shows this memory"
        del first
        third = one.loan_array(large)
        assert third.ctypes.data == place


@in_a_loop
async def test_a_view_forgotten_in_a_cycle_comes_back_and_is_counted() -> None:
    async with Pair("shm") as (one, other):
        await one.send(bytes(200_000))
        cycle: list[Any] = [await other.recv(copy=False)]
        cycle.append(cycle)
        del cycle
        assert (other.endpoint.views, other.endpoint.forgotten) == (1, 0)
        gc.collect()
        assert (other.endpoint.views, other.endpoint.forgotten) == (0, 1)


@in_a_loop
async def test_a_view_in_use_is_not_released() -> None:
    async with Pair("shm") as (one, other):
        await one.send(bytes(200_000))
        view = await other.recv(copy=False)
        export = pickle.PickleBuffer(view)
        with pytest.raises(BufferError):
            view.release()
        export.release()
        array = numpy.frombuffer(view, "uint8")  # has a view of its own
        view.release()
        assert array.sum() == 0 and other.endpoint.views == 1
        del array
        assert other.endpoint.views == 0


@in_a_loop
async def test_empty_arrays_and_scalars() -> None:
    async with Pair("shm") as (one, other):
        await one.send(one.loan_array(0))
        assert await other.recv() == b""
        await one.send(one.loan(0))
        assert await other.recv() == b""
        await one.send(one.loan_array((), "int32"))
        assert len(await other.recv()) == 4


@in_a_loop
async def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Pair("shm") as (one, _):
        with pytest.raises(TypeError, match="Python objects"):
            one.loan_array(3, object)
        with pytest.raises(ValueError, match="negative"):
            one.loan_array((3, -1))
        monkeypatch.setitem(sys.modules, "numpy", None)
        with pytest.raises(ModuleNotFoundError, match=r"anywire\[numpy\]"):
            one.loan_array(3)


def test_blocking() -> None:
    address = address_of("shm")
    accepted: list[Any] = []
    with anywire.sync.listen(address) as listener:
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
        thread.start()
        one = anywire.sync.connect(address)
        thread.join()
        (other,) = accepted
        array = one.loan_array((3, 1000), "int32")
        array[:] = 7
        one.send(array)
        assert set(other.recv(copy=False).cast("i")) == {7}
        one.abort()
        other.abort()
