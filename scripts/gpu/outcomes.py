"""Write every test's outcome into a file as soon as it is known, so that a run that is ended tells what it had found.

A plugin of pytest: ``-p outcomes --outcomes FILE`` with this folder on PYTHONPATH. One JSON object a line:
{"test": "tests/embedded/test_a.py::test_x", "outcome": "failed", "why": "the traceback"}.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="a file, written anew")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of xdist reports to the process that does this
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


class Outcomes:
    """Writes a line for each test that passed or was skipped, and for each failure, of fixtures too."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            line = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "why": report.longreprtext if report.failed else "",
            }
            self._file.write(f"{json.dumps(line)}\n")
            self._file.flush()
