"""The losses of a token against the papers' formulas, written as loops over tokens in plain Python."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_spec.config.algorithm import ESTIMATORS, KL_TYPES, AlgorithmConfig
from slime_spec.types import TrainSample
from trainer_bridge.importance import ImportanceWeights
from trainer_bridge.kl import estimated_kl
from trainer_bridge.microbatch import Microbatch, build_microbatch
from trainer_bridge.packing import form_segments
from trainer_bridge.policy_loss import POLICY_LOSSES, Clip, PolicyLoss, PolicyTerms, clipped_objective

logprob = st.floats(-12.0, -0.01)
token = st.tuples(logprob, logprob, logprob, logprob)
Tokens = Sequence[tuple[float, float, float, float]]
"""(policy, rollout, reference, trainer before the update)"""
responses = st.lists(st.tuples(st.lists(token, min_size=1, max_size=6), st.floats(-3.0, 3.0)), min_size=1, max_size=4)
clips = {"eps_clip": st.floats(0.01, 1.0), "eps_clip_high": st.floats(0.01, 4.0)}


def microbatch_of(responses: Sequence[tuple[Tokens, float]]) -> tuple[torch.Tensor, Microbatch]:
    """The policy's logprobs of samples with one prompt, and their microbatch in float64."""
    samples = [
        TrainSample(
            (1, 2, *(7 for _ in tokens)),
            2,
            tuple(rollout for _, rollout, _, _ in tokens),
            advantage,
            trainer_logprobs=tuple(trainer for *_, trainer in tokens),
        )
        for tokens, advantage in responses
    ]
    microbatch = build_microbatch(samples, tuple(form_segments(samples, 1000)), torch.device("cpu"))
    everything = [values for tokens, _ in responses for values in tokens]
    policy, rollout, reference, trainer = torch.tensor(everything, dtype=torch.float64).unbind(1)
    lengths = torch.tensor([len(tokens) for tokens, _ in responses])
    advantages = torch.tensor([advantage for _, advantage in responses], dtype=torch.float64).repeat_interleave(lengths)
    exact = replace(
        microbatch,
        rollout_logprobs=rollout,
        ref_logprobs=reference,
        trainer_logprobs=trainer,
        advantages=advantages,
        weights=microbatch.weights.double(),
    )
    return policy, exact


def terms_of(algorithm: AlgorithmConfig, responses: Sequence[tuple[Tokens, float]]) -> PolicyTerms:
    policy, microbatch = microbatch_of(responses)
    return PolicyLoss(algorithm)(policy, torch.full_like(policy, 0.5), microbatch)


def clip(ratio: float, low: float, high: float) -> float:
    return min(max(ratio, 1 - low), 1 + high)


def ppo(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, clip(ratio, low, high) * advantage)


def each_token(policy_loss: Callable[[Tokens, int, float], float], responses: Sequence[tuple[Tokens, float]]) -> list:
    return [policy_loss(tokens, t, advantage) for tokens, advantage in responses for t in range(len(tokens))]


def close(got: torch.Tensor, expected: Sequence[float]) -> None:
    assert got.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(responses=responses, kl_coef=st.floats(0.0, 1.0), **clips)
def test_grpos_loss_is_the_papers(responses, kl_coef: float, eps_clip: float, eps_clip_high: float) -> None:
    algorithm = AlgorithmConfig(eps_clip=eps_clip, eps_clip_high=eps_clip_high, kl_loss_coef=kl_coef)
    terms = terms_of(algorithm, responses)
    ratio = [math.exp(policy - rollout) for tokens, _ in responses for policy, rollout, _, _ in tokens]
    advantages = [advantage for tokens, advantage in responses for _ in tokens]
    pg = [ppo(r, a, eps_clip, eps_clip_high) for r, a in zip(ratio, advantages, strict=True)]
    kl = [
        math.exp(reference - policy) - (reference - policy) - 1
        for tokens, _ in responses
        for policy, _, reference, _ in tokens
    ]
    close(terms.pg_loss, pg)
    close(terms.kl, kl)
    close(terms.loss, [a + kl_coef * b for a, b in zip(pg, kl, strict=True)])


