"""ImportanceWeights correct tokens for an engine whose probabilities are not the trainer's (truncated, masked IS).

TIS: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; masked: IcePop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Weighed:
    """Holds, per token [N]: the weight, the ratio that it comes from, and whether the bounds changed it."""

    weights: torch.Tensor
    ratio: torch.Tensor
    was_bounded: torch.Tensor


@dataclass(frozen=True)
class ImportanceWeights:
    """Computes weights ``π_trainer / π_rollout``; those outside of [low, high] become the bound, or 0 by mode mask."""

    mode: str
    low: float
    high: float

    def __call__(self, trainer_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> Weighed:
        """Return N tokens' weights, without gradient."""
        ratio = (trainer_logprobs - rollout_logprobs).detach().exp()
        held = ratio.clamp(self.low, self.high)
        was_bounded = held != ratio
        return Weighed(torch.where(was_bounded, 0.0, ratio) if self.mode == "mask" else held, ratio, was_bounded)
