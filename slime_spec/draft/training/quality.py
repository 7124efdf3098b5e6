"""What a draft was like in a batch, by row and draft position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slime_spec.draft.training.batch import TrainBatch


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

    def note(
        self,
        at: tuple[torch.Tensor, torch.Tensor, int],
        overlap: torch.Tensor,
        hits: torch.Tensor,
        log_ratios: torch.Tensor,
    ) -> None:
        """Take down n rows of a step, ``at`` (sequence [n], row [n], step)."""
        self.valid[at] = True
        self.overlap[at] = overlap
        self.hits[at] = hits
        self.log_ratios[at] = log_ratios
