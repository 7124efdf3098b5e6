"""Expected rounds in closed form, compared with every way that an engine's rounds can go, one by one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from math import inf, log, prod

import numpy as np
import pytest

from slime_spec.draft.training.served import RULES, Rule, ServedTally, standing

VOCAB, POSITIONS = 3, 2
Text = tuple[int, ...]


class Toy:
    """Gives next-token distributions of a target and of a draft, which depend on the whole text before."""

    def __init__(self, seed: int, unknown: int | None = None) -> None:
        self._seed, self._unknown = seed, unknown  # a token that the draft never names

    def p(self, text: Text) -> list[float]:
        return self._drawn("p", text)

    def q(self, text: Text) -> list[float]:
        weights = self._drawn("q", text)
        if self._unknown is not None:
            weights[self._unknown] = 0.0
        return [each / sum(weights) for each in weights]

    def _drawn(self, name: str, text: Text) -> list[float]:
        rng = random.Random(f"{self._seed} {name} {text}")
        weights = [rng.random() ** 2 + 0.02 for _ in range(VOCAB)]
        return [each / sum(weights) for each in weights]


def residual(p: Sequence[float], q: Sequence[float], scale: float) -> list[float]:
    left = [max(0.0, scale * a - b) for a, b in zip(p, q, strict=True)]
    return [each / sum(left) for each in left]


def outcomes(toy: Toy, text: Text, length: int, rule: Rule) -> Iterator[tuple[float, Text]]:
    """Yield (probability, tokens that the round adds) of a round that drafts ``length`` tokens behind ``text``."""
    for drafted in product(range(VOCAB), repeat=length):
        before = [text + drafted[:i] for i in range(length + 1)]
        chance = prod(toy.q(before[i])[token] for i, token in enumerate(drafted))
        if not chance:
            continue
        p, q = [toy.p(each) for each in before], [toy.q(each) for each in before[:length]]
        for count, (share, scale) in enumerate(lengths(p, q, drafted, rule)):
            law = p[length] if count == length else residual(p[count], q[count], scale) if share else [0.0] * VOCAB
            for token, last in enumerate(law):
                if chance * share * last:
                    yield chance * share * last, (*drafted[:count], token)


def lengths(
    p: Sequence[Sequence[float]], q: Sequence[Sequence[float]], drafted: Text, rule: Rule
) -> list[tuple[float, float]]:
    """Return, by number of drafts that stand, (probability, scale of p in the residual), as each rule defines it."""
    ratios = [p[i][token] / q[i][token] for i, token in enumerate(drafted)]
    if rule == "rejection":
        passes = [min(1.0, each) for each in ratios]
        stands = [prod(passes[:i]) for i in range(len(drafted) + 1)] + [0.0]
        return [(stands[i] - stands[i + 1], 1.0) for i in range(len(drafted) + 1)]
    scales, passes = [1.0], [1.0]
    for i, ratio in enumerate(ratios, 1):
        scales.append(min(1.0, scales[-1] * ratio))
        if i == len(drafted):
            passes.append(scales[i])
        else:
            left = sum(max(0.0, scales[i] * a - b) for a, b in zip(p[i], q[i], strict=True))
            passes.append(left / (left + 1.0 - scales[i]) if left + 1.0 - scales[i] > 0.0 else 1.0)
    # The longest prefix that passes stands.
    return [
        (passes[i] * prod(1.0 - passes[j] for j in range(i + 1, len(passes))), scales[i]) for i in range(len(passes))
    ]


def enumerated(toy: Toy, num_tokens: int, rule: Rule) -> tuple[dict[Text, float], dict[Text, float]]:
    """Return the probability of every reply, and the expected rounds of each; the first token is the prefill's, 0."""
    chances: dict[Text, float] = defaultdict(float)
    rounds: dict[Text, float] = defaultdict(float)

    def go_on(text: Text, chance: float, count: int) -> None:
        room = num_tokens - len(text)
        if room <= 0:
            chances[text[:num_tokens]] += chance
            rounds[text[:num_tokens]] += chance * count
            return
        for share, added in outcomes(toy, text, min(POSITIONS, room), rule):
            go_on(text + added, chance * share, count + 1)

    go_on((0,), 1.0, 0)
    return chances, {reply: total / chances[reply] for reply, total in rounds.items()}


def rows_of(toy: Toy, reply: Text) -> np.ndarray:
    """Return log(q / p) of the reply's tokens behind each of its tokens but the last."""
    rows = np.full((len(reply) - 1, POSITIONS), -inf)
    for row, position in product(range(len(reply) - 1), range(POSITIONS)):
        place = row + 1 + position
        if place < len(reply) and (q := toy.q(reply[:place])[reply[place]]) > 0.0:
            rows[row, position] = log(q / toy.p(reply[:place])[reply[place]])
    return rows


@pytest.mark.parametrize("unknown", [None, 1])
@pytest.mark.parametrize("rule", RULES)
def test_expected_rounds_are_those_of_every_way_that_rounds_can_go(rule: Rule, unknown: int | None) -> None:
    for seed in range(3):
        toy = Toy(seed, unknown)
        chances, rounds = enumerated(toy, 5, rule)
        assert len(chances) == VOCAB**4
        for reply, expected in rounds.items():
            by_target = prod(toy.p(reply[:place])[reply[place]] for place in range(1, 5))
            assert chances[reply] == pytest.approx(by_target), "the enumerated rounds keep the target's distribution"
            tally = ServedTally(POSITIONS)
            tally.count(standing(rows_of(toy, reply), rule))
            assert tally.num_rounds == pytest.approx(expected)
            assert tally.num_tokens == 4


def test_a_block_stands_at_least_as_often_and_a_perfect_draft_always() -> None:
    log_ratios = np.random.default_rng(0).normal(size=(50, 4))
    assert (standing(log_ratios, "block") >= standing(log_ratios, "rejection") - 1e-12).all()
    perfect = ServedTally(3)
    for rule in RULES:
        perfect.count(standing(np.zeros((8, 3)), rule))
    assert perfect.num_rounds == pytest.approx(4.0), "eight tokens in two rounds of four, by each rule"
    assert perfect.stood == pytest.approx(perfect.judged)


def test_what_never_stands_is_one_token_a_round() -> None:
    tally = ServedTally(2)
    tally.count(standing(np.full((5, 2), -inf), "rejection"))
    assert tally.tokens_per_verify == 1.0
    assert tally.summary() == {"tokens_per_verify": 1.0, "conditional": [0.0, 0.0]}
