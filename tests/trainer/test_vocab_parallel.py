"""Logprobs, entropy and gradient of the hand-written pass against torch's log_softmax."""

import pytest
import torch

from tests.trainer.trainer_support import run_ranks
from trainer_bridge.megatron.vocab_parallel import argmax_and_logsumexp, token_logprobs


def plain(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 12, generator=generator) * 4
    return logits, torch.randint(0, 12, (7,), generator=generator), torch.randn(7, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_gradient_are_log_softmaxs(temperature: float) -> None:
    logits, targets, weights = draw()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(ours, targets, temperature, None)
    expected, expected_entropy = plain(theirs, targets, temperature)
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(ours.detach(), logits), "the logits themselves must stay as they were"


def test_a_vocabulary_in_two_slices_gives_the_same() -> None:
    temperature = 0.7
    logits, targets, weights = draw()
    whole = logits.clone().requires_grad_()
    expected, expected_entropy = plain(whole, targets, temperature)
    (expected * weights).sum().backward()
    answers = run_ranks(2, "sliced_vocabulary", logits, targets, weights, temperature)
    for logprobs, entropy, _ in answers:
        torch.testing.assert_close(logprobs, expected.detach())
        torch.testing.assert_close(entropy, expected_entropy.detach())
    torch.testing.assert_close(torch.cat([gradient for _, _, gradient in answers], dim=1), whole.grad)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_differentiable_entropy_has_torchs_gradient_in_one_slice_or_two(temperature: float) -> None:
    logits, targets, weights = draw()
    of_entropy = weights.flip(0)
    whole, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, expected_entropy = plain(whole, targets, temperature)
    ((expected * weights).sum() + (expected_entropy * of_entropy).sum()).backward()
    logprobs, entropy = token_logprobs(ours, targets, temperature, None, entropy_has_gradient=True)
    ((logprobs * weights).sum() + (entropy * of_entropy).sum()).backward()
    torch.testing.assert_close(ours.grad, whole.grad)
    answers = run_ranks(2, "sliced_vocabulary", logits, targets, weights, temperature, of_entropy)
    torch.testing.assert_close(torch.cat([gradient for _, _, gradient in answers], dim=1), whole.grad)


def test_an_entropy_of_a_certain_token_has_no_gradient_and_no_nan() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    _, entropy = token_logprobs(logits, torch.tensor([0]), 1.0, None, entropy_has_gradient=True)
    entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), 1.0, None)
    logprobs.sum().backward()
    assert logprobs.item() == -2e4
    assert entropy.item() == 0.0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_row_of_nan_has_a_token_for_its_argmax_and_nan() -> None:
    logits, _, _ = draw()
    logits[2] = float("nan")
    for argmax, logsumexp in [argmax_and_logsumexp(logits, 1.0, None), *run_ranks(2, "sliced_peaks", logits, 1.0)]:
        assert 0 <= int(argmax[2]) < 12
        assert logsumexp[2].isnan()
        assert logsumexp[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_argmax_and_logsumexp_are_torchs_in_one_slice_or_two(temperature: float) -> None:
    logits, _, _ = draw()
    expected = (logits.argmax(-1), (logits / temperature).logsumexp(-1))
    answers = [argmax_and_logsumexp(logits, temperature, None), *run_ranks(2, "sliced_peaks", logits, temperature)]
    for argmax, logsumexp in answers:
        assert torch.equal(argmax, expected[0])
        torch.testing.assert_close(logsumexp, expected[1])
