"""Compute the losses of an unrolled step, over the draft vocabulary; each is a mean over the rows that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTarget:
    """Holds the target's distribution at n rows: ``logits`` [n, draft vocab], ``logsumexp`` [n] over all tokens, fp32.

    ``counts`` [n] says that the target's argmax is in the draft vocabulary; the other rows are not learned from.
    """

    logits: torch.Tensor
    logsumexp: torch.Tensor
    counts: torch.Tensor

    @property
    def p_target(self) -> torch.Tensor:
        """Return [n, draft vocab], summing to at most 1: the rest lies outside the draft vocabulary."""
        return (self.logits - self.logsumexp[:, None]).exp()


def acceptance(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: Σ min(p_target, q_draft), the probability that rejection sampling accepts a draft from q_draft."""
    return torch.minimum(target.p_target, draft_logits.softmax(-1)).sum(-1)


def soft_cross_entropy(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: cross-entropy to the target's distribution renormalised over the draft vocabulary (SpecForge)."""
    return -(target.logits.softmax(-1) * draft_logits.log_softmax(-1)).sum(-1)


def log_acceptance(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: -log of the acceptance probability itself."""
    return -acceptance(draft_logits, target).clamp_min(1e-9).log()


def blended(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: w·KL + (1 - w)·(1 - acceptance), where w = exp(-acceptance) shrinks as the draft gets better."""
    accepted = acceptance(draft_logits, target)
    p_renormalised = target.logits.softmax(-1)
    entropy = -(p_renormalised * target.logits.log_softmax(-1)).sum(-1)
    weight = (-accepted.detach()).exp()
    return weight * (soft_cross_entropy(draft_logits, target) - entropy) + (1 - weight) * (1 - accepted)


Loss = Callable[[torch.Tensor, StepTarget], torch.Tensor]
LOSSES: dict[str, Loss] = {"soft_ce": soft_cross_entropy, "log_acceptance": log_acceptance, "blended": blended}


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values whose mask is true; 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)
