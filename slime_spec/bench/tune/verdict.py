"""The verdict names the flags for each batch size, or says why not to speculate there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slime_spec.bench.tune.results import BatchResult, SpeedUp
from slime_spec.speculation.controller import FOR_OFF
from slime_spec.speculation.draft_length import tokens_of

CLEARLY = 1.05  # a fixed length must be faster than the engine's own choice by so much, in every repetition
NO_LOSS = 0.98  # a setting that is as fast as none, but for noise


@dataclass(frozen=True)
class Verdict:
    """Holds the choice at one batch: the side's name, its speed-up, its flags; without a side ``why`` says why not."""

    batch: int
    side: str | None
    speed_up: SpeedUp | None
    flags: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Overall:
    """Holds one setting for all batches that were measured; ``flags`` are empty where nothing pays at any of them."""

    side: str | None
    flags: tuple[str, ...]
    speed_ups: Mapping[int, SpeedUp]


def verdict_of(result: BatchResult) -> Verdict:
    """Return the fastest of the sides that are faster than none in every repetition, and by more than noise."""
    name = _preferred(result)
    if name is not None:
        return Verdict(result.batch, name, result.speed_ups[name], result.sides[name].flags)
    return Verdict(result.batch, None, None, (), "; ".join(_reasons(result)))


def overall(results: Sequence[BatchResult]) -> Overall:
    """Return the side that is fastest over all batches, the mean of ratios being geometric.

    A fixed length beside an engine that decides is none: it is chosen batch by batch. The side must pay at a batch as
    its verdict says, and lose at none.
    """
    common = [name for name, side in results[0].sides.items() if name in results[0].speed_ups and side.depth is None]
    common = [name for name in common if all(name in each.speed_ups for each in results)]

    def mean(name: str) -> float:
        return math.prod(each.speed_ups[name].median for each in results) ** (1.0 / len(results))

    best = max(common, key=mean, default=None)
    if best is None or mean(best) < FOR_OFF or not any(_pays(each.speed_ups[best]) for each in results):
        return Overall(None, (), {})
    if min(each.speed_ups[best].median for each in results) < NO_LOSS:
        return Overall(None, (), {})
    return Overall(best, results[0].sides[best].flags, {each.batch: each.speed_ups[best] for each in results})


def _preferred(result: BatchResult) -> str | None:
    """Return the fastest side that pays, a fixed length only where it is clearly faster than the engine's choice."""
    paying = [name for name, speed_up in result.speed_ups.items() if _pays(speed_up)]
    by_median = sorted(paying, key=lambda name: -result.speed_ups[name].median)
    own = next((name for name in by_median if result.sides[name].depth is None), None)
    fixed = next((name for name in by_median if result.sides[name].depth is not None), None)
    if own is None or fixed is None:
        return own or fixed
    pairs = zip(result.speed_ups[fixed].each, result.speed_ups[own].each, strict=True)
    return fixed if all(ours > CLEARLY * theirs for ours, theirs in pairs) else own


def _pays(speed_up: SpeedUp) -> bool:
    return min(speed_up.each) > 1.0 and speed_up.median >= FOR_OFF


def _reasons(result: BatchResult) -> list[str]:
    reasons = []
    if result.fastest is not None:
        speed_up = result.speed_ups[result.fastest]
        noise = ", but not faster in every repetition" if min(speed_up.each) <= 1.0 < speed_up.median else ""
        reasons.append(f"the fastest, {result.fastest}, was {speed_up.text} of none{noise}")
        rounds = result.rounds.get(result.fastest)
        if rounds is not None and rounds.accept_length is not None and rounds.break_even is not None:
            reasons.append(
                f"its round takes {rounds.break_even:.2f} plain steps and brings {rounds.accept_length:.2f} tokens, "
                f"{rounds.most} at most"
            )
    lengths = result.lengths
    if lengths is not None:
        brings = tokens_of(lengths.rates, 1)
        reasons.append(
            f"a round of one draft costs {lengths.break_even[1]:.2f} plain steps and brings {brings:.2f} tokens"
        )
        if lengths.perfect < FOR_OFF:
            reasons.append("drafts that are all accepted would not pay either")
        else:
            reasons.append(f"drafts that are all accepted would bring {lengths.perfect:.2f}x")
    if reasons:
        return reasons
    return ["no drafter was measured" + (", as none was predicted to come near" if result.predicted else "")]
