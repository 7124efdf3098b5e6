"""This module scores the samples of a rollout before its updates: what the policy and the reference think of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from slime_spec.types import TrainSample
from trainer_bridge.megatron.policy_step import with_reference_logprobs
from trainer_bridge.microbatch import Microbatch
from trainer_bridge.packing import MicrobatchPlan


def response_logprobs(
    model: torch.nn.Module,
    samples: Sequence[TrainSample],
    plans: Sequence[MicrobatchPlan],
    microbatches: Sequence[Microbatch],
    temperature: float,
) -> list[tuple[float, ...]]:
    """Return each sample's response logprobs by ``model``, the same on every rank, from a forward pass.

    ``plans`` and ``microbatches`` are this data parallel rank's part of the samples.
    """
    scored = with_reference_logprobs(model, microbatches, temperature)
    ends = torch.tensor([sample.num_response_tokens for sample in samples]).cumsum(0).tolist()
    flat = torch.zeros(ends[-1], device=microbatches[0].rows.device)
    if mpu.is_pipeline_last_stage():
        for plan, microbatch in zip(plans, scored, strict=True):
            assert microbatch.ref_logprobs is not None, "the last stage has them"
            start = 0
            for index in _indices(plan):
                length = samples[index].num_response_tokens
                flat[ends[index] - length : ends[index]] = microbatch.ref_logprobs[start : start + length]
                start += length
        dist.all_reduce(flat, group=mpu.get_data_parallel_group())
    dist.broadcast(flat, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    values = flat.tolist()
    return [tuple(values[end - sample.num_response_tokens : end]) for sample, end in zip(samples, ends, strict=True)]


def _indices(plan: MicrobatchPlan) -> Iterator[int]:
    """Yield the samples of a microbatch in the order of its rows."""
    for segment in plan:
        yield from segment.sample_indices
