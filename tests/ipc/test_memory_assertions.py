"""The table of assertions names tests that exist, and leaves no assertion out."""

from __future__ import annotations

import re
from pathlib import Path

import memory_assertions
import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("function", memory_assertions.COUNTS)
def test_each_assertion_has_a_test_or_a_reason(function: str) -> None:
    tested = memory_assertions.TESTED[function]
    parts = [*tested, *memory_assertions.NOT_TESTED.get(function, {})]
    numbers = [int(number) for number in " ".join(parts).split()]
    assert sorted(numbers) == list(range(1, memory_assertions.COUNTS[function] + 1))
    where = HERE / ("test_semaphore.py" if function.startswith("sem") else "test_shared_memory.py")
    here = set(re.findall(r"^def (test_\w+)", where.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(tested.values()) <= here
