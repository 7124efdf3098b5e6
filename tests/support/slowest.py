"""Where a run's time went, file by file."""

from __future__ import annotations

from collections import defaultdict

import pytest


class Slowest:
    """Adds up how long the tests of each file took, their fixtures included, and tells the longest at the end."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        longest = sorted(self._seconds.items(), key=lambda item: -item[1])[: self._count]
        terminalreporter.section(f"slowest {len(longest)} files, of {sum(self._seconds.values()):.0f} s in all")
        for file, seconds in longest:
            terminalreporter.write_line(f"{seconds:7.1f}s {file}")
