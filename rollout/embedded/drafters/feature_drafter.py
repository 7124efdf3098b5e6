"""EAGLE, EAGLE-3 and MTP drafters share FeatureDrafter, which drafts from the target's hidden states.

Per sequence, draft position t holds the keys and values of (token t + 1, features of token t). The features of the
last committed token wait until its successor is known:

    prefill   features 0 … k      owe positions 0 … k - 1, whose next tokens are known; the last features wait
    propose   root is token k+1   pays what is owed; extends the waiting positions, whose last output is the first draft
              S - 1 steps         on the draft's own states, into slots that the next round overwrites
    observe                       features of what was accepted wait for the next propose, of rounds without drafts too
    catch_up                      extends the waiting positions without drafting

So after every round the draft's cache of committed tokens comes from the target's true features. A group's shared
prompt of P tokens is computed once: its first P - 1 positions, for the last one's next token differs by sample. What
is owed is computed when one of its sequences drafts: where none does, the prompts cost the draft nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rollout.embedded.drafters.growth import graphed_drafts, grow_drafts
from rollout.embedded.drafters.network import DraftNetwork
from rollout.embedded.drafters.network_weights import NetworkWeights
from rollout.embedded.drafters.step import (
    DrafterSetup,
    DraftRows,
    DraftVocab,
    Heads,
    last_rows,
    own_span,
)
from rollout.embedded.drafting import DraftContext, FeatureNeed, KvRow, Outcome, Prefill, Swap
from rollout.embedded.kv_cache import KvCache, KvStore
from rollout.embedded.linear import PackedLinear
from rollout.embedded.model import Decoder
from rollout.embedded.plan import AttentionPlan, RowSpan
from rollout.embedded.unread import UnreadDraft
from slime_spec.checkpoints.draft_spec import DraftSpec

if TYPE_CHECKING:
    from rollout.embedded.cuda.device_pass import DevicePass

MOST_OWED_BYTES = 256 << 20  # of features of prompts that no draft was made for


@dataclass(frozen=True)
class Track:
    """Says how far a sequence's draft cache reaches; ``waiting`` are the features of the positions after."""

    num_cached: int
    waiting: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Owed:
    """Holds positions of a prompt, or of a sequence's own row, that the draft has not computed so far."""

    shared: bool
    prefix_len: int
    position: int
    token_ids: tuple[int, ...]  # the next token of each position
    features: torch.Tensor