@given(responses=responses, **clips)
def test_gspos_ratio_is_the_geometric_mean_of_its_tokens(responses, eps_clip: float, eps_clip_high: float) -> None:
    algorithm = AlgorithmConfig(advantage_estimator="gspo", eps_clip=eps_clip, eps_clip_high=eps_clip_high)

    def expected(tokens: Tokens, t: int, advantage: float) -> float:
        log_ratio = sum(policy - rollout for policy, rollout, _, _ in tokens) / len(tokens)
        return ppo(math.exp(log_ratio), advantage, eps_clip, eps_clip_high)

    close(terms_of(algorithm, responses).pg_loss, each_token(expected, responses))


@given(responses=responses, **clips)
def test_cispo_weighs_the_log_probability_with_the_clipped_ratio(
    responses, eps_clip: float, eps_clip_high: float
) -> None:
    algorithm = AlgorithmConfig(advantage_estimator="cispo", eps_clip=eps_clip, eps_clip_high=eps_clip_high)

    def expected(tokens: Tokens, t: int, advantage: float) -> float:
        policy, rollout, _, _ = tokens[t]
        return -clip(math.exp(policy - rollout), eps_clip, eps_clip_high) * advantage * policy

    close(terms_of(algorithm, responses).pg_loss, each_token(expected, responses))


@given(responses=responses, mode=st.sampled_from(["truncate", "mask"]), low=st.floats(0, 1), high=st.floats(1, 5))
def test_tis_clips_the_trainers_own_ratio_and_weighs_it(responses, mode: str, low: float, high: float) -> None:
    algorithm = AlgorithmConfig(use_tis=True, tis_mode=mode, tis_clip=high, tis_clip_low=low)

    def expected(tokens: Tokens, t: int, advantage: float) -> float:
        policy, rollout, _, trainer = tokens[t]
        weight = math.exp(trainer - rollout)
        if not low <= weight <= high:
            weight = 0.0 if mode == "mask" else min(max(weight, low), high)
        return weight * ppo(math.exp(policy - trainer), advantage, 0.2, 0.2)

    close(terms_of(algorithm, responses).pg_loss, each_token(expected, responses))


def test_tis_of_a_first_update_takes_the_passs_own_logprobs_without_gradient() -> None:
    policy, microbatch = microbatch_of([([(-1.0, -1.5, -1.0, -9.0), (-2.0, -1.0, -1.0, -9.0)], 2.0)])
    policy.requires_grad_()
    terms = PolicyLoss(AlgorithmConfig(use_tis=True, tis_clip=1.2))(
        policy, torch.zeros(2), replace(microbatch, trainer_logprobs=None)
    )
    terms.loss.sum().backward()
    # The ratio is 1 and its gradient that of log π; weights are min(e^0.5, 1.2) and e^-1.
    assert policy.grad.tolist() == pytest.approx([-2.0 * 1.2, -2.0 * math.exp(-1.0)])
    assert terms.weighed is not None
    assert terms.weighed.was_bounded.tolist() == [True, False]


def test_weights_say_what_the_bounds_changed() -> None:
    trainer, rollout = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-3.0, -1.0, -1.0 + math.log(4.0)])
    truncated = ImportanceWeights("truncate", 0.5, 2.0)(trainer, rollout)
    masked = ImportanceWeights("mask", 0.5, 2.0)(trainer, rollout)
    assert truncated.weights.tolist() == pytest.approx([2.0, 1.0, 0.5])
    assert masked.weights.tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert truncated.ratio.tolist() == pytest.approx([math.exp(2.0), 1.0, 0.25])
    assert truncated.was_bounded.tolist() == masked.was_bounded.tolist() == [True, False, True]


def test_the_entropy_bonus_lowers_the_loss() -> None:
    tokens = [([(-1.0, -1.0, -1.0, -1.0)], 1.0)]
    without, bonus = (terms_of(AlgorithmConfig(entropy_coef=coef), tokens) for coef in (0.0, 0.01))
    assert bonus.loss.item() == pytest.approx(without.loss.item() - 0.01 * 0.5)
    assert bonus.pg_loss.item() == without.pg_loss.item()


def test_a_token_beyond_the_clip_gets_no_gradient_where_that_would_go_further() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-2.0, -2.0, -1.0])
    loss, was_clipped = clipped_objective(logprobs - old, torch.tensor([1.0, -1.0, 1.0]), Clip(0.2, 0.2))
    loss.sum().backward()
    assert was_clipped.tolist() == [True, False, False]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, math.e, -1.0])


