"""All metrics are logged through ``MetricLog``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

from slime_spec.config.tree import Config
from slime_spec.interfaces import SINKS, MetricSink, load_choice
from slime_spec.metrics.table import metric


@runtime_checkable
class ShowsProgress(Protocol):
    """Shows, as some sinks can, how far the current phase is."""

    def progress(self, phase: str, done: int, wanted: int) -> None: ...


class MetricLog:
    """Gives each step's metrics to every sink. Example::

    with MetricLog.open(config, folder) as log:
        log.log(0, {"rollout/reward_mean": 0.25})
    """

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def open(cls, config: Config, folder: Path) -> MetricLog:
        """Open the sinks that the configuration asks for, metrics.jsonl always among them, and the alarm."""
        asked = {
            "jsonl": True,
            "wandb": config.metrics.use_wandb,
            "tensorboard": config.metrics.use_tensorboard,
            "console": config.metrics.console,
            "alarm": config.speculative.record.speculates,
            "report": config.metrics.report_interval > 0,  # after jsonl, which it reads
        }
        with ExitStack() as opened:
            sinks = []
            for name in (name for name, wanted in asked.items() if wanted):
                sink: MetricSink = load_choice("metrics", SINKS, name).open(config, folder)
                opened.callback(sink.close)
                sinks.append(sink)
            opened.pop_all()
        return cls(sinks)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's values to every sink; raises ConfigError for a name that is not in the table."""
        for name in values:
            metric(name)
        for sink in self._sinks:
            sink.write(step, values)

    def progress(self, phase: str, done: int, wanted: int) -> None:
        """Show, in the sinks that can, how far a phase of the step is."""
        for sink in self._sinks:
            if isinstance(sink, ShowsProgress):
                sink.progress(phase, done, wanted)

    def close(self) -> None:
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
