"""Runs each scenario on every wire that promises its guarantee, on both fronts.

A scenario is `async def test_…(world)` with `@holds("guarantee", condition, …)`: it is parametrised over the wires
whose line fulfils the conditions. The guarantee is the column of README's first table that the scenario proves.

ANYWIRE_CONFORMANCE_RESULT=file: ../conftest.py writes {wire: {front: {guarantee: {scenario: passed}}}} there, for
scripts/guarantee_table.py.
ANYWIRE_FAULT=name: install that fault first (faults.py), in this process and in the peers.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from typing import Any

import pytest

from .fronts import FRONTS
from .loops import on_loop
from .wires import promising
from .world import World

DEADLINE = float(os.environ.get("ANYWIRE_CONFORMANCE_DEADLINE", 40))  # seconds a scenario; a hang is a failure


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "holds(guarantee, *conditions): the guarantee that a scenario proves")
    fault = os.environ.get("ANYWIRE_FAULT")
    if fault:
        from . import faults

        faults.install(fault)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("holds")
    assert marker is not None, f"{metafunc.function.__name__} needs @holds"
    fronts = marker.kwargs.get("fronts", tuple(FRONTS))
    pairs = [(setup, front) for setup in promising(*marker.args[1:]) for front in fronts]
    metafunc.parametrize("world", pairs, ids=[f"{setup.name}-{front}" for setup, front in pairs])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    setup, front = arguments["world"]

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE), World(setup, FRONTS[front]()) as world:
            await pyfuncitem.obj(**{**arguments, "world": world})

    on_loop(scenario())
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    marker = item.get_closest_marker("holds")
    if marker is not None and "world" in getattr(item, "funcargs", {}):
        setup, front = item.funcargs["world"]  # type: ignore[attr-defined]
        line = [setup.name, front, marker.args[0], item.originalname]  # type: ignore[attr-defined]
        report.user_properties.append(("conformance", line))
    return report
