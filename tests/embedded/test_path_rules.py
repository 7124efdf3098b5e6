"""Exact proofs of rules for several sampled paths: every draw of drafts is enumerated, and every trial summed up."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import pytest
import torch

from rollout.embedded.verification.reference import block_reference
from tests.support.path_rules import (
    Array,
    NextToken,
    Node,
    Prefix,
    Trial,
    block,
    chain,
    greedy,
    outcomes,
    traversal,
)

Shape = tuple["Shape", ...]  # a tree's form: of each child, its children
Rounds = list[tuple[Trial, float]]
TWO_AND_ONE: Shape = (((), ()), ((),))  # two children, of which the first has two and the second one
ONE: Shape = ((),)


def random_pair(vocab: int, seed: int, lacking: bool = False) -> tuple[NextToken, NextToken]:
    """Two random distributions after every prefix; ``lacking``: each often gives a token no probability."""
    generator = np.random.default_rng(seed)

    def drawn() -> NextToken:
        @cache
        def after(prefix: Prefix) -> Array:
            weights = generator.exponential(size=vocab) ** 1.5
            if lacking and generator.random() < 0.5:
                weights[generator.integers(vocab)] = 0.0
            return weights / weights.sum()

        return after

    return drawn(), drawn()


def sequences(after: NextToken, length: int, start: Prefix = ()) -> list[tuple[Prefix, float]]:
    """Every sequence of ``length`` tokens after ``start``, which it includes, with its probability."""
    found = [(start, 1.0)]
    for _ in range(length):
        found = [((*s, x), w * p) for s, w in found for x, p in enumerate(after(s).tolist()) if p > 0]
    return found


def trees(q: NextToken, shape: Shape, prefix: Prefix = ()) -> Iterator[tuple[tuple[Node, ...], float]]:
    """Every tree of a shape with siblings drawn without replacement, with its probability."""
    row = q(prefix)
    for tokens in itertools.permutations(np.flatnonzero(row).tolist(), len(shape)):
        weight = 1.0
        for place, x in enumerate(tokens):
            weight *= row[x] / (1.0 - row[list(tokens[:place])].sum())
        below = [list(trees(q, each, (*prefix, x))) for each, x in zip(shape, tokens, strict=True)]
        for chosen in itertools.product(*below):
            nodes = tuple(Node(x, children) for x, (children, _) in zip(tokens, chosen, strict=True))
            yield nodes, weight * float(np.prod([each for _, each in chosen]))


Judge = Callable[[list[Prefix], NextToken, NextToken], Iterable[Trial]]


def by_paths(judge: Judge, num_paths: int, length: int, trunk: int = 0) -> Callable:
    """A rule over independent paths after a trunk that they share: all rounds, each with its probability."""

    def rounds(p: NextToken, q: NextToken) -> Rounds:
        found: Rounds = []
        for start, weight in sequences(q, trunk):
            for paths in itertools.product(sequences(q, length, start), repeat=num_paths):
                joint = weight * float(np.prod([each for _, each in paths]))
                trials = judge([path for path, _ in paths], p, q)
                found += [(trial, joint * chance) for trial, chance in outcomes(trials)]
        return found

    return rounds


def by_block(length: int) -> Callable:
    def judge(paths: list[Prefix], p: NextToken, q: NextToken) -> list[Trial]:
        (path,) = paths
        return block(path, [p(path[:i]) for i in range(length + 1)], [q(path[:i]) for i in range(length)])

    return by_paths(judge, 1, length)


def by_greedy(num_paths: int, length: int, trunk: int = 0) -> Callable:
    return by_paths(lambda paths, p, q: greedy(paths, p, q, trunk), num_paths, length, trunk)


def by_traversal_of_paths(num_paths: int, length: int) -> Callable:
    return by_paths(lambda paths, p, q: traversal([*map(chain, paths)], p, q, replaced=True), num_paths, length)


def by_traversal(shape: Shape) -> Callable:
    def rounds(p: NextToken, q: NextToken) -> Rounds:
        return [
            (trial, weight * chance)
            for tree, weight in trees(q, shape)
            for trial, chance in outcomes(traversal(tree, p, q))
        ]

    return rounds


def error(rounds: Rounds, p: NextToken, num_tokens: int) -> float:
    """The largest error of the probability of ``num_tokens`` tokens, what a round leaves open drawn from the target."""
    of_prefix: dict[Prefix, Array] = {}
    for trial, weight in rounds:
        of_prefix[trial.prefix] = of_prefix.get(trial.prefix, 0.0) + weight * trial.after
    expected = dict(sequences(p, num_tokens))
    emitted = dict.fromkeys(expected, 0.0)
    for prefix, weights in of_prefix.items():
        for x in np.flatnonzero(weights).tolist():
            for tokens, rest in sequences(p, num_tokens - len(prefix) - 1, (*prefix, x)):
                emitted[tokens] = emitted.get(tokens, 0.0) + weights[x] * rest
    return max(abs(emitted[tokens] - expected.get(tokens, 0.0)) for tokens in emitted)


def tokens_a_round(rounds: Rounds) -> float:
    return sum(weight * (1 + len(trial.prefix)) for trial, weight in rounds)


RULES = {
    "block, 3": (by_block(3), 3),
    "greedy, 2 of 2": (by_greedy(2, 2), 2),
    "greedy, 3 of 2": (by_greedy(3, 2), 2),
    "greedy, 2 of 3": (by_greedy(2, 3), 3),
    "greedy, 2 of 2 after a trunk": (by_greedy(2, 2, trunk=1), 3),
    "traversal, 2 paths of 2": (by_traversal_of_paths(2, 2), 2),
    "traversal, 3 paths of 2": (by_traversal_of_paths(3, 2), 2),
    "traversal, two and one": (by_traversal(TWO_AND_ONE), 2),
    "traversal, deep": (by_traversal(((((), ()),), ())), 3),
}


@pytest.mark.parametrize(("vocab", "lacking"), [(3, False), (3, True), (4, False)])
@pytest.mark.parametrize("rule", RULES)
def test_a_round_emits_the_distribution_of_the_target(rule: str, vocab: int, lacking: bool) -> None:
    rounds_of, depth = RULES[rule]
    p, q = random_pair(vocab, vocab, lacking)
    assert error(rounds_of(p, q), p, depth + 1) < 1e-12


@pytest.mark.parametrize("num_paths", [2, 3])
def test_negative_control_a_chosen_path_is_not_distributed_as_the_draft(num_paths: int) -> None:
    def judge(paths: list[Prefix], p: NextToken, q: NextToken) -> list[Trial]:
        path = greedy(paths, p, q)[0].prefix
        return block(path, [p(path[:i]) for i in range(3)], [q(path[:i]) for i in range(2)])

    p, q = random_pair(3, 1)
    assert error(by_paths(judge, num_paths, 2)(p, q), p, 3) > 1e-2


def test_negative_control_siblings_that_differ_were_not_drawn_with_replacement() -> None:
    p, q = random_pair(4, 1)
    rounds = [
        (trial, weight * chance)
        for tree, weight in trees(q, TWO_AND_ONE)
        for trial, chance in outcomes(traversal(tree, p, q, replaced=True))
    ]
    assert error(rounds, p, 3) > 1e-2


def test_one_path_is_judged_as_the_block_reference_judges_it_uniform_for_uniform() -> None:
    generator = np.random.default_rng(3)
    for seed in range(100):
        p, q = random_pair(5, seed)
        path = tuple(generator.integers(5, size=4).tolist())
        accept, emit = generator.random(4).tolist(), generator.random(5).tolist()
        rows = [torch.from_numpy(np.stack([each(path[:i]) for i in range(5)])) for each in (p, q)]
        expected = block_reference(path, rows[1][:4], rows[0], accept, emit)
        for trials in (greedy([path], p, q), list(traversal([chain(path)], p, q))):
            stands = next(trial for trial in trials if not trial.prefix or accept[len(trial.prefix) - 1] < trial.passes)
            last = int(np.searchsorted(stands.after.cumsum(), emit[len(stands.prefix)], side="right"))
            assert [*stands.prefix, last] == expected


def test_a_sibling_more_never_costs_a_traversal_tokens_and_a_path_more_may_cost_greedy_choice_some() -> None:
    for seed in range(20):
        p, q = random_pair(3, seed)
        assert tokens_a_round(by_traversal((ONE, ()))(p, q)) > tokens_a_round(by_block(2)(p, q)) - 1e-12

    def p(prefix: Prefix) -> Array:
        return np.array([0.2, 0.8])

    def q(prefix: Prefix) -> Array:
        return np.array([0.1, 0.9])

    # Of many paths the chosen one nearly always begins with token 0, which the target wants in a fifth of cases.
    assert tokens_a_round(by_greedy(1, 1)(p, q)) == pytest.approx(1.9)
    assert tokens_a_round(by_greedy(8, 1)(p, q)) == pytest.approx(1.2 + 0.9**8)


def test_of_six_drafts_one_path_brings_the_most_where_the_draft_is_near_the_target() -> None:
    generator, sums = np.random.default_rng(5), dict.fromkeys(("one of 6", "two of 3", "a tree"), 0.0)
    for _ in range(5):
        table = generator.exponential(size=(2, 3))
        p_row, q_row = table[0] / table[0].sum(), (table.sum(0)) / table.sum()
        p, q = (lambda _, row=row: row for row in (p_row, q_row))
        sums["one of 6"] += tokens_a_round(by_block(6)(p, q))
        sums["two of 3"] += tokens_a_round(by_greedy(2, 3)(p, q))
        sums["a tree"] += tokens_a_round(by_traversal((((((),),),), ((),)))(p, q))
    assert sums["one of 6"] > sums["a tree"] > sums["two of 3"]
