"""The dynamic tree: the worked vector, and the batched builder against the slow one."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.embedded.draft import Draft
from rollout.embedded.drafters.step import DraftVocab, Heads
from rollout.embedded.drafters.tree import grow_trees, tree_reference
from rollout.embedded.drafting import DraftContext, KvRow
from rollout.embedded.plan import RowSpan, positions_of, tree_shape
from slime_spec.types import SamplingParams

# A draft over three states of four tokens that looks at the last token only: row t is the distribution after token t.
MARKOV = [[0.5, 0.3, 0.15, 0.05], [0.1, 0.6, 0.2, 0.1], [0.25, 0.25, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]]
Distributions = Sequence[Sequence[Sequence[float]]]


class PairDraft:
    """A draft whose distribution depends on the last two tokens, the one before coming in through the hidden state.

    ``distributions[a][b]`` is the distribution after tokens a, b; a root is its own predecessor. So a leaf that gets
    another's hidden state drafts something else.
    """

    def __init__(self, distributions: Distributions) -> None:
        self._log_distributions = torch.tensor(distributions, dtype=torch.float64).log().float()
        self.spans: list[list[RowSpan]] = []

    def step(self, tokens: torch.Tensor, hidden: torch.Tensor, spans: Sequence[RowSpan]) -> Heads:
        assert tokens.shape[0] == sum(span.count for span in spans)
        self.spans.append(list(spans))
        return Heads(self._log_distributions[hidden[:, 0].long(), tokens], tokens.unsqueeze(1).float())

    def grow(self, roots: list[int], num_steps: int, topk: int, count: int, limits: tuple[int, int]) -> list[Draft]:
        contexts = [
            DraftContext(row, 0, KvRow(row), [root], 0, *limits, SamplingParams(), uniforms=())
            for row, root in enumerate(roots)
        ]
        slots = [RowSpan(row, 10 * (row + 1), 1) for row in range(len(roots))]
        root_ids = torch.tensor(roots)
        first = Heads(self._log_distributions[root_ids, root_ids], root_ids.unsqueeze(1).float())
        vocab = DraftVocab(self._log_distributions.shape[0])
        grown = grow_trees(first, self.step, slots, contexts, num_steps, topk, count, vocab)
        return [draft.read() for draft in grown]


def distributions_after(distributions: Distributions, root: int) -> Callable[[tuple[int, ...]], Sequence[float]]:
    """The same draft as the slow builder asks it."""

    def distribution_after(path: tuple[int, ...]) -> Sequence[float]:
        before_last, last = (root, root, *path)[-2:]
        return distributions[before_last][last]

    return distribution_after


def test_the_worked_example_of_the_rules_comes_out() -> None:
    pool, draft = tree_reference(lambda path: MARKOV[path[-1] if path else 0], num_steps=3, topk=2, num_draft_tokens=6)
    scores = [0.5, 0.3, 0.25, 0.15, 0.18, 0.06, 0.125, 0.075, 0.108, 0.036]
    assert [(token, parent) for token, parent, _ in pool] == [
        (0, -1),
        (1, -1),
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 1),
        (0, 2),
        (1, 2),
        (1, 4),
        (2, 4),
    ]
    assert [score for _, _, score in pool] == pytest.approx(scores)
    assert (draft.token_ids, draft.parents) == ((0, 1, 0, 1, 1), (-1, -1, 0, 0, 1))
    assert PairDraft([MARKOV] * 4).grow([0], num_steps=3, topk=2, count=6, limits=(5, 3)) == [draft]


@st.composite
def pair_distributions(draw: st.DrawFn) -> Distributions:
    """Distributions without ties among a node's children; products tie now and then."""
    size = draw(st.integers(3, 6))
    weights = st.permutations(range(1, size + 1))
    tables = draw(st.lists(st.lists(weights, min_size=size, max_size=size), min_size=size, max_size=size))
    return [[[weight / sum(row) for weight in row] for row in table] for table in tables]


