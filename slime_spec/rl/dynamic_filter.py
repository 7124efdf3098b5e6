"""A dynamic filter drops groups that teach nothing, and others take their place (DAPO, arXiv:2503.14476)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slime_spec.agents.own import FILTERS, WITH_FALLBACK, OwnFunction
from slime_spec.errors import RAISED_IN_THREADS, CustomFunctionError, raised, shown
from slime_spec.slime_sample import Args
from slime_spec.types import Sample

NO_REWARD = "no_reward"
LEAST_STD = 1e-6  # slime's


@dataclass(frozen=True)
class Judgement:
    """Says whether a group is kept, else why not; ``fills``: it is kept all the same where too few others are."""

    keep: bool
    reason: str = ""
    fills: bool = False


# Judges a group by its samples, and by the same as functions of a user's own see them.
Filter = Callable[[Sequence[Sample], Sequence[Any]], Judgement]


def keep_all(samples: Sequence[Sample], owns: Sequence[Any]) -> Judgement:
    return Judgement(True)


def nonzero_std(rewards: Sequence[float], fills: bool = False) -> Judgement:
    """Keep groups whose rewards differ: the others have advantage 0 throughout. The reasons are slime's."""
    keep = len(rewards) > 1 and statistics.stdev(rewards) > LEAST_STD
    return Judgement(keep, "" if keep else f"zero_std_{round(rewards[0], 1)}", fills)


def make_filter(name: str, function: OwnFunction | None, args: Args) -> Filter:
    """Return the filter that custom.dynamic_filter names; it judges scored samples alone.

    A group without any is dropped, with the reason NO_REWARD.
    """
    fills = FILTERS.get(name) == WITH_FALLBACK

    def judge(samples: Sequence[Sample], owns: Sequence[Any]) -> Judgement:
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        if not rewards:
            return Judgement(False, NO_REWARD, fills)
        if function is None:
            return nonzero_std(rewards, fills)
        scored = [own for own, sample in zip(owns, samples, strict=True) if sample.reward is not None]
        try:
            given = function(args, scored)
            keep = _truth(getattr(given, "keep", given))
            reason = str(getattr(given, "reason", None) or "filter")
            fills_too = bool(getattr(given, "keep_when_insufficient", False))
        except RAISED_IN_THREADS as error:
            raise CustomFunctionError(f"the filter {name} raised {raised(error)}") from error
        if keep is None:
            rule = "must return whether the group is kept, or an object with keep (and reason)"
            raise CustomFunctionError(f"the filter {name} {rule}; it was {shown(given)}")
        return Judgement(keep, reason, fills_too)

    return judge


def _truth(given: object) -> bool | None:
    """Return a bool, also of numpy's and torch's kind, or a number as a bool.

    None for anything else, which Python would call true or false all the same: a coroutine that nobody awaited, a
    (bool, reason) pair, None where a return was forgotten.
    """
    return bool(given) if given is not None and hasattr(given, "__bool__") else None
