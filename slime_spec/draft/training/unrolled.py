"""The unrolled loss of EAGLE-3's training (arXiv 2503.01840), and by draft position what the draft would bring."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.chunks import MAX_LOGITS_BYTES, Positions, losses_of_steps
from slime_spec.draft.training.loss import Loss
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.quality import Quality
from slime_spec.draft.unroll import Unroll


@dataclass(frozen=True)
class Objective:
    """Says what is minimised: Σ ``step_decay``^i · the mean of ``loss`` over the rows of step i, of ``num_steps``.

    The mean is over the rows that the draft can learn from: of a loss that ``learns_replies`` it can name the reply's
    own token, else the target's argmax. No tensor of logits has more than ``max_logits_bytes``.
    """

    loss: Loss
    num_steps: int
    step_decay: float
    max_logits_bytes: int = MAX_LOGITS_BYTES
    learns_replies: bool = False

    def counts(self, positions: Positions) -> torch.Tensor:
        """Return bool [n]: the mean counts what is predicted at the position."""
        return positions.drafted >= 0 if self.learns_replies else positions.known


@dataclass(frozen=True)
class Unrolled:
    """Holds a batch's loss, and without gradient what the draft was like."""

    loss: torch.Tensor
    quality: Quality


def num_learned(model: DraftModel, batch: TrainBatch, objective: Objective) -> torch.Tensor:
    """Return [steps]: the rows that a step's mean is over."""
    positions = Positions.of(model, batch)
    counts = objective.counts(positions)
    return torch.stack([counts[positions.of_step(step)].sum() for step in range(objective.num_steps)])


def unrolled_loss(
    model: DraftModel, batch: TrainBatch, objective: Objective, num_rows: torch.Tensor | None = None
) -> Unrolled:
    """Run the unrolled forward, teacher-forced: step i embeds the reply's own token.

    ``num_rows`` [steps] is what the sums of the steps are divided by, where the batch is a part of a larger batch; by
    default the batch's own ``num_learned``.
    """
    num_rows = num_learned(model, batch, objective) if num_rows is None else num_rows
    quality = Quality.none(batch, objective.num_steps)
    states = _head_inputs(model, batch, objective.num_steps)
    positions = Positions.of(model, batch)
    losses = losses_of_steps(model, objective.loss, positions, states, quality, objective.max_logits_bytes)
    counts = objective.counts(positions)
    total = torch.zeros((), device=batch.token_ids.device)
    for step, of_rows in enumerate(losses):
        learned = (of_rows * counts[positions.of_step(step)]).sum() / num_rows[step].clamp_min(1)
        total = total + objective.step_decay**step * learned
    return Unrolled(total, quality)


def _head_inputs(model: DraftModel, batch: TrainBatch, num_steps: int) -> list[torch.Tensor]:
    """Return [batch, rows, hidden] by step, of the steps that predict a token of the longest reply."""
    unroll = Unroll(model.network, model.embed, batch.starts, batch.num_rows)
    states = []
    for step in range(min(num_steps, batch.num_rows)):
        if step == 0:
            states.append(unroll.first(batch.features, batch.token_ids))
        else:
            states.append(unroll.next(batch.replies_from(step)))
    return states
