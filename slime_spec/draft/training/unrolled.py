"""The unrolled loss of EAGLE-3's training (arXiv 2503.01840), and by draft position what the draft would bring."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import Loss, StepTarget, acceptance, token_log_ratios
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.unroll import make_unroll


@dataclass(frozen=True)
class Objective:
    """Says what is minimised: Σ ``step_decay``^i · the mean of ``loss`` over the rows of step i, of ``num_steps``."""

    loss: Loss
    num_steps: int
    step_decay: float


@dataclass(frozen=True)
class Quality:
    """Says of every row and step [batch, rows, steps], teacher-forced, what a draft was like; zero where not ``valid``.

    ``valid``: the token that the row's step predicts is in the reply. ``overlap`` is Σ min(p, q), ``hits`` whether the
    argmax is the target's. ``log_ratios`` are log(q / p) of the reply's own token, -inf where the draft cannot name it.
    """

    valid: torch.Tensor
    overlap: torch.Tensor
    hits: torch.Tensor
    log_ratios: torch.Tensor

    @classmethod
    def none(cls, batch: TrainBatch, num_steps: int) -> Quality:
        """Return the quality of steps that are still to be run."""
        shape = (*batch.valid(0).shape, num_steps)
        zeros = torch.zeros(shape, device=batch.starts.device)
        return cls(zeros.bool(), zeros, zeros.bool(), torch.full_like(zeros, -torch.inf))


@dataclass(frozen=True)
class Unrolled:
    """Holds a batch's loss, and without gradient what the draft was like."""

    loss: torch.Tensor
    quality: Quality


def num_learned(model: DraftModel, batch: TrainBatch, num_steps: int) -> torch.Tensor:
    """Return [steps]: the rows that a step's mean is over, whose token is in the reply and argmax in the vocabulary."""
    known = model.vocabulary.t2d.to(batch.argmax.device)[batch.argmax]
    counts = []
    for step in range(num_steps):
        sequence, row = batch.valid(step).nonzero(as_tuple=True)
        counts.append(known[sequence, row + step].sum())
    return torch.stack(counts)


def unrolled_loss(
    model: DraftModel, batch: TrainBatch, objective: Objective, num_rows: torch.Tensor | None = None
) -> Unrolled:
    """Run the unrolled forward, teacher-forced: step i embeds the reply's own token.

    ``num_rows`` [steps] is what the sums of the steps are divided by, where the batch is a part of a larger batch; by
    default the batch's own ``num_learned``.
    """
    num_rows = num_learned(model, batch, objective.num_steps) if num_rows is None else num_rows
    # In float32, also where the network computes in bfloat16: the policy's own logsumexp belongs to these logits.
    with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
        logits_of_replies = model.target_logits(batch.final)
        known = model.vocabulary.t2d.to(batch.argmax.device)[batch.argmax]
        draft_ids = model.vocabulary.draft_ids.to(batch.token_ids.device)
    unroll = make_unroll(model.network, model.embed, batch.starts, batch.num_rows)
    loss = torch.zeros((), device=batch.token_ids.device)
    quality = Quality.none(batch, objective.num_steps)
    for step in range(objective.num_steps):
        if step == 0:
            head_input = unroll.first(batch.features, batch.token_ids)
        else:
            head_input = unroll.next(batch.replies_from(step))
        sequence, row = batch.valid(step).nonzero(as_tuple=True)
        if len(row) == 0:
            break
        # Root reply[row]; step i predicts reply[row + 1 + i], which the target draws at reply position row + i.
        at = (sequence, row + step)
        target = StepTarget(logits_of_replies[at], batch.logsumexp[at], known[at])
        draft_logits = model.logits(head_input[sequence, row])
        learned = (objective.loss(draft_logits, target) * target.counts).sum() / num_rows[step].clamp_min(1)
        loss = loss + objective.step_decay**step * learned
        with torch.no_grad():
            here = (sequence, row, step)
            quality.valid[here] = True
            quality.overlap[here] = acceptance(draft_logits, target)
            quality.hits[here] = model.target_ids(draft_logits.argmax(-1)) == batch.argmax[at]
            drafted = draft_ids[batch.replies_from(step + 1)[sequence, row]]
            quality.log_ratios[here] = token_log_ratios(draft_logits, target, drafted)
    return Unrolled(loss, quality)
