"""Sees to it that the mark `processes` says the truth: .ci/run leaves these tests out under the sanitizers."""

from __future__ import annotations

import resource
from collections.abc import Generator

import pytest


def reaped() -> int:
    """Changes whenever a child was waited for: the page faults of them all, getrusage(2), of which each has some."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test that passes fails all the same if it starts processes without the mark, or has it and starts none."""
    before = reaped()
    result = yield
    if item.get_closest_marker("processes") is None:
        assert reaped() == before, "it starts processes: give it the mark, @pytest.mark.processes"
    else:
        assert reaped() != before, "it starts no process: take the mark `processes` away"
    return result
