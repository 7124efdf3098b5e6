"""The slow choice of a draft temperature weighs all overlaps that were ever seen, from the first one on, each time."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.speculation.draft_temperature import FIRST_CHOICE, MARGIN, WINDOW


def chosen_temperature(temperatures: Sequence[float], seen: Sequence[Sequence[float]]) -> float:
    """Return what DraftTemperature draws from after ``seen`` [observations, temperatures], oldest first."""
    if len(seen) < FIRST_CHOICE:
        return temperatures[0]
    weights = [(1.0 - 1.0 / WINDOW) ** age for age in reversed(range(len(seen)))]
    means = [
        sum(weight * overlaps[choice] for weight, overlaps in zip(weights, seen, strict=True)) / sum(weights)
        for choice in range(len(temperatures))
    ]
    before = chosen_temperature(temperatures, seen[:-1])
    best = max(zip(means, temperatures, strict=True), key=lambda pair: pair[0])
    return best[1] if best[0] - means[list(temperatures).index(before)] > MARGIN else before


def overlap_reference(p_target: Sequence[float], q_draft: Sequence[float], exponent: float) -> float:
    """Return sum min(p_target, q_draft^exponent, renormalised), token by token; both may have any sum."""
    tempered = [q**exponent for q in q_draft]
    return sum(min(p / sum(p_target), q / sum(tempered)) for p, q in zip(p_target, tempered, strict=True))
