"""Prompt lookup follows RTP-LLM's rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.embedded.drafters import make_drafter
from rollout.embedded.drafters.lookup import LookupDrafter, NgramIndex, scan_lookup
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.errors import ConfigError, PushError
from slime_spec.interfaces import DraftContext

VECTORS = [
    # sequence, corpus, min, max, limit, expected
    ([1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 1, 2], 2, 2, 3, (3, 4, 1)),
    ([9, 5, 6], [5, 6, 7, 5, 6, 8, 9], 2, 2, 2, (7, 5)),
    ([5, 6], [7, 5, 6, 8], 2, 2, 5, ()),
    ([5, 6], [7, 5, 6], 2, 2, 5, ()),
    ([5, 6], [7, 5, 6, 8, 9], 2, 2, 5, (8, 9)),
    ([3, 5, 6], [5, 6, 1, 1, 3, 5, 6, 2, 2], 2, 3, 2, (2, 2)),
]


@pytest.mark.parametrize(("sequence", "corpus", "shortest", "longest", "limit", "expected"), VECTORS)
def test_the_published_vectors_hold_for_the_index_and_for_the_scan(
    sequence: list[int], corpus: list[int], shortest: int, longest: int, limit: int, expected: tuple[int, ...]
) -> None:
    index = NgramIndex(shortest, longest)
    index.extend(corpus)
    assert index.continuation(sequence, corpus, limit) == expected
    assert scan_lookup(sequence, corpus, shortest, longest, limit) == expected


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=40),
    shortest=st.integers(1, 3),
    extra=st.integers(0, 3),
    limit=st.integers(1, 6),
)
def test_an_index_grown_in_pieces_equals_the_scan_at_every_length(
    tokens: list[int], pieces: list[int], shortest: int, extra: int, limit: int
) -> None:
    index, corpus = NgramIndex(shortest, shortest + extra), []
    remaining = list(tokens)
    for piece in pieces:
        corpus += remaining[:piece]
        remaining = remaining[piece:]
        index.extend(corpus)
        assert index.continuation(corpus, corpus, limit) == scan_lookup(
            corpus, corpus, shortest, shortest + extra, limit
        )


def test_requests_have_indexes_of_their_own_until_they_are_forgotten() -> None:
    drafter = LookupDrafter(SpeculativeConfig(algorithm="LOOKUP", min_token_match=2, max_token_match=2))
    first = DraftContext(1, [1, 2, 3, 4, 1, 2], 6, 3)
    second = DraftContext(2, [1, 2, 7, 8, 1, 2], 6, 2)
    drafts = drafter.propose([first, second])
    assert [draft.token_ids for draft in drafts] == [(3, 4, 1), (7, 8)]
    assert drafts[0].parents == (-1, 0, 1)
    drafter.forget(1)
    assert drafter.propose([DraftContext(1, [5, 1, 2], 3, 3)])[0].token_ids == ()


@pytest.mark.parametrize("algorithm", ["LOOKUP", "NONE"])
def test_draft_weights_are_refused_by_drafters_without_weights(algorithm: str) -> None:
    with pytest.raises(PushError, match="draft weights"):
        make_drafter(SpeculativeConfig(algorithm=algorithm)).load({"w": torch.zeros(1)})


def test_an_algorithm_the_engine_does_not_have_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="LOOKUP, NONE"):
        make_drafter(SpeculativeConfig(algorithm="EAGLE3"))