class FeatureDrafter:
    """Drafts chains or trees with a network that reads the target's features."""

    def __init__(self, setup: DrafterSetup) -> None:
        spec = setup.draft.spec
        assert isinstance(spec, DraftSpec), "the algorithm's draft is a network, not a whole model"
        self.spec, self._setup = spec, setup
        self.needs = FeatureNeed(layers=spec.capture_layers, final=not spec.capture_layers)
        self.weights = NetworkWeights(spec, setup)
        self._rows = DraftRows(spec.block, setup)
        self._vocab = DraftVocab(setup.target.vocab_size)
        self._tracks: dict[int, Track] = {}
        self._owed: dict[int, list[Owed]] = {}
        self._most_owed = MOST_OWED_BYTES // max(1, self._feature_bytes())
        self._graphed = graphed_drafts(self._rows, setup)
        self._target: Decoder | None = None
        self._shared_head: PackedLinear | None = None

    @property
    def cache(self) -> KvCache:
        return self._rows.cache

    @torch.inference_mode()
    def bind(self, decoder: Decoder) -> Swap:
        """Share the target's embedding and head; the first time, read the draft's own weights."""
        if self._target is None:
            self._read()
        shared_head = None if self.spec.has_own_head else self._head_of(decoder)

        def swap() -> None:
            self._target, self._shared_head = decoder, shared_head

        return swap

    @torch.inference_mode()
    def prefill(self, prefills: Sequence[Prefill]) -> None:
        for prefill in prefills:
            assert prefill.features is not None, "the core brings the features that were asked for"
            track = self._track_before(prefill)
            count = sum(map(len, track.waiting)) + len(prefill.token_ids) - 1
            if count:
                prefix_len = shared_positions(prefill.kv_row.prefix_len)
                features = torch.cat((*track.waiting, prefill.features[:-1]))
                owed = Owed(prefill.shared, prefix_len, track.num_cached, prefill.token_ids[-count:], features)
                self._owed.setdefault(prefill.key, []).append(owed)
            self._tracks[prefill.key] = Track(track.num_cached + count, (prefill.features[-1:].clone(),))
        if sum(len(each.token_ids) for pieces in self._owed.values() for each in pieces) > self._most_owed:
            self.pay([(prefill.key, prefill.kv_row) for prefill in prefills])

    def pay(self, rows: Sequence[tuple[int, KvRow]]) -> None:
        """Compute what is owed of these prompts and sequences, prompts first: they come before what is a sample's own.

        Rows are those of this moment; pieces of one sequence or prompt follow each other.
        """
        due = [(kv_row, self._owed.pop(key)) for key, kv_row in rows if key in self._owed]
        for shared in (True, False):
            together = [(kv_row, pieces) for kv_row, pieces in due if pieces[0].shared == shared]
            if not together:
                continue
            spans: list[RowSpan] = []
            token_ids: list[int] = []
            features: list[torch.Tensor] = []
            for kv_row, pieces in together:
                first, count = pieces[0], sum(len(each.token_ids) for each in pieces)
                if shared:
                    spans.append(RowSpan(kv_row.prefix_row, first.position, count))
                else:
                    spans.append(own_span(kv_row, first.prefix_len, first.position, count))
                for piece in pieces:
                    token_ids += piece.token_ids
                    features.append(piece.features)
            store = self.cache.prefixes if shared else self.cache.own
            hidden = self._network.project(torch.cat(features))
            self._forward(store, self._rows.tensor(token_ids), hidden, spans)

    def _feature_bytes(self) -> int:
        num_states = len(self.needs.layers) + self.needs.final
        return num_states * self._setup.target.hidden_size * self._setup.dtype.itemsize

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[UnreadDraft]:
        self.pay(_owners(contexts))
        next_slots: list[RowSpan] = []
        for context in contexts:
            prefix_len = shared_positions(context.kv_row.prefix_len)
            next_slots.append(own_span(context.kv_row, prefix_len, len(context.token_ids) - 1, 1))
        spans, token_ids, features = self._take_waiting(contexts)
        if self._graphed is not None:
            from rollout.embedded.cuda.graphed_drafts import DraftWork

            work = DraftWork(spans, token_ids, features, next_slots)
            drafts = self._graphed.grow(self._on_device, self._vocab, self._owners(), work, contexts)
            if drafts is not None:
                return drafts
        residual = self._extend(spans, token_ids, features)
        first = self._network.heads(last_rows(residual, spans), self._shared_head)
        return grow_drafts(self._setup, self._vocab, first, self._step, next_slots, contexts)

    @torch.inference_mode()
    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        behind = [each for each in contexts if len(self._track(each.request_key, each.prompt_key).waiting) > 1]
        if behind:
            self.pay(_owners(behind))
            self._extend(*self._take_waiting(behind, kept=1))

    def _take_waiting(
        self, contexts: Sequence[DraftContext], kept: int = 0
    ) -> tuple[list[RowSpan], list[int], torch.Tensor]:
        """Return the spans, next tokens and features of all that waits but the last ``kept`` pieces of each sequence.

        They count as cached from now on.
        """
        spans: list[RowSpan] = []
        token_ids: list[int] = []
        waiting: list[torch.Tensor] = []
        for context in contexts:
            track = self._track(context.request_key, context.prompt_key)
            taken, left = track.waiting[: len(track.waiting) - kept], track.waiting[len(track.waiting) - kept :]
            num_cached = track.num_cached + sum(map(len, taken))
            prefix_len = shared_positions(context.kv_row.prefix_len)
            spans.append(own_span(context.kv_row, prefix_len, track.num_cached, num_cached - track.num_cached))
            token_ids.extend(context.token_ids[track.num_cached + 1 : num_cached + 1])
            waiting.extend(taken)
            self._tracks[context.request_key] = Track(num_cached, left)
        return spans, token_ids, torch.cat(waiting) if len(waiting) > 1 else waiting[0]

    def _extend(self, spans: Sequence[RowSpan], token_ids: Sequence[int], features: torch.Tensor) -> torch.Tensor:
        """Put committed tokens into the draft's cache; returns their states [tokens, hidden]."""
        hidden = self._network.project(features)
        return self._forward(self.cache.own, self._rows.tensor(token_ids), hidden, spans)

    def _on_device(self) -> NetworkOnDevice:
        return NetworkOnDevice(self._network, self._embed, self._shared_head)

    def _owners(self) -> tuple[object, ...]:
        """Return what a graph of the network is captured over."""
        assert self._target is not None, "a drafter is bound before it drafts"
        head = self._shared_head
        own_head = None if head is None or head is self._target.head else head
        return self._network, own_head, self._target.memory

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.features is not None, "the core brings the features that were asked for"
            track = self._track(outcome.request_key, outcome.prompt_key)
            self._tracks[outcome.request_key] = Track(track.num_cached, (*track.waiting, outcome.features))

    def forget(self, request_key: int) -> None:
        self._tracks.pop(request_key, None)
        self._owed.pop(request_key, None)

    @property
    def _network(self) -> DraftNetwork:
        network = self.weights.network
        assert isinstance(network, DraftNetwork), "the draft drafts by steps"
        return network

    def _step(self, token_ids: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]) -> Heads:
        residual = self._forward(self.cache.own, token_ids, hidden, spans)
        return self._network.heads(residual, self._shared_head)

    def _forward(
        self, store: KvStore, token_ids: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]
    ) -> torch.Tensor:
        return self._rows.run(store, spans, self._planned, token_ids, hidden)

    def _planned(self, plan: AttentionPlan | DevicePass, token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self._network.forward(self._embed(token_ids), hidden, plan)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._target is not None, "a drafter is bound before it drafts"
        own = self._network.embedding
        return self._target.embed(token_ids) if own is None else F.embedding(token_ids, own)

    def _track(self, request_key: int, prompt_key: int) -> Track:
        """Let a sample's state begin where the sample's shared prompt ends."""
        track = self._tracks.get(request_key)
        return self._tracks[prompt_key] if track is None else track

    def _track_before(self, prefill: Prefill) -> Track:
        return Track(0, ()) if prefill.start == 0 else self._track(prefill.key, prefill.prompt_key)

    def _read(self) -> None:
        hot_token_ids = self.weights.read(self._setup)
        if hot_token_ids is not None:
            self._vocab = DraftVocab(self._vocab.target_size, hot_token_ids)

    def _head_of(self, decoder: Decoder) -> PackedLinear:
        return decoder.head


@dataclass(frozen=True)
class NetworkOnDevice:
    """Runs the network's passes for a captured graph; see ModelOnDevice."""

    network: DraftNetwork
    embed: Callable[[torch.Tensor], torch.Tensor]
    shared_head: PackedLinear | None

    def first(self, one_pass: DevicePass, features: torch.Tensor | None) -> torch.Tensor:
        assert features is not None, "the network reads the target's features"
        return self.network.forward(self.embed(one_pass.tokens), self.network.project(features), one_pass)

    def step(self, token_ids: torch.Tensor, hidden: torch.Tensor, one_pass: DevicePass) -> torch.Tensor:
        return self.network.forward(self.embed(token_ids), hidden, one_pass)

    def heads(self, states: torch.Tensor) -> Heads:
        return self.network.heads(states, self.shared_head)


def _owners(contexts: Sequence[DraftContext]) -> list[tuple[int, KvRow]]:
    """Return the keys of the sequences and of their prompts, each with its row; a prompt comes once for each sample."""
    return [
        *((context.prompt_key, context.kv_row) for context in contexts),
        *((context.request_key, context.kv_row) for context in contexts),
    ]


def shared_positions(num_prompt_tokens: int) -> int:
    """Return the number of a shared prompt's draft positions that are the same for all its samples."""
    return max(0, num_prompt_tokens - 1)
