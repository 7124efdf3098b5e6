"""What an update of a draft has of logits at once: the plan's numbers against the tensors of a real one."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slime_spec.checkpoints.draft_spec import DraftSpec
from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.draft.build import make_network
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import LOSSES
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.trainer import TrainSettings
from slime_spec.draft.training.unrolled import unrolled_loss
from slime_spec.draft.training.vocabulary import DraftVocabulary
from slime_spec.preflight.draft_memory import logits_bytes
from tests.support.tiny_models import make_tiny_checkpoint

HIDDEN, VOCAB, REPLIES, ROWS = 48, 2000, 2, 20
NUM_ROWS = REPLIES * ROWS
WHOLE, IN_CHUNKS = 2**28, 4 * VOCAB * NUM_ROWS // 4


class Logits(TorchDispatchMode):
    """Adds up the tensors of logits that exist at a time, a head's [vocab, hidden] left out, and knows the most."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[1:] == (VOCAB,) and len(tensor) <= NUM_ROWS:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DraftModel:
    folder: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=1)
    block = replace(ModelSpec.from_folder(folder), vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(0)
    network = make_network(DraftSpec("mtp", block, HIDDEN, VOCAB, hidden_first=True, recurrent_norm=True))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    head = 0.2 * torch.randn(VOCAB, HIDDEN, generator=generator)
    return DraftModel(network, head, head, DraftVocabulary(torch.arange(VOCAB), VOCAB))


@pytest.fixture(scope="module")
def batch(model: DraftModel) -> TrainBatch:
    generator = torch.Generator().manual_seed(1)
    final = torch.randn(REPLIES, ROWS, HIDDEN, generator=generator)
    logits = final @ model.target_head.T
    return TrainBatch(
        token_ids=torch.randint(0, VOCAB, (REPLIES, ROWS + 5), generator=generator),
        features=torch.randn(REPLIES, ROWS + 5, HIDDEN, generator=generator),
        starts=torch.full((REPLIES,), 3),
        reply_lens=torch.full((REPLIES,), ROWS + 1),
        final=final,
        argmax=logits.argmax(-1),
        logsumexp=logits.logsumexp(-1),
    )


@pytest.mark.parametrize("bound", [WHOLE, IN_CHUNKS], ids=["whole", "in chunks"])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_at_once_are_what_the_plan_says(
    loss: str, num_steps: int, bound: int, model: DraftModel, batch: TrainBatch
) -> None:
    objective = replace(TrainSettings(num_steps=num_steps, loss=loss).objective, max_logits_bytes=bound)
    model.network.zero_grad()
    with Logits() as logits:
        unrolled_loss(model, batch, objective).loss.backward()
    planned = logits_bytes(loss, NUM_ROWS, VOCAB, num_steps, bound)
    assert logits.peak_bytes <= planned <= 1.3 * logits.peak_bytes
