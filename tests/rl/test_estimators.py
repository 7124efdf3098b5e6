"""Advantages against the papers' formulas, written out in plain Python, and numpy for means and deviations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.config.algorithm import ESTIMATORS, AlgorithmConfig
from slime_spec.rl.estimators import ADVANTAGES, STD_EPSILON, Scored, advantages, group_advantages, leave_one_out

GROUP = 3
# Two prompts of three samples, of one to four tokens, some of them not counted.
rewards = st.lists(st.floats(-2.0, 2.0).map(lambda x: round(x, 3)), min_size=2 * GROUP, max_size=2 * GROUP)
MASKS = ((1,), (1, 1), (1, 0, 1), (0, 1, 1, 0), (1, 1), (1, 1, 1))
KL = ((0.5,), (-0.25, 0.125), (1.0, 7.0, -0.5), (9.0, 0.5, 0.25, 9.0), (0.0, 2.0), (0.5, 0.5, -1.0))


def scored(rewards: list[float], with_kl: bool = False) -> list[Scored]:
    return [
        Scored(i // GROUP, reward, MASKS[i], KL[i] if with_kl else ())  # the prompts' samples come side by side
        for i, reward in enumerate(rewards)
    ]


def kl_of(i: int) -> list[float]:
    """The KL of a sample's tokens, 0 where they are not counted."""
    return [kl * counts for kl, counts in zip(KL[i], MASKS[i], strict=True)]


