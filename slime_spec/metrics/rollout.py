"""This module computes metrics of one step's samples: rewards, lengths, acceptance. Ratios are a sum over a sum."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from slime_spec.speculation.counters import accepted_per_position
from slime_spec.types import GeneratedSample, Sample, SpecCounters


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the metrics ``rollout/*`` and ``spec/*`` of a step; a metric without a value is absent."""
    if not samples:
        return {"rollout/num_samples": 0.0}
    lengths = [sample.response.num_loss_tokens for sample in samples]
    versions = [sample.response.weight_version for sample in samples]
    truncated = sum(sample.response.finish_reason == "length" for sample in samples)
    return {
        "rollout/num_samples": float(len(samples)),
        "rollout/num_excluded": float(sum(sample.reward is None for sample in samples)),
        "rollout/num_tokens": float(sum(sample.response.num_generated_tokens for sample in samples)),
        "rollout/response_len_mean": statistics.fmean(lengths),
        "rollout/response_len_max": float(max(lengths)),
        "rollout/prompt_len_mean": statistics.fmean(len(sample.prompt.token_ids) for sample in samples),
        "rollout/truncated_ratio": truncated / len(samples),
        "rollout/weight_version_min": float(min(versions)),
        "rollout/weight_version_max": float(max(versions)),
        **_turn_metrics([sample.response for sample in samples]),
        **_reward_metrics(samples),
        **acceptance_metrics([sample.response for sample in samples]),
    }


def _turn_metrics(responses: Sequence[GeneratedSample]) -> dict[str, float]:
    """Return the metrics of turns, where functions of the user's own made them."""
    counts = [(response.turns, response) for response in responses if response.turns is not None]
    if not counts:
        return {}
    num_prompt_tokens = sum(turns.num_prompt_tokens for turns, _ in counts)
    of_kv = sum(response.cached_tokens for _, response in counts) / num_prompt_tokens if num_prompt_tokens else None
    return {
        "rollout/turns_mean": statistics.fmean(turns.num_turns for turns, _ in counts),
        "rollout/loss_token_share": sum(response.num_loss_tokens for _, response in counts)
        / max(1, sum(len(response.token_ids) for _, response in counts)),
        "rollout/outside_time_mean": statistics.fmean(turns.outside_s for turns, _ in counts),
        **({} if of_kv is None else {"rollout/cached_prompt_share": of_kv}),
    }


def sudden_drop_metrics(is_sudden: bool) -> dict[str, float]:
    """Return the metric of a loss of acceptance from one step to the next."""
    return {"spec/sudden_drop": float(is_sudden)}


def filter_metrics(dropped: Mapping[str, int]) -> dict[str, float]:
    """Return the metrics of a step's groups that a filter dropped, by reason; a reason is shown without its slashes."""
    return {f"rollout/dynamic_filter/drop_{reason.replace('/', '_')}": float(num) for reason, num in dropped.items()}


def _reward_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    by_task: dict[str, list[float]] = defaultdict(list)
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None:
            by_task[sample.prompt.task].append(sample.reward)
            by_prompt[sample.prompt.prompt_id].append(sample.reward)
    rewards = [reward for group in by_prompt.values() for reward in group]
    if not rewards:
        return {}
    mixed = sum(min(group) != max(group) for group in by_prompt.values())
    return {
        "rollout/reward_mean": statistics.fmean(rewards),
        "rollout/reward_std": statistics.pstdev(rewards),
        "rollout/mixed_group_ratio": mixed / len(by_prompt),
        **{f"rollout/reward_mean/{task}": statistics.fmean(by_task[task]) for task in sorted(by_task)},
    }


def acceptance_metrics(responses: Sequence[GeneratedSample]) -> dict[str, float]:
    """Return the acceptance of responses: pooled over all of them, by draft position and by weight version."""
    return {**_acceptance(responses), **_acceptance_by_position([response.spec for response in responses])}


def _acceptance(responses: Sequence[GeneratedSample]) -> dict[str, float]:
    verified = [response for response in responses if response.spec.num_rounds > 0]
    num_rounds = sum(response.spec.num_rounds for response in verified)
    num_proposed = sum(response.spec.num_proposed for response in verified)
    num_correct = sum(response.spec.num_correct for response in verified)
    num_drafted = sum(response.spec.num_drafted for response in verified)
    metrics = {
        "spec/verify_rounds": float(num_rounds),
        "spec/proposed_drafts": float(num_proposed),
        "spec/drafted_tokens": float(num_drafted),
        "spec/empty_rounds": float(sum(response.spec.num_empty_rounds for response in verified)),
        "spec/nonfinite_rounds": float(sum(response.spec.num_nonfinite_rounds for response in verified)),
        "spec/correct_drafts": float(num_correct),
    }
    num_off_steps = sum(response.spec.num_off_steps for response in responses)
    if num_off_steps:
        metrics["spec/off_ratio"] = num_off_steps / (num_off_steps + num_rounds)
    if num_proposed:
        metrics["rollout/spec_accept_rate"] = num_correct / num_proposed
    if num_drafted:
        metrics["spec/accept_rate_drafted"] = num_correct / num_drafted
    if num_rounds:
        metrics["rollout/spec_accept_length"] = accept_length(verified)
        metrics["spec/lossy_ratio"] = sum(response.lossy for response in verified) / len(verified)
    lags = [each.weight_version - each.draft_version for each in verified if each.draft_version is not None]
    if lags:
        metrics["spec/draft_version_lag"] = statistics.fmean(lags)
    return metrics | _acceptance_by_version(verified)


def accept_length(verified: Sequence[GeneratedSample]) -> float:
    """Return response tokens per verify round of samples that each had a round; plain steps and theirs are left out."""
    num_rounds = sum(response.spec.num_rounds for response in verified)
    return sum(response.num_verified_tokens for response in verified) / num_rounds


def _acceptance_by_version(verified: Sequence[GeneratedSample]) -> dict[str, float]:
    """Return the acceptance by weight version, only where a step mixes versions: otherwise it equals the step's own."""
    by_version: dict[int, list[GeneratedSample]] = defaultdict(list)
    for response in verified:
        by_version[response.weight_version].append(response)
    if len(by_version) < 2:
        return {}
    return {
        f"spec/accept_length_by_version/{version}": accept_length(by_version[version]) for version in sorted(by_version)
    }


def _acceptance_by_position(counters: Sequence[SpecCounters]) -> dict[str, float]:
    """Return rates up to the first position that no round accepted, over requests whose engine counted by position."""
    counted = [spec for spec in counters if spec.histogram]
    accepted = [sum(column) for column in zip_longest(*map(accepted_per_position, counted), fillvalue=0)]
    num_rounds = sum(spec.num_rounds for spec in counted)
    # Rounds that reached a position: by the engine's own count where depths vary, else those that accepted all before.
    tried = [sum(column) for column in zip_longest(*(spec.num_tried for spec in counted), fillvalue=0)]
    reached = tried or [num_rounds, *accepted]
    metrics: dict[str, float] = {}
    cumulative = 1.0
    for position, (num_accepted, num_reached) in enumerate(zip(accepted, reached, strict=False)):
        if num_reached == 0:
            break
        cumulative = cumulative * num_accepted / num_reached if tried else num_accepted / num_rounds
        metrics[f"spec/accept_rate_pos_{position}"] = num_accepted / num_reached
        metrics[f"spec/accept_rate_cum_pos_{position}"] = cumulative
    return metrics
