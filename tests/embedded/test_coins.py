"""A sample's uniforms. The tests of uniformity have a false-alarm probability of 1e-4 together; seeds are fixed."""

import pytest
from scipy.stats import kstest, spearmanr

from rollout.embedded.coins import Coins

NUM_SEEDS = 20_000


def test_a_seed_names_its_coins_and_streams_differ() -> None:
    assert Coins(5, 9).emit == Coins(5, 9).emit != Coins(6, 9).emit
    assert list(Coins(5, 9).draft_of_round(3)) == list(Coins(5, 9).draft_of_round(3))
    streams = [
        tuple(each)
        for seed in (5, 6)
        for each in (
            Coins(seed, 9).emit,
            *(Coins(seed, 9).draft_of_round(start) for start in range(9)),
            *(Coins(seed, 9).accept_of_round(start) for start in range(9)),
        )
    ]
    assert len(set(streams)) == len(streams) == 38


def test_a_seed_of_any_size_has_coins_of_its_own() -> None:
    assert Coins(2**64 + 5, 4).emit == Coins(5, 4).emit
    assert len({tuple(Coins(seed, 4).emit) for seed in (-1, 0, 1, 2**32, 2**63)}) == 5


def test_a_round_stream_reads_like_a_list() -> None:
    coins = Coins(7, 6).accept_of_round(2)
    everything = [coins[t] for t in range(6)]
    assert list(coins) == everything
    assert coins[2:5] == everything[2:5]
    assert coins[-1] == everything[-1]
    with pytest.raises(IndexError):
        coins[6]


def test_round_coins_are_uniform_and_independent_of_each_other() -> None:
    all_coins = [Coins(seed, 64) for seed in range(NUM_SEEDS)]
    columns = {
        "draft": [coins.draft_of_round(3)[5] for coins in all_coins],
        "draft of the next token": [coins.draft_of_round(3)[6] for coins in all_coins],
        "draft of the next round": [coins.draft_of_round(4)[5] for coins in all_coins],
        "accept": [coins.accept_of_round(3)[5] for coins in all_coins],
        "emit": [coins.emit[5] for coins in all_coins],
    }
    names = list(columns)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    significance = 1e-4 / (len(names) + len(pairs))
    for name in names:
        assert min(columns[name]) >= 0.0
        assert max(columns[name]) < 1.0
        assert kstest(columns[name], "uniform").pvalue > significance, name
    for a, b in pairs:
        assert spearmanr(columns[a], columns[b]).pvalue > significance, (a, b)
