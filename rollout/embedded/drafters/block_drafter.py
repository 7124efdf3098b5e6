"""A block drafter (DFlash, DSpark) drafts all tokens of a round in one pass over the target's features.

Per sequence, draft position t holds the keys and values of the features of token t. Features wait until their sequence
drafts:

    prefill   features of known tokens wait, a shared prompt's once for all its samples
    propose   root is token k+1   caches the features up to token k, and runs the block [root, masks]
    observe                       features of what was accepted wait for the next propose
    catch_up                      caches what waits without drafting

The tokens of a block are drawn one by one from their own logits. In DFlash a token's distribution depends on no token
before it in the block, in DSpark on the last or on all of them. That is a chain as any other to verification, whatever
its rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rollout.embedded.drafters.block_network import BlockNetwork, BlockRow
from rollout.embedded.drafters.chain import chain_steps, grow_chains
from rollout.embedded.drafters.network_weights import NetworkWeights
from rollout.embedded.drafters.step import DrafterSetup, DraftRows, DraftVocab, Heads, own_span
from rollout.embedded.drafting import DraftContext, FeatureNeed, KvRow, Outcome, Prefill, Swap
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.model import Decoder
from rollout.embedded.plan import RowSpan, make_plan
from rollout.embedded.unread import UnreadDraft
from slime_spec.checkpoints.draft_spec import DraftSpec

MOST_GATHERED_BYTES = 256 << 20  # of one layer's keys and values, which are gathered by sequence
MOST_WAITING_BYTES = 256 << 20  # of features of prompts that no draft was made for


@dataclass(frozen=True)
class Waiting:
    """Holds features [tokens, width] that the draft has not cached so far, of a prompt or of a sequence's own row."""

    shared: bool
    position: int
    features: torch.Tensor


