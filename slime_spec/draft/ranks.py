"""Several ranks may train one draft together: each has a part of every batch, and may have a part of the experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

OF_EXPERT = re.compile(r"(?:^|\.)mlp\.experts\.(\d+)\.")


class DraftRanks(Protocol):
    """Are the ranks that train a draft; they call everything here together, in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put into each tensor the sum over the ranks."""

    def over_all_rows(self, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return this rank's rows of the sum over ranks of ``compute``, given the rows [n, width] of all ranks.

        Differentiable: a rank's parameters receive the gradients of all rows.
        """


@dataclass(frozen=True)
class OneRank:
    """Trains a draft alone."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leave the tensors as they are."""

    def over_all_rows(self, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return compute(x)


ONE_RANK = OneRank()


def experts_of(rank: int, size: int, num_experts: int) -> range:
    """Return the experts that one of ``size`` ranks holds: successive ones, as many as others or one more."""
    return range(rank * num_experts // size, (rank + 1) * num_experts // size)


def holder_of(expert: int, size: int, num_experts: int) -> int:
    """Return the rank of ``size`` that holds the expert."""
    return next(rank for rank in range(size) if expert in experts_of(rank, size, num_experts))


def expert_of(name: str) -> int | None:
    """Return the expert that a parameter of this name belongs to, None for one that every rank has."""
    match = OF_EXPERT.search(name)
    return int(match[1]) if match else None
