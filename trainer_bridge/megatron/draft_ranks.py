"""StageRanks are the ranks of the last pipeline stage, which train the draft together.

Each has the draft whole but for its experts, of which each has a part, and learns from replies of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu


class StageRanks:
    """Implements DraftRanks over the tensor and data parallel ranks of this pipeline stage."""

    def __init__(self) -> None:
        self.group = mpu.get_tensor_and_data_parallel_group()
        self.rank, self.size = self.group.rank(), self.group.size()

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def over_all_rows(self, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.size == 1:
            return compute(x)
        counts = torch.zeros(self.size, dtype=torch.int64, device=x.device)
        counts[self.rank] = len(x)
        self.add_up([counts])
        of_ranks: list[int] = counts.tolist()
        rows: torch.Tensor = _AllRows.apply(x, self, of_ranks)
        own: torch.Tensor = _OwnRowsOfSum.apply(compute(rows), self, of_ranks)
        return own

    def rows_of_all(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return the rows [Σ counts, width] of all ranks, of which this one has x [counts[rank], width]."""
        padded = x.new_zeros(max(counts), x.shape[1])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def own_rows_of_sum(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Return this rank's rows of the sum over ranks of x [Σ counts, width]."""
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total.split(list(counts))[self.rank]


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: StageRanks, counts: list[int]) -> torch.Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks.rows_of_all(x, counts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.ranks.own_rows_of_sum(grad, ctx.counts), None, None


class _OwnRowsOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: StageRanks, counts: list[int]) -> torch.Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks.own_rows_of_sum(x, counts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.ranks.rows_of_all(grad, ctx.counts), None, None
