"""Prompt lookup and speculative edit follow RTP-LLM's rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.embedded.drafters.lookup import LookupDrafter, NgramPositions
from rollout.embedded.drafters.lookup_reference import ReferenceRequest, scan
from rollout.embedded.drafting import Outcome
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.types import SamplingParams
from tests.support.embedded_harness import draft_context

VECTORS = [
    # sequence, corpus, min, max, limit, expected
    ([1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 1, 2], 2, 2, 3, (3, 4, 1)),
    ([9, 5, 6], [5, 6, 7, 5, 6, 8, 9], 2, 2, 2, (7, 5)),
    ([5, 6], [7, 5, 6, 8], 2, 2, 5, ()),
    ([5, 6], [7, 5, 6], 2, 2, 5, ()),
    ([5, 6], [7, 5, 6, 8, 9], 2, 2, 5, (8, 9)),
    ([3, 5, 6], [5, 6, 1, 1, 3, 5, 6, 2, 2], 2, 3, 2, (2, 2)),
]
SHORT = SpeculativeConfig(algorithm="LOOKUP", min_token_match=2, max_token_match=2)
tokens = st.integers(0, 3)


@pytest.mark.parametrize(("sequence", "corpus", "shortest", "longest", "limit", "expected"), VECTORS)
def test_the_published_vectors_hold_for_the_index_and_for_the_scan(
    sequence: list[int], corpus: list[int], shortest: int, longest: int, limit: int, expected: tuple[int, ...]
) -> None:
    index = NgramPositions(shortest, longest)
    index.extend(corpus)
    assert index.continuation(sequence, corpus, limit) == expected
    assert tuple(scan(sequence, corpus, shortest, longest, limit)) == expected


@given(
    corpus=st.lists(tokens, min_size=1, max_size=40),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=40),
    shortest=st.integers(1, 3),
    extra=st.integers(0, 3),
    limit=st.integers(1, 6),
    search_index=st.integers(0, 30),
)
def test_an_index_grown_in_pieces_equals_the_scan_at_every_length_and_from_every_start(
    corpus: list[int], pieces: list[int], shortest: int, extra: int, limit: int, search_index: int
) -> None:
    index, grown = NgramPositions(shortest, shortest + extra), []
    remaining = list(corpus)
    for piece in pieces:
        grown += remaining[:piece]
        remaining = remaining[piece:]
        index.extend(grown)
        expected = scan(grown, grown, shortest, shortest + extra, limit, search_index)
        assert index.continuation(grown, grown, limit, search_index) == tuple(expected)


@dataclass
class Driven:
    """One request, driven as the core drives it: propose, verify against a known true output, observe."""

    drafter: LookupDrafter
    prompt: list[int]
    output: list[int]
    params: SamplingParams
    num_drafts: int
    key: int = 1
    num_generated: int = 0

    def round(self) -> tuple[tuple[int, ...], list[int]]:
        """(proposed, emitted); a draft may not reach the last token of the output's budget."""
        limit = min(self.num_drafts, len(self.output) - self.num_generated - 1)
        proposed: tuple[int, ...] = ()
        if limit > 0:
            sequence = self.prompt + self.output[: self.num_generated]
            context = draft_context(self.key, sequence, len(self.prompt), limit, self.params)
            proposed = self.drafter.propose([context])[0].token_ids
        rest = self.output[self.num_generated :]
        accepted = 0
        while accepted < len(proposed) and proposed[accepted] == rest[accepted]:
            accepted += 1
        self.drafter.observe([Outcome(self.key, tuple(range(accepted)))])
        emitted = rest[: accepted + 1]
        self.num_generated += len(emitted)
        return proposed, emitted


def test_the_published_edit_takes_its_five_rounds() -> None:
    """Advice 10 to 20, the reply differs in one token; the budget is far away, as RTP-LLM's rules assume."""
    advice = tuple(range(10, 21))
    output = [10, 11, 12, 99, *range(14, 21), 2] + [0] * 10
    edit = Driven(LookupDrafter(SHORT), [1, 2, 3, 4], output, SamplingParams(advice_token_ids=advice, edit=True), 4)
    state = edit.drafter._states
    rounds = []
    for _ in range(5):
        index = state[1].search_index if state else 0
        rounds.append((index, *edit.round()))
    assert rounds == [
        (0, (10, 11, 12, 13), [10, 11, 12, 99]),
        (3, (), [14]),
        (3, (), [15]),
        (3, (16, 17, 18, 19), [16, 17, 18, 19, 20]),
        (7, (), [2]),
    ]
    assert edit.num_generated == 12


def test_an_edits_first_round_starts_where_the_reply_stands() -> None:
    """The prefill of this engine emits a token before the first draft."""
    params = SamplingParams(advice_token_ids=(10, 11, 12, 13, 14), edit=True)
    drafter = LookupDrafter(SHORT)
    assert drafter.propose([draft_context(1, [1, 2, 10], 2, 3, params)])[0].token_ids == (11, 12, 13)
    assert drafter.propose([draft_context(2, [1, 2, *range(10, 20)], 2, 3, params)])[0].token_ids == ()


