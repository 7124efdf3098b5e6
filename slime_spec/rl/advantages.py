"""This module computes group-relative advantages (GRPO, arXiv 2402.03300) and the training batch that they make."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from slime_spec.types import Sample, TrainSample

STD_EPSILON = 1e-6  # slime's


def group_advantages(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Return each reward against its group's mean, if asked in units of the group's standard deviation.

    The standard deviation is the sample's (n - 1), as slime's and TRL's. Equal rewards teach nothing.
    """
    if min(rewards) == max(rewards):  # exactly: their computed mean may differ from each of them
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards, mean) + STD_EPSILON if normalize_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def train_batch(
    samples: Sequence[Sample],
    normalize_std: bool,
    replays_routing: bool = False,
    given: Sequence[float | None] | None = None,
) -> list[TrainSample]:
    """Return every scored sample with its advantage, groups together, in a fixed order whatever order samples came in.

    Samples without a reward are excluded, from their group's mean too; so are empty responses. Samples of which no
    token counts in the loss are part of their group's mean alone. With ``replays_routing`` the experts that the engine
    chose go with each sample. ``given`` are advantages in place of the groups', one for each of ``samples``.
    """
    own = {} if given is None else {id(sample): each for sample, each in zip(samples, given, strict=True)}
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None and sample.response.token_ids:
            groups[sample.prompt.prompt_id].append(sample)
    batch = []
    for prompt_id in sorted(groups):
        group = sorted(groups[prompt_id], key=lambda sample: sample.response.sample_index)
        advantages = group_advantages([_reward(sample) for sample in group], normalize_std)
        for sample, of_group in zip(group, advantages, strict=True):
            advantage = own.get(id(sample), of_group) if own else of_group
            if advantage is not None and sample.response.num_loss_tokens:
                batch.append(_train_sample(sample, advantage, replays_routing))
    return batch


def _train_sample(sample: Sample, advantage: float, replays_routing: bool) -> TrainSample:
    """Return a sample up to its last token that counts in the loss: nothing that counts depends on those after it."""
    response, prompt_len = sample.response, len(sample.prompt.token_ids)
    mask, experts = response.loss_mask, response.routed_experts if replays_routing else None
    end = len(response.token_ids)
    if mask:
        end -= mask[::-1].index(1)
    return TrainSample(
        token_ids=sample.prompt.token_ids + response.token_ids[:end],
        prompt_len=prompt_len,
        rollout_logprobs=response.logprobs[:end],
        advantage=advantage,
        routed_experts=experts if experts is None else experts.first(prompt_len + end - 1),
        loss_mask=mask[:end],
    )


def _reward(sample: Sample) -> float:
    assert sample.reward is not None, "unscored samples were excluded above"
    return sample.reward
