"""HostAdamW is AdamW with its moments in host memory, where it also computes: ``--optimizer-cpu-offload``.

Megatron's own hybrid optimizer cannot stand in: it takes apart parameters on a GPU alone, and fails on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class HostAdamW(torch.optim.Optimizer):
    """Updates parameters of any device, one after the other: two copies of one parameter pass between the devices."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__([{"params": []}], defaults={})
        # torch takes no views, and a distributed optimizer's shards of float32 parameters are views of these.
        self.param_groups = list(groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros(parameter.shape, dtype=torch.float32)
            state.update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
        updated = parameter.detach().cpu()
        adamw(
            [updated],
            [parameter.grad.cpu()],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(updated)
