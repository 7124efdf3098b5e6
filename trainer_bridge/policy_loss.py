"""PolicyLoss computes the loss of each response token; POLICY_LOSSES has its policy gradient part by name.

    loss = policy_loss(ratio, advantage) · importance weight + kl_loss_coef · KL - entropy_coef · entropy

The ratio is of the policy's probability to the rollout's, or with truncated importance sampling to the trainer's own
before the rollout's updates. What belongs to which estimator says slime_spec.config.algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from slime_spec.config.algorithm import AlgorithmConfig
from trainer_bridge.importance import ImportanceWeights, Weighed
from trainer_bridge.kl import estimated_kl
from trainer_bridge.microbatch import Microbatch

LARGEST_LOG_RATIO = 60.0  # far beyond every bound, and exp of it times any advantage is finite in 32 bits


@dataclass(frozen=True)
class Clip:
    """Holds the bounds of the ratio, 1 - ``low`` and 1 + ``high`` (clip-higher, DAPO, arXiv:2503.14476).

    ``dual`` is the c of dual clip (arXiv:1912.09729), None without.
    """

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True)
class PolicyTerms:
    """Holds, per response token [N]: the loss to minimise, its policy-gradient part, whether the clip bit, the KL.

    ``weighed`` is None without truncated importance sampling.
    """

    loss: torch.Tensor
    pg_loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    weighed: Weighed | None = None


def clipped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, microbatch: Microbatch, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's loss of each token's own ratio (arXiv:1707.06347), and where the clip lowered the objective."""
    return clipped_objective(logprobs - old_logprobs, microbatch.advantages, clip)


def sequence_clipped(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, microbatch: Microbatch, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's loss of the sequence's ratio (GSPO, arXiv:2507.18071).

    That is ``(π(y) / π_old(y)) ** (1 / |y|)``, and the same at each token of the response.
    """
    log_ratio = (logprobs - old_logprobs) * microbatch.weights
    zeros = log_ratio.new_zeros(microbatch.num_samples)
    total = zeros.index_add(0, microbatch.sample_of_row, log_ratio)
    length = zeros.index_add(0, microbatch.sample_of_row, microbatch.weights.to(zeros.dtype))
    mean = total / length.clamp(min=1.0)
    return clipped_objective(mean[microbatch.sample_of_row], microbatch.advantages, clip)


def cispo(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, microbatch: Microbatch, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``-sg(clip(ratio)) A log π`` (CISPO, arXiv:2506.13585), and where the clip changed the ratio.

    The ratio weighs the gradient and has none itself: a clipped token still learns. The paper has no lower bound,
    which is an ``eps_clip`` of 1.
    """
    ratio = (logprobs - old_logprobs).detach().exp()
    held = ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    return -held * microbatch.advantages * logprobs, (held != ratio) & (microbatch.advantages != 0.0)


POLICY_LOSSES: Mapping[
    str, Callable[[torch.Tensor, torch.Tensor, Microbatch, Clip], tuple[torch.Tensor, torch.Tensor]]
] = {"clipped": clipped, "sequence_clipped": sequence_clipped, "cispo": cispo}


def clipped_objective(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``-min(r A, clip(r, 1 - low, 1 + high) A)`` and where the clip lowered the objective.

    With dual clip a negative advantage's loss is at most ``-dual A``. Where a bound holds, a ratio that overflows
    changes neither the loss nor its gradient, 0; where none does (A < 0 without dual clip) it has to stop the step.
    """
    is_bounded = advantages >= 0 if clip.dual is None else torch.ones_like(advantages, dtype=torch.bool)
    ratio = torch.where(is_bounded, log_ratio.clamp(max=LARGEST_LOG_RATIO), log_ratio).exp()
    free = -ratio * advantages
    held = -ratio.clamp(1.0 - clip.low, 1.0 + clip.high) * advantages
    loss = torch.maximum(free, held)
    if clip.dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip.dual * advantages), loss)
    return loss, held > free


class PolicyLoss:
    """Computes the loss by the settings. Example::

    terms = PolicyLoss(config.algorithm)(logprobs, entropy, microbatch)
    """

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._policy_loss = POLICY_LOSSES[algorithm.estimator.policy_loss]
        high = algorithm.eps_clip if algorithm.eps_clip_high is None else algorithm.eps_clip_high
        self._clip = Clip(algorithm.eps_clip, high, algorithm.eps_clip_c)
        self._kl_coef, self._kl_type = algorithm.kl_loss_coef, algorithm.kl_loss_type or "k3"
        self.entropy_coef = algorithm.entropy_coef
        self._weights = (
            ImportanceWeights(algorithm.tis_mode, algorithm.tis_clip_low, algorithm.tis_clip)
            if algorithm.use_tis
            else None
        )

    def __call__(self, logprobs: torch.Tensor, entropy: torch.Tensor, microbatch: Microbatch) -> PolicyTerms:
        """Return the terms of the microbatch's N tokens; ``entropy`` has a gradient where its weight is not 0."""
        if self._weights is None:
            old, weighed = microbatch.rollout_logprobs, None
        else:
            # Before the first update they are those of this very pass.
            old = logprobs.detach() if microbatch.trainer_logprobs is None else microbatch.trainer_logprobs
            weighed = self._weights(old, microbatch.rollout_logprobs)
        pg_loss, was_clipped = self._policy_loss(logprobs, old, microbatch, self._clip)
        if weighed is not None:
            pg_loss = pg_loss * weighed.weights
        loss = pg_loss - self.entropy_coef * entropy if self.entropy_coef else pg_loss
        if microbatch.ref_logprobs is None:
            return PolicyTerms(loss, pg_loss, was_clipped, torch.zeros_like(pg_loss), weighed)
        kl = estimated_kl(logprobs, microbatch.ref_logprobs, self._kl_type)
        loss = loss + self._kl_coef * kl if self._kl_coef else loss
        return PolicyTerms(loss, pg_loss, was_clipped, kl, weighed)
