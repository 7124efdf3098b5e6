"""The n-gram drafter: its trie equals its definition, its trees are sound, its memory is bounded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from rollout.embedded.draft import Draft
from rollout.embedded.drafters.growth import DraftTree, Growth
from rollout.embedded.drafters.ngram import NgramDrafter
from rollout.embedded.drafters.ngram_reference import ReferenceNgrams
from rollout.embedded.drafters.suffixes import SuffixArray
from rollout.embedded.drafters.trie import Suffixes, Trie
from rollout.embedded.drafting import DraftContext
from slime_spec.config.tree import Config, ModelConfig, SpeculativeConfig
from slime_spec.errors import ConfigError
from tests.support.embedded_harness import draft_context

token_lists = st.lists(st.integers(0, 4), min_size=1, max_size=30)


def config(**settings: object) -> SpeculativeConfig:
    return SpeculativeConfig(algorithm="NGRAM", **settings)  # type: ignore[arg-type]


def context(tokens: Sequence[int], limit: int = 11, key: int = 1, max_depth: int | None = None) -> DraftContext:
    asked = draft_context(key, tokens, 1, limit)
    return asked if max_depth is None else asked._replace(max_depth=max_depth)


def propose(drafter: NgramDrafter, tokens: Sequence[int], limit: int = 11, key: int = 1) -> Draft:
    return drafter.propose([context(tokens, limit, key)])[0]


def paths(draft: Draft) -> set[tuple[int, ...]]:
    """Every node as the tokens from the root to it."""
    found: list[tuple[int, ...]] = []
    for token_id, parent in zip(draft.token_ids, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token_id))
    return set(found)


@settings(deadline=None, max_examples=150)
@given(
    sequences=st.lists(token_lists, min_size=1, max_size=3),
    order=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7)), min_size=1, max_size=12),
    depth=st.integers(2, 6),
    match_type=st.sampled_from(["BFS", "PROB"]),
    breadths=st.tuples(st.integers(1, 3), st.integers(0, 4)),
    limit=st.integers(1, 12),
    max_depth=st.integers(1, 12),
)
def test_every_tree_is_what_the_definition_of_the_trie_gives(
    sequences: list[list[int]],
    order: list[tuple[int, int]],
    depth: int,
    match_type: str,
    breadths: tuple[int, int],
    limit: int,
    max_depth: int,
) -> None:
    """Requests grow in turns; the reference searches all that was ever inserted."""
    low, high = breadths[0], sum(breadths)
    drafter = NgramDrafter(
        config(
            ngram_max_trie_depth=depth,
            ngram_match_type=match_type,
            ngram_min_bfs_breadth=low,
            ngram_max_bfs_breadth=high,
        )
    )
    reference, growth = ReferenceNgrams(depth), Growth(match_type, low, high, depth - 1)
    grown = [1] * len(sequences)
    for request, step in order:
        request %= len(sequences)
        tokens = sequences[request][: grown[request]]
        grown[request] = min(len(sequences[request]), grown[request] + step)
        reference.insert(request, tokens)
        tree = DraftTree(limit, max_depth)
        growth.grow(tree, reference, reference.anchors(request, tokens), limit)
        assert drafter.propose([context(tokens, limit, request, max_depth)])[0] == tree.draft()


@settings(deadline=None, max_examples=100)
@given(
    text=st.lists(st.integers(0, 5), min_size=2, max_size=200),
    documents=st.lists(token_lists, max_size=3),
    capacity=st.integers(18, 400),
    match_type=st.sampled_from(["BFS", "PROB"]),
    budget=st.integers(1, 6),
)
def test_whatever_is_evicted_trees_are_small_rooted_distinct_and_the_trie_keeps_its_capacity(
    text: list[int], documents: list[list[int]], capacity: int, match_type: str, budget: int
) -> None:
    settings = config(ngram_capacity=capacity, ngram_match_type=match_type, ngram_external_sam_budget=budget)
    drafter = NgramDrafter(settings, SuffixArray(documents, 30) if documents else None)
    for end in range(1, len(text), 3):
        limit = 1 + end % 7
        draft = propose(drafter, text[:end], limit, key=end % 4)
        assert len(draft.token_ids) <= limit
        assert all(parent < node for node, parent in enumerate(draft.parents))
        assert len(paths(draft)) == len(draft.token_ids), "siblings are distinct"
        assert drafter._trie.num_nodes <= capacity


def test_what_followed_most_recently_is_drafted_first_and_other_requests_are_seen() -> None:
    drafter = NgramDrafter(config(ngram_min_bfs_breadth=2))
    for key, tail in ((1, 7), (2, 8), (3, 9)):
        propose(drafter, [1, 2, 3, tail, 50 + key], key=key)
    draft = propose(drafter, [40, 2, 3], limit=2, key=4)
    assert draft == Draft((9, 8), (-1, -1))


def test_prob_drafts_the_most_frequent_path_before_the_most_recent() -> None:
    histories = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 9]]
    expected = {"BFS": (9,), "PROB": (3, 4, 9, 5)}
    for match_type, first in expected.items():
        drafter = NgramDrafter(config(ngram_match_type=match_type))
        for key, history in enumerate(histories):
            propose(drafter, history, key=key)
        draft = propose(drafter, [7, 1, 2], limit=4, key=9)
        assert draft.token_ids[: len(first)] == first
    assert draft == Draft((3, 4, 9, 5), (-1, 0, -1, 0))  # 3/4, 3/4 * 2/3, then 1/4 and 3/4 * 1/3 by age


def test_breadth_tapers_with_the_length_of_the_match_and_with_the_level() -> None:
    """SGLang's: (max_match - length) * taper + min at the root of an anchor, less a taper a level, never below 1."""
    growth = Growth("BFS", min_breadth=1, max_breadth=5, max_match=4)

    class Everything:
        asked: list[tuple[int, int]]

        def latest(self, place: int, limit: int) -> list[tuple[int, int]]:
            self.asked.append((place, limit))
            return [(place * 10 + i, place + 1) for i in range(1)]

        def commonest(self, place: int, limit: int) -> list[tuple[int, int, int]]:
            raise AssertionError("BFS does not ask for counts")

    for length, expected in ((4, [1, 1, 1]), (3, [2, 1, 1]), (1, [4, 3, 2])):
        source = Everything()
        source.asked = []
        growth.grow(DraftTree(3, 3), source, [(0, length)], 3)
        assert [limit for _, limit in source.asked] == expected


