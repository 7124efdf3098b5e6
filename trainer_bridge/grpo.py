"""GrpoLoss computes the policy loss per token: clipped ratio and KL (PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyTerms:
    """Holds, per response token [N]: the loss to minimise, its policy-gradient part, whether the clip bit, the KL."""

    loss: torch.Tensor
    pg_loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


@dataclass(frozen=True)
class GrpoLoss:
    """Computes the loss by these constants; ``eps_high`` is the upper clip (clip-higher, DAPO, arXiv:2503.14476)."""

    eps_low: float
    eps_high: float
    kl_coef: float

    def __call__(
        self,
        logprobs: torch.Tensor,
        rollout_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        ref_logprobs: torch.Tensor | None,
    ) -> PolicyTerms:
        """Return N tokens' terms; the ratio is against the rollout's logprobs, so it corrects engine differences."""
        pg_loss, clipped = clipped_policy_loss(logprobs, rollout_logprobs, advantages, self.eps_low, self.eps_high)
        if ref_logprobs is None:
            return PolicyTerms(pg_loss, pg_loss, clipped, torch.zeros_like(pg_loss))
        kl = k3_kl(logprobs, ref_logprobs)
        return PolicyTerms(pg_loss + self.kl_coef * kl, pg_loss, clipped, kl)


def clipped_policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, eps_low: float, eps_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)`` and where the clip lowered the objective."""
    ratio = (logprobs - old_logprobs).exp()
    free = -ratio * advantages
    held = -ratio.clamp(1.0 - eps_low, 1.0 + eps_high) * advantages
    return torch.maximum(free, held), held > free


def k3_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference) from samples of the policy: never negative, unbiased."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1.0
