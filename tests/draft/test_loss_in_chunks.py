"""A batch beyond the bound is judged in chunks: the same numbers and gradients, and no larger tensor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.config.draft_training import REPLY_LOSS
from slime_spec.draft.build import make_network
from slime_spec.draft.network import DraftNetwork
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import LOSSES, loss_of
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.unrolled import Objective, Unrolled, unrolled_loss
from slime_spec.draft.training.vocabulary import DraftVocabulary
from tests.support.tiny_models import make_tiny_checkpoint

HIDDEN, VOCAB, STEPS, RANK = 48, 131, 3, 30
PROMPTS, REPLIES = torch.tensor([3, 1, 4, 2]), torch.tensor([9, 4, 12, 2])
NUM_POSITIONS = int((REPLIES - 1).sum())
TEMPERATURE = 0.9
EMBEDDING, HEAD = torch.randn(2, VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)).unbind()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=4)
    return ModelSpec.from_folder(folder)


@pytest.fixture(
    scope="module",
    params=[("eagle3", 50), ("mtp", VOCAB), ("dspark", VOCAB), ("dspark", 50), ("dspark with a recurrent head", VOCAB)],
    ids=["own head", "the target's head", "a bias beside it", "a bias of some tokens", "a recurrent bias"],
)
def model(request: pytest.FixtureRequest, target: ModelSpec) -> DraftModel:
    family, size = request.param
    block = replace(target, num_layers=1)
    if family == "mtp":
        spec = DraftSpec("mtp", block, HIDDEN, VOCAB, hidden_first=True, recurrent_norm=True, zero_first_embedding=True)
    elif family.startswith("dspark"):
        qwen3 = replace(block, architecture="Qwen3ForCausalLM", qk_norm=True)
        spec = DraftSpec("dspark", qwen3, HIDDEN, VOCAB, capture_layers=(0, 1), block_size=STEPS)
        kind = "rnn" if "recurrent" in family else "vanilla"
        spec = replace(spec, mask_token_id=7, drafts_from_root=True, markov_rank=RANK, markov_kind=kind)
    else:
        spec = DraftSpec("eagle3", block, HIDDEN, size, capture_layers=(0, 1, 2), has_own_head=True)
    generator = torch.Generator().manual_seed(1)
    network = make_network(spec)
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randperm(VOCAB, generator=generator)[:size].sort().values
    return DraftModel(network, EMBEDDING, HEAD[ids], DraftVocabulary(ids, VOCAB), TEMPERATURE)


@pytest.fixture(scope="module")
def batch(model: DraftModel) -> TrainBatch:
    """Replies of different lengths, in one of them a single token to predict."""
    generator = torch.Generator().manual_seed(2)
    longest, width = int((PROMPTS + REPLIES).max()), model.network.spec.feature_size
    final = 0.3 * torch.randn(4, int(REPLIES.max()), HIDDEN, generator=generator)
    logits = final @ HEAD.T / TEMPERATURE
    return TrainBatch(
        token_ids=torch.randint(0, VOCAB, (4, longest), generator=generator),
        features=torch.randn(4, longest, width, generator=generator),
        starts=PROMPTS - 1,
        reply_lens=REPLIES,
        final=final,
        argmax=logits.argmax(-1),
        logsumexp=logits.logsumexp(-1),
    )


def learned(
    model: DraftModel, batch: TrainBatch, objective: Objective, autocast: bool = False
) -> tuple[Unrolled, dict[str, torch.Tensor]]:
    """The loss of a batch and its gradients."""
    network: DraftNetwork = model.network
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unrolled = unrolled_loss(model, batch, objective)
    unrolled.loss.backward()
    return unrolled, {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


def objective_of(name: str, **options: Any) -> Objective:
    return Objective(loss_of(name, 7), STEPS, 0.8, learns_replies=name == REPLY_LOSS, **options)


def bytes_of_rows(model: DraftModel, rows: int) -> int:
    return 4 * rows * len(model.vocabulary.target_ids)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 5, NUM_POSITIONS - 1])
def test_chunks_make_the_same_loss_quality_and_gradients(
    rows: int, name: str, autocast: bool, model: DraftModel, batch: TrainBatch
) -> None:
    objective = objective_of(name)
    whole, expected = learned(model, batch, objective, autocast)
    chunked, found = learned(model, batch, replace(objective, max_logits_bytes=bytes_of_rows(model, rows)), autocast)
    # A product of other shapes may sum in another order; in bfloat16 that may round once more.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(chunked.loss, whole.loss, **tolerance)
    for field in ("valid", "overlap", "log_ratios"):
        torch.testing.assert_close(getattr(chunked.quality, field), getattr(whole.quality, field), **tolerance)
    assert (chunked.quality.hits != whole.quality.hits).sum() <= (1 if autocast else 0)
    assert found.keys() == expected.keys()
    for each, gradient in found.items():
        scale = float(expected[each].abs().max())
        assert scale > 0.0
        torch.testing.assert_close(gradient / scale, expected[each] / scale, **tolerance)


def test_chunks_make_the_same_gradients_of_paced_positions(model: DraftModel, batch: TrainBatch) -> None:
    objective = objective_of(REPLY_LOSS, paces=True)
    whole, expected = learned(model, batch, objective)
    chunked, found = learned(model, batch, replace(objective, max_logits_bytes=bytes_of_rows(model, 5)))
    torch.testing.assert_close(chunked.loss, whole.loss)
    for each, gradient in found.items():
        torch.testing.assert_close(gradient, expected[each], rtol=1e-4, atol=1e-5)


def test_under_no_grad_chunks_judge_alike(model: DraftModel, batch: TrainBatch) -> None:
    objective = Objective(LOSSES["total_variation"], STEPS, 1.0)
    with torch.no_grad():
        whole, chunked = (
            unrolled_loss(model, batch, replace(objective, max_logits_bytes=bound))
            for bound in (2**28, bytes_of_rows(model, 4))
        )
    torch.testing.assert_close(chunked.loss, whole.loss)
    torch.testing.assert_close(chunked.quality.overlap, whole.quality.overlap)


class Largest(TorchDispatchMode):
    """Records the most rows of all tensors over the vocabulary, but for those of a head, [hidden or rank, vocab]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows, self.num_tensors = width, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.shape[1:] == (self.width,)
                and len(tensor) not in (HIDDEN, RANK)
            ):
                self.rows = max(self.rows, len(tensor))
                self.num_tensors += 1
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_over_the_vocabulary_has_more_rows_than_the_bound(
    name: str, model: DraftModel, batch: TrainBatch
) -> None:
    width = len(model.vocabulary.target_ids)
    objective = objective_of(name, max_logits_bytes=bytes_of_rows(model, 5))
    with Largest(width) as bounded:
        learned(model, batch, objective)
    with Largest(width) as unbounded:
        learned(model, batch, replace(objective, max_logits_bytes=2**28))
    assert (bounded.rows, unbounded.rows) == (5, NUM_POSITIONS)
    assert bounded.num_tensors > NUM_POSITIONS  # the backward pass is seen too
