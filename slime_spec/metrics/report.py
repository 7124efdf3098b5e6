"""The sink writes report.html into the run's folder while the run goes on, and once more when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from slime_spec.config.tree import Config
from slime_spec.errors import ConfigError
from slime_spec.report.folder import read_run
from slime_spec.report.page import FILE, Page, write_page

logger = logging.getLogger(__name__)

RELOAD_S = 15.0  # after which an open page of a run that goes on reads itself again
MOST_SHARE = 0.02  # of a run's time that its pages may take: long runs write them less often


class ReportSink:
    """Implements MetricSink: reads what the run's folder has, every ``interval`` steps.

    A page that cannot be written is a warning, said once, and fails no run. ``clock`` tells seconds.
    """

    def __init__(self, folder: Path, interval: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._interval, self._clock = folder, interval, clock
        self._num_steps = 0
        self._ended_s, self._took_s = clock(), 0.0
        self._has_warned = False

    @classmethod
    def open(cls, config: Config, folder: Path) -> ReportSink:
        return cls(folder, config.metrics.report_interval)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._num_steps += 1
        is_due = self._num_steps == 1 or self._num_steps % self._interval == 0
        if is_due and self._took_s <= MOST_SHARE * (self._clock() - self._ended_s):
            self._write(is_running=True)

    def close(self) -> None:
        if self._num_steps:
            self._write(is_running=False)

    def _write(self, is_running: bool) -> None:
        began_s = self._clock()
        try:
            run = read_run(self._folder, self._folder.absolute().name, is_running)
            write_page(self._folder / FILE, Page((run,), reload_s=RELOAD_S if is_running else None))
        except (ConfigError, OSError) as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("report not written path=%s: %s", self._folder / FILE, error)
        self._ended_s = self._clock()
        self._took_s = self._ended_s - began_s