class BlockDrafter:
    """Drafts chains, a block at once; what a block is longer than a round asks for is not drawn."""

    def __init__(self, setup: DrafterSetup) -> None:
        spec = setup.draft.spec
        assert isinstance(spec, DraftSpec), "the algorithm's draft is a network, not a whole model"
        self.spec, self._setup = spec, setup
        self.needs = FeatureNeed(layers=spec.capture_layers)
        self.weights = NetworkWeights(spec, setup)
        self._rows = DraftRows(spec.block, setup)
        self._vocab = DraftVocab(setup.target.vocab_size)
        self._known: dict[int, int] = {}  # tokens whose features came
        self._waiting: dict[int, list[Waiting]] = {}
        feature_bytes = len(spec.capture_layers) * setup.target.hidden_size * setup.dtype.itemsize
        self._most_waiting = MOST_WAITING_BYTES // feature_bytes
        self._target: Decoder | None = None

    @property
    def cache(self) -> KvCache:
        return self._rows.cache

    @torch.inference_mode()
    def bind(self, decoder: Decoder) -> Swap:
        """Share the target's embedding and head; the first time, read the draft's own weights."""
        if self._target is None:
            self.weights.read(self._setup)

        def swap() -> None:
            self._target = decoder

        return swap

    @torch.inference_mode()
    def prefill(self, prefills: Sequence[Prefill]) -> None:
        for prefill in prefills:
            assert prefill.features is not None, "the core brings the features that were asked for"
            waiting = Waiting(prefill.shared, prefill.start, prefill.features.clone())
            self._waiting.setdefault(prefill.key, []).append(waiting)
            self._known[prefill.key] = prefill.start + len(prefill.token_ids)
        if sum(len(each.features) for pieces in self._waiting.values() for each in pieces) > self._most_waiting:
            self._cache_waiting([(prefill.key, prefill.kv_row) for prefill in prefills])

    @torch.inference_mode()
    def propose(self, contexts: Sequence[DraftContext]) -> list[UnreadDraft]:
        self.catch_up(contexts)
        num_steps = min(chain_steps(contexts, self._setup.shape.num_steps), self.spec.num_block_drafts)
        network, rows = self._network, [_block_row(context) for context in contexts]
        blocks = torch.full((len(rows), self.spec.block_size), self.spec.mask_token_id, device=self._setup.device)
        blocks[:, 0] = torch.tensor([context.token_ids[-1] for context in contexts])
        states = self._states(self._embed(blocks.flatten()).unflatten(0, blocks.shape), rows)
        states = states[:, :num_steps]
        assert self._target is not None, "a drafter is bound before it drafts"
        logits = self._target.head.wide(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        positions = iter(range(num_steps))
        memory: torch.Tensor | None = None

        def heads_behind(token_ids: torch.Tensor) -> Heads:
            nonlocal memory
            here = next(positions)
            biased, memory = network.biased(logits[:, here], token_ids, states[:, here], memory)
            return Heads(biased, states[:, here])

        def step(token_ids: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]) -> Heads:
            return heads_behind(token_ids)

        first = heads_behind(blocks[:, 0])
        slots = [RowSpan(row.row, row.own_len, 1) for row in rows]
        return grow_chains(first, step, slots, contexts, num_steps, self._vocab, self._setup.drawing)

    @torch.inference_mode()
    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        prompts = [(context.prompt_key, context.kv_row) for context in contexts]
        self._cache_waiting([*prompts, *((context.request_key, context.kv_row) for context in contexts)])

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.features is not None, "the core brings the features that were asked for"
            key = outcome.request_key
            # A sample begins where its shared prompt ends.
            position = self._known[key if key in self._known else outcome.prompt_key]
            self._waiting.setdefault(key, []).append(Waiting(False, position, outcome.features))
            self._known[key] = position + len(outcome.features)

    def forget(self, request_key: int) -> None:
        self._known.pop(request_key, None)
        self._waiting.pop(request_key, None)

    def _states(self, embedded: torch.Tensor, rows: Sequence[BlockRow]) -> torch.Tensor:
        """Run the blocks, so many at once as their gathered contexts have room in memory."""
        spec, longest = self.spec, max(row.position for row in rows) + self.spec.block_size
        width = 2 * spec.block.num_kv_heads * spec.block.head_dim * self._setup.dtype.itemsize  # keys and values
        at_once = max(1, MOST_GATHERED_BYTES // (longest * width))
        parts = [
            self._network.states(embedded[start : start + at_once], rows[start : start + at_once], self.cache)
            for start in range(0, len(rows), at_once)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _cache_waiting(self, rows: Sequence[tuple[int, KvRow]]) -> None:
        """Cache the features that wait of these prompts and sequences; rows are those of this moment."""
        due = [(kv_row, self._waiting.pop(key)) for key, kv_row in rows if key in self._waiting]
        for shared in (True, False):
            spans: list[RowSpan] = []
            features: list[torch.Tensor] = []
            for kv_row, pieces in due:
                if pieces[0].shared != shared:
                    continue
                position, count = pieces[0].position, sum(len(each.features) for each in pieces)
                if shared:
                    spans.append(RowSpan(kv_row.prefix_row, position, count))
                else:
                    spans.append(own_span(kv_row, kv_row.prefix_len, position, count))
                features += [each.features for each in pieces]
            if spans:
                store = self.cache.prefixes if shared else self.cache.own
                plan = make_plan(store, spans, 1, self._setup.dtype, self._setup.device)
                self._network.cache_context(torch.cat(features), plan)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._target is not None, "a drafter is bound before it drafts"
        own = self._network.embedding
        return self._target.embed(token_ids) if own is None else F.embedding(token_ids, own)

    @property
    def _network(self) -> BlockNetwork:
        network = self.weights.network
        assert isinstance(network, BlockNetwork), "the draft is of a block drafter's format"
        return network


def _block_row(context: DraftContext) -> BlockRow:
    kv_row = context.kv_row
    own_len = len(context.token_ids) - 1 - kv_row.prefix_len
    return BlockRow(kv_row.row, own_len, kv_row.prefix_row, kv_row.prefix_len)
