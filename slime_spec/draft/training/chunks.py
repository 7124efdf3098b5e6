"""Judge what a draft predicts in chunks of the replies' positions, so that no tensor [positions, vocabulary] is large.

A loss has several such tensors: of 16 replies of 512 tokens over a vocabulary of 151,680 each is 5 GB. Position t of a
reply is where the target draws its token t + 1; step i of row t - i predicts it. A chunk has the target's logits of its
positions once, for all steps:

    forward     chunk by chunk: the target's logits, of each step the draft's; of these the losses alone are kept
    backward    chunk by chunk: the same logits once more, and of each step the gradient, by itself

A batch of one chunk is judged as it is, and computes no logits twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from slime_spec.config.draft_training import MAX_LOGITS_BYTES
from slime_spec.draft.training.batch import TrainBatch
from slime_spec.draft.training.loss import Loss, StepTarget, acceptance, token_log_ratios
from slime_spec.draft.training.model import DraftModel
from slime_spec.draft.training.quality import Quality

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Positions:
    """Lists n positions of a batch's replies, and of each what the target knows.

    ``sequence`` and ``place`` [n] say whose reply and where in it, ``final`` [n, hidden], ``logsumexp`` and ``argmax``
    [n] are as of a TrainBatch. ``drafted`` [n] are the draft's ids of the replies' tokens there, -1 where it has none;
    ``known`` [n] says that it has one of the argmax.
    """

    sequence: torch.Tensor
    place: torch.Tensor
    final: torch.Tensor
    logsumexp: torch.Tensor
    argmax: torch.Tensor
    drafted: torch.Tensor
    known: torch.Tensor

    @classmethod
    def of(cls, model: DraftModel, batch: TrainBatch) -> Positions:
        """List every position of the batch, sequence by sequence."""
        sequence, place = batch.valid(0).nonzero(as_tuple=True)
        at = (sequence, place)
        ids = model.vocabulary.draft_ids.to(batch.argmax.device)
        argmax, drafted = batch.argmax[at], ids[batch.replies_from(1)[at]]
        return cls(sequence, place, batch.final[at], batch.logsumexp[at], argmax, drafted, ids[argmax] >= 0)

    def __len__(self) -> int:
        return len(self.place)

    def split(self, size: int) -> Iterator[Positions]:
        """Yield the positions in chunks of at most ``size``."""
        parts = zip(*(getattr(self, name).split(size) for name in self.__dataclass_fields__), strict=True)
        yield from (Positions(*each) for each in parts)

    def of_step(self, step: int) -> torch.Tensor:
        """Return bool [n]: a row's ``step`` predicts the position; nothing is drafted behind a row before the first."""
        return self.place >= step

    def rows_of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sequence, row), each [m], of the rows whose ``step`` predicts one of the positions."""
        here = self.of_step(step)
        return self.sequence[here], self.place[here] - step

    def target(self, model: DraftModel) -> StepTarget:
        """Compute the target's distribution; in fp32, for the policy's own logsumexp belongs to these logits."""
        with torch.no_grad(), torch.autocast(self.final.device.type, enabled=False):
            logits = model.target_logits(self.final)
        return StepTarget(logits, self.logsumexp, self.drafted)


@dataclass(frozen=True)
class Chunk:
    """Judges what a draft predicts at some positions; ``quality`` takes down, in a forward pass, what it is like."""

    model: DraftModel
    loss: Loss
    positions: Positions
    quality: Quality

    def losses(self, of_steps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return a loss by row for each step's head inputs [rows, hidden], and take down the quality."""
        target = self.positions.target(self.model)
        return tuple(self._judged(step, rows, target) for step, rows in enumerate(of_steps))

    def _judged(self, step: int, head_input: torch.Tensor, of_chunk: StepTarget) -> torch.Tensor:
        positions, here = self.positions, self.positions.of_step(step)
        target = of_chunk if step == 0 else of_chunk.of(here)
        draft_logits = self.model.logits(head_input)
        losses = self.loss(draft_logits, target)
        with torch.no_grad():
            is_hit = self.model.target_ids(draft_logits.argmax(-1)) == positions.argmax[here]
            at = (*positions.rows_of(step), step)
            self.quality.note(at, acceptance(draft_logits, target), is_hit, token_log_ratios(draft_logits, target))
        return losses

    def gradients(
        self, of_steps: Sequence[torch.Tensor], of_losses: Sequence[torch.Tensor], autocast: AbstractContextManager[Any]
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of ``head_weight``, None where the draft has none, and of each step's head inputs."""
        head, whole = self.model.network.head_weight, self.positions.target(self.model)
        if head is not None and not head.requires_grad:
            head = None
        of_head, found = None, []
        for step, (rows, of_loss) in enumerate(zip(of_steps, of_losses, strict=True)):
            target = whole if step == 0 else whole.of(self.positions.of_step(step))
            inputs = rows.detach().requires_grad_()
            with torch.enable_grad(), autocast:
                losses = self.loss(self.model.logits(inputs), target)
            wanted = [inputs] if head is None else [inputs, head]
            of_inputs, *more = torch.autograd.grad(losses, wanted, of_loss)
            found.append(of_inputs)
            for each in more:
                of_head = each if of_head is None else of_head.add_(each)
        return (of_head, *found)


class _Recomputed(torch.autograd.Function):
    """Keeps of a chunk's forward pass the losses and what they were computed from, and no logits."""

    @staticmethod
    def forward(ctx: Any, chunk: Chunk, head: torch.Tensor | None, *of_steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kind = of_steps[0].device.type
        ctx.chunk = chunk
        # Without its cache: a head that was rounded for one step's graph would be asked for another's gradient.
        dtype, is_enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.autocast = torch.autocast(kind, dtype, enabled=is_enabled, cache_enabled=False)
        ctx.save_for_backward(*of_steps)
        return chunk.losses(of_steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.chunk.gradients(ctx.saved_tensors, of_losses, ctx.autocast))


def losses_of_steps(
    model: DraftModel,
    loss: Loss,
    positions: Positions,
    head_inputs: Sequence[torch.Tensor],
    quality: Quality,
    max_bytes: int = MAX_LOGITS_BYTES,
) -> list[torch.Tensor]:
    """Return by step the losses [rows] of the rows that predict a position, in the positions' order.

    ``head_inputs`` [batch, rows, hidden] are by step. A tensor of logits has at most ``max_bytes``, or one row.
    """
    of_steps = [states[positions.rows_of(step)] for step, states in enumerate(head_inputs)]
    size = max(1, max_bytes // (FLOAT32_BYTES * len(model.vocabulary.target_ids)))
    if len(positions) <= size:
        return list(Chunk(model, loss, positions, quality).losses(of_steps))
    parts = list(positions.split(size))
    sizes = [[int(part.of_step(step).sum()) for part in parts] for step in range(len(of_steps))]
    split = [rows.split(each) for rows, each in zip(of_steps, sizes, strict=True)]
    found = [
        _Recomputed.apply(Chunk(model, loss, part, quality), model.network.head_weight, *rows)
        for part, *rows in zip(parts, *split, strict=True)
    ]
    return [torch.cat(each) for each in zip(*found, strict=True)]
