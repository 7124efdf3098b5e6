"""This module runs forward and backward over microbatches through Megatron's schedules (plain or pipelined)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from trainer_bridge.megatron.attention import PackedSegments
from trainer_bridge.megatron.vocab_parallel import token_logprobs
from trainer_bridge.microbatch import Microbatch
from trainer_bridge.policy_loss import PolicyLoss


@dataclass(frozen=True)
class TokenSums:
    """Holds sums over the ``num_tokens`` response tokens that had a pass; add them, and divide for means.

    ``loss`` and ``pg_loss`` are scaled for the loss's mean (LossMean). The last three are of truncated importance
    sampling.
    """

    loss: float = 0.0
    pg_loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    logprob_abs_diff: float = 0.0
    num_tokens: float = 0.0
    tis: float = 0.0
    tis_bounded: float = 0.0
    tis_abs: float = 0.0

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(*(a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)))

    def as_list(self) -> list[float]:
        return list(astuple(self))


def accumulate_gradients(
    model: torch.nn.Module, microbatches: Sequence[Microbatch], loss: PolicyLoss, temperature: float
) -> TokenSums:
    """Add the gradients of the mean loss; returns the same sums on every rank.

    The sum of all ranks' losses is divided by the sum of the microbatches' ``num_in_mean``. Gradients are reduced over
    data parallel ranks when this returns.
    """
    results = _run(model, microbatches, partial(_policy_loss, loss=loss, temperature=temperature), forward_only=False)
    return _summed(results, microbatches[0].rows.device)


def observe(
    model: torch.nn.Module, microbatches: Sequence[Microbatch], loss: PolicyLoss, temperature: float
) -> TokenSums:
    """Return the sums that ``accumulate_gradients`` would, by a forward pass alone; the same on every rank."""
    with torch.no_grad():
        results = _run(model, microbatches, partial(_sums, loss=loss, temperature=temperature), forward_only=True)
    return _summed(results, microbatches[0].rows.device)


def with_reference_logprobs(
    reference: torch.nn.Module, microbatches: Sequence[Microbatch], temperature: float
) -> list[Microbatch]:
    """Return the microbatches with the reference model's logprobs; only the last pipeline stage has and needs them."""
    with torch.no_grad():
        results = _run(reference, microbatches, partial(_logprobs, temperature=temperature), forward_only=True)
    if not mpu.is_pipeline_last_stage():
        return list(microbatches)
    return [replace(mb, ref_logprobs=logprobs) for mb, logprobs in zip(microbatches, results, strict=True)]


def _summed(results: Sequence[torch.Tensor], device: torch.device) -> TokenSums:
    """Add up the microbatches' sums over data parallel ranks, and tell every pipeline stage."""
    sums = torch.zeros(len(TokenSums().as_list()), dtype=torch.float64, device=device)
    for result in results:
        sums += result
    if mpu.is_pipeline_last_stage():
        dist.all_reduce(sums, group=mpu.get_data_parallel_group())
    dist.broadcast(sums, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    return TokenSums(*sums.tolist())


def _run(
    model: torch.nn.Module, microbatches: Sequence[Microbatch], finish: Any, forward_only: bool
) -> list[torch.Tensor]:
    """Return what ``finish(logits, microbatch)`` left for each microbatch; empty on all but the last pipeline stage."""

    def forward_step(pending: Iterator[Microbatch], part: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        microbatch = next(pending)
        packed = PackedSegments(microbatch.spans, microbatch.rows, microbatch.experts)
        output = part(microbatch.token_ids, microbatch.position_ids, None, packed_seq_params=packed)
        return output, partial(finish, microbatch=microbatch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].token_ids.size(1),  # not used: lengths vary and travel with the activations
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _policy_loss(
    logits: torch.Tensor, microbatch: Microbatch, loss: PolicyLoss, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, by Megatron's per-token contract: the loss summed over tokens, their number, and what to report."""
    logprobs, entropy = token_logprobs(
        logits, microbatch.targets, temperature, _tensor_group(), entropy_has_gradient=loss.entropy_coef != 0.0
    )
    weights = microbatch.weights
    # A token that does not count has no ratio and no gradient: 0 times an overflow would be no number.
    logprobs = torch.where(weights > 0, logprobs, microbatch.rollout_logprobs)
    terms = loss(logprobs, entropy, _of_counted(microbatch))
    in_loss = weights * microbatch.scales
    abs_diff = (logprobs - microbatch.rollout_logprobs).abs()
    of_loss = _sum_rows([terms.loss, terms.pg_loss], in_loss)
    of_tokens = _sum_rows([entropy, terms.clipped, terms.kl, abs_diff, torch.ones_like(weights)], weights)
    of_tis = of_tokens.new_zeros(3)
    if (weighed := terms.weighed) is not None:
        of_tis = _sum_rows([weighed.ratio, weighed.was_bounded, (weighed.ratio - 1.0).abs()], weights)
    in_mean = torch.tensor(microbatch.num_in_mean, dtype=torch.int, device=weights.device)
    return (terms.loss * in_loss).sum(), in_mean, torch.cat([of_loss, of_tokens, of_tis])


def _of_counted(microbatch: Microbatch) -> Microbatch:
    """Return the microbatch with the rollout's logprobs for all others of tokens that do not count."""
    counts, rolled_out = microbatch.weights > 0, microbatch.rollout_logprobs
    trainer, reference = (
        None if logprobs is None else torch.where(counts, logprobs, rolled_out)
        for logprobs in (microbatch.trainer_logprobs, microbatch.ref_logprobs)
    )
    return replace(microbatch, trainer_logprobs=trainer, ref_logprobs=reference)


def _sum_rows(columns: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each, in float64 and without gradient."""
    return (torch.stack([column.detach().double() for column in columns]) * weights).sum(dim=1)


def _sums(
    logits: torch.Tensor, microbatch: Microbatch, loss: PolicyLoss, temperature: float, non_loss_data: bool = True
) -> torch.Tensor:
    return _policy_loss(logits, microbatch, loss, temperature)[2]


def _logprobs(
    logits: torch.Tensor, microbatch: Microbatch, temperature: float, non_loss_data: bool = True
) -> torch.Tensor:
    return token_logprobs(logits, microbatch.targets, temperature, _tensor_group())[0]


def _tensor_group() -> dist.ProcessGroup | None:
    whole = mpu.get_tensor_model_parallel_world_size() == 1
    return None if whole else mpu.get_tensor_model_parallel_group()
