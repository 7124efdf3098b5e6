"""Losses of a draft in training, by their definitions: values, where they are least, gradients."""

import math
from collections.abc import Sequence

import pytest
import torch

from slime_spec.config.draft_training import LOSSES as NAMES
from slime_spec.draft.training.loss import LOSSES, StepTarget, acceptance


def test_acceptance_is_the_overlap_of_both_distributions_over_all_tokens() -> None:
    logits_p, logits_q = torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([[0.5, 2.0]])
    kept = torch.tensor([0, 2])  # the draft knows tokens 0 and 2
    target = StepTarget(logits_p[kept][None], logits_p.logsumexp(0)[None], torch.tensor([0]))
    p, q = logits_p.softmax(0), logits_q.softmax(-1)[0]
    assert float(acceptance(logits_q, target)) == pytest.approx(float(min(p[0], q[0]) + min(p[2], q[1])))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_least_where_the_draft_is_the_target(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    target = StepTarget(logits, logits.logsumexp(-1), torch.arange(5))
    least = LOSSES[name](logits, target)
    for seed in range(20):
        noise = 0.5 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1))
        assert (LOSSES[name](logits + noise, target) > least).all()


def by_hand(name: str, p: Sequence[float], q: Sequence[float]) -> float:
    """A loss from probabilities: ``p`` of the target for the draft's tokens (it has others), ``q`` the draft's."""
    accepted = sum(min(each) for each in zip(p, q, strict=True))
    inside = [each / sum(p) for each in p]
    forward = sum(a * math.log(a / b) for a, b in zip(inside, q, strict=True))
    weight = math.exp(-accepted)
    return {
        "soft_ce": -sum(a * math.log(b) for a, b in zip(inside, q, strict=True)),
        "total_variation": 0.5 * (sum(abs(a - b) for a, b in zip(p, q, strict=True)) + 1.0 - sum(p)),
        "log_acceptance": -math.log(accepted),
        "reverse_kl": sum(b * math.log(b / a) for a, b in zip(inside, q, strict=True)),
        "lk_hybrid": weight * forward + (1.0 - weight) * (1.0 - accepted),
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_definition_says_of_the_probabilities(name: str) -> None:
    """Also where the draft knows only some of the tokens."""
    generator = torch.Generator().manual_seed(3)
    logits_p = 2.0 * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    logits_q = 2.0 * torch.randn(6, 4, dtype=torch.float64, generator=generator)
    kept = torch.tensor([0, 2, 3, 7])
    target = StepTarget(logits_p[:, kept], logits_p.logsumexp(-1), torch.tensor([0, 1, 2, 3, 0, 1]))
    p, q = logits_p.softmax(-1)[:, kept].tolist(), logits_q.softmax(-1).tolist()
    expected = [by_hand(name, *each) for each in zip(p, q, strict=True)]
    assert LOSSES[name](logits_q, target).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_draft_follows_what_the_loss_says_and_never_its_weights(name: str) -> None:
    """Gradients by differences; the hybrid's weight counts as a number."""
    generator = torch.Generator().manual_seed(4)
    logits_p, logits_q = (torch.randn(1, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    target = StepTarget(logits_p, logits_p.logsumexp(-1) + 0.2, torch.tensor([2]))
    logits_q.requires_grad_()
    LOSSES[name](logits_q, target).sum().backward()

    def loss_at(logits: torch.Tensor) -> float:
        if name != "lk_hybrid":
            return float(LOSSES[name](logits, target))
        weight = math.exp(-float(acceptance(logits_q, target)))
        p = target.logits.softmax(-1)
        forward = float((p * (p.log() - logits.log_softmax(-1))).sum())
        return weight * forward + (1.0 - weight) * float(LOSSES["total_variation"](logits, target))

    step = 1e-6
    with torch.no_grad():
        moved = [step * torch.nn.functional.one_hot(torch.tensor([token]), 5) for token in range(5)]
        slopes = [(loss_at(logits_q + each) - loss_at(logits_q - each)) / (2 * step) for each in moved]
    assert logits_q.grad is not None
    assert logits_q.grad[0].tolist() == pytest.approx(slopes, abs=1e-8)


def test_the_settings_name_every_loss() -> None:
    assert set(NAMES) == set(LOSSES)
