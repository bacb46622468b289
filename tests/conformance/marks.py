"""Words for saying which wires a scenario runs on: `@holds("order", ordered, two_way)`.

Each condition reads the promise (wires.py), never the implementation. A wire that doesn't promise a guarantee does not
run its scenarios; what its line says instead is tested under the opposite condition.
"""

from __future__ import annotations

from typing import Any

import pytest

from .wires import Setup

CLEAR = "clear about what it can't do"
"""The guarantee of the scenarios under the opposite conditions: of wires that don't make some promise."""


def holds(guarantee: str, *conditions: Any, **options: Any) -> Any:
    return pytest.mark.holds(guarantee, *conditions, **options)


def reliable(setup: Setup) -> bool:
    return setup.promise.reliable


def ordered(setup: Setup) -> bool:
    return setup.promise.ordered != "no"


def two_way(setup: Setup) -> bool:
    return setup.two_way


def one_way(setup: Setup) -> bool:
    return not setup.two_way


def connected(setup: Setup) -> bool:
    return setup.promise.connection


def connectionless(setup: Setup) -> bool:
    return not setup.promise.connection


def listening(setup: Setup) -> bool:
    return setup.shape == "listener"


def clean_end(setup: Setup) -> bool:
    return setup.promise.clean_end


def no_clean_end(setup: Setup) -> bool:
    return not setup.promise.clean_end


def half_close(setup: Setup) -> bool:
    return setup.promise.half_close


def no_half_close(setup: Setup) -> bool:
    return not setup.promise.half_close


def sees_death(setup: Setup) -> bool:
    return setup.promise.death == "at once"


def blind_to_death(setup: Setup) -> bool:
    return setup.promise.death == "no"


def processes(setup: Setup) -> bool:
    return setup.processes


def framed(setup: Setup) -> bool:
    return setup.framed


def stream(setup: Setup) -> bool:
    return "stream" in setup.promise.kind


def credentials(setup: Setup) -> bool:
    return setup.promise.credentials == "process"


def roomy(setup: Setup) -> bool:
    """Some ten small messages can wait."""
    return setup.room > 100


def several(setup: Setup) -> bool:
    return setup.several


def wire(*names: str) -> Any:
    """Only these wires, for what is theirs alone."""
    return lambda setup: setup.name in names
