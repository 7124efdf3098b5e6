"""A drafter that keeps books instead of a network: it fails where the core breaks its side of the contract."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from rollout.embedded.draft import Draft
from rollout.embedded.drafting import DraftContext, DraftWeights, FeatureNeed, Outcome, Prefill, Swap
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.model import Decoder
from slime_spec.checkpoints.model_spec import ModelSpec

LEDGER_SPEC = ModelSpec.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 2,  # the least that a rotation needs
        "intermediate_size": 1,
        "num_attention_heads": 1,
        "vocab_size": 1,
        "max_position_embeddings": 1,
        "rms_norm_eps": 1e-5,
    }
)
Continue = Callable[[DraftContext], Sequence[int]]


class LedgerDrafter:
    """Keeps the number of every cached token as its "keys", and checks before each round that rows still hold them.

    Drafts are trees: along the tokens that ``continue_with`` says will follow, every level with wrong siblings before
    and after the right one. Features are kept by (key, position).
    """

    weights: DraftWeights | None = None

    def __init__(self, continue_with: Continue, needs: FeatureNeed | None = None, branches: int = 2) -> None:
        self._continue_with, self._branches = continue_with, branches
        self.needs = needs or FeatureNeed()
        self.cache: KvCache | None = KvCache(LEDGER_SPEC, torch.float32, torch.device("cpu"), 10**9)
        self.bound: list[Decoder] = []
        self.features: dict[tuple[int, int], torch.Tensor] = {}
        self.prefills: list[Prefill] = []
        self.num_prefilled: dict[int, int] = {}  # by key: the position that must come next
        self.drafted: dict[int, tuple[DraftContext, Draft]] = {}
        self.forgotten: list[int] = []

    def bind(self, decoder: Decoder) -> Swap:
        return lambda: self.bound.append(decoder)

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        assert len({prefill.shared for prefill in prefills}) == 1, "the pieces of one pass are of one store"
        assert len({prefill.key for prefill in prefills}) == len(prefills), "a row has one piece a pass"
        for prefill in prefills:
            self._prefill(prefill)

    def _prefill(self, prefill: Prefill) -> None:
        own_start = 0 if prefill.shared else prefill.kv_row.prefix_len
        assert prefill.start == self.num_prefilled.get(prefill.key, own_start), "a piece came out of order"
        self.num_prefilled[prefill.key] = prefill.start + len(prefill.token_ids)
        self.prefills.append(prefill)
        store = self._ledger.prefixes if prefill.shared else self._ledger.own
        row = prefill.kv_row.prefix_row if prefill.shared else prefill.kv_row.row
        first = prefill.start - own_start
        store.keys[0][row, 0, first : first + len(prefill.token_ids), 0] = torch.tensor(prefill.token_ids).float()
        self._keep_features(prefill.key, range(prefill.start, self.num_prefilled[prefill.key]), prefill.features)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        assert [each.kv_row.row for each in contexts] == sorted(each.kv_row.row for each in contexts)
        drafts = [self._tree(context) for context in contexts]
        for context, draft in zip(contexts, drafts, strict=True):
            self._check_rows(context)
            self.drafted[context.request_key] = context, draft
        return drafts

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.request_key not in self.drafted:
                continue  # one token of its budget was left
            context, draft = self.drafted.pop(outcome.request_key)
            tokens = [context.token_ids[-1], *(draft.token_ids[node] for node in outcome.path)]
            first = len(context.token_ids) - 1 - context.kv_row.prefix_len
            self._ledger.own.keys[0][context.kv_row.row, 0, first : first + len(tokens), 0] = torch.tensor(
                tokens
            ).float()
            positions = range(len(context.token_ids) - 1, len(context.token_ids) - 1 + len(tokens))
            self._keep_features(outcome.request_key, positions, outcome.features)

    def forget(self, request_key: int) -> None:
        self.forgotten.append(request_key)
        self.num_prefilled.pop(request_key, None)
        self.drafted.pop(request_key, None)

    @property
    def _ledger(self) -> KvCache:
        assert self.cache is not None
        return self.cache

    def _keep_features(self, key: int, positions: range, features: torch.Tensor | None) -> None:
        assert (features is not None) == self.needs.any
        if features is not None:
            assert len(features) == len(positions)
            self.features.update(
                {(key, position): row for position, row in zip(positions, features.cpu(), strict=True)}
            )

    def _check_rows(self, context: DraftContext) -> None:
        kv_row = context.kv_row
        own = self._ledger.own.keys[0][kv_row.row, 0, : len(context.token_ids) - 1 - kv_row.prefix_len, 0]
        assert own.tolist() == list(context.token_ids[kv_row.prefix_len : -1]), "a row holds other tokens"
        if kv_row.prefix_row >= 0:
            prefix = self._ledger.prefixes.keys[0][kv_row.prefix_row, 0, : kv_row.prefix_len, 0]
            assert prefix.tolist() == list(context.token_ids[: kv_row.prefix_len]), "a prompt's row holds other tokens"

    def _tree(self, context: DraftContext) -> Draft:
        rng = random.Random(context.request_key * 1000 + len(context.token_ids))
        tokens: list[int] = []
        parents: list[int] = []
        parent = -1
        for right in list(self._continue_with(context))[: context.max_depth]:
            siblings = [right, *((right + 1 + offset) % 131 for offset in range(self._branches))]
            rng.shuffle(siblings)
            if len(tokens) + len(siblings) > context.max_draft_tokens:
                break
            tokens += siblings
            parents += [parent] * len(siblings)
            parent = len(tokens) - len(siblings) + siblings.index(right)
        return Draft(tuple(tokens), tuple(parents))