def test_a_clipped_token_of_cispo_still_has_a_gradient() -> None:
    policy, microbatch = microbatch_of([([(-1.0, -3.0, 0.0, 0.0)], 2.0), ([(-1.0, -3.0, 0.0, 0.0)], 0.0)])
    policy.requires_grad_()
    loss, was_clipped = POLICY_LOSSES["cispo"](policy, microbatch.rollout_logprobs, microbatch, Clip(0.2, 0.3))
    loss.sum().backward()
    assert policy.grad.tolist() == pytest.approx([-1.3 * 2.0, 0.0])
    assert was_clipped.tolist() == [True, False]


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_alone() -> None:
    """By hand (arXiv:1912.09729, eq. 5): max(min(r A, clip(r) A), c A) where A < 0, as an objective."""
    log_ratio = torch.tensor([10.0, 2.0, 0.5]).log()
    for advantage, expected in ((-1.0, [3.0, 2.0, 0.8]), (1.0, [-1.2, -1.2, -0.5])):
        loss, _ = clipped_objective(log_ratio, torch.full((3,), advantage), Clip(0.2, 0.2, dual=3.0))
        assert loss.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KL_TYPES)
def test_a_kl_estimate_is_schulmans_with_his_bias(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    every_token = estimated_kl(policy, reference, kind)
    true_kl = (policy.exp() * (policy - reference)).sum().item()
    mean = (policy.exp() * every_token).sum().item()
    if kind == "k2":
        second_moment = sum(
            math.exp(p) * (p - q) ** 2 for p, q in zip(policy.tolist(), reference.tolist(), strict=True)
        )
        assert mean == pytest.approx(second_moment / 2)
        assert mean != pytest.approx(true_kl, rel=0.01)
    else:
        assert mean == pytest.approx(true_kl, rel=1e-12)
    assert (kind == "k1") == bool((every_token < 0).any())


def test_low_var_kl_is_k3_up_to_10() -> None:
    policy, reference = torch.tensor([-1.0, -9.0]), torch.tensor([-2.0, -1.0])
    k3, held = (estimated_kl(policy, reference, kind).tolist() for kind in ("k3", "low_var_kl"))
    assert k3 == pytest.approx([math.exp(-1.0), math.exp(8.0) - 9.0])
    assert held == pytest.approx([k3[0], 10.0])


def test_without_a_reference_there_is_no_kl_in_the_loss() -> None:
    policy, microbatch = microbatch_of([([(-1.0, -1.2, 0.0, 0.0)], 0.5)])
    terms = PolicyLoss(AlgorithmConfig())(policy, policy, replace(microbatch, ref_logprobs=None))
    assert terms.loss.tolist() == terms.pg_loss.tolist()
    assert terms.kl.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("advantage", "dual", "loss"),
    [(2.0, None, -2.0 * 1.25), (0.0, None, 0.0), (2.0, 3.0, -2.0 * 1.25), (-2.0, 3.0, 3.0 * 2.0), (0.0, 3.0, 0.0)],
)
def test_a_ratio_that_overflows_has_the_bounds_loss_and_no_gradient(
    advantage: float, dual: float | None, loss: float, dtype: torch.dtype
) -> None:
    """At the bound -(1 + 0.25) A or -c A; the exponential of 200 is infinite in 32 bits, and 0 times it no number."""
    log_ratio = torch.tensor([200.0, 95.0], dtype=dtype, requires_grad=True)
    terms, _ = clipped_objective(log_ratio, torch.full((2,), advantage, dtype=dtype), Clip(0.2, 0.25, dual))
    terms.sum().backward()
    assert terms.tolist() == [loss, loss]
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [0.0, 0.0]


def test_a_ratio_that_overflows_where_nothing_bounds_it_stays_infinite() -> None:
    """The step must stop: the largest number in its place would look like a loss."""
    (loss, _) = clipped_objective(torch.tensor([200.0]), torch.tensor([-1.0]), Clip(0.2, 0.25))
    assert loss.tolist() == [math.inf]


@pytest.mark.parametrize("log_ratio", [-95.0, -200.0])
def test_low_var_kl_beyond_its_bound_has_no_gradient_however_far(log_ratio: float) -> None:
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    kl = estimated_kl(logprobs, torch.zeros(1), "low_var_kl")
    kl.sum().backward()
    assert logprobs.grad is not None
    assert (kl.tolist(), logprobs.grad.tolist()) == ([10.0], [0.0])


def test_every_estimator_names_a_loss_that_there_is() -> None:
    assert {each.policy_loss for each in ESTIMATORS.values()} == POLICY_LOSSES.keys()
