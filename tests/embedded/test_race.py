"""Races draw from the distribution, with noise that is uniform and independent; seeds are fixed.

The statistical tests have a false-alarm probability of 1e-4 together for each of their forms. 200,000 races (the long
form) see a total variation of 0.01, 20,000 one of 0.03.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, spearmanr

from rollout.embedded.uniforms import Noise, Uniforms
from rollout.embedded.verification.race import exponentials, race, race_in_numpy
from rollout.embedded.verification.reference import exponential_reference, race_reference

SIZES = [
    pytest.param(20_000, marks=pytest.mark.proven_by_more),
    pytest.param(200_000, marks=[pytest.mark.long, pytest.mark.sampling_law, pytest.mark.proves]),
]
SIGNIFICANCE = 1e-4 / 48  # at most so many comparisons
P_TARGET = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.25], dtype=torch.float64) / 16
Q_DRAFT = torch.tensor([2.0, 6.0, 0.0, 2.5, 1.0, 0.5, 0.3, 3.7], dtype=torch.float64) / 16


def keys_of(seeds: range, t: int) -> np.ndarray:
    return np.array([Uniforms(seed, 9).noise.key(t) for seed in seeds], np.uint64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "numpy"])
@pytest.mark.parametrize("width", [1, 3, 63, 64, 65, 400])
def test_the_winner_is_the_references(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    token_ids = torch.randperm(3 * width, generator=generator)[:width]
    for spread, dropped in itertools.product((0.0, 2.0, 12.0), (0.0, 0.5)):
        weights = (spread * torch.randn(20, width, generator=generator)).softmax(-1).to(dtype)
        weights[torch.rand(20, width, generator=generator) < dropped] = 0.0
        keys = keys_of(range(20), t=3)
        for names in (None, token_ids):
            expected = [
                race_reference(row.tolist(), int(key), None if names is None else names.tolist())
                for row, key in zip(weights, keys, strict=True)
            ]
            assert race(weights, keys, names).tolist() == expected


def test_a_vocabulary_of_a_models_size_has_the_same_winner_with_and_without_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (3.0 * torch.randn(200, 49_152, generator=generator)).softmax(-1)
    keys = keys_of(range(200), t=0)
    winners = race(weights, keys)
    assert torch.equal(winners, race_in_numpy(weights, keys))
    assert len(set(winners.tolist())) > 150
    assert torch.equal(race(1000.0 * weights[:, 100:40_000], keys), race_in_numpy(weights[:, 100:40_000], keys))


def test_what_is_no_distribution_gives_some_token() -> None:
    weights = torch.tensor([[0.0] * 5, [torch.nan] * 5])
    for given in (weights, weights.double()):
        assert race(given, np.array([1, 2], np.uint64)).tolist() == [0, 0]


def test_noise_lies_strictly_between_zero_and_infinity_and_is_the_references() -> None:
    # 2 n + 1 of 2^53: the least and the greatest n are the ends.
    ends = -np.log1p(-np.array([1, 2**53 - 1]) / 2.0**53)
    assert 0.0 < ends[0] < 1.2e-16
    assert ends[1] == pytest.approx(53 * np.log(2))
    for key in (0, 5, 2**64 - 1):
        found = exponentials(np.uint64(key), np.array([0, 1, 7, 49_151, 151_935]))
        expected = [exponential_reference(key, token_id) for token_id in (0, 1, 7, 49_151, 151_935)]
        assert found.tolist() == pytest.approx(expected, rel=1e-15)


def test_a_key_belongs_to_a_seed_and_a_position() -> None:
    keys = {Uniforms(seed, 9).noise.key(t) for seed in (-1, 0, 1, 2**32, 2**63) for t in range(50)}
    assert len(keys) == 250
    assert Uniforms(2**64 + 5, 4).noise.key(2) == Uniforms(5, 900).noise.key(2)


def test_noise_is_exponential_and_independent_across_positions_tokens_and_seeds() -> None:
    seeds = range(20_000)

    def column(t: int, token_id: int, first_seed: int = 0) -> list[float]:
        keys = keys_of(range(first_seed, first_seed + len(seeds)), t)
        return [float(exponentials(key, np.array([token_id]))[0]) for key in keys]

    columns = {
        "noise": column(3, 5),
        "of the next token id": column(3, 6),
        "of a far token id": column(3, 40_000),
        "of the next position": column(4, 5),
        "of the position and id before": column(2, 4),
        "of the next seed": column(3, 5, first_seed=1),
    }
    others = {
        "emit": [Uniforms(seed, 9).emit[3] for seed in seeds],
        "draft": [Uniforms(seed, 9).draft_of_round(3)[3] for seed in seeds],
    }
    for name, values in columns.items():
        assert kstest(values, "expon").pvalue > SIGNIFICANCE, name
    for (a, left), (b, right) in itertools.combinations((columns | others).items(), 2):
        assert spearmanr(left, right).pvalue > SIGNIFICANCE, (a, b)


@pytest.mark.parametrize("num_races", SIZES)
def test_a_race_draws_from_the_distribution_and_the_next_position_does_not_know(num_races: int) -> None:
    rows, seeds = P_TARGET.float().expand(num_races, -1), range(num_races)
    first, second = (race(rows, keys_of(seeds, t)).tolist() for t in (0, 1))
    assert fits(first, P_TARGET)
    assert fits(second, P_TARGET)
    pairs = [8 * a + b for a, b in zip(first, second, strict=True)]
    assert fits(pairs, torch.outer(P_TARGET, P_TARGET).flatten())
    one_seed = race(rows, np.array([Noise(7).key(t) for t in seeds], np.uint64)).tolist()
    assert fits(one_seed, P_TARGET)
    assert fits([8 * a + b for a, b in itertools.pairwise(one_seed)][::2], torch.outer(P_TARGET, P_TARGET).flatten())


@pytest.mark.parametrize("num_races", SIZES)
def test_a_coupled_draft_is_right_with_its_analytic_probability(num_races: int) -> None:
    """Token i wins both races with probability 1 / sum_j max(p_j / p_i, q_j / q_i): the first of as many exponentials.

    Within 4.5 binomial sigma: a false alarm in 150,000 choices of seeds.
    """
    keys = keys_of(range(num_races), t=1)
    target = race(P_TARGET.float().expand(num_races, -1), keys)
    draft = race(Q_DRAFT.float().expand(num_races, -1), keys)
    both = [
        1.0 / float(torch.maximum(P_TARGET / P_TARGET[i], Q_DRAFT / Q_DRAFT[i]).sum()) for i in range(8) if Q_DRAFT[i]
    ]
    agree, shared = sum(both), float(torch.minimum(P_TARGET, Q_DRAFT).sum())
    assert shared / (2 - shared) <= agree <= shared
    found = float((target == draft).double().mean())
    assert abs(found - agree) < 4.5 * (agree * (1 - agree) / num_races) ** 0.5
    assert fits(draft.tolist(), Q_DRAFT)


def test_negative_control_a_wrong_distribution_is_caught() -> None:
    won = race(P_TARGET.float().expand(20_000, -1), keys_of(range(20_000), t=0)).tolist()
    assert not fits(won, (P_TARGET + 0.05 * Q_DRAFT) / 1.05)


def fits(tokens: list[int], p: torch.Tensor) -> bool:
    counts = Counter(tokens)
    possible = [i for i in range(len(p)) if p[i] > 0]
    assert counts.keys() <= set(possible)
    expected = [float(p[i]) * len(tokens) for i in possible]
    return float(chisquare([counts[i] for i in possible], expected).pvalue) > SIGNIFICANCE
