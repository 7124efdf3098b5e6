"""A sample's uniforms. The tests of uniformity have a false-alarm probability of 1e-4 together; seeds are fixed."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import kstest, spearmanr

from rollout.embedded.uniforms import Uniforms

NUM_SEEDS = 20_000


def test_a_seed_names_its_uniforms_and_streams_differ() -> None:
    assert Uniforms(5, 9).emit == Uniforms(5, 9).emit != Uniforms(6, 9).emit
    assert list(Uniforms(5, 9).draft_of_round(3)) == list(Uniforms(5, 9).draft_of_round(3))
    streams = [
        tuple(each)
        for seed in (5, 6)
        for each in (
            Uniforms(seed, 9).emit,
            *(Uniforms(seed, 9).draft_of_round(start) for start in range(9)),
            *(Uniforms(seed, 9).accept_of_round(start) for start in range(9)),
        )
    ]
    assert len(set(streams)) == len(streams) == 38


def test_a_seed_of_any_size_has_uniforms_of_its_own() -> None:
    assert Uniforms(2**64 + 5, 4).emit == Uniforms(5, 4).emit
    assert len({tuple(Uniforms(seed, 4).emit) for seed in (-1, 0, 1, 2**32, 2**63)}) == 5


def test_a_round_stream_reads_like_a_list() -> None:
    uniforms = Uniforms(7, 6).accept_of_round(2)
    everything = [uniforms[t] for t in range(6)]
    assert list(uniforms) == everything
    assert uniforms[2:5] == everything[2:5]
    assert uniforms[-1] == everything[-1]
    with pytest.raises(IndexError):
        uniforms[6]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 11])
def test_a_round_stream_counts_on_from_a_mix_of_seed_purpose_and_round(seed: int) -> None:
    uniforms = Uniforms(seed, 8)
    for purpose, stream in ((1, uniforms.draft_of_round(3)), (2, uniforms.accept_of_round(3))):
        key = splitmix64(splitmix64(splitmix64(np.array([seed], np.uint64)) + np.uint64(purpose)) + np.uint64(3))
        counter = key + np.arange(8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        assert list(stream) == ((splitmix64(counter) >> np.uint64(11)) / 2.0**53).tolist()


def test_round_uniforms_are_uniform_and_independent_of_each_other() -> None:
    all_uniforms = [Uniforms(seed, 64) for seed in range(NUM_SEEDS)]
    columns = {
        "draft": [uniforms.draft_of_round(3)[5] for uniforms in all_uniforms],
        "draft of the next token": [uniforms.draft_of_round(3)[6] for uniforms in all_uniforms],
        "draft of the next round": [uniforms.draft_of_round(4)[5] for uniforms in all_uniforms],
        "accept": [uniforms.accept_of_round(3)[5] for uniforms in all_uniforms],
        "emit": [uniforms.emit[5] for uniforms in all_uniforms],
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
