"""This module computes metrics of engines: restarts, disabled speculation, the canary, shares of time."""

from __future__ import annotations

from collections.abc import Sequence

from slime_spec.types import EngineStats, Sample


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


def benefit_metrics(stats: Sequence[EngineStats], samples: Sequence[Sample]) -> dict[str, float]:
    """Return a round's cost, by all probes of the engines so far, and the gain of the step's rounds."""
    plain_s = sum(each.probed_plain_s for each in stats)
    if not plain_s:
        return {}
    break_even = sum(each.probed_round_s for each in stats) / plain_s
    metrics = {"spec/break_even_length": break_even}
    verified = [sample.response for sample in samples if sample.response.spec.num_rounds > 0]
    if verified:
        # A response's first token comes from its prefill, with speculation and without.
        num_gained = sum(len(response.token_ids) - 1 for response in verified)
        num_rounds = sum(response.spec.num_rounds for response in verified)
        metrics["spec/net_speedup_est"] = num_gained / num_rounds / break_even
    return metrics


def canary_metrics(stats: Sequence[EngineStats]) -> dict[str, float]:
    """Return the metrics ``sync/canary_*`` after a push, over the engines that ran a canary."""
    counted = [each.canary for each in stats if each.canary.num_rounds]
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