def group_of(i: int) -> range:
    return range(i // GROUP * GROUP, (i // GROUP + 1) * GROUP)


def whitened(by_token: list[list[float]]) -> list[list[float]]:
    counted = np.array([a for i, row in enumerate(by_token) for a, c in zip(row, MASKS[i], strict=True) if c])
    return [[(a - counted.mean()) / math.sqrt(counted.var(ddof=1) + 1e-8) for a in row] for row in by_token]


def check(got: list, expected: list[list[float]]) -> None:
    """Compare the tokens that count; a single number stands for all tokens of its sample."""
    for i, (advantage, row) in enumerate(zip(got, expected, strict=True)):
        tokens = advantage if isinstance(advantage, tuple) else (advantage,) * len(MASKS[i])
        counted = [(a, b) for a, b, counts in zip(tokens, row, MASKS[i], strict=True) if counts]
        assert [a for a, _ in counted] == pytest.approx([b for _, b in counted], rel=1e-6, abs=1e-6)


@given(rewards=rewards, kl_coef=st.sampled_from([0.0, 0.1]), estimator=st.sampled_from(["grpo", "gspo", "cispo"]))
def test_grpo_is_the_distance_from_the_prompts_mean_in_its_deviations(
    rewards: list[float], kl_coef: float, estimator: str
) -> None:
    lowered = [r - kl_coef * sum(kl_of(i)) for i, r in enumerate(rewards)]
    of_prompt = [np.array([lowered[j] for j in group_of(i)]) for i in range(len(rewards))]
    expected = [
        [(lowered[i] - of_prompt[i].mean()) / (of_prompt[i].std(ddof=1) + STD_EPSILON)] * len(MASKS[i])
        if len(set(of_prompt[i])) > 1
        else [0.0] * len(MASKS[i])
        for i in range(len(rewards))
    ]
    algorithm = AlgorithmConfig(advantage_estimator=estimator, kl_coef=kl_coef)
    check(advantages(scored(rewards, kl_coef > 0), algorithm), expected)


@given(rewards=rewards)
def test_dr_grpo_divides_by_no_deviation(rewards: list[float]) -> None:
    expected = [[rewards[i] - np.mean([rewards[j] for j in group_of(i)])] * len(MASKS[i]) for i in range(len(rewards))]
    check(advantages(scored(rewards), AlgorithmConfig(advantage_estimator="dr_grpo")), expected)
    check(advantages(scored(rewards), AlgorithmConfig(normalize_std=False)), expected)


@given(rewards=rewards, kl_coef=st.sampled_from([0.0, 0.1]))
def test_rloos_baseline_is_the_mean_of_the_others(rewards: list[float], kl_coef: float) -> None:
    lowered = [r - kl_coef * sum(kl_of(i)) for i, r in enumerate(rewards)]
    expected = [
        [lowered[i] - sum(lowered[j] for j in group_of(i) if j != i) / (GROUP - 1)] * len(MASKS[i])
        for i in range(len(rewards))
    ]
    algorithm = AlgorithmConfig(advantage_estimator="rloo", kl_coef=kl_coef)
    check(advantages(scored(rewards, kl_coef > 0), algorithm), expected)


def test_rloo_is_dr_grpo_times_n_over_n_minus_1() -> None:
    """verl computes it so: n / (n - 1) (r - mean)."""
    assert leave_one_out([1.0, 0.0, 0.0, 1.0]) == pytest.approx([4 / 3 * a for a in (0.5, -0.5, -0.5, 0.5)])
    assert leave_one_out([0.7]) == [0.0]


@given(rewards=rewards, kl_coef=st.sampled_from([0.0, 0.1]), gamma=st.sampled_from([1.0, 0.9, 0.0]))
def test_reinforce_plus_plus_whitens_discounted_returns(rewards: list[float], kl_coef: float, gamma: float) -> None:
    returns = []
    for i, reward in enumerate(rewards):
        last = max(t for t, counts in enumerate(MASKS[i]) if counts)
        of_token = [-kl_coef * kl + (reward if t == last else 0.0) for t, kl in enumerate(kl_of(i))]
        returns.append(
            [sum(gamma ** (u - t) * of_token[u] for u in range(t, len(of_token))) for t in range(len(of_token))]
        )
    algorithm = AlgorithmConfig(advantage_estimator="reinforce_plus_plus", kl_coef=kl_coef, gamma=gamma)
    check(advantages(scored(rewards, kl_coef > 0), algorithm), whitened(returns))


@given(rewards=rewards, kl_coef=st.sampled_from([0.0, 0.1]))
def test_its_baseline_variant_whitens_the_distance_from_the_prompts_mean(rewards: list[float], kl_coef: float) -> None:
    by_token = [
        [rewards[i] - np.mean([rewards[j] for j in group_of(i)]) - kl_coef * kl for kl in kl_of(i)]
        for i in range(len(rewards))
    ]
    algorithm = AlgorithmConfig(advantage_estimator="reinforce_plus_plus_baseline", kl_coef=kl_coef)
    check(advantages(scored(rewards, kl_coef > 0), algorithm), whitened(by_token))


def test_any_advantages_are_whitened_where_that_is_asked() -> None:
    given_rewards = [1.0, 0.0, 0.0, 0.5, 1.0, 0.0]
    plain = advantages(scored(given_rewards), AlgorithmConfig(advantage_estimator="rloo"))
    algorithm = AlgorithmConfig(advantage_estimator="rloo", normalize_advantages=True)
    expected = whitened([[advantage] * len(MASKS[i]) for i, advantage in enumerate(plain)])
    check(advantages(scored(given_rewards), algorithm), expected)


@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("reward", [1.0, 0.1])
def test_where_all_rewards_agree_advantages_are_exactly_0(estimator: str, reward: float) -> None:
    algorithm = AlgorithmConfig(advantage_estimator=estimator)
    assert advantages(scored([reward] * 2 * GROUP), algorithm) == [0.0] * 2 * GROUP


def test_a_prompt_of_equal_rewards_teaches_reinforce_plus_plus_alone() -> None:
    flat_prompt = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    for estimator, record in ESTIMATORS.items():
        got = advantages(scored(flat_prompt), AlgorithmConfig(advantage_estimator=estimator))[:GROUP]
        if not record.compares_samples:
            assert all(isinstance(a, float) and a > 0.1 for a in got)
        elif not estimator.endswith("baseline"):
            assert got == [0.0] * GROUP


def test_groups_may_come_in_any_order() -> None:
    samples = scored([1.0, 0.0, 0.5, 0.25, 0.0, 1.0])
    order = [4, 0, 3, 2, 5, 1]
    in_order = advantages(samples, AlgorithmConfig())
    assert advantages([samples[i] for i in order], AlgorithmConfig()) == [in_order[i] for i in order]


def test_a_groups_advantages_are_by_hand() -> None:
    assert group_advantages([1.0, 0.0], normalize_std=True) == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert group_advantages([0.7], normalize_std=True) == [0.0]
    assert group_advantages([3.0, 0.0], normalize_std=False) == [1.5, -1.5]


def test_every_estimator_of_the_settings_has_a_function() -> None:
    assert ADVANTAGES.keys() == ESTIMATORS.keys()
