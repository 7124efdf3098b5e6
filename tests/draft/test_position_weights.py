"""D-PACE (arXiv 2605.18810): a position weighs what its confidence adds to the expected accepted length."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import DraftTrainingConfig, check_loss
from slime_spec.draft.build import make_network
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import StepTarget
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.trainer import TrainSettings
from slime_spec.draft.training.unrolled import d_pace_weights, num_learned, unrolled_loss
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.errors import ConfigError
from tests.support.tiny_models import make_tiny_checkpoint

HIDDEN, VOCAB, KNOWN, ALPHA = 48, 131, 90, 0.5
REPLY_LENS = torch.tensor([6, 3])
SETTINGS = TrainSettings(num_steps=3, loss="cross_entropy", position_weights="d_pace")


def by_sums(confidence: list[float], alpha: float) -> list[float]:
    """Equations 7 and 8, term by term."""
    smooth = [(1 - alpha) * q + alpha for q in confidence]
    weights = []
    for j in range(len(smooth)):
        weight = 0.0
        for m in range(j, len(smooth)):
            product = 1.0
            for i in range(m + 1):
                product *= smooth[i]
            weight += product
        weights.append(weight)
    return weights


def test_weights_are_the_sums_of_products_of_the_paper() -> None:
    confidence = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = d_pace_weights(confidence, torch.ones(5, 4, dtype=torch.bool), 0.3)
    for row, found in zip(confidence.tolist(), weights.tolist(), strict=True):
        assert found == pytest.approx(by_sums(row, 0.3))


def test_steps_beyond_the_reply_add_nothing() -> None:
    confidence = torch.tensor([[0.2, 0.9, 0.7, 0.4]])
    inside = torch.tensor([[True, True, False, False]])
    assert d_pace_weights(confidence, inside)[0].tolist() == pytest.approx([*by_sums([0.2, 0.9], ALPHA), 0.0, 0.0])


def test_without_smoothing_a_weight_is_the_derivative_of_the_expected_length_by_the_log_of_its_confidence() -> None:
    log_q = torch.log(torch.tensor([0.8, 0.3, 0.6], dtype=torch.float64)).requires_grad_()
    log_q.exp().cumprod(-1).sum().backward()
    assert log_q.grad is not None
    weights = d_pace_weights(log_q.detach().exp(), torch.ones(3, dtype=torch.bool), alpha=0.0)
    assert weights.tolist() == pytest.approx(log_q.grad.tolist())


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[DraftModel, TrainBatch]:
    """A random draft of some of the target's tokens, and two replies, of which a token is none of them."""
    folder: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=4)
    block = replace(ModelSpec.from_folder(folder), num_layers=1)
    network = make_network(DraftSpec("eagle3", block, HIDDEN, KNOWN, capture_layers=(0, 1, 2), has_own_head=True))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    vocabulary = DraftVocabulary(torch.arange(KNOWN), VOCAB)
    token_ids = torch.randint(0, KNOWN, (2, 9), generator=generator)
    token_ids[0, 6] = KNOWN + 5
    batch = TrainBatch(
        token_ids=token_ids,
        features=torch.randn(2, 9, 3 * HIDDEN, generator=generator),
        starts=torch.tensor([2, 1]),
        reply_lens=REPLY_LENS,
        final=torch.randn(2, 6, HIDDEN, generator=generator),
        argmax=torch.randint(0, VOCAB, (2, 6), generator=generator),
        logsumexp=torch.zeros(2, 6),
    )
    return DraftModel(network, embedding, head[:KNOWN], vocabulary), batch


def test_the_loss_is_the_mean_over_rounds_of_weighted_cross_entropies(lesson: tuple[DraftModel, TrainBatch]) -> None:
    """A token that the draft cannot name stands with probability 0, and is not learned from."""
    model, batch = lesson
    quality = unrolled_loss(model, batch, SETTINGS.objective).quality
    logits = batch.final @ model.target_head.T
    total, rounds = 0.0, 0
    for b, length in enumerate(REPLY_LENS.tolist()):
        start = int(batch.starts[b]) + 1
        for row in range(length - 1):
            rounds += 1
            log_q = []
            for step in range(min(3, length - 1 - row)):
                token = int(batch.token_ids[b, start + row + 1 + step])
                log_p = float(logits[b, row + step, token]) if token < KNOWN else 0.0
                log_q.append(float(quality.log_ratios[b, row, step]) + log_p)
            confidence = torch.tensor(log_q).exp().tolist()
            weights = by_sums(confidence, ALPHA)
            total -= sum(w * each for w, each in zip(weights, log_q, strict=True) if each > -torch.inf)
    found = unrolled_loss(model, batch, SETTINGS.objective).loss
    assert float(found.detach()) == pytest.approx(total / rounds, rel=1e-5)
    assert num_learned(model, batch, SETTINGS.objective).tolist() == [rounds] * 3


def test_the_weights_themselves_are_not_learned(lesson: tuple[DraftModel, TrainBatch]) -> None:
    """A row's loss has its weight as gradient, and no other: as if the weights were given."""
    model, batch = lesson
    own: list[torch.Tensor] = []

    def half(draft_logits: torch.Tensor, target: StepTarget) -> torch.Tensor:
        own.append(torch.full((len(draft_logits),), math.log(2.0), requires_grad=True))
        return own[-1]

    unrolled_loss(model, batch, replace(SETTINGS.objective, loss=half)).loss.backward()
    of_second = slice(5, 7)  # rows of the second reply, all of whose tokens the draft can name
    assert own[0].grad is not None
    assert own[1].grad is not None
    expected = by_sums([0.5, 0.5], ALPHA)
    assert own[0].grad[of_second].tolist() == pytest.approx([expected[0] / 7, by_sums([0.5], ALPHA)[0] / 7])
    assert own[1].grad[4:].tolist() == pytest.approx([expected[1] / 7])


def test_paces_are_of_cross_entropy_and_have_no_decay_beside_them() -> None:
    paced = DraftTrainingConfig(position_weights="d_pace", loss="cross_entropy")
    check_loss(paced, "mtp")
    with pytest.raises(ConfigError, match="of the loss cross_entropy, and this draft learns by top_k_soft_ce"):
        check_loss(replace(paced, loss=None), "mtp")
    with pytest.raises(ConfigError, match="no effect beside"):
        check_loss(replace(paced, step_decay=0.5), "mtp")
