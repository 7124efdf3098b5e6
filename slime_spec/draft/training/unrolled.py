"""The unrolled loss of EAGLE-3's training (arXiv 2503.01840), and by draft position what the draft would bring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from slime_spec.config.draft_training import MAX_LOGITS_BYTES
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.chunks import Positions, losses_of_steps
from slime_spec.draft.training.loss import Loss
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.quality import Quality
from slime_spec.draft.unroll import make_unroll

D_PACE_ALPHA = 0.5  # the paper's


@dataclass(frozen=True)
class Objective:
    """Says what is minimised: Σ ``step_decay``^i · the mean of ``loss`` over the rows of step i, of ``num_steps``.

    With ``paces`` it is the mean over rounds of Σ w_i · ``loss``, w the weights of D-PACE, the loss cross-entropy.
    The mean is over the rows that the draft can learn from: of a loss that ``learns_replies`` it can name the reply's
    own token, else the target's argmax. No tensor of logits has more than ``max_logits_bytes``.
    """

    loss: Loss
    num_steps: int
    step_decay: float
    max_logits_bytes: int = MAX_LOGITS_BYTES
    learns_replies: bool = False
    paces: bool = False

    def __post_init__(self) -> None:
        assert self.learns_replies or not self.paces, "the draft's confidence is its probability of the reply's tokens"

    def counts(self, positions: Positions) -> torch.Tensor:
        """Return bool [n]: the mean counts what is predicted at the position."""
        return positions.drafted >= 0 if self.learns_replies else positions.known


@dataclass(frozen=True)
class Unrolled:
    """Holds a batch's loss, and without gradient what the draft was like."""

    loss: torch.Tensor
    quality: Quality


def num_learned(model: DraftModel, batch: TrainBatch, objective: Objective) -> torch.Tensor:
    """Return [steps]: the rows that a step's mean is over; with ``paces`` the rounds, for each step."""
    positions = Positions.of(model, batch)
    if objective.paces:
        return torch.full((objective.num_steps,), len(positions), device=batch.starts.device)
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
    total = torch.zeros((), device=batch.token_ids.device)
    for step, weighted in enumerate(_weighted(objective, positions, losses, quality)):
        total = total + weighted.sum() / num_rows[step].clamp_min(1)
    if model.network.is_spread:
        # A rank whose replies are shorter than others', or that has none, goes the whole way back with them.
        total = total + 0.0 * sum(each.sum() for each in states)
    return Unrolled(total, quality)


def _weighted(
    objective: Objective, positions: Positions, losses: Sequence[torch.Tensor], quality: Quality
) -> Iterator[torch.Tensor]:
    """Yield by step the rows' losses, each times what it weighs."""
    counts = objective.counts(positions)
    rows = [positions.rows_of(step) for step in range(len(losses))]
    weights = _paces(rows, [loss.detach() for loss in losses], quality) if objective.paces else None
    for step, of_rows in enumerate(losses):
        own = of_rows * counts[positions.of_step(step)]
        yield own * (objective.step_decay**step if weights is None else weights[(*rows[step], step)])


def _paces(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], losses: Sequence[torch.Tensor], quality: Quality
) -> torch.Tensor:
    """Return [batch, rows, steps]: D-PACE's weights from the rows' losses, which are -log of the draft's confidence."""
    confidence = torch.zeros_like(quality.overlap)
    for step, of_rows in enumerate(losses):
        confidence[(*rows[step], step)] = (-of_rows).exp()
    # A token that the draft cannot name it drafts with probability 0; its row's loss says nothing.
    return d_pace_weights(confidence.masked_fill(quality.log_ratios.isinf(), 0.0), quality.valid)


def d_pace_weights(confidence: torch.Tensor, inside: torch.Tensor, alpha: float = D_PACE_ALPHA) -> torch.Tensor:
    """Return [..., steps]: w_j = Σ_{m ≥ j} Π_{i ≤ m} ((1 - α) q_i + α) over the steps of a round.

    That is D-PACE (arXiv 2605.18810, equations 7 and 8). ``confidence`` q is the draft's probability of the reply's
    token at each step, ``inside`` says which steps are in the reply, the first ones. Π q is the chance that the drafts
    up to a step stand, their sum the expected accepted length, and w_j its derivative by log q_j; α keeps weight on
    steps behind a token of which the draft is not sure.
    """
    reached = ((1 - alpha) * confidence + alpha).cumprod(-1) * inside
    return reached.flip(-1).cumsum(-1).flip(-1)


def _head_inputs(model: DraftModel, batch: TrainBatch, num_steps: int) -> list[torch.Tensor]:
    """Return [batch, rows, hidden] by step, of the steps that predict a token of the longest reply.

    Ranks that compute them together go through all.
    """
    unroll = make_unroll(model.network, model.embed, batch.starts, batch.num_rows)
    states: list[torch.Tensor] = []
    for step in range(num_steps if model.network.is_spread else min(num_steps, batch.num_rows)):
        if step == 0:
            states.append(unroll.first(batch.features, batch.token_ids))
        else:
            states.append(unroll.next(batch.replies_from(step)))
    return states
