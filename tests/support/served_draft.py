"""Stand-ins for a draft on a server and for SGLang's updater of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

EMBEDDING = "embed_tokens.weight"


class DraftModel(torch.nn.Module):
    """Own tensors, the target's embedding, and a table that is neither parameter nor buffer."""

    def __init__(self, target: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.embed_tokens = target
        self.own = torch.nn.ParameterDict({name.replace(".", "/"): each.clone() for name, each in tensors.items()})
        self.hot_token_id = torch.arange(3)

    def state(self) -> dict[str, torch.Tensor]:
        return {name.replace("/", "."): each.detach().clone() for name, each in self.own.items()}


@dataclass
class Updater:
    """What of SGLang's updater the plug-in uses."""

    tp_worker: Any
    draft_worker: Any
    tp_cpu_group: Any
    memory_saver_adapter: Any = field(default_factory=lambda: SimpleNamespace(enabled=True))
    offload_tags: set[str] = field(default_factory=set)

    @property
    def draft(self) -> DraftModel:
        draft: DraftModel = self.draft_worker.weight_update_runners()[0][1].model
        return draft

    def quantize(self, method: str) -> None:
        self.draft_worker.weight_update_runners()[0][1].model_config.quantization = method

    @property
    def target(self) -> torch.nn.Module:
        target: torch.nn.Module = self.tp_worker.model_runner.model
        return target


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
