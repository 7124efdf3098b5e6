"""Where a drafter's keys and values go: its rows are the target's, its positions those of the draft network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.embedded.drafters.setup import DrafterSetup
from rollout.embedded.drafting import Lane
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.plan import AttentionPlan, RowSpan, make_plan
from slime_spec.checkpoints.model_spec import ModelSpec


class DraftRows:
    """A draft decoder's cache and the passes over it."""

    def __init__(self, spec: ModelSpec, setup: DrafterSetup) -> None:
        self._heads_per_kv = spec.num_heads // spec.num_kv_heads
        self._dtype, self._device = setup.dtype, setup.device
        self.cache = KvCache(spec, setup.dtype, setup.device, setup.max_total_tokens)

    def plan(self, store: KvStore, spans: Sequence[RowSpan]) -> AttentionPlan:
        shared = self.cache.prefixes if any(span.prefix_row >= 0 for span in spans) else None
        return make_plan(store, spans, self._heads_per_kv, self._dtype, self._device, shared)

    def tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, device=self._device)


def own_span(lane: Lane, prefix_len: int, position: int, count: int) -> RowSpan:
    """``count`` tokens from absolute ``position`` on in the sequence's own row, after ``prefix_len`` shared ones."""
    if prefix_len == 0:
        return RowSpan(lane.row, position, count)
    return RowSpan(lane.row, position - prefix_len, count, lane.prefix_row, prefix_len)


def last_rows(states: torch.Tensor, spans: Sequence[RowSpan]) -> torch.Tensor:
    """The state of every span's last token [rows, width], of a pass's [tokens, width]."""
    if states.shape[0] == len(spans):
        return states
    ends = torch.tensor([span.count for span in spans], device=states.device).cumsum(0) - 1
    return states.index_select(0, ends)
