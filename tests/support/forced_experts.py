"""Transformers' models with experts, told which experts to give each token to, in plain torch; and what they choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from slime_spec.checkpoints.model_spec import ModelSpec
from slime_spec.routed_experts import Ids


class Routing:
    """Notes at each pass which experts every router chose, [tokens, layers, chosen] in ``choices``; may force others.

    ``forced`` are ids of the first tokens of a pass, [tokens, layers, chosen]; tokens after them are routed as ever.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        assert spec.experts is not None
        self._kind, self._layers = spec.experts, spec.experts.layers(spec.num_layers)
        self._model, self._logits = model, dict[int, torch.Tensor]()
        self._chosen: dict[int, torch.Tensor] = {}
        self.forced: Ids | None = None

    @property
    def choices(self) -> Ids:
        return torch.stack([self._chosen[layer] for layer in self._layers], dim=1).numpy()

    @contextmanager
    def watched(self) -> Iterator[Routing]:
        with ExitStack() as hooks:
            for place, layer in enumerate(self._layers):
                mlp = self._model.model.layers[layer].mlp
                hooks.callback(mlp.gate.register_forward_hook(self._keep_logits(layer)).remove)
                hooks.callback(mlp.experts.register_forward_pre_hook(self._choose(place, layer)).remove)
            yield self

    def _keep_logits(self, layer: int) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._logits[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def _choose(self, place: int, layer: int) -> Any:
        def choose(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, own, own_weights = args
            self._chosen[layer] = own
            if self.forced is None:
                return args
            given = torch.from_numpy(self.forced[:, place].astype(np.int64))
            logits = self._logits[layer].reshape(len(own), -1)[: len(given)].float()
            scores = torch.softmax(logits, dim=-1) if self._kind.score == "softmax" else torch.sigmoid(logits)
            weights = scores.gather(1, given)
            if self._kind.renormalises:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            weights = (weights * self._kind.scaling).to(own_weights.dtype)
            return (
                hidden,
                torch.cat([given, own[len(given) :]]),
                torch.cat([weights, own_weights[len(given) :]]),
            )

        return choose


def same_sets(left: Ids, right: Ids) -> Any:
    """Whether both name the same experts, [tokens, layers]."""
    return (np.sort(left, axis=-1) == np.sort(right, axis=-1)).all(axis=-1)
