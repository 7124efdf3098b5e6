"""These functions add and convert the counters of speculation (SpecCounters)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from slime_spec.types import SpecCounters


def pooled(counters: Iterable[SpecCounters]) -> SpecCounters:
    """Return the counters of several responses, or of the parts of one response: sums, never means of ratios."""
    listed = [each for each in counters if each.num_rounds or each.num_off_steps]
    if len(listed) == 1:
        return listed[0]
    return SpecCounters(
        num_rounds=sum(each.num_rounds for each in listed),
        num_proposed=sum(each.num_proposed for each in listed),
        histogram=tuple(map(sum, zip_longest(*(each.histogram for each in listed), fillvalue=0))),
        num_drafted=sum(each.num_drafted for each in listed),
        num_empty_rounds=sum(each.num_empty_rounds for each in listed),
        num_steps=max((each.num_steps for each in listed), default=0),
        num_correct_unbinned=sum(each.num_correct_unbinned for each in listed),
        num_nonfinite_rounds=sum(each.num_nonfinite_rounds for each in listed),
        num_tried=tuple(map(sum, zip_longest(*(each.num_tried for each in listed), fillvalue=0))),
        num_off_steps=sum(each.num_off_steps for each in listed),
    )


def accepted_per_position(spec: SpecCounters) -> list[int]:
    """Return how many rounds accepted more than 0, 1, ... drafts (survival counts), one number per draft position.

    Example: ``accepted_per_position(SpecCounters(3, 9, (1, 0, 1, 1))) == [2, 2, 1]``
    """
    if not spec.num_rounds:
        return []
    depth = spec.num_steps or spec.num_proposed // spec.num_rounds
    return [sum(spec.histogram[position + 1 :]) for position in range(depth)]
