"""This module computes metrics of engines: restarts, disabled speculation, the canary, shares of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime_spec.speculation.net_benefit import NetBenefit
from slime_spec.types import EngineStats, SpecCounters


def engine_metrics(before: Sequence[EngineStats], after: Sequence[EngineStats], speculates: bool) -> dict[str, float]:
    """Return a step's metrics ``engine/*`` and the engines' shares of time; an engine that times nothing has no share.

    ``before`` and ``after`` are the stats of the same engines at the step's ends; ``speculates`` says that the run was
    asked to.
    """
    metrics = {
        "engine/restarts": float(sum(each.num_restarts for each in after)),
        "engine/interruptions": float(sum(each.num_interruptions for each in after)),
        "engine/preemptions": float(sum(each.num_preemptions for each in after)),
    }
    if speculates:
        metrics["engine/speculating"] = sum(each.speculates for each in after) / len(after)
        metrics["engine/draft_resends"] = float(sum(each.num_draft_resends for each in after))
    if busy_s := _spent(before, after, "time_total_s"):
        metrics["perf/engine_forward_share"] = _spent(before, after, "time_in_forward_s") / busy_s
        metrics["perf/engine_draft_share"] = _spent(before, after, "time_in_draft_s") / busy_s
    return metrics


def benefit_metrics(before: Sequence[EngineStats], after: Sequence[EngineStats]) -> dict[str, float]:
    """Return what the step's rounds cost and gained, over all engines, and where speculation pays by what is known."""
    earlier = before if len(before) == len(after) else [None] * len(after)
    total = NetBenefit()
    for was, now in zip(earlier, after, strict=True):
        total = total.plus(now.benefit if was is None else now.benefit.since(was.benefit))
    metrics = net_metrics(total)
    limits = [each.pays_up_to for each in after if each.pays_up_to is not None]
    if limits:
        metrics["spec/pays_up_to_batch"] = float(min(limits))
    temperatures = [each.draft_temperature for each in after if each.draft_temperature is not None]
    if temperatures:
        metrics["spec/draft_temperature"] = sum(temperatures) / len(temperatures)
    return metrics


def net_metrics(total: NetBenefit) -> dict[str, float]:
    """Return what rounds cost and gained; a ratio that nothing was measured for is absent."""
    metrics = {}
    if total.one_step_s:
        metrics["spec/break_even_length"] = total.drafted_s / total.one_step_s
    if total.spent_s:
        metrics["spec/net_speedup_est"] = total.plain_s / total.spent_s
        metrics["spec/net_speedup_err"] = total.error_s / total.spent_s
    return metrics


def canary_metrics(stats: Sequence[EngineStats]) -> dict[str, float]:
    """Return the metrics ``sync/canary_*`` after a push, over the engines that ran a canary."""
    return counted_canaries(each.canary for each in stats)


def counted_canaries(canaries: Iterable[SpecCounters]) -> dict[str, float]:
    """Return the same of what the canaries counted, one an engine."""
    counted = [each for each in canaries if each.num_rounds]
    if not counted:
        return {}
    num_correct, num_rounds = sum(each.num_correct for each in counted), sum(each.num_rounds for each in counted)
    return {
        "sync/canary_accept_length": 1 + num_correct / num_rounds,
        "sync/canary_accept_length_min": min(1 + each.num_correct / each.num_rounds for each in counted),
    }


def _spent(before: Sequence[EngineStats], after: Sequence[EngineStats], name: str) -> float:
    """Return the seconds that all engines spent between the two."""
    return sum(getattr(each, name) for each in after) - sum(getattr(each, name) for each in before)
