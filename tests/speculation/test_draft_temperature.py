"""The draft temperature follows the policy: it stays where nothing is gained, and falls as the policy sharpens."""

import random
from collections.abc import Sequence

import pytest

from slime_spec.algorithms import EAGLE3, NONE
from slime_spec.config.tree import SpeculativeConfig
from slime_spec.sglang.draft_shape import embedded_shape
from slime_spec.speculation.draft_temperature import (
    FIRST_CHOICE,
    MOST_DRAFTS,
    MOST_ROUNDS,
    OWN,
    TEMPERATURES,
    DraftTemperature,
    draft_temperatures,
)
from slime_spec.speculation.draft_temperature_reference import chosen_temperature
from tests.support.overlap_traces import AFTER_TRAINING, BEFORE_TRAINING

Trace = Sequence[Sequence[float]]


def replayed(trace: Trace, policy: DraftTemperature | None = None) -> list[float]:
    """The temperature after each observation."""
    policy = policy or DraftTemperature()
    chosen = []
    for overlaps in trace:
        policy.observe(overlaps)
        chosen.append(policy.value)
    return chosen


def random_trace(seed: int) -> Trace:
    rng = random.Random(seed)
    means = [rng.random() for _ in TEMPERATURES]
    return [[min(1.0, max(0.0, rng.gauss(mean, 0.3))) for mean in rng.sample(means, 5)] for _ in range(60)]


@pytest.mark.parametrize(
    "trace",
    [BEFORE_TRAINING, AFTER_TRAINING, BEFORE_TRAINING + AFTER_TRAINING, AFTER_TRAINING + BEFORE_TRAINING]
    + [random_trace(seed) for seed in range(20)],
)
def test_the_choice_is_that_of_the_slow_reference(trace: Trace) -> None:
    assert replayed(trace) == [chosen_temperature(TEMPERATURES, trace[: count + 1]) for count in range(len(trace))]


def test_an_untrained_policy_keeps_the_drafts_own_distribution() -> None:
    assert set(replayed(BEFORE_TRAINING)) == {OWN}


def test_a_trained_policy_gets_sharper_drafts_and_nine_tenths_of_what_they_gain() -> None:
    chosen = replayed(AFTER_TRAINING)
    assert chosen[-1] <= 0.6
    means = dict(zip(TEMPERATURES, map(sum, zip(*AFTER_TRAINING, strict=True)), strict=True))
    assert means[chosen[-1]] - means[OWN] > 0.9 * (max(means.values()) - means[OWN])


def test_the_choice_follows_a_policy_that_sharpens_within_a_run_and_one_that_flattens_again() -> None:
    policy = DraftTemperature()
    assert replayed(BEFORE_TRAINING, policy)[-1] == OWN
    assert replayed(AFTER_TRAINING * 2, policy)[-1] <= 0.6
    assert replayed(BEFORE_TRAINING * 2, policy)[-1] >= 0.8


def test_nothing_is_chosen_before_enough_was_seen_or_where_the_difference_is_noise() -> None:
    sharp = [(0.1, 0.2, 0.3, 0.4, 0.9)] * (FIRST_CHOICE + 1)
    assert replayed(sharp) == [OWN] * (FIRST_CHOICE - 1) + [0.2] * 2
    assert set(replayed([(0.5, 0.505, 0.505, 0.509, 0.4)] * 100)) == {OWN}


def test_a_part_of_the_rounds_is_observed_and_none_where_there_is_no_choice() -> None:
    policy, fixed = DraftTemperature(), DraftTemperature((0.7,))
    alone = [policy.is_due(1) for _ in range(3 * MOST_ROUNDS)]
    assert alone == [True, *[False] * (MOST_ROUNDS - 1)] * 3
    assert sum(policy.is_due(MOST_DRAFTS // 2) for _ in range(40)) == 20
    assert all(policy.is_due(MOST_DRAFTS) for _ in range(5))
    assert fixed.value == 0.7
    assert not any(fixed.is_due(64) for _ in range(20))


COUPLED = {"use_gumbel_coupling": True}
REJECTION = {"use_rejection_sampling": True}
BLOCK = {"use_block_verification": True}
CHAIN = {"num_steps": 3, "eagle_topk": 1, "num_draft_tokens": 4}
TREE = {"num_steps": 3, "eagle_topk": 2, "num_draft_tokens": 6}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ()),
        (COUPLED, TEMPERATURES),
        (COUPLED | CHAIN, TEMPERATURES),
        (COUPLED | TREE, ()),
        (COUPLED | {"draft_temperature": 0.5}, (0.5,)),
        (REJECTION, TEMPERATURES),
        (BLOCK, TEMPERATURES),
        (REJECTION | CHAIN, (OWN,)),  # a seed names one output whatever else runs
        (BLOCK | CHAIN, (OWN,)),
        (BLOCK | CHAIN | {"draft_temperature": 0.5}, (0.5,)),
        ({"draft_temperature": 0.5}, ()),
    ],
)
def test_the_engine_chooses_where_a_seeds_tokens_do_not_come_to_depend_on_it(
    settings: dict, expected: tuple[float, ...]
) -> None:
    config = SpeculativeConfig(algorithm=EAGLE3.name, **settings)
    assert draft_temperatures(config, embedded_shape(config, "LlamaForCausalLM")) == expected


def test_races_without_a_draft_have_no_temperature() -> None:
    config = SpeculativeConfig(algorithm=NONE.name, use_gumbel_coupling=True)
    assert draft_temperatures(config, embedded_shape(config, "LlamaForCausalLM")) == ()
