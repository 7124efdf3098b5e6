"""When the run ends, the terminal shows replies of the first and of the last step side by side."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.table import Table

from slime_spec.types import Sample

NUM_EXAMPLES = 4


class Examples:
    """Remembers a few samples of the first and of the latest step; leaving the context prints them."""

    def __init__(self, show: bool, console: Console | None = None) -> None:
        self._show, self._console = show, console or Console(stderr=True)
        self._steps: dict[int, list[Sample]] = {}

    def see(self, rollout_id: int, samples: Sequence[Sample]) -> None:
        first = min(self._steps, default=rollout_id)
        self._steps = {step: seen for step, seen in self._steps.items() if step == first}
        self._steps[rollout_id] = _one_per_prompt(samples)[:NUM_EXAMPLES]

    def table(self) -> Table:
        table = Table(title="Samples of the first and the last step", show_lines=False)
        table.add_column("step", justify="right")
        for column in ("prompt", "reply"):
            table.add_column(column, overflow="fold")
        table.add_column("reward", justify="right")
        for step, samples in sorted(self._steps.items()):
            for sample in samples:
                reward = "excluded" if sample.reward is None else f"{sample.reward:g}"
                table.add_row(str(step + 1), sample.prompt.text, sample.text.strip(), reward)
            table.add_section()
        return table

    def __enter__(self) -> Examples:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._show and self._steps and error is None:
            self._console.print(self.table(), markup=False)


def _one_per_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """Return the first sample of each prompt: several of one prompt would say less."""
    return list({sample.prompt.prompt_id: sample for sample in reversed(samples)}.values())[::-1]
