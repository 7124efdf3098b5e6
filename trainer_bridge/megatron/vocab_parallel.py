"""This module computes tokens' log-probabilities and entropy where each tensor rank holds a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    entropy_has_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(logits / temperature) at the targets, differentiable, and the entropy, if asked likewise.

    ``logits`` is [N, vocab / ranks] (this rank's slice), ``targets`` [N] global token ids; both results are [N] float32
    and equal on every rank of ``group`` (None: the vocabulary is whole).
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, temperature, group, entropy_has_gradient)
    return logprobs, entropy


def argmax_and_logsumexp(
    logits: torch.Tensor, temperature: float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, of ``logits`` as in ``token_logprobs``: the global id of each row's largest, and logsumexp / temperature.

    Both are [N] and equal on every rank. A row of NaN has some token for its largest, and NaN.
    """
    scaled = logits.float() / temperature
    peak, column = scaled.max(dim=-1)
    largest = _reduced(peak.clone(), dist.ReduceOp.MAX, group)
    exp_sum = _reduced((scaled - largest[:, None]).exp().sum(dim=-1), dist.ReduceOp.SUM, group)
    rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    last = num_ranks * logits.size(-1) - 1
    argmax = torch.where(peak == largest, column + rank * logits.size(-1), last)
    return _reduced(argmax, dist.ReduceOp.MIN, group), largest + exp_sum.log()


class _TokenLogprobs(torch.autograd.Function):
    """Computes both results in one pass over the logits; keeps one [N, vocab] tensor, probabilities, for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        entropy_has_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
        peak = _reduced(scaled.amax(dim=-1), dist.ReduceOp.MAX, group)
        shifted = scaled - peak[:, None]
        first = dist.get_rank(group) * logits.size(-1) if group is not None else 0
        owned = (targets >= first) & (targets < first + logits.size(-1))
        column = torch.where(owned, targets - first, 0)
        at_target = torch.where(owned, shifted.gather(-1, column[:, None])[:, 0], 0.0)
        exp = shifted.exp()
        exp_sum = exp.sum(dim=-1)
        weighted = torch.linalg.vecdot(exp, shifted)
        if group is not None:
            summed = torch.stack([at_target, exp_sum, weighted])
            at_target, exp_sum, weighted = _reduced(summed, dist.ReduceOp.SUM, group)
        log_z = exp_sum.log()
        entropy = log_z - weighted / exp_sum
        ctx.save_for_backward(exp.div_(exp_sum[:, None]), owned, column, entropy if entropy_has_gradient else None)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        if not entropy_has_gradient:
            ctx.mark_non_differentiable(entropy)
        return at_target - log_z, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        probabilities, owned, column, entropy = ctx.saved_tensors
        grad = grad_logprobs / ctx.temperature
        grad_logits = probabilities.mul(-grad[:, None])
        grad_logits.scatter_add_(-1, column[:, None], torch.where(owned, grad, 0.0)[:, None])
        if entropy is not None:
            # dH/dz = -p (log p + H); a probability that rounds to 0 has none, as p log p goes to 0.
            log_p = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log_()
            of_entropy = log_p.add_(entropy[:, None]).mul_(probabilities)
            grad_logits.sub_(of_entropy.mul_((grad_entropy / ctx.temperature)[:, None]))
        return grad_logits.to(ctx.dtype), None, None, None, None


def _reduced(values: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(values, op=op, group=group)
    return values
