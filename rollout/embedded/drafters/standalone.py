"""STANDALONE (RTP-LLM's ``vanilla``) drafts with a second, smaller model that has the same tokenizer.

Its cache holds one position per token, like the target's. After a round it keeps what it computed of the tokens that
stood: all of a chain but its last token, which it never read; of a tree only the root, whose branches lie scattered.
The next round begins by reading the tokens it is behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rollout.embedded.drafters.chain import chain_limit
from rollout.embedded.drafters.growth import graphed_drafts, grow_drafts
from rollout.embedded.drafters.step import (
    DrafterSetup,
    DraftRows,
    DraftVocab,
    Heads,
    last_rows,
    own_span,
    prefill_span,
)
from rollout.embedded.drafters.whole_model import ModelWeights
from rollout.embedded.drafting import DraftContext, FeatureNeed, Outcome, Prefill, Swap
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.model import Decoder
from rollout.embedded.plan import AttentionPlan, RowSpan
from rollout.embedded.unread import UnreadDraft
from slime_spec.checkpoints.model_spec import ModelSpec

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass


class StandaloneDrafter:
    """Drafts chains or trees with a whole model of its own."""

    needs = FeatureNeed()

    def __init__(self, setup: DrafterSetup) -> None:
        spec = setup.draft.spec
        assert isinstance(spec, ModelSpec), "a whole model drafts"
        self.spec, self._setup = spec, setup
        self.weights = ModelWeights(spec, setup)
        self._rows = DraftRows(spec, setup)
        self._vocab = DraftVocab(setup.target.vocab_size)
        # Where the two models pad their embeddings differently, neither's padding is drafted or read.
        self._num_tokens = min(spec.vocab_size, setup.target.vocab_size)
        self._graphed = graphed_drafts(self._rows, setup)
        self._num_cached: dict[int, int] = {}  # tokens whose keys are right, by request or prompt
        self._num_read = 0  # drafted tokens of a chain that the last round read

    @property
    def cache(self) -> KvCache:
        return self._rows.cache

    @torch.inference_mode()
    def bind(self, decoder: Decoder) -> Swap:
        """Read the draft's weights at the first call; the draft shares nothing with the target."""
        if not self.weights.is_read:
            self.weights.read()
        return lambda: None

    @torch.inference_mode()
    def prefill(self, prefills: Sequence[Prefill]) -> None:
        spans: list[RowSpan] = []
        token_ids: list[int] = []
        for prefill in prefills:
            count = len(prefill.token_ids)
            spans.append(prefill_span(prefill, prefill.kv_row.prefix_len, prefill.start, count))
            token_ids += prefill.token_ids
            self._num_cached[prefill.key] = prefill.start + count
        self._forward(self._rows.store_of(prefills), self._rows.tensor(token_ids), spans)

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[UnreadDraft]:
        self._num_read = min(self._setup.shape.num_steps, max(map(chain_limit, contexts))) - 1
        next_slots = [own_span(each.kv_row, each.kv_row.prefix_len, len(each.token_ids), 1) for each in contexts]
        spans, token_ids = self._take_unread(contexts)
        if self._graphed is not None:
            from rollout.embedded.cuda.graphed_drafts import DraftWork

            work, owners = DraftWork(spans, token_ids, None, next_slots), (self.weights.decoder.memory,)
            drafts = self._graphed.grow(lambda: self, self._vocab, owners, work, contexts)
            if drafts is not None:
                return drafts
        hidden = self._forward(self.cache.own, self._rows.tensor(token_ids), spans)
        first = self.heads(last_rows(hidden, spans))
        return grow_drafts(self._setup, self._vocab, first, self._next, next_slots, contexts)

    @torch.inference_mode()
    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        spans, token_ids = self._take_unread(contexts, kept=1)
        if token_ids:
            self._forward(self.cache.own, self._rows.tensor(token_ids), spans)

    def _take_unread(self, contexts: Sequence[DraftContext], kept: int = 0) -> tuple[list[RowSpan], list[int]]:
        """Return the spans and tokens that the cache does not hold, but the last ``kept`` of each sequence.

        They count as cached from now on.
        """
        spans: list[RowSpan] = []
        token_ids: list[int] = []
        for context in contexts:
            num_cached = self._num_cached.get(context.request_key)
            if num_cached is None:  # a sample begins where its shared prompt ends
                num_cached = self._num_cached[context.prompt_key]
            num_tokens = len(context.token_ids) - kept
            if num_tokens > num_cached:
                spans.append(own_span(context.kv_row, context.kv_row.prefix_len, num_cached, num_tokens - num_cached))
                token_ids.extend(context.token_ids[num_cached:num_tokens])
                self._num_cached[context.request_key] = num_tokens
        return spans, token_ids

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        if self._setup.shape.topk > 1:
            return
        for outcome in outcomes:
            if outcome.path:
                self._num_cached[outcome.request_key] += min(len(outcome.path), self._num_read)

    def forget(self, request_key: int) -> None:
        self._num_cached.pop(request_key, None)

    def first(self, one_pass: DevicePass, features: torch.Tensor | None) -> torch.Tensor:
        return self._planned(one_pass, one_pass.tokens)

    def step(self, token_ids: torch.Tensor, hidden: torch.Tensor, one_pass: DevicePass) -> torch.Tensor:
        return self._planned(one_pass, token_ids)

    def heads(self, states: torch.Tensor) -> Heads:
        return Heads(self.weights.decoder.logits(states)[:, : self._num_tokens], states)

    def _next(self, token_ids: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]) -> Heads:
        return self.heads(self._forward(self.cache.own, token_ids, spans))

    def _forward(self, store: KvStore, token_ids: torch.Tensor, spans: Sequence[RowSpan]) -> torch.Tensor:
        return self._rows.run(store, spans, self._planned, token_ids)

    def _planned(self, plan: AttentionPlan | DevicePass, token_ids: torch.Tensor) -> torch.Tensor:
        if self.spec.vocab_size < self._setup.target.vocab_size:
            token_ids = token_ids.clamp(max=self.spec.vocab_size - 1)
        hidden, _ = self.weights.decoder.hidden(token_ids, plan)
        return hidden