@settings(max_examples=150, deadline=None)
@given(
    distributions=pair_distributions(),
    steps=st.integers(1, 5),
    topk=st.integers(1, 4),
    count=st.integers(2, 14),
    data=st.data(),
)
def test_batched_trees_are_those_of_the_slow_builder(
    distributions: Distributions, steps: int, topk: int, count: int, data: st.DataObject
) -> None:
    topk = min(topk, len(distributions))
    roots = data.draw(st.lists(st.integers(0, len(distributions) - 1), min_size=1, max_size=3))
    drafts = PairDraft(distributions).grow(roots, steps, topk, count, limits=(count - 1, steps))
    for root, draft in zip(roots, drafts, strict=True):
        distribution_after = distributions_after(distributions, root)
        pool, expected = tree_reference(distribution_after, steps, topk, count)
        assert len(pool) == topk + (steps - 1) * topk**2
        assert len(draft.token_ids) == min(count - 1, len(pool))
        assert_is_tree_of_distinct_siblings(draft)
        if len(set(round(math.log(score), 9) for _, _, score in pool)) == len(pool):
            assert draft == expected  # ties may fall either way: sums of logarithms round where products do not


@pytest.mark.parametrize(("steps", "topk", "count"), [(5, 4, 8), (3, 8, 32), (7, 10, 60)])
def test_large_trees_over_a_large_vocabulary_are_those_of_the_slow_builder(steps: int, topk: int, count: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    distributions = torch.rand(40, 40, 40, generator=generator, dtype=torch.float64).pow(4)
    distributions = (distributions / distributions.sum(-1, keepdim=True)).tolist()
    drafts = PairDraft(distributions).grow([3, 17], steps, topk, count, limits=(count - 1, steps))
    for root, draft in zip((3, 17), drafts, strict=True):
        _, expected = tree_reference(distributions_after(distributions, root), steps, topk, count)
        assert draft == expected


def path_to(draft: Draft, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, draft.token_ids[node])
        node = draft.parents[node]
    return path


def assert_is_tree_of_distinct_siblings(draft: Draft) -> None:
    children = list(zip(draft.parents, draft.token_ids, strict=True))
    assert len(set(children)) == len(children)
    assert all(parent < node for node, parent in enumerate(draft.parents))


def test_a_tie_goes_to_the_node_that_came_first() -> None:
    even = [[[0.25] * 4] * 4] * 4
    (draft,) = PairDraft(even).grow([0], num_steps=2, topk=2, count=5, limits=(4, 2))
    _, expected = tree_reference(distributions_after(even, 0), 2, 2, 5)
    assert draft.parents == expected.parents == (-1, -1, 0, 0)


def test_a_context_near_its_end_gets_the_best_of_what_fits() -> None:
    full = PairDraft([MARKOV] * 4).grow([0], num_steps=3, topk=2, count=6, limits=(5, 3))[0]
    fewer = PairDraft([MARKOV] * 4).grow([0], num_steps=3, topk=2, count=6, limits=(3, 3))[0]
    assert set(map(tuple, (path_to(fewer, i) for i in range(3)))) == {(0,), (1,), (0, 0)}
    shallow = PairDraft([MARKOV] * 4).grow([0, 1], num_steps=3, topk=2, count=6, limits=(5, 1))
    assert [draft.parents for draft in shallow] == [(-1, -1), (-1, -1)]
    assert len(full.token_ids) == 5


def test_leaves_keys_lie_behind_the_committed_ones_and_see_their_own_ancestors_only() -> None:
    draft = PairDraft([MARKOV] * 4)
    draft.grow([0, 2], num_steps=4, topk=3, count=9, limits=(8, 4))
    assert len(draft.spans) == 3
    for level, spans in enumerate(draft.spans):
        for row, span in enumerate(spans):
            assert (span.row, span.start, span.count) == (row, 10 * (row + 1) + 3 * level, 3)
            assert span.parents is not None
            assert span.tree_start == 10 * (row + 1)
            assert positions_of(span).tolist() == [span.tree_start + level] * 3
            lineage, _ = tree_shape(span.parents)
            assert lineage[-3:].sum(axis=1).tolist() == [level + 1] * 3
