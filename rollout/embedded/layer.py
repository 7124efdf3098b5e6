"""A layer holds one decoder block's weights, as the engine packs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from rollout.embedded.linear import PackedLinear


class Weights:
    """Is the base of dataclasses that hold weights: tensors, linears, parts that hold more, and lists of these."""

    def weights(self) -> Iterator[torch.Tensor | PackedLinear]:
        """Yield every weight, in an order that two of the same model share."""
        for each in fields(self):  # type: ignore[arg-type]
            yield from _weights(getattr(self, each.name))

    def move(self, device: torch.device) -> None:
        """Move every weight; only where nothing is packed (CUDA and back)."""
        for each in fields(self):  # type: ignore[arg-type]
            setattr(self, each.name, _moved(getattr(self, each.name), device))


def _weights(value: Any) -> Iterator[torch.Tensor | PackedLinear]:
    match value:
        case torch.Tensor() | PackedLinear():
            yield value
        case Weights():
            yield from value.weights()
        case list():
            for each in value:
                yield from _weights(each)


def _moved(value: Any, device: torch.device) -> Any:
    match value:
        case torch.Tensor():
            return value.to(device)
        case PackedLinear() | Weights():
            value.move(device)
        case list():
            return [_moved(each, device) for each in value]
    return value


@dataclass
class Layer(Weights):
    """Holds a plain block's weights (``ModelSpec.has_plain_blocks``); q, k and v are one matrix, gate and up another.

    Other blocks are ``MixedLayer``.
    """

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
