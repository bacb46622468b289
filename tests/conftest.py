"""What a whole run of the tests begins with, and leaves behind: the conformance suite's result, for README's table.

ANYWIRE_CONFORMANCE_RESULT=file: write {wire: {front: {guarantee: {scenario: passed}}}} there, for
scripts/guarantee_table.py. It is here and not beside the suite because under xdist the controlling process, which gets
all reports, loads only the conftest files of the directories that it was given.

A run in the background, or under nohup, inherits ignored signals, and so would all that the tests start; those that
press Ctrl-C or hang up need them as they are at a terminal.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest


class Results:
    """Collects in the controlling process, also under xdist: user properties travel with the reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "conformance" and (report.when == "call" or report.failed):
                wire, front, guarantee, scenario = value
                scenarios = self.results.setdefault(wire, {}).setdefault(front, {}).setdefault(guarantee, {})
                scenarios[scenario] = scenarios.get(scenario, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        if self.results:
            self.path.write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    path = os.environ.get("ANYWIRE_CONFORMANCE_RESULT")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Path(path).absolute()), "conformance-results")