def test_a_tree_with_little_to_say_is_small_and_never_padded() -> None:
    drafter = NgramDrafter(config())
    assert propose(drafter, [5, 6, 7]).token_ids == ()
    assert paths(propose(drafter, [5, 6, 7, 5])) == {(6,), (6, 7), (6, 7, 5)}


def test_of_a_prompt_only_the_tail_is_inserted() -> None:
    drafter = NgramDrafter(config(ngram_max_trie_depth=4))
    prompt = list(range(100, 120))
    propose(drafter, prompt)
    assert propose(drafter, [1, 101], key=2).token_ids == ()
    assert propose(drafter, [1, 117], key=3).token_ids == (118, 119)


def test_the_least_recently_seen_ngrams_leave_first() -> None:
    trie = Trie(max_depth=3, capacity=30)
    old, kept = Suffixes(), Suffixes()
    trie.insert(old, [1, 2, 3])
    trie.insert(kept, [7, 8, 9])
    for number in range(40):
        trie.insert(Suffixes(epoch=trie.epoch), [100 + number])
        again = Suffixes(epoch=trie.epoch)
        trie.insert(again, [7, 8, 9])
        assert trie.num_nodes <= 30
    assert trie.epoch > 0
    found = Suffixes(epoch=-1)
    assert list(trie.anchors(found, [7, 8])) != []
    assert list(trie.anchors(Suffixes(epoch=-1), [1, 2])) == []


def test_a_sequence_goes_on_after_its_nodes_were_evicted() -> None:
    drafter = NgramDrafter(config(ngram_capacity=60))
    text = [1, 2, 3]
    propose(drafter, text, key=1)
    for number in range(30):
        propose(drafter, [1000 + number, 2000 + number, 3000 + number], key=100 + number)
    text += [4, 1, 2, 3, 4, 1, 2, 3]  # the n-grams under way at the eviction are lost, the next are not
    assert propose(drafter, text, key=1).token_ids[:1] == (4,)


def test_statistics_survive_a_weight_push_and_the_end_of_their_request() -> None:
    drafter = NgramDrafter(config())
    propose(drafter, [1, 2, 3, 4, 5], key=1)
    drafter.forget(1)
    drafter.bind(None)()  # type: ignore[arg-type]  # what follows every change of the target's weights
    assert (3, 4, 5) in paths(propose(drafter, [1, 2], key=2))


