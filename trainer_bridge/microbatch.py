"""A Microbatch holds tensors: those that the model reads and those that the loss needs, response tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from slime_spec.types import TrainSample
from trainer_bridge.loss_mean import TOKEN_MEAN, LossMean
from trainer_bridge.packing import MicrobatchPlan

OWN_CHOICE = -1  # of experts: the router's


@dataclass(frozen=True)
class SegmentSpan:
    """Places a segment in the packed row: ``prompt_len`` tokens from ``start``, then each response's fed tokens."""

    start: int
    prompt_len: int
    fed_lens: tuple[int, ...]


@dataclass(frozen=True)
class Microbatch:
    """Holds T packed tokens and the N response tokens they predict.

    ``token_ids`` and ``position_ids`` are [1, T]; ``rows``, ``targets``, ``rollout_logprobs``, ``advantages``,
    ``weights``, ``scales``, ``sample_of_row``, ``trainer_logprobs`` and ``ref_logprobs`` are [N]: row ``rows[i]`` of
    the model predicts token ``targets[i]`` of sample ``sample_of_row[i]`` of the ``num_samples`` here. ``weights`` is
    1, or 0 for a token that does not count (TrainSample.loss_mask) or that only keeps a rank in step with the others.
    ``scales`` and ``num_in_mean`` make the loss's mean (LossMean): tokens' losses times the one, their sum over the
    other of all microbatches of the step. ``experts`` [T, layers, chosen] are the choices to replay of each layer with
    experts, in int16; OWN_CHOICE where a row has none, such as one of padding. None where no sample of the microbatch
    has any.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: tuple[SegmentSpan, ...]
    rows: torch.Tensor
    targets: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor
    sample_of_row: torch.Tensor
    num_samples: int
    num_in_mean: int
    trainer_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    experts: torch.Tensor | None = None


def build_microbatch(
    samples: Sequence[TrainSample],
    plan: MicrobatchPlan,
    device: torch.device,
    multiple: int = 1,
    mean: LossMean = TOKEN_MEAN,
) -> Microbatch:
    """Lay the plan's segments side by side; T is padded to a ``multiple``, by a segment whose rows predict nothing."""
    if not plan:
        return _empty_microbatch(device, multiple)
    token_ids: list[int] = []
    position_ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    spans: list[SegmentSpan] = []
    for segment in plan:
        prompt_len = segment.prompt_len
        spans.append(SegmentSpan(len(token_ids), prompt_len, tuple(n - 1 for n in segment.response_lens)))
        token_ids += samples[segment.sample_indices[0]].token_ids[:prompt_len]
        position_ids += range(prompt_len)
        last_prompt_row = len(token_ids) - 1
        for index in segment.sample_indices:
            sample = samples[index]
            response = sample.token_ids[prompt_len:]
            rows += [last_prompt_row, *range(len(token_ids), len(token_ids) + len(response) - 1)]
            targets += response
            token_ids += response[:-1]
            position_ids += range(prompt_len, prompt_len + len(response) - 1)
    if padding := -len(token_ids) % multiple:
        spans.append(SegmentSpan(len(token_ids), padding, ()))
        token_ids += [0] * padding
        position_ids += range(padding)
    held = [samples[index] for segment in plan for index in segment.sample_indices]
    lengths = torch.tensor([sample.num_response_tokens for sample in held])

    def of_samples(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths).to(device)

    def of_tokens(values: Iterable[Sequence[float]]) -> torch.Tensor:
        return torch.tensor(list(chain.from_iterable(values)), dtype=torch.float32, device=device)

    return Microbatch(
        token_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        spans=tuple(spans),
        rows=torch.tensor(rows, device=device),
        targets=torch.tensor(targets, device=device),
        rollout_logprobs=of_tokens(sample.rollout_logprobs for sample in held),
        advantages=of_tokens(sample.advantages for sample in held),
        weights=of_tokens(sample.loss_mask or (1,) * sample.num_response_tokens for sample in held),
        scales=of_samples([mean.scale(sample) for sample in held]),
        sample_of_row=torch.arange(len(held)).repeat_interleave(lengths).to(device),
        num_samples=len(held),
        num_in_mean=mean.size(held),
        trainer_logprobs=of_tokens(sample.trainer_logprobs or () for sample in held)
        if held[0].trainer_logprobs is not None
        else None,
        experts=_experts(samples, plan, len(token_ids), device),
    )


def _experts(
    samples: Sequence[TrainSample], plan: MicrobatchPlan, num_rows: int, device: torch.device
) -> torch.Tensor | None:
    """Return Microbatch.experts: a segment's prompt has those of any of its samples, which agree."""
    held = [samples[index].routed_experts for segment in plan for index in segment.sample_indices]
    first = next((each for each in held if each is not None), None)
    if first is None:
        return None
    experts = np.full((num_rows, first.num_layers, first.num_per_token), OWN_CHOICE, dtype=np.int16)
    start = 0
    for segment in plan:
        own = start + segment.prompt_len
        for index, length in zip(segment.sample_indices, segment.response_lens, strict=True):
            if (routed := samples[index].routed_experts) is not None:
                of_prompt, of_response = np.split(routed.ids, [segment.prompt_len])
                experts[start : start + len(of_prompt)] = of_prompt
                experts[own : own + len(of_response)] = of_response
            own += length - 1
        start = own
    return torch.from_numpy(experts).to(device)


def _empty_microbatch(device: torch.device, num_tokens: int) -> Microbatch:
    """Return tokens of which one counts, for nothing: the smallest input that takes part in every collective."""
    zero = torch.zeros(1, dtype=torch.long, device=device)
    nothing = torch.zeros(1, device=device)
    return Microbatch(
        token_ids=zero.expand(1, num_tokens),
        position_ids=zero.expand(1, num_tokens),
        spans=(SegmentSpan(0, num_tokens, ()),),
        rows=zero,
        targets=zero,
        rollout_logprobs=nothing,
        advantages=nothing,
        weights=nothing,
        scales=nothing,
        sample_of_row=zero,
        num_samples=1,
        num_in_mean=0,
    )
