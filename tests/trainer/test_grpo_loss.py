"""The policy loss against the formula written as a loop over tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_bridge.grpo import GrpoLoss, clipped_policy_loss, k3_kl

logprob = st.floats(-12.0, -0.01)
tokens = st.lists(st.tuples(logprob, logprob, logprob, st.floats(-3.0, 3.0)), min_size=1, max_size=20)


@given(tokens=tokens, eps_low=st.floats(0.01, 0.9), eps_high=st.floats(0.01, 0.9), kl_coef=st.floats(0.0, 1.0))
def test_loss_equals_the_papers_formula_token_by_token(
    tokens: list[tuple[float, float, float, float]], eps_low: float, eps_high: float, kl_coef: float
) -> None:
    new, old, ref, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True))
    terms = GrpoLoss(eps_low, eps_high, kl_coef)(new, old, advantages, ref)
    for i, (logp, logp_old, logp_ref, advantage) in enumerate(tokens):
        ratio = math.exp(logp - logp_old)
        held = min(max(ratio, 1 - eps_low), 1 + eps_high)
        pg_loss = -min(ratio * advantage, held * advantage)
        kl = math.exp(logp_ref - logp) - (logp_ref - logp) - 1
        assert terms.pg_loss[i].item() == pytest.approx(pg_loss, rel=1e-9)
        assert terms.kl[i].item() == pytest.approx(kl, rel=1e-9, abs=1e-9)
        assert terms.loss[i].item() == pytest.approx(pg_loss + kl_coef * kl, rel=1e-9, abs=1e-9)


def test_a_token_beyond_the_clip_gets_no_gradient_where_that_would_go_further() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-2.0, -2.0, -1.0])
    loss, clipped = clipped_policy_loss(logprobs, old, torch.tensor([1.0, -1.0, 1.0]), 0.2, 0.2)
    loss.sum().backward()
    assert clipped.tolist() == [True, False, False]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, math.e, -1.0])


def test_k3_estimates_the_kl_without_bias_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    every_token = k3_kl(policy, reference)
    assert (every_token >= 0).all()
    true_kl = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * every_token).sum().item() == pytest.approx(true_kl.item(), rel=1e-12)


def test_without_a_reference_there_is_no_kl_in_the_loss() -> None:
    new, old, advantages = torch.tensor([-1.0]), torch.tensor([-1.2]), torch.tensor([0.5])
    terms = GrpoLoss(0.2, 0.2, 0.0)(new, old, advantages, None)
    assert terms.loss.tolist() == terms.pg_loss.tolist()
    assert terms.kl.tolist() == [0.0]
