"""The trainer makes optimizer steps: EAGLE-3's unrolled loss, AdamW in fp32, warm-up and cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import LOSSES, StepTarget, acceptance, masked_mean
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.unroll import Unroll
from slime_spec.errors import TrainingError


@dataclass(frozen=True)
class TrainSettings:
    """Holds SpecForge's recipe with a larger ``lr`` and a smaller ``num_steps``, for a small head and short drafts.

    ``batch_size`` counts sequences. ``autocast`` computes the network in bfloat16 (weights and moments stay fp32).
    """

    num_steps: int = 5
    epochs: int = 8
    batch_size: int = 8
    lr: float = 1e-3
    warmup_ratio: float = 0.015
    clip_grad: float = 0.5
    step_decay: float = 0.8
    loss: str = "soft_ce"
    seed: int = 0
    autocast: bool = False


@dataclass(frozen=True)
class StepReport:
    """Reports a step: ``acceptance`` is Σ min(p, q) of draft step 0, ``accuracy`` the share of right argmaxes."""

    loss: float
    acceptance: float
    accuracy: float
    grad_norm: float
    lr: float


class DraftTrainer:
    """Owns a draft's parameters and their moments. Example::

    trainer = DraftTrainer(model, settings, num_updates=1000)
    report = trainer.step(batch)
    torch.save(trainer.state(), path)
    """

    def __init__(self, model: DraftModel, settings: TrainSettings, num_updates: int) -> None:
        self.model, self.settings, self.num_updates, self.step_number = model, settings, num_updates, 0
        # The draft's own embedding, if there is one, is a copy of the target's and is not trained.
        self._parameters = [each for name, each in model.network.named_parameters() if "embed_tokens" not in name]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, batch: TrainBatch) -> StepReport:
        """Make one update; raises TrainingError and keeps the weights where the gradient is not finite."""
        lr = learning_rate(self.step_number, self.num_updates, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self.settings.autocast):
            loss, accepted, accuracy = unrolled_loss(self.model, batch, self.settings)
        loss.backward()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_grad))
        if not math.isfinite(grad_norm):
            raise TrainingError(f"the draft's gradient is not finite at update {self.step_number}: lower --lr")
        self._optimizer.step()
        self.step_number += 1
        return StepReport(float(loss.detach()), float(accepted), float(accuracy), grad_norm, lr)

    def state(self) -> dict[str, Any]:
        """Return the state from which ``load_state`` resumes, bit for bit."""
        return {
            "step_number": self.step_number,
            "num_updates": self.num_updates,
            "network": self.model.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step_number = state["step_number"]
        self.model.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])


def learning_rate(step: int, num_updates: int, settings: TrainSettings) -> float:
    """Return the rate: linear warm-up over ``warmup_ratio`` of the updates, then a cosine to zero."""
    warmup = max(1, round(settings.warmup_ratio * num_updates))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_updates - warmup)))


def unrolled_loss(
    model: DraftModel, batch: TrainBatch, settings: TrainSettings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss, acceptance and accuracy of step 0): Σ step_decay^i · mean over the rows of step i that count.

    Drafts are teacher-forced: step i embeds the reply's own token. A row counts where the token it predicts is in the
    reply and the target's argmax is in the draft vocabulary; accuracy and acceptance are over all rows of the reply.
    """
    per_row = LOSSES[settings.loss]
    with torch.no_grad():
        logits_of_replies = model.target_logits(batch.final)
        in_vocabulary = model.vocabulary.t2d.to(batch.argmax.device)[batch.argmax]
    unroll = Unroll(model.network, model.embedding, batch.starts, batch.num_rows)
    loss = torch.zeros((), device=batch.token_ids.device)
    first = (loss, loss)
    for step in range(settings.num_steps):
        if step == 0:
            head_input = unroll.first(batch.features, batch.token_ids)
        else:
            head_input = unroll.next(batch.replies_from(step))
        sequence, row = batch.valid(step).nonzero(as_tuple=True)
        if len(row) == 0:
            break
        # Root reply[row]; step i predicts reply[row + 1 + i], which the target draws at reply position row + i.
        at = (sequence, row + step)
        target = StepTarget(logits_of_replies[at], batch.logsumexp[at], in_vocabulary[at])
        draft_logits = model.logits(head_input[sequence, row])
        loss = loss + settings.step_decay**step * masked_mean(per_row(draft_logits, target), target.counts)
        if step == 0:
            first = _quality(model, draft_logits.detach(), target, batch.argmax[at])
    return loss, *first


@torch.no_grad()
def _quality(
    model: DraftModel, draft_logits: torch.Tensor, target: StepTarget, argmax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hits = model.target_ids(draft_logits.argmax(-1)) == argmax
    return acceptance(draft_logits, target).mean(), hits.float().mean()
