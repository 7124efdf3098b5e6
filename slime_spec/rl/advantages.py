"""This module makes the training batch of a rollout's samples, with their advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from slime_spec.config.algorithm import AlgorithmConfig
from slime_spec.rl.estimators import Scored, advantages
from slime_spec.types import Sample, TrainSample


def train_batch(
    samples: Sequence[Sample],
    algorithm: AlgorithmConfig,
    replays_routing: bool = False,
    given: Sequence[float | None] | None = None,
) -> list[TrainSample]:
    """Return every scored sample with its advantage, groups together, in a fixed order whatever order samples came in.

    Samples without a reward are excluded, from their group's mean too; so are empty responses. Samples of which no
    token counts in the loss are part of their group's mean alone. With ``replays_routing`` the experts that the engine
    chose go with each sample. ``given`` are advantages in place of the estimated ones, one for each of ``samples``.
    A KL in the reward is not in these advantages: the trainer, which has the reference, estimates them anew, of the
    samples that it gets: those of which no token counts are then not in their group's mean.
    """
    own = {} if given is None else {id(sample): each for sample, each in zip(samples, given, strict=True)}
    scored = [sample for sample in samples if sample.reward is not None and sample.response.token_ids]
    scored.sort(key=lambda sample: (sample.prompt.prompt_id, sample.response.sample_index))
    unjudged = [_train_sample(sample, replays_routing) for sample in scored]
    batch = []
    for sample, judged in zip(scored, with_advantages(unjudged, algorithm), strict=True):
        advantage = own.get(id(sample), judged.advantage) if own else judged.advantage
        if advantage is not None and judged.num_loss_tokens:
            batch.append(replace(judged, advantage=advantage))
    return batch


def with_advantages(
    batch: Sequence[TrainSample], algorithm: AlgorithmConfig, kl: Sequence[tuple[float, ...]] | None = None
) -> list[TrainSample]:
    """Return the samples of a rollout with advantages by the settings; ``kl`` has each token's KL for the reward."""
    if not batch:
        return []
    by_sample = kl or [()] * len(batch)
    scored = [
        Scored(sample.group, sample.reward, sample.loss_mask or (1,) * sample.num_response_tokens, of_sample)
        for sample, of_sample in zip(batch, by_sample, strict=True)
    ]
    return [
        replace(sample, advantage=advantage)
        for sample, advantage in zip(batch, advantages(scored, algorithm), strict=True)
    ]


def _train_sample(sample: Sample, replays_routing: bool) -> TrainSample:
    """Return a sample up to its last token that counts in the loss: nothing that counts depends on those after it."""
    response, prompt_len = sample.response, len(sample.prompt.token_ids)
    mask, experts = response.loss_mask, response.routed_experts if replays_routing else None
    end = len(response.token_ids)
    if mask:
        end = end - mask[::-1].index(1) if any(mask) else 0
    return TrainSample(
        token_ids=sample.prompt.token_ids + response.token_ids[:end],
        prompt_len=prompt_len,
        rollout_logprobs=response.logprobs[:end],
        advantage=0.0,
        routed_experts=experts if experts is None or not end else experts.first(prompt_len + end - 1),
        loss_mask=mask[:end],
        group=sample.prompt.prompt_id,
        reward=_reward(sample),
    )


def _reward(sample: Sample) -> float:
    assert sample.reward is not None, "unscored samples were excluded above"
    return sample.reward
