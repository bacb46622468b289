"""Runs each pattern scenario, `async def test_…(many)`, on every wire of `pattern_world.WIRES`, on both fronts."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from conformance.fronts import FRONTS
from conformance.wires import SETUPS
from pattern_world import WIRES, Many

DEADLINE = 40
"""Seconds a scenario; a hang is a failure."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "only(wires=None, fronts=None): the wires or fronts that a scenario is about")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "many" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("only")
    options = marker.kwargs if marker is not None else {}
    wanted = options.get("wires") or WIRES
    pairs = [
        (setup, front) for setup in SETUPS if setup.name in wanted for front in options.get("fronts") or tuple(FRONTS)
    ]
    metafunc.parametrize("many", pairs, ids=[f"{setup.name}-{front}" for setup, front in pairs])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    setup, front = arguments["many"]

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE), Many(setup, FRONTS[front]()) as many:
            await pyfuncitem.obj(**{**arguments, "many": many})

    asyncio.run(scenario())
    return True
