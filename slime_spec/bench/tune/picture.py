"""The picture shows what the tables say: the speed-up by batch with its range, and acceptance beside RTP-LLM's bar."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from slime_spec.bench.chart import RULE, Panel, Series, speed_up_panel, write_panels
from slime_spec.bench.tune.acceptance import Acceptance
from slime_spec.bench.tune.report import Found
from slime_spec.bench.tune.results import BatchResult
from slime_spec.preflight.checks.metrics import BAR

OFF = "none"
BAR_NAME = "RTP-LLM's bar"


def write_picture(path: Path, found: Found) -> None:
    """Draw what was measured; what was only predicted is in the tables alone."""
    title = f"tokens a {found.per} over no speculation, median and range"
    panels = [speed_up_panel(title, speed_up_lines(found.swept.batches))]
    lines = acceptance_lines(found.swept.acceptance)
    title = "accepted by draft position, of rounds with a draft"
    panels.append(Panel(title, lines, "draft position", top=1.0, step=0.2, value_format="{:.0%}", doubles=False))
    write_panels(path, panels)


def speed_up_lines(batches: Sequence[BatchResult]) -> tuple[Series, ...]:
    """Return a line for each side, over the batches at which it took turns, and one for none at 1."""
    lines = [Series(OFF, tuple((each.batch, 1.0) for each in batches), colour=RULE)]
    for name in dict.fromkeys(chain.from_iterable(each.speed_ups for each in batches)):
        measured = [(each.batch, each.speed_ups[name]) for each in batches if name in each.speed_ups]
        points = tuple((batch, speed_up.median) for batch, speed_up in measured)
        ranges = tuple((min(speed_up.each), max(speed_up.each)) for _, speed_up in measured)
        lines.append(Series(name, points, ranges=ranges))
    return tuple(lines)


def acceptance_lines(acceptance: Sequence[Acceptance]) -> tuple[Series, ...]:
    """Return the bar, and a line for each drafter whose acceptance is known by position."""
    bar = Series(BAR_NAME, tuple(enumerate(BAR, start=1)), dashed=True, colour=RULE)
    lines = [
        Series(f"{each.name}, {each.rule}" if each.rule else each.name, tuple(enumerate(each.cumulative, start=1)))
        for each in acceptance
        if each.rates
    ]
    return (bar, *lines)
