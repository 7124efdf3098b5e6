"""Prompt lookup and speculative edit follow RTP-LLM's rules: they continue an earlier occurrence of the latest tokens.

Lookup, over a corpus C of m tokens (the request's advice, else its own sequence): for L from ``max_token_match`` down
to ``min_token_match``, the earliest i with C[i : i+L] equal to the last L tokens and i + L < m - 1 (at least two
tokens follow) wins; propose what follows it.

Edit takes the advice for an earlier version of the reply. The first round proposes it from where the reply stands,
without a match. Later rounds search as above, but only from ``search_index - L`` on, where ``search_index`` counts the
drafts accepted from the advice; it is not moved to the place of a hit, so that after an insertion it lags and never
skips what is still to come.

When advice was given and proposed nothing, the request's own sequence is looked up instead. RTP-LLM's own bounds on a
proposal (gen_num_per_cycle, max_new_tokens, the sequence's room) are the round's ``max_draft_tokens`` and
``max_depth``, which are never wider. Its match lengths default to 2 and 2, here to 2 and 4: a longer suffix is the
better hit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from rollout.embedded.draft import Draft
from rollout.embedded.drafting import DraftContext, Outcome, WeightlessDrafter
from slime_spec.config.tree import SpeculativeConfig


class NgramPositions:
    """Lists the ascending positions of every n-gram of a growing corpus, for each length of a range."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._lengths = range(max_match, min_match - 1, -1)
        self._positions: dict[int, dict[tuple[int, ...], list[int]]] = {length: {} for length in self._lengths}
        self._num_indexed = 0

    def extend(self, corpus: Sequence[int]) -> None:
        """Index what was appended to ``corpus`` since the last call."""
        for length in self._lengths:
            positions = self._positions[length]
            for end in range(max(self._num_indexed + 1, length), len(corpus) + 1):
                positions.setdefault(tuple(corpus[end - length : end]), []).append(end - length)
        self._num_indexed = len(corpus)

    def continuation(
        self, sequence: Sequence[int], corpus: Sequence[int], limit: int, search_index: int = 0
    ) -> tuple[int, ...]:
        """Return at most ``limit`` tokens that followed the suffix of ``sequence`` in the indexed ``corpus``, or none.

        Hits before ``search_index - L`` do not count. If the earliest of the others lies too near to the corpus's end,
        so do all.
        """
        for length in self._lengths:
            if length > len(sequence):
                continue
            positions = self._positions[length].get(tuple(sequence[-length:]))
            if positions is None:
                continue
            at = bisect_left(positions, search_index - length) if search_index > length else 0
            if at < len(positions) and (start := positions[at] + length) < len(corpus) - 1:
                return tuple(corpus[start : start + limit])
        return ()


@dataclass(eq=False)
class LookupState:
    """Holds the indexes of one request, and the position that its edit has reached."""

    own: NgramPositions
    advice: NgramPositions | None
    is_first_round: bool = True
    search_index: int = 0
    ran: bool = False  # this round's proposal is the advice's, so its accepted drafts count


class LookupDrafter(WeightlessDrafter):
    """Drafts chains from each request's advice and from its own tokens."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._min_match, self._max_match = config.min_token_match, config.max_token_match
        self._states: dict[int, LookupState] = {}
        # A group's samples have the same advice: it is indexed once, for as long as one of them lives.
        self._advice: WeakValueDictionary[tuple[int, ...], NgramPositions] = WeakValueDictionary()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        return [Draft.chain(self._propose(context)) for context in contexts]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            state = self._states.get(outcome.request_key)
            if state is not None and state.ran:
                state.search_index += len(outcome.path)
                state.ran = False

    def forget(self, request_key: int) -> None:
        self._states.pop(request_key, None)

    def _propose(self, context: DraftContext) -> tuple[int, ...]:
        state = self._state(context)
        tokens, advice = context.token_ids, context.params.advice_token_ids
        limit = min(context.max_draft_tokens, context.max_depth)
        chain: tuple[int, ...] = ()
        if context.params.edit:
            chain = self._edit(state, context, limit)
        elif state.advice is not None:
            chain = state.advice.continuation(tokens, advice, limit)
        if chain or (context.params.edit and state.advice is None):
            return chain
        state.own.extend(tokens)
        return state.own.continuation(tokens, tokens, limit)

    def _edit(self, state: LookupState, context: DraftContext, limit: int) -> tuple[int, ...]:
        tokens = context.token_ids
        corpus = context.params.advice_token_ids or tokens
        if state.is_first_round:
            state.is_first_round, state.ran = False, True
            num_generated = len(tokens) - context.num_prompt_tokens
            return tuple(corpus[num_generated : num_generated + limit])
        index = state.advice
        if index is None:
            index = state.own
            index.extend(tokens)
        chain = index.continuation(tokens, corpus, limit, state.search_index)
        state.ran = bool(chain)
        return chain

    def _state(self, context: DraftContext) -> LookupState:
        state = self._states.get(context.request_key)
        if state is None:
            advice = context.params.advice_token_ids
            index = self._advice_index(advice) if advice else None
            state = LookupState(NgramPositions(self._min_match, self._max_match), index)
            self._states[context.request_key] = state
        return state

    def _advice_index(self, advice: tuple[int, ...]) -> NgramPositions:
        index = self._advice.get(advice)
        if index is None:
            index = NgramPositions(self._min_match, self._max_match)
            index.extend(advice)
            self._advice[advice] = index
        return index