def test_an_edit_never_goes_back_behind_what_was_accepted() -> None:
    """7 8 occurs twice in the advice: lookup takes the first place for ever, edit only what lies ahead."""
    advice = (1, 7, 8, 2, 3, 4, 5, 7, 8, 9, 6)
    for edit, expected in ((False, (2, 3)), (True, (9, 6))):
        drafter = LookupDrafter(SHORT)
        driven = Driven(drafter, [0], [1, 7, 8, 2, 3, 4, 5, 50, 7, 8, 9, 6, 0], _advised(advice, edit), 7)
        while driven.num_generated < 10:
            driven.round()
        context = draft_context(1, [0, *driven.output[:10]], 1, 2, _advised(advice, edit))
        assert drafter.propose([context])[0].token_ids == expected


def _advised(advice: tuple[int, ...], edit: bool) -> SamplingParams:
    return SamplingParams(advice_token_ids=advice, edit=edit)


@pytest.mark.parametrize("edit", [False, True])
def test_where_advice_proposes_nothing_the_own_sequence_does(edit: bool) -> None:
    params = SamplingParams(advice_token_ids=(70, 71, 72, 73), edit=edit)
    drafter = LookupDrafter(SHORT)
    drafter.propose([draft_context(1, [5, 6, 7, 8], 4, 3, params)])  # an edit's first round, which does not search
    assert drafter.propose([draft_context(1, [5, 6, 7, 8, 5, 6], 4, 3, params)])[0].token_ids == (7, 8, 5)


def test_an_edit_without_advice_takes_the_prompt_for_the_old_version() -> None:
    prompt = [10, 11, 12, 13, 14, 15]
    draft = LookupDrafter(SHORT).propose([draft_context(1, prompt, 6, 4, SamplingParams(edit=True))])[0]
    assert draft.token_ids == (10, 11, 12, 13)


@given(
    prompt=st.lists(tokens, min_size=1, max_size=12),
    output=st.lists(tokens, min_size=2, max_size=40),
    advice=st.lists(tokens, max_size=30),
    edit=st.booleans(),
    shortest=st.integers(1, 3),
    extra=st.integers(0, 2),
    num_drafts=st.integers(1, 8),
    first_token_by_prefill=st.booleans(),
)
def test_every_round_proposes_what_the_rules_say(
    prompt: list[int],
    output: list[int],
    advice: list[int],
    edit: bool,
    shortest: int,
    extra: int,
    num_drafts: int,
    first_token_by_prefill: bool,
) -> None:
    config = SpeculativeConfig(algorithm="LOOKUP", min_token_match=shortest, max_token_match=shortest + extra)
    driven = Driven(LookupDrafter(config), prompt, output, _advised(tuple(advice), edit), num_drafts)
    reference = ReferenceRequest(prompt, advice, edit, shortest, shortest + extra)
    driven.num_generated = int(first_token_by_prefill)
    while driven.num_generated < len(output):
        num_generated = driven.num_generated
        limit = min(num_drafts, len(output) - num_generated - 1)
        expected = reference.propose(prompt + output[:num_generated], limit) if limit > 0 else []
        proposed, emitted = driven.round()
        reference.verified(len(emitted) - 1)
        assert proposed == tuple(expected)


def test_a_groups_samples_share_one_index_of_their_advice_and_the_last_one_frees_it() -> None:
    params = _advised(tuple(range(50)), edit=False)
    drafter = LookupDrafter(SHORT)
    drafter.propose([draft_context(key, [3, 4], 2, 2, params) for key in (1, 2, 3)])
    assert len({id(drafter._states[key].advice) for key in (1, 2, 3)}) == 1
    for key in (1, 2, 3):
        assert len(drafter._advice) == 1
        drafter.forget(key)
    assert len(drafter._advice) == 0


def test_requests_have_indexes_of_their_own_until_they_are_forgotten() -> None:
    drafter = LookupDrafter(SHORT)
    first = draft_context(1, [1, 2, 3, 4, 1, 2], 6, 3)
    second = draft_context(2, [1, 2, 7, 8, 1, 2], 6, 2)
    drafts = drafter.propose([first, second])
    assert [draft.token_ids for draft in drafts] == [(3, 4, 1), (7, 8)]
    assert drafts[0].parents == (-1, 0, 1)
    drafter.forget(1)
    assert drafter.propose([draft_context(1, [5, 1, 2], 3, 3)])[0].token_ids == ()


def test_a_drafter_without_a_network_has_no_weights_to_push_and_no_cache() -> None:
    drafter = LookupDrafter(SHORT)
    assert (drafter.weights, drafter.cache, drafter.needs.any) == (None, None, False)
