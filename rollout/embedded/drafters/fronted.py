"""A fronted drafter takes drafts out of texts where they promise more than a network's, and the network's elsewhere.

    propose    texts ──► a chain for every sequence, with what is expected of it
               network ─► drafts for the sequences whose chain promises fewer tokens than its own drafts brought lately
    observe    the network hears of every sequence: of one that it did not draft for, as of a plain step with the
               features of all tokens that were committed

Texts cost next to nothing, so a network that promises as much is not asked. Whoever drafted, verification is the same:
chains out of texts are chosen tokens, also beside a network's sampled ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from rollout.embedded.draft import NO_DRAFT, Draft
from rollout.embedded.drafters.history import HistoryDrafter
from rollout.embedded.drafting import DraftContext, Drafter, DraftWeights, FeatureNeed, Outcome, Prefill, Swap
from rollout.embedded.kv_cache import KvCache
from rollout.embedded.model import Decoder
from rollout.embedded.unread import AnyDraft

KEPT = 1.0 - 1.0 / 64.0  # of the means of what a network's draft brings, with every draft of it that was verified
FIRST_BROUGHT = 0.5  # accepted tokens, before any was


class FrontedDrafter:
    """Puts ``front`` before ``network``, whose cache, weights and features are this drafter's."""

    def __init__(self, front: HistoryDrafter, network: Drafter) -> None:
        self._front, self._network = front, network
        self._brought, self._verified = FIRST_BROUGHT, 0.0  # means of accepted and verified tokens of its drafts
        self._of_front: set[int] = set()  # sequences whose draft of this round is the front's
        self._of_network: set[int] = set()

    @property
    def needs(self) -> FeatureNeed:
        return self._network.needs

    @property
    def cache(self) -> KvCache | None:
        return self._network.cache

    @property
    def weights(self) -> DraftWeights | None:
        return self._network.weights

    def bind(self, decoder: Decoder) -> Swap:
        return self._network.bind(decoder)

    def prefill(self, prefills: Sequence[Prefill]) -> None:
        self._network.prefill(prefills)

    def propose(self, contexts: Sequence[DraftContext]) -> list[AnyDraft]:
        found = self._front.propose(contexts)
        pairs = list(zip(contexts, found, strict=True))
        is_front = [draft.num_tokens > 0 and self._is_enough(context, draft) for context, draft in pairs]
        asks = [context.network_depth != 0 and not ours for context, ours in zip(contexts, is_front, strict=True)]
        asked = [_of_network(context) for context, ask in zip(contexts, asks, strict=True) if ask]
        drawn: Sequence[AnyDraft] = self._network.propose(asked) if asked else ()
        self._of_network = {each.request_key for each, draft in zip(asked, drawn, strict=True) if draft.num_tokens}
        self._of_front = {each.request_key for each, ours in zip(contexts, is_front, strict=True) if ours}
        if self._of_front:  # a device takes the shapes of trees from drafts that are all unread
            drawn = [draft.read() for draft in drawn]
        rest = iter(drawn)
        return [
            draft if ours else next(rest) if ask else NO_DRAFT
            for draft, ours, ask in zip(found, is_front, asks, strict=True)
        ]

    def _is_enough(self, context: DraftContext, draft: Draft) -> bool:
        """Return whether a text's draft makes the network's unnecessary: by as many tokens as are verified of that.

        What texts promise beyond stands behind tokens that the network may know better.
        """
        return context.network_depth == 0 or _promise(draft, self._verified) >= self._brought

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes if self._of_network else ():
            if outcome.request_key in self._of_network and outcome.num_verified != 0:
                self._note(len(outcome.path), outcome.num_verified)
        if self._of_front:
            ours = self._of_front
            outcomes = [each._replace(path=()) if each.request_key in ours else each for each in outcomes]
        self._network.observe(outcomes)
        self._of_front, self._of_network = set(), set()

    def _note(self, num_accepted: int, num_verified: int | None) -> None:
        """Note what a draft of the network brought; the first that says how much of it was verified sets that mean."""
        self._brought += (1.0 - KEPT) * (num_accepted - self._brought)
        if num_verified is not None:
            self._verified += (1.0 - KEPT if self._verified else 1.0) * (num_verified - self._verified)

    def catch_up(self, contexts: Sequence[DraftContext]) -> None:
        self._network.catch_up(contexts)

    def forget(self, request_key: int) -> None:
        self._front.forget(request_key)
        self._network.forget(request_key)

    def finished(self, prompt_key: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        self._front.finished(prompt_key, token_ids, num_prompt_tokens)

    def ended(self, prompt_key: int) -> None:
        self._front.ended(prompt_key)


def _of_network(context: DraftContext) -> DraftContext:
    depth = context.network_depth
    return context if depth is None else context._replace(max_depth=min(context.max_depth, depth))


def _promise(draft: Draft, num_verified: float) -> float:
    """Return the number of tokens that are expected to be accepted of a chain's first ones; of all where 0."""
    assert draft.expected is not None, "a draft out of texts says what is expected of it"
    brought = list(accumulate(draft.expected, mul))
    whole = int(num_verified) if num_verified else len(brought)
    return sum(brought[:whole]) + (num_verified - whole) * sum(brought[whole : whole + 1])
