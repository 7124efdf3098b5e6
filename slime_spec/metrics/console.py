"""The terminal sink shows a progress bar for the run and its current phase, a line per step, a table at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slime_spec.columns import WIDEST, wrapped
from slime_spec.config.tree import Config
from slime_spec.metrics.summary import mean_of, window_of

logger = logging.getLogger(__name__)

SHOWN = {"is_shown": True}  # marks log lines that the terminal has already: they are for the run's log
# (metric, short name, format) of what a step's line shows, in this order, where the step has it.
LINE = (
    ("rollout/reward_mean", "reward", "{:.3f}"),
    ("rollout/response_len_mean", "len", "{:.1f}"),
    ("rollout/spec_accept_rate", "accept_rate", "{:.3f}"),
    ("rollout/spec_accept_length", "accept_len", "{:.2f}"),
    ("spec/net_speedup_est", "net_speedup", "{:.2f}x"),
    ("spec/off_ratio", "off", "{:.0%}"),
    ("spec/pays_up_to_batch", "pays_up_to", "{:.0f}"),
    ("sync/canary_accept_length", "canary", "{:.2f}"),
    ("train/train_rollout_logprob_abs_diff", "logprob_diff", "{:.1e}"),
    ("train/grad_norm", "grad_norm", "{:.2f}"),
    ("perf/tokens_per_s", "tokens_per_s", "{:.0f}"),
    ("perf/rollout_time", "rollout", "{:.1f}s"),
    ("perf/train_time", "train", "{:.1f}s"),
    ("perf/sync_time", "sync", "{:.2f}s"),
    ("perf/step_time", "step_time", "{:.1f}s"),
    ("rollout/num_excluded", "excluded", "{:.0f}"),
)


class ConsoleSink:
    """Implements MetricSink and ShowsProgress; without a terminal it writes the plain lines only.

    A step's line is wrapped to the terminal, and stands in the run's log in one piece.
    """

    def __init__(self, num_steps: int, console: Console) -> None:
        self._num_steps = num_steps
        self._console = console
        self._rows: dict[int, Mapping[str, float]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._steps = self._bars.add_task("steps", total=num_steps)
        self._phase = self._bars.add_task("starting", total=None)
        self._bars.start()

    @classmethod
    def open(cls, config: Config, folder: Path) -> ConsoleSink:
        return cls(config.run.num_rollout, Console(stderr=True))

    def progress(self, phase: str, done: int, wanted: int) -> None:
        self._bars.update(self._phase, description=phase, completed=done, total=wanted)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's line; the row after the last step has the evaluation of the end, which the log shows."""
        if step >= self._num_steps:
            return
        self._rows[step] = dict(values)
        line = step_line(step, self._num_steps, values)
        for part in wrapped(line, min(self._console.width, WIDEST) if self._console.is_terminal else WIDEST):
            self._console.print(part, soft_wrap=True, markup=False, highlight=False)
        logger.info(line, extra=SHOWN)
        self._bars.update(self._steps, completed=step + 1)

    def close(self) -> None:
        self._bars.stop()
        if self._rows:
            self._console.print(summary(self._rows))


def step_line(step: int, num_steps: int, values: Mapping[str, float]) -> str:
    """Return ``finished step=3/40 reward=0.312 len=18.2 accept_rate=0.351 ...``, steps counted from 1."""
    facts = [f"{short}={form.format(values[name])}" for name, short, form in LINE if _worth_showing(name, values)]
    return f"finished step={step + 1}/{num_steps} " + " ".join(facts)


def summary(rows: Mapping[int, Mapping[str, float]]) -> Table:
    """Return the mean of each shown metric over the first and the last steps; see ``window_of``."""
    steps = sorted(rows)
    window = window_of(len(steps))
    first, last = steps[:window], steps[-window:]
    table = Table(title=f"{len(steps)} steps")
    table.add_column("metric")
    table.add_column(f"first {len(first)}", justify="right")
    table.add_column(f"last {len(last)}", justify="right")
    for name, _, form in LINE:
        means = [mean_of(name, [rows[step] for step in part]) for part in (first, last)]
        if any(mean is not None for mean in means):
            table.add_row(name, *("" if mean is None else form.format(mean) for mean in means))
    return table


def _worth_showing(name: str, values: Mapping[str, float]) -> bool:
    return name in values and not (name == "rollout/num_excluded" and values[name] == 0)
