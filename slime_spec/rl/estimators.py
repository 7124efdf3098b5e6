"""Advantage estimators turn the rewards of a rollout into advantages; each is a function of plain numbers.

    rewards r, KL by token ─► R = r - kl_coef Σ kl ─► advantages A, a number for a sample or one for each token

``ADVANTAGES`` has them by the name of --advantage-estimator; what the loss does with an advantage is
trainer_bridge.policy_loss. Samples of equal rewards get advantages of exactly 0, where the formula says 0.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np

from slime_spec.config.algorithm import AlgorithmConfig

STD_EPSILON = 1e-6  # slime's and verl's
VARIANCE_EPSILON = 1e-8  # slime's, verl's and OpenRLHF's
Advantage = float | tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """Holds what an estimator reads of a response of prompt ``group``.

    ``loss_mask`` has a 1 for each token that the loss counts, 0 for the others; ``kl`` is the estimated KL to the
    reference at each token, empty where rewards have no KL in them.
    Example: ``Scored(group=17, reward=1.0, loss_mask=(1, 1, 0, 1), kl=(0.1, 0.0, 0.3, -0.2))``
    """

    group: int
    reward: float
    loss_mask: tuple[int, ...]
    kl: tuple[float, ...] = ()

    @property
    def masked_kl(self) -> tuple[float, ...]:
        return tuple(kl if counts else 0.0 for kl, counts in zip(self.kl, self.loss_mask, strict=True))

    def lowered_reward(self, kl_coef: float) -> float:
        """Return the reward less the KL of all tokens."""
        return self.reward - kl_coef * math.fsum(self.masked_kl) if self.kl else self.reward


def advantages(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return the samples' advantages by the settings."""
    estimated = ADVANTAGES[algorithm.advantage_estimator](samples, algorithm)
    return whitened(estimated, samples) if algorithm.normalize_advantages else estimated


def grpo(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return ``A_i = (R_i - mean(R)) / std(R)`` over a prompt's samples (GRPO, arXiv:2402.03300).

    GSPO (arXiv:2507.18071) and CISPO (arXiv:2506.13585) have the same advantages and other losses.
    """
    return _by_group(samples, algorithm, partial(group_advantages, normalize_std=algorithm.normalize_std))


def dr_grpo(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return ``A_i = R_i - mean(R)`` over a prompt's samples (Dr. GRPO, arXiv:2503.20783)."""
    return _by_group(samples, algorithm, partial(group_advantages, normalize_std=False))


def rloo(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return ``A_i = R_i - mean of the others' R`` over a prompt's samples (RLOO, arXiv:2402.14740)."""
    return _by_group(samples, algorithm, leave_one_out)


def reinforce_plus_plus(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return whitened returns ``G_t = r_t + gamma G_(t+1)`` (REINFORCE++, arXiv:2501.03262).

    A token's reward is ``-kl_coef kl_t``, the last one's that and the sample's. Prompts are not compared.
    """
    return whitened([_returns(sample, algorithm.kl_coef, algorithm.gamma) for sample in samples], samples)


def reinforce_plus_plus_baseline(samples: Sequence[Scored], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return whitened ``r_i - mean(r) - kl_coef kl_t``, the mean over a prompt's samples (arXiv:2501.03262)."""
    without_kl = [Scored(sample.group, sample.reward, sample.loss_mask) for sample in samples]
    estimated: list[Advantage] = []
    for sample, advantage in zip(samples, dr_grpo(without_kl, algorithm), strict=True):
        assert isinstance(advantage, float), "it is of the whole sample"
        by_token = tuple(advantage - algorithm.kl_coef * kl for kl in sample.masked_kl) if sample.kl else ()
        estimated.append(by_token or advantage)
    return whitened(estimated, samples)


ADVANTAGES: Mapping[str, Callable[[Sequence[Scored], AlgorithmConfig], list[Advantage]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gspo": grpo,
    "cispo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


def group_advantages(rewards: Sequence[float], normalize_std: bool) -> list[float]:
    """Return each reward against its group's mean, if asked in units of the group's standard deviation.

    The standard deviation is the sample's (n - 1), as slime's, verl's and TRL's. Equal rewards teach nothing.
    """
    if min(rewards) == max(rewards):  # exactly: their computed mean may differ from each of them
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards, mean) + STD_EPSILON if normalize_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return each reward against the mean of the others; a reward alone has no baseline, and advantage 0."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def whitened(estimated: Sequence[Advantage], samples: Sequence[Scored]) -> list[Advantage]:
    """Return ``(A - mean) / sqrt(variance + 1e-8)``, both over all tokens that count; the variance is of n - 1."""
    counted = [np.asarray(sample.loss_mask, dtype=bool) for sample in samples]
    values = np.concatenate(
        [np.broadcast_to(advantage, counts.shape)[counts] for advantage, counts in zip(estimated, counted, strict=True)]
    )
    if not len(values) or values.min() == values.max():
        return [0.0] * len(estimated)
    mean = float(values.mean())
    scale = math.sqrt(float(values.var(ddof=1)) + VARIANCE_EPSILON)
    return [
        tuple((value - mean) / scale for value in advantage)
        if isinstance(advantage, tuple)
        else (advantage - mean) / scale
        for advantage in estimated
    ]


def _returns(sample: Scored, kl_coef: float, gamma: float) -> Advantage:
    if not any(sample.loss_mask) or (not sample.kl and gamma == 1.0):
        return sample.reward
    rewards = [-kl_coef * kl for kl in sample.masked_kl] if sample.kl else [0.0] * len(sample.loss_mask)
    rewards[max(place for place, counts in enumerate(sample.loss_mask) if counts)] += sample.reward
    return tuple(accumulate(reversed(rewards), lambda later, reward: reward + gamma * later))[::-1]


def _by_group(
    samples: Sequence[Scored], algorithm: AlgorithmConfig, estimate: Callable[[Sequence[float]], list[float]]
) -> list[Advantage]:
    """Return what ``estimate`` makes of each prompt's rewards, in the samples' order."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        groups[sample.group].append(place)
    estimated: list[Advantage] = [0.0] * len(samples)
    for places in groups.values():
        rewards = [samples[place].lowered_reward(algorithm.kl_coef) for place in places]
        for place, advantage in zip(places, estimate(rewards), strict=True):
            estimated[place] = advantage
    return estimated
