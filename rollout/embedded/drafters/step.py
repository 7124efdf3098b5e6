"""These classes are the parts of a draft network's step: setup, KV rows, vocabulary, and the heads that it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from rollout.embedded.drafting import KvRow, Prefill
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.plan import RowSpan, make_plan
from slime_spec.checkpoints.draft_choice import ChosenDraft
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.sglang.draft_shape import DraftShape

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import KvTable
    from rollout.embedded.cuda.graphs import Graphs


class Drawing(Enum):
    """Names the ways to draw the next token of a chain for a request that samples.

    LIKELIEST takes the argmax. SAMPLED draws from the draft's distribution by uniforms of the draft's own, and
    verification must know the distribution. RACED draws from it by the race, with the target's noise: for verification
    the token is chosen, as an argmax is.
    """

    LIKELIEST = "likeliest"
    SAMPLED = "sampled"
    RACED = "raced"


@dataclass(frozen=True)
class DrafterSetup:
    """Holds the draft and its settings; ``context_length`` and ``max_total_tokens`` bound the engine, in tokens."""

    config: SpeculativeConfig
    shape: DraftShape
    draft: ChosenDraft
    target: ModelSpec
    dtype: torch.dtype
    device: torch.device
    context_length: int
    max_total_tokens: int
    quantization: str | None = None  # of the draft's weights: int8 or fp8
    graphs: Graphs | None = None

    @property
    def drawing(self) -> Drawing:
        """Return how the tokens of chains are drawn."""
        if self.config.use_gumbel_coupling:
            return Drawing.RACED
        return Drawing.SAMPLED if self.config.samples_drafts else Drawing.LIKELIEST


@dataclass(frozen=True)
class Heads:
    """Holds the output of one step of a draft network.

    ``logits`` [rows, draft vocab] are the next token's, in fp32; ``hidden`` [rows, hidden] is read by the next step
    (a whole model does not use it).
    """

    logits: torch.Tensor
    hidden: torch.Tensor


# (token ids [tokens], hidden states [tokens, hidden] they follow, where they go) -> what comes after each
DraftStep = Callable[[torch.Tensor, torch.Tensor, Sequence[RowSpan]], Heads]


@dataclass(frozen=True)
class DraftVocab:
    """Maps the draft's token ids to the target's.

    ``target_ids`` [draft vocab] are the target's ids of the draft head's rows; None where the ids are the same.
    """

    target_size: int
    target_ids: torch.Tensor | None = None

    def tokens(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids if self.target_ids is None else self.target_ids[draft_ids]

    def spread(self, q_draft: torch.Tensor) -> torch.Tensor:
        """Return ``q_draft`` [rows, draft vocab] over the target's vocabulary, zero where the draft has no row."""
        if q_draft.shape[1] == self.target_size and self.target_ids is None:
            return q_draft
        full = q_draft.new_zeros(q_draft.shape[0], self.target_size)
        columns = slice(q_draft.shape[1]) if self.target_ids is None else self.target_ids
        full[:, columns] = q_draft
        return full


class DraftRows:
    """Owns the cache of a draft decoder and runs the passes over the cache."""

    def __init__(self, spec: ModelSpec, setup: DrafterSetup) -> None:
        self._heads_per_kv = spec.num_heads // spec.num_kv_heads
        self._dtype, self._device = setup.dtype, setup.device
        self.cache = KvCache(spec, setup.dtype, setup.device, setup.max_total_tokens)
        self.table: KvTable | None = None  # of the cache, for the kernels of a GPU
        if setup.graphs is not None:
            from rollout.embedded.cuda.store_kernels import table_of  # needs Triton, which a CPU does without

            self.table = table_of(self.cache, setup.device)

    def run(
        self, store: KvStore, spans: Sequence[RowSpan], forward: Callable[..., torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        """Return ``forward(plan, *inputs)`` over a plan of the pass; inputs and result are [tokens, ..].

        A GPU's pass is padded where its rows differ in length, and its inputs then, too.
        """
        if self.table is None:
            shared = self.cache.prefixes if any(span.prefix_row >= 0 for span in spans) else None
            return forward(make_plan(store, spans, self._heads_per_kv, self._dtype, self._device, shared), *inputs)
        return self._run_on_device(self.table, store, spans, forward, *inputs)

    def store_of(self, prefills: Sequence[Prefill]) -> KvStore:
        """Return the store of the pieces of one pass."""
        return self.cache.prefixes if prefills[0].shared else self.cache.own

    def tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(token_ids, device=self._device)

    def _run_on_device(
        self,
        table: KvTable,
        store: KvStore,
        spans: Sequence[RowSpan],
        forward: Callable[..., torch.Tensor],
        *inputs: torch.Tensor,
    ) -> torch.Tensor:
        from rollout.embedded.cuda.device_pass import DevicePass, Places, exact_bucket

        bucket, num_tokens = exact_bucket(spans), sum(span.count for span in spans)
        one_pass = DevicePass(bucket, table, self._device)
        one_pass.fill(spans, [0] * num_tokens, store is self.cache.prefixes)
        if num_tokens == bucket.tokens:
            return forward(one_pass, *inputs)
        places = Places(bucket, spans, self._device)
        return places.packed(forward(one_pass, *map(places.padded, inputs)))


def own_span(kv_row: KvRow, prefix_len: int, position: int, count: int) -> RowSpan:
    """Return the span of ``count`` tokens from absolute ``position`` on in the own row, after ``prefix_len`` shared."""
    if prefix_len == 0:
        return RowSpan(kv_row.row, position, count)
    return RowSpan(kv_row.row, position - prefix_len, count, kv_row.prefix_row, prefix_len)


def prefill_span(prefill: Prefill, prefix_len: int, position: int, count: int) -> RowSpan:
    """Return the span of ``count`` tokens from absolute ``position`` on, in the prompt's row or the sequence's own."""
    if prefill.shared:
        return RowSpan(prefill.kv_row.prefix_row, position, count)
    return own_span(prefill.kv_row, prefix_len, position, count)


def last_rows(states: torch.Tensor, spans: Sequence[RowSpan]) -> torch.Tensor:
    """Return the state of every span's last token [rows, width], of a pass's [tokens, width]."""
    if states.shape[0] == len(spans):
        return states
    ends = torch.tensor([span.count for span in spans], device=states.device).cumsum(0) - 1
    return states.index_select(0, ends)
