"""Pack samples of different lengths into microbatches without padding.

Samples with the same prompt share its tokens:

    one segment      [ prompt | response 1 | response 2 | ... ]
    positions          0..P-1   P..          P..
    attention          each response sees the prompt and itself

Where the engine's choices of experts are replayed, only samples for which the engine chose the same experts at every
token of the prompt share it: a row has one choice, and every sample is replayed exactly.

A response's last token predicts nothing and is not fed; its first token is predicted by the prompt's last row. So a
segment of P prompt tokens and responses of R_i tokens costs P + sum(R_i - 1) rows of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slime_spec.routed_experts import RoutedExperts
from slime_spec.types import TrainSample


@dataclass(frozen=True)
class Segment:
    """Holds a prompt of ``prompt_len`` tokens and the samples that continue it, as indices into the step's samples.

    Example, three samples of one prompt with 4, 2 and 5 response tokens:
    ``Segment(prompt_len=35, sample_indices=(0, 1, 2), response_lens=(4, 2, 5))``
    """

    prompt_len: int
    sample_indices: tuple[int, ...]
    response_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + sum(n - 1 for n in self.response_lens)


MicrobatchPlan = tuple[Segment, ...]


def plan_microbatches(
    samples: Sequence[TrainSample], max_tokens: int, num_ranks: int, share_prompts: bool = True
) -> list[list[MicrobatchPlan]]:
    """Return each data parallel rank's microbatches, as many on every rank and at least one (collectives need that).

    A microbatch has at most ``max_tokens`` tokens, except one that holds a single longer sample. Where there are fewer
    than the ranks need, empty plans fill up. Samples without response tokens are left out.
    """
    segments = form_segments(samples, max_tokens, share_prompts)
    bins = _best_fit_decreasing(segments, max_tokens)
    per_rank = max(1, -(-len(bins) // num_ranks))
    even = _spread_evenly(segments, per_rank * num_ranks)
    if all(len(b) <= 1 or _num_tokens(b) <= max_tokens for b in even):
        bins = even
    bins = bins + [()] * (per_rank * num_ranks - len(bins))
    return _deal(bins, num_ranks)


def form_segments(samples: Sequence[TrainSample], max_tokens: int, share_prompts: bool = True) -> list[Segment]:
    """Group samples by their prompt and its routing, starting a new segment where ``max_tokens`` would be exceeded."""
    groups: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        if len(sample.token_ids) > sample.prompt_len:
            key = _prompt(sample) if share_prompts else index
            groups.setdefault(key, []).append(index)
    segments = []
    for indices in groups.values():
        prompt_len = samples[indices[0]].prompt_len
        members: list[int] = []
        num_tokens = prompt_len
        for index in indices:
            added = _response_len(samples[index]) - 1
            if members and num_tokens + added > max_tokens:
                segments.append(_segment(samples, prompt_len, members))
                members, num_tokens = [], prompt_len
            members.append(index)
            num_tokens += added
        segments.append(_segment(samples, prompt_len, members))
    return segments


def _prompt(sample: TrainSample) -> tuple[tuple[int, ...], RoutedExperts | None]:
    experts = sample.routed_experts
    of_prompt = None if experts is None else experts.first(sample.prompt_len)
    return sample.token_ids[: sample.prompt_len], of_prompt


def _response_len(sample: TrainSample) -> int:
    return len(sample.token_ids) - sample.prompt_len


def _segment(samples: Sequence[TrainSample], prompt_len: int, members: list[int]) -> Segment:
    return Segment(prompt_len, tuple(members), tuple(_response_len(samples[index]) for index in members))


def _num_tokens(segments: Sequence[Segment]) -> int:
    return sum(segment.num_tokens for segment in segments)


def _by_size(segments: Sequence[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: segment.num_tokens, reverse=True)


def _best_fit_decreasing(segments: Sequence[Segment], max_tokens: int) -> list[MicrobatchPlan]:
    """Return bins, as many as needed: each segment, largest first, goes where the least room remains."""
    bins: list[list[Segment]] = []
    room: list[int] = []
    for segment in _by_size(segments):
        fitting = [i for i, free in enumerate(room) if free >= segment.num_tokens]
        if fitting:
            best = min(fitting, key=lambda i: room[i])
            bins[best].append(segment)
            room[best] -= segment.num_tokens
        else:
            bins.append([segment])
            room.append(max_tokens - segment.num_tokens)
    return [tuple(b) for b in bins]


def _spread_evenly(segments: Sequence[Segment], num_bins: int) -> list[MicrobatchPlan]:
    """Return ``num_bins`` bins: each segment, largest first, goes to the emptiest bin."""
    bins: list[list[Segment]] = [[] for _ in range(num_bins)]
    load = [0] * num_bins
    for segment in _by_size(segments):
        emptiest = min(range(num_bins), key=lambda i: load[i])
        bins[emptiest].append(segment)
        load[emptiest] += segment.num_tokens
    return [tuple(b) for b in bins]


def _deal(bins: Sequence[MicrobatchPlan], num_ranks: int) -> list[list[MicrobatchPlan]]:
    """Deal bins of like size side by side, because the i-th microbatches of all ranks run at the same time."""
    ordered = sorted(bins, key=_num_tokens, reverse=True)
    return [list(ordered[rank::num_ranks]) for rank in range(num_ranks)]