def test_a_node_of_many_children_finds_them_all_and_loses_them_one_by_one() -> None:
    trie = Trie(max_depth=2, capacity=200)
    suffixes = Suffixes()
    tokens = [token for number in range(60) for token in (7, 100 + number)]
    for end in range(len(tokens) + 1):
        trie.insert(suffixes, tokens[:end])
    (anchor, length), *_ = trie.anchors(Suffixes(epoch=-1), [7])
    assert length == 1
    assert [token for token, _ in trie.latest(anchor, 100)] == [100 + number for number in reversed(range(60))]
    trie._evict(50)
    (anchor, _), *_ = trie.anchors(Suffixes(epoch=-1), [7])
    left = [token for token, _ in trie.latest(anchor, 100)]
    assert left == [100 + number for number in reversed(range(60))][: len(left)]
    again = Suffixes(epoch=trie.epoch)
    trie.insert(again, [7, 159])
    assert trie.latest(anchor, 1)[0][0] == 159


def _occurrences(documents: list[list[int]], ngram: tuple[int, ...]) -> list[tuple[int, int]]:
    size = len(ngram)
    return [(d, i) for d, doc in enumerate(documents) for i in range(len(doc)) if tuple(doc[i : i + size]) == ngram]


@settings(deadline=None, max_examples=150)
@given(documents=st.lists(token_lists, min_size=1, max_size=4), tail=token_lists)
def test_a_corpus_knows_every_continuation_its_count_and_its_last_occurrence(
    documents: list[list[int]], tail: list[int]
) -> None:
    array = SuffixArray(documents, max_depth=40)
    lengths = []
    for place, length in array.anchors(tail):
        lengths.append(length)
        ngram = tuple(tail[len(tail) - length :])
        occurrences = _occurrences(documents, ngram)
        followed = [(documents[d][i + length], (d, i)) for d, i in occurrences if i + length < len(documents[d])]
        expected = {token: sum(each == token for each, _ in followed) for token, _ in followed}
        assert {token: count for token, _, count in array.commonest(place, 99)} == expected
        newest = dict.fromkeys(token for token, _ in sorted(followed, key=lambda each: each[1], reverse=True))
        assert [token for token, _ in array.latest(place, 99)] == list(newest)
    possible = [n for n in range(len(tail), 0, -1) if _occurrences(documents, tuple(tail[len(tail) - n :]))]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) <= set(possible)


def test_a_frequent_ngram_of_a_corpus_is_sampled() -> None:
    generator = random.Random(0)
    document = [token for _ in range(5000) for token in (7, generator.choice([1, 1, 1, 2]), generator.randrange(9, 99))]
    array = SuffixArray([document], max_depth=4)
    places = {length: place for place, length in array.anchors([7])}
    (token, place, count), (second, _, _) = array.commonest(places[1], 2)
    assert (token, second) == (1, 2)
    assert count == sum(document[i] == 7 and document[i + 1] == 1 for i in range(len(document) - 1))
    assert place[1] - place[0] == count


def test_the_corpus_has_nodes_of_its_own_and_shares_those_both_know() -> None:
    settings = config(ngram_external_sam_budget=2)
    drafter = NgramDrafter(settings, SuffixArray([[1, 2, 3, 4, 5], [1, 2, 30]], max_depth=30))
    assert len(propose(drafter, [9, 1, 2], limit=4, key=1).token_ids) == 2
    propose(drafter, [1, 2, 3, 4, 70, 71], key=2)
    draft = propose(drafter, [8, 1, 2], limit=5, key=3)
    assert (3,) in paths(draft)
    assert (30,) in paths(draft)
    assert len(paths(draft)) == len(draft.token_ids) == 5


def test_a_configured_corpus_is_tokenised_as_the_targets_texts_without_special_tokens(tmp_path: Path) -> None:
    words = FastTokenizer(WordLevel({"<s>": 0, **{word: number + 1 for number, word in enumerate("abcdef")}}, "<s>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "corpus.jsonl").write_text('"a b c d"\n[6, 5, 4]\n')
    speculative = config(
        ngram_external_corpus_path=str(tmp_path / "corpus.jsonl"), ngram_external_sam_budget=4, num_draft_tokens=6
    )
    whole = Config(model=ModelConfig(hf_checkpoint=str(tmp_path)), speculative=speculative)
    drafter = NgramDrafter.with_corpus(whole, vocab_size=7)
    assert propose(drafter, [1, 2], limit=5).token_ids == (3, 4)
    assert propose(drafter, [6], limit=5, key=2).token_ids == (5, 4)
    assert propose(drafter, [0], limit=5, key=3).token_ids == ()
    with pytest.raises(ConfigError, match="token ids must be from 0 to 5"):
        NgramDrafter.with_corpus(whole, vocab_size=6)
    without = replace(whole, speculative=replace(speculative, ngram_external_corpus_path=None))
    assert propose(NgramDrafter.with_corpus(without, vocab_size=7), [1, 2], limit=5).token_ids == ()
