"""Losses of a draft in training, by their definitions: values, where they are least, gradients."""

import math
from collections.abc import Sequence

import pytest
import torch

from slime_spec.config.draft_training import LOSSES as NAMES
from slime_spec.config.draft_training import REPLY_LOSS, TOP_K, TOP_K_LOSS, DraftTrainingConfig, check_loss, loss_for
from slime_spec.draft.training.loss import LOSSES, StepTarget, acceptance, loss_of
from slime_spec.errors import ConfigError

OF_DISTRIBUTIONS = [name for name in LOSSES if name != REPLY_LOSS]


def test_acceptance_is_the_overlap_of_both_distributions_over_all_tokens() -> None:
    logits_p, logits_q = torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([[0.5, 2.0]])
    kept = torch.tensor([0, 2])  # the draft knows tokens 0 and 2
    target = StepTarget(logits_p[kept][None], logits_p.logsumexp(0)[None], torch.tensor([0]))
    p, q = logits_p.softmax(0), logits_q.softmax(-1)[0]
    assert float(acceptance(logits_q, target)) == pytest.approx(float(min(p[0], q[0]) + min(p[2], q[1])))


@pytest.mark.parametrize("name", OF_DISTRIBUTIONS)
def test_every_loss_is_least_where_the_draft_is_the_target(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    target = StepTarget(logits, logits.logsumexp(-1), torch.arange(5))
    least = LOSSES[name](logits, target)
    for seed in range(20):
        noise = 0.5 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1))
        assert (LOSSES[name](logits + noise, target) > least).all()


def by_hand(name: str, p: Sequence[float], q: Sequence[float], drafted: int) -> float:
    """A loss from probabilities: ``p`` of the target for the draft's tokens (it has others), ``q`` the draft's.

    The reply's own token is the draft's token ``drafted``.
    """
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
        TOP_K_LOSS: -sum(a * math.log(b) for a, b in zip(inside, q, strict=True)),  # K is more than all tokens
        REPLY_LOSS: -math.log(q[drafted]),
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
    expected = [by_hand(name, *each) for each in zip(p, q, target.drafted.tolist(), strict=True)]
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


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_top_k_learns_the_likeliest_tokens_by_a_draft_over_all(top_k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits_p, logits_q = (2.0 * torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    target = StepTarget(logits_p, logits_p.logsumexp(-1), torch.zeros(4, dtype=torch.int64))
    expected = []
    for p, q in zip(logits_p.softmax(-1).tolist(), logits_q.softmax(-1).tolist(), strict=True):
        kept = sorted(range(6), key=lambda token: -p[token])[:top_k]
        whole = sum(p[token] for token in kept)
        expected.append(-sum(p[token] / whole * math.log(q[token]) for token in kept))
    assert loss_of(TOP_K_LOSS, top_k)(logits_q, target).tolist() == pytest.approx(expected)
    if top_k == 6:
        assert LOSSES["soft_ce"](logits_q, target).tolist() == pytest.approx(expected)


def test_cross_entropy_to_replies_is_in_the_mean_the_soft_one() -> None:
    """Over the tokens that the target draws, so that both are least at the same draft."""
    generator = torch.Generator().manual_seed(6)
    logits_p, logits_q = (torch.randn(1, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    of_token = [
        LOSSES[REPLY_LOSS](logits_q, StepTarget(logits_p, logits_p.logsumexp(-1), torch.tensor([token])))
        for token in range(5)
    ]
    mean = float((logits_p.softmax(-1)[0] * torch.cat(of_token)).sum())
    soft = LOSSES["soft_ce"](logits_q, StepTarget(logits_p, logits_p.logsumexp(-1), torch.tensor([0])))
    assert mean == pytest.approx(float(soft))


def test_the_settings_name_every_loss() -> None:
    assert set(NAMES) == set(LOSSES)


def test_without_a_loss_the_drafts_family_chooses() -> None:
    assert loss_for(DraftTrainingConfig(), "mtp") == TOP_K_LOSS
    assert {loss_for(DraftTrainingConfig(), family) for family in ("eagle", "eagle3")} == {"total_variation"}
    assert loss_for(DraftTrainingConfig(loss=REPLY_LOSS), "mtp") == REPLY_LOSS


def test_a_number_of_tokens_that_the_loss_does_not_read_is_refused() -> None:
    few = DraftTrainingConfig(loss_top_k=TOP_K // 2)
    check_loss(few, "mtp")
    with pytest.raises(ConfigError, match="no effect on the loss total_variation"):
        check_loss(few, "eagle3")
