"""Compute the losses of an unrolled step, over the draft vocabulary: by row, of which those that count are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from slime_spec.config.draft_training import REPLY_LOSS, TOP_K, TOP_K_LOSS


@dataclass(frozen=True)
class StepTarget:
    """Holds the target's distribution at n rows: ``logits`` [n, draft vocab], ``logsumexp`` [n] over all tokens, fp32.

    ``drafted`` [n] are the draft's ids of the reply's own tokens, -1 where it has none.
    """

    logits: torch.Tensor
    logsumexp: torch.Tensor
    drafted: torch.Tensor

    def of(self, rows: torch.Tensor) -> StepTarget:
        """Return the target of some rows, bool [n]."""
        return StepTarget(self.logits[rows], self.logsumexp[rows], self.drafted[rows])

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


def top_k_soft_cross_entropy(draft_logits: torch.Tensor, target: StepTarget, top_k: int = TOP_K) -> torch.Tensor:
    """Return [n]: cross-entropy to the target's ``top_k`` likeliest tokens, renormalised over these.

    The draft's probabilities are over its whole vocabulary. With as many tokens as that has it is the soft one.
    """
    likeliest, ids = target.logits.topk(min(top_k, target.logits.shape[-1]), dim=-1, sorted=False)
    log_q = draft_logits.gather(-1, ids) - draft_logits.logsumexp(-1, keepdim=True)
    return -(likeliest.softmax(-1) * log_q).sum(-1)


def cross_entropy(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: -log of the draft's probability of the reply's own token, as slime's MTP layers learn; 0 without."""
    column = target.drafted.clamp(min=0)[:, None]
    log_q = draft_logits.gather(-1, column)[:, 0] - draft_logits.logsumexp(-1)
    return -log_q.masked_fill(target.drafted < 0, 0.0)


def total_variation(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: the probability that rejection sampling refuses a draft, which is the distributions' distance."""
    return 1.0 - acceptance(draft_logits, target)


def log_acceptance(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: -log of the acceptance probability itself (SpecForge's ``alpha``)."""
    return -acceptance(draft_logits, target).clamp_min(1e-9).log()


def reverse_kl(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: KL(q_draft || p_target), p renormalised over the draft vocabulary: seeks p's mode."""
    log_q = draft_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - target.logits.log_softmax(-1))).sum(-1)


def lk_hybrid(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: w·KL(p || q) + (1 - w)·(1 - acceptance), w = exp(-acceptance), without gradient (arXiv 2602.23881).

    An untrained draft, which overlaps nowhere, learns by the first part; a good one by what is accepted. It is
    SpecForge's ``lambda`` with kl_scale and kl_decay 1.
    """
    refused = total_variation(draft_logits, target)
    p_renormalised = target.logits.softmax(-1)
    entropy = -(p_renormalised * target.logits.log_softmax(-1)).sum(-1)
    weight = (refused.detach() - 1.0).exp()
    return weight * (soft_cross_entropy(draft_logits, target) - entropy) + (1 - weight) * refused


Loss = Callable[[torch.Tensor, StepTarget], torch.Tensor]
LOSSES: dict[str, Loss] = {
    "soft_ce": soft_cross_entropy,
    "total_variation": total_variation,
    "log_acceptance": log_acceptance,
    "reverse_kl": reverse_kl,
    "lk_hybrid": lk_hybrid,
    TOP_K_LOSS: top_k_soft_cross_entropy,
    REPLY_LOSS: cross_entropy,
}


def loss_of(name: str, top_k: int) -> Loss:
    """Return the loss of a name, with so many tokens where it has a number of them."""
    return partial(top_k_soft_cross_entropy, top_k=top_k) if name == TOP_K_LOSS else LOSSES[name]


def token_log_ratios(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
    """Return [n]: log(q_draft / p_target) of the reply's own token; -inf where the draft cannot name it."""
    column = target.drafted.clamp(min=0)[:, None]
    log_q = draft_logits.log_softmax(-1).gather(1, column)[:, 0]
    log_p = target.logits.gather(1, column)[:, 0] - target.logsumexp
    return (log_q - log_p).masked_fill(target.drafted < 0, -torch.inf)
